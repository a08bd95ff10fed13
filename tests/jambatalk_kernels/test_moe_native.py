"""moe_route and moe_mlp in C++ against the definition, and the contract of every op."""

import os

import pytest
import torch
from accuracy import assert_accurate, rms_ratio

from jambatalk_kernels import load_balancing_loss, moe_mlp, moe_route, native_library
from jambatalk_kernels.moe import reference

pytestmark = pytest.mark.skipif(
    not native_library()[0] and os.environ.get("JAMBATALK_BUILD") == "none", reason="built with JAMBATALK_BUILD=none"
)
SHAPES = [  # tokens, d, hidden, experts, top_k
    (7, 97, 47, 7, 1), (7, 97, 47, 7, 7), (40, 33, 31, 5, 2), (1, 64, 32, 8, 2), (5, 1, 1, 1, 1), (3, 17, 20, 256, 16),
    (64, 16, 24, 4, 4), (9, 130, 5, 3, 2),
]  # fmt: skip


def example(tokens, d, hidden, experts, top_k, activation="swiglu", dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes):
        return torch.randn(sizes, generator=generator, dtype=torch.float64).to(dtype)

    rows = 2 * hidden if activation == "swiglu" else hidden
    return normal(tokens, experts), normal(tokens, d), normal(experts, rows, d), normal(experts, d + 1, hidden)


def incoming(output):
    """The gradient of an output: some numbers, the same ones for the same shape."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)


def everything(logits, x, w_in, w_out, top_k, activation="swiglu", renormalize=False, backend="cpu"):
    """Outputs and the gradients of all inputs, for one fixed incoming gradient."""
    leaves = [tensor.detach().requires_grad_() for tensor in (logits, x, w_in, w_out)]
    routing = moe_route(leaves[0], top_k, renormalize=renormalize, backend=backend)
    y = moe_mlp(*leaves[1:2], routing, *leaves[2:], activation=activation, backend=backend)
    outputs = [y, routing.probabilities, routing.probability_sums]
    gradients = torch.autograd.grad(outputs, leaves, [incoming(output) for output in outputs])
    return {"y": y, **routing._asdict(), **dict(zip(("dlogits", "dx", "dw_in", "dw_out"), gradients, strict=True))}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("activation", ["swiglu", "gelu", "relu"])
def test_native_is_the_reference_in_float64(shape, activation):
    inputs, renormalize = example(*shape, activation), shape[0] % 2 == 0
    got = everything(*inputs, shape[4], activation, renormalize)
    want = everything(*inputs, shape[4], activation, renormalize, backend="reference")
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_accuracy_rule(dtype, isa):
    """At most twice the error of the same computation in PyTorch, forward and backward."""
    low = example(60, 65, 70, 6, 2, dtype=dtype)
    got = everything(*low, 2)
    torchs = everything(*low, 2, backend="reference")
    # The choice of experts is that of the low-precision logits, so that all three compare the same function.
    exact = everything(*(tensor.double() for tensor in low), 2, backend="reference")
    assert torch.equal(got["experts"], exact["experts"])
    for name in ("y", "weights", "dlogits", "dx", "dw_in", "dw_out"):
        assert_accurate(got[name], exact[name], torchs[name], 1e-5 if dtype == torch.float32 else 5e-3, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("activation", ["swiglu", "gelu", "relu"])
def test_a_few_assignments_are_the_same_sum(dtype, activation, isa):
    """Without gradients, up to 16 assignments take the matrix-vector path; the rule of accuracy holds there too."""
    for shape in [(1, 64, 48, 8, 2), (3, 33, 17, 4, 4), (16, 20, 9, 5, 1), (5, 130, 70, 2, 1)]:
        logits, x, w_in, w_out = example(*shape, activation, dtype)
        turned = w_in.transpose(1, 2).contiguous().transpose(1, 2)  # strides that are not the usual ones
        routing = moe_route(logits, shape[4])
        # Besides twice PyTorch's error, one rounding of the result and, where PyTorch is exact by luck, those of sums
        # of up to 130 terms in the compute dtype: about sqrt(130) / 2 eps.
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        rounding = torch.finfo(dtype).eps / 4 + 8 * torch.finfo(compute).eps
        exact = reference.moe_mlp_dense(x.double(), routing, w_in.double(), w_out.double(), activation)
        torchs = reference.moe_mlp(x, routing, w_in, w_out, activation)
        bound = 2 * rms_ratio(torchs, exact) + rounding
        with torch.no_grad():
            for weights in (w_in, turned):
                y = moe_mlp(x, routing, weights, w_out, activation=activation, backend="cpu")
                assert y.dtype == dtype and rms_ratio(y, exact) <= bound


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_logits_without_a_softmax(backend):
    nan, inf = torch.nan, torch.inf
    rows = [[0.0, nan, 1.0, 2.0], [0.0, 1.0, inf, 2.0], [-inf] * 4, [nan] * 4, [-inf, -inf, 1.0, -inf], [1e30, 0, 0, 0]]
    routing = moe_route(torch.tensor(rows), 2, backend=backend)
    assert routing.experts.tolist() == [[0, 1]] * 4 + [[2, 0], [0, 1]]
    assert routing.weights[:4].isnan().all() and routing.probabilities[:4].isnan().all()
    assert routing.weights[4:].tolist() == [[1, 0], [1, 0]]
    assert routing.offsets.tolist() == [0, 6, 11, 12, 12]
    y = moe_mlp(torch.ones(6, 3), routing, *example(6, 3, 5, 4, 2, dtype=torch.float32)[2:], backend=backend)
    assert y[:4].isnan().all() and y[4:].isfinite().all()  # it stays in its own tokens


def test_wild_indices_read_nothing_out_of_range():
    logits, x, w_in, w_out = example(30, 8, 6, 4, 2, dtype=torch.float32)
    routing = moe_route(logits, 2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        order, offsets = (
            torch.randint(-(2**31), 2**31 - 1, tensor.shape, generator=generator).int()
            for tensor in (routing.order, routing.offsets)
        )
        wild = routing._replace(order=order, offsets=offsets)
        assert moe_mlp(x.requires_grad_(), wild, w_in, w_out, backend="cpu").shape == (30, 9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("top_k", [2, 8])
def test_equal_bytes_over_runs_threads_and_orders_of_the_tokens(dtype, top_k, isa):
    """A token's output and gradient have the same bytes wherever it stands and whoever computes it."""
    size = 40 if isa == "wide" else 150
    logits, x, w_in, w_out = example(size, 300, 70, 8, top_k, dtype=dtype)  # sums of more than one block of terms
    first = everything(logits, x, w_in, w_out, top_k)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        again = everything(logits, x, w_in, w_out, top_k)
    finally:
        torch.set_num_threads(threads)
    for name in first:
        assert torch.equal(first[name], again[name]), name
    shuffle = torch.randperm(size, generator=torch.Generator().manual_seed(3))
    outputs = ("y", "probabilities", "probability_sums")
    grad_y, grad_p, grad_sums = (incoming(first[name]) for name in outputs)
    leaves = [tensor.detach().requires_grad_() for tensor in (logits[shuffle], x[shuffle])]
    routing = moe_route(leaves[0], top_k, backend="cpu")
    y = moe_mlp(leaves[1], routing, w_in, w_out, backend="cpu")
    dlogits, dx = torch.autograd.grad(
        [y, routing.probabilities, routing.probability_sums], leaves, [grad_y[shuffle], grad_p[shuffle], grad_sums]
    )
    for name, value in (("y", y), ("dx", dx), ("dlogits", dlogits), ("weights", routing.weights)):
        assert torch.equal(value, first[name][shuffle]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_a_token_does_not_depend_on_how_many_there_are(dtype, isa):
    """Segments of every length up to several tiles, each against the same rows in a longer one."""
    sizes = range(17, 60, 6 if isa == "wide" else 1)  # fewer take the matrix-vector path
    logits, x, w_in, w_out = example(60, 300, 40, 3, 1, dtype=dtype)
    with torch.no_grad():
        whole = moe_mlp(x, moe_route(logits, 1, backend="cpu"), w_in, w_out, backend="cpu")
        for size in sizes:
            for begin in (0, 60 - size):
                part = slice(begin, begin + size)
                y = moe_mlp(x[part], moe_route(logits[part], 1, backend="cpu"), w_in, w_out, backend="cpu")
                assert torch.equal(y, whole[part]), (size, begin)


@pytest.mark.parametrize("how", ["transposed", "sliced", "expanded"])
def test_any_strides(how):
    logits, x, w_in, w_out = example(20, 12, 10, 4, 2)
    view = {
        "transposed": lambda t: t.mT.contiguous().mT,
        "sliced": lambda t: torch.cat([t, t], -1)[..., ::2].contiguous().repeat_interleave(2, -1)[..., ::2],
        "expanded": lambda t: t[:1].expand(t.shape),
    }[how]
    inputs = [view(tensor) for tensor in (logits, x, w_in, w_out)]
    got, want = everything(*inputs, 2), everything(*(tensor.contiguous() for tensor in inputs), 2, backend="reference")
    for name in want:
        torch.testing.assert_close(got[name], want[name])


def test_second_derivatives_are_refused_clearly():
    logits, x, w_in, w_out = example(5, 4, 3, 3, 2)
    x.requires_grad_()
    y = moe_mlp(x, moe_route(logits, 2), w_in, w_out, backend="cpu")
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="moe_mlp.*second derivative"):
        dx.sum().backward()


def test_compiles_without_a_graph_break():
    logits, x, w_in, w_out = example(20, 8, 6, 4, 2, dtype=torch.float32)

    def run(logits, x, w_in, w_out):
        routing = moe_route(logits, 2)
        return moe_mlp(x, routing, w_in, w_out).sum() + load_balancing_loss(routing)

    leaves = [tensor.requires_grad_() for tensor in (logits, x, w_in, w_out)]
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    got, want = torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(run(*leaves), leaves)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_opcheck():
    logits, x, w_in, w_out = example(20, 8, 6, 4, 2, dtype=torch.float32)
    routing = moe_route(logits, 2)
    indices = (routing.experts, routing.order, routing.offsets)
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.jambatalk.moe_route.default, (logits, 2, True), test_utils=utils)
    grads = (routing.weights, None, routing.probability_sums)
    arguments = (*grads, logits, *routing[:3], False)
    torch.library.opcheck(torch.ops.jambatalk.moe_route_backward.default, arguments, test_utils=utils)
    arguments = (x, routing.weights, *indices, w_in, w_out, "swiglu", True)
    torch.library.opcheck(torch.ops.jambatalk.moe_mlp.default, arguments, test_utils=utils)
    y, saved = torch.ops.jambatalk.moe_mlp(*arguments)
    arguments = (y, x, routing.weights, *indices, w_in, w_out, saved, "swiglu")
    torch.library.opcheck(torch.ops.jambatalk.moe_mlp_backward.default, arguments, test_utils=utils)


def test_autocast_multiplies_in_its_dtype():
    logits, x, w_in, w_out = example(40, 32, 16, 4, 2, dtype=torch.float32)
    leaves = [tensor.requires_grad_() for tensor in (x, w_in, w_out)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = moe_mlp(x, moe_route(logits, 2), w_in, w_out, backend="cpu")
    low = moe_mlp(x.bfloat16(), moe_route(logits, 2), w_in.bfloat16(), w_out.bfloat16(), backend="cpu")
    assert y.dtype == torch.float32 and torch.equal(y, low.float())
    assert all(grad.dtype == torch.float32 for grad in torch.autograd.grad(y.sum(), leaves))


def test_outputs_are_written_whole(monkeypatch):
    monkeypatch.setenv("JAMBATALK_KERNELS_CHECK", "1")  # new tensors start as NaN
    for shape in SHAPES:
        for name, value in everything(*example(*shape), shape[4]).items():
            assert value.isfinite().all(), (shape, name)
