"""Dense layers: as PyTorch's, whichever library multiplies; which products go where."""

import math
import time

import pytest
import torch
from torch import nn
from torch.nn import functional

from jambatalk_kernels import linear as module
from jambatalk_kernels.linear import Linear, adopt, linear

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or not module._wide_vectors(),
    reason="this processor or torch has no oneDNN with AVX-512",
)


@pytest.fixture
def products(monkeypatch):
    """Shapes of the products that oneDNN made, on anybody's processor."""
    monkeypatch.setattr(module, "_intel", lambda: False)
    seen = []
    real = module._Product.forward

    def forward(ctx, left, right, bias):
        seen.append((tuple(left.shape), tuple(right.shape)))
        return real(ctx, left, right, bias)

    monkeypatch.setattr(module._Product, "forward", staticmethod(forward))
    return seen


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def results(function, tensors, dtype):
    x, weight, bias = (None if t is None else t.detach().to(dtype).requires_grad_() for t in tensors)
    y = function(x, weight, bias)
    gradients = torch.autograd.grad(
        (y * normal(*y.shape, seed=9).to(dtype)).sum(), [x, weight, bias][: 2 + (bias is not None)]
    )
    return [y.detach(), *gradients]


@needs_onednn
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "x",
    [normal(2, 129, 65), normal(130, 65).T.contiguous().T, normal(3, 90, 130)[:, ::2, 1::2]],
    ids=["3d", "t", "cut"],
)
def test_values_and_gradients(products, x, bias):
    tensors = x, normal(257, 65, seed=1), normal(257, seed=2) if bias else None
    ours, theirs = results(linear, tensors, torch.float32), results(functional.linear, tensors, torch.float32)
    assert len(products) == 3  # forward and two gradients
    for mine, peer, exact in zip(ours, theirs, results(functional.linear, tensors, torch.float64), strict=True):
        assert mine.shape == peer.shape
        rounding = torch.finfo(torch.float32).eps * exact.norm()
        assert (mine - exact).norm() <= 2 * (peer - exact).norm() + rounding


@needs_onednn
def test_columns_of_a_larger_matrix_cost_no_more(products):
    """oneDNN's reference code takes some hundred times as long as its fast code."""
    weight, wide = normal(1024, 32).requires_grad_(), normal(600, 64, seed=1)
    seconds = {}
    for name, x in [("slice", wide[:, :32]), ("own", wide[:, :32].contiguous())] * 3:
        begun = time.perf_counter()
        linear(x, weight).sum().backward()
        seconds[name] = min(seconds.get(name, math.inf), time.perf_counter() - begun)
    assert len(products) == 12
    assert seconds["slice"] < 20 * seconds["own"]


@needs_onednn
def test_gradients_of_gradients(products):
    x, weight = normal(64, 256).requires_grad_(), normal(256, 256, seed=1).requires_grad_()

    def second(function, dtype):
        a, b = x.to(dtype), weight.to(dtype)
        gradient = torch.autograd.grad((function(a, b) ** 3).sum(), [a, b], create_graph=True)
        return torch.autograd.grad(sum((g**2).sum() for g in gradient), [x, weight])

    for mine, exact in zip(second(linear, torch.float32), second(functional.linear, torch.float64), strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-4, atol=1e-5 * exact.abs().max().item())
    assert len(products) > 6


@needs_onednn
def test_only_what_needs_a_gradient_is_computed(products):
    x, weight = normal(64, 256), normal(256, 256, seed=1).requires_grad_()
    linear(x, weight).sum().backward()
    assert weight.grad is not None and len(products) == 2
    with torch.no_grad():
        assert not linear(x, weight).requires_grad


@pytest.mark.parametrize(
    "rows, outputs, inputs, dtype",
    [
        (1, 2048, 2048, torch.float32),
        (100_000, 48, 5, torch.float32),
        (20, 40, 40, torch.float32),
        (256, 256, 256, torch.float64),
        (256, 256, 256, torch.bfloat16),
        (0, 256, 256, torch.float32),
    ],
)
def test_products_that_stay_pytorchs(products, rows, outputs, inputs, dtype):
    x, weight = normal(rows, inputs).to(dtype), normal(outputs, inputs, seed=1).to(dtype)
    assert torch.equal(linear(x, weight), functional.linear(x, weight))
    assert not products


def test_intels_processors_are_mkls(products, monkeypatch):
    monkeypatch.setattr(module, "_intel", lambda: True)
    x, weight = normal(256, 256), normal(256, 256, seed=1)
    assert torch.equal(linear(x, weight), functional.linear(x, weight))
    assert not products


@pytest.mark.parametrize("intel", [False, True], ids=["onednn", "mkl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [(), (3,)], ids=["one", "batch"])
def test_products_into_memory_that_is_there(monkeypatch, intel, dtype, batch):
    """Any strides; the sum of what was there and a product, or a product with a bias; or new memory."""
    monkeypatch.setattr(module, "_intel", lambda: intel)
    x, weight, bias = (
        normal(*batch, 130, 80).to(dtype)[..., 5:70],
        normal(256, 65, seed=1).to(dtype),
        normal(256).to(dtype),
    )
    wide = normal(*batch, 130, 300, seed=3).to(dtype)
    before, exact = wide.clone().double(), functional.linear(x.double(), weight.double())
    out = wide[..., 20:276]
    for how, want in (
        (dict(add=True), before[..., 20:276] + exact), (dict(), exact), (dict(bias=bias), exact + bias.double())
    ):  # fmt: skip
        assert module.linear_into(out, x, weight, **how) is out
        assert (out - want).norm() <= 4 * torch.finfo(dtype).eps * want.norm()
    wide[..., 20:276] = before[..., 20:276].to(dtype)
    assert torch.equal(wide.double(), before)  # nothing beside it was written
    assert (module.linear_into(None, x, weight) - exact).norm() <= 4 * torch.finfo(dtype).eps * exact.norm()


def test_autocast_and_compilation_are_pytorchs(products):
    x, weight = normal(256, 256), normal(256, 256, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    compiled = torch.compile(linear, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, weight), functional.linear(x, weight))
    assert not products


def test_a_bad_shape_is_pytorchs_error():
    with pytest.raises(RuntimeError, match="shapes"):
        linear(normal(256, 255), normal(256, 256))
    with pytest.raises(RuntimeError, match="size"):
        linear(normal(256, 256), normal(256, 256), normal(7))


def test_adopted_layers_keep_names_and_weights():
    theirs = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Sequential(nn.Linear(128, 64)))
    before = {name: value.clone() for name, value in theirs.state_dict().items()}
    adopt(theirs)
    assert [type(m) for m in theirs.modules()].count(Linear) == 2
    assert all(torch.equal(before[name], value) for name, value in theirs.state_dict().items())
    assert theirs(normal(3, 64)).shape == (3, 64)
