"""Norms against PyTorch's functions in float64, in every instruction set."""

import pytest
import torch
from accuracy import assert_accurate
from torch.nn.functional import gelu, layer_norm
from torch.nn.functional import rms_norm as pytorchs_rms_norm

from jambatalk_kernels import native_library
from jambatalk_kernels.norms import RMSNorm, layer_norm_gelu, rms_norm

native = pytest.mark.skipif(not native_library()[0], reason=f"no native library: {native_library()[1]}")

SHAPES = [(1, 3), (3, 5), (2, 19, 48), (700, 64), (33, 100), (9, 192), (1100, 17), (60, 8), (60, 16)]
# float32: the contract's (DESIGN 3.2); float64: as of the other ops; halves: one rounding, of at most half an eps,
# beside what is float32's.
BARS = {torch.float32: 1e-5, torch.float64: 1e-13} | {
    half: torch.finfo(half).eps / 2 + 1e-5 for half in (torch.bfloat16, torch.float16)
}


def inputs(shape, dtype, scale=3.0):
    torch.manual_seed(0)
    channels = shape[-1]
    x, weight, bias = torch.randn(shape) * scale + 1, torch.randn(channels) * 1.5, torch.randn(channels)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = [x.to(dtype), *(t.to(wide) for t in (weight, bias, torch.randn(channels)))]
    return [t.requires_grad_() for t in tensors], torch.randn(shape).to(dtype)


def pytorchs(x, weight, bias, shift):
    return gelu(layer_norm(x + shift.to(x.dtype), weight.shape, weight, bias, 1e-5))


def run(function, tensors, dy):
    y = function(*tensors)
    return [y, *torch.autograd.grad(y, tensors, dy)]


@native
@pytest.mark.parametrize("dtype", BARS)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_accurate_and_halves_are_rounded_once(isa, shape, dtype):
    tensors, dy = inputs(shape, dtype)
    got = run(lambda x, w, b, s: layer_norm_gelu(x, w, b, shift=s), tensors, dy)
    exact = run(pytorchs, [t.detach().double().requires_grad_() for t in tensors], dy.double())
    peer = run(pytorchs, tensors, dy)
    for name, mine, truth, theirs in zip(("y", "dx", "dweight", "dbias", "dshift"), got, exact, peer, strict=True):
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
        assert_accurate(mine, truth, theirs, BARS[mine.dtype], name)


@native
@pytest.mark.parametrize("dtype", BARS)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norms_values_and_gradients(isa, shape, dtype):
    (x, weight, _, _), dy = inputs(shape, dtype)
    parts = [x, weight]

    def theirs(x, weight):
        return pytorchs_rms_norm(x.to(weight.dtype), weight.shape, weight, 1e-6).to(x.dtype)

    got = run(lambda x, w: rms_norm(x, w, 1e-6), parts, dy)
    exact = run(theirs, [t.detach().double().requires_grad_() for t in parts], dy.double())
    for name, mine, truth, peer in zip(("y", "dx", "dweight"), got, exact, run(theirs, parts, dy), strict=True):
        assert mine.dtype == peer.dtype and mine.shape == peer.shape
        assert_accurate(mine, truth, peer, BARS[mine.dtype], name)


@native
def test_rms_norm_reads_slices_where_they_lie(isa):
    whole = torch.randn(2, 30, 40)
    for part in whole.split([8, 16, 16], -1):
        norm = RMSNorm(part.shape[-1], 1e-6)
        assert torch.equal(norm(part), norm(part.contiguous()))
    columns = torch.randn(8, 30).T
    assert torch.equal(RMSNorm(8, 1e-6)(columns), RMSNorm(8, 1e-6)(columns.contiguous()))


@native
def test_the_tail_of_gelu_keeps_its_digits(isa):
    """Far down the negative side gelu is small, not zero: relative to its own size."""
    n = torch.linspace(-9, 9, 2001)
    bias = n.double()
    x = torch.cat([torch.zeros(1, 2001), torch.ones(1, 2001)])  # rows of equal numbers: only the bias is left
    y = layer_norm_gelu(x, torch.ones(2001), n)
    exact = bias * 0.5 * torch.special.erfc(-bias * 0.5**0.5)
    # Half an eps of n^2 / 2, the exponent, and of each of eight operations after it: two of the exponential, two to get
    # the polynomial's argument, its last two, two products.
    rounding = (bias.square() / 4 + 4) * torch.finfo(torch.float32).eps
    assert ((y[1].double() - exact).abs() <= rounding * exact.abs()).all()
    assert torch.equal(y[0], y[1])


@native
def test_nothing_is_read_beyond_strides_and_ends(isa):
    (x, weight, bias, _), dy = inputs((40, 24), torch.float32)
    wide = torch.full((40, 50), float("nan"))
    wide[:, 13:37] = x.detach()
    view = wide[:, 13:37].requires_grad_()
    y = layer_norm_gelu(view, weight, bias)
    assert torch.equal(y, layer_norm_gelu(x, weight, bias))
    (dx,) = torch.autograd.grad(y, view, dy)
    assert torch.equal(dx, torch.autograd.grad(layer_norm_gelu(x, weight, bias), x, dy)[0])
    assert layer_norm_gelu(x[:0], weight, bias).shape == (0, 24)


@native
def test_float64_gradients_are_those_of_differences():
    tensors, _ = inputs((4, 6), torch.float64, scale=1.0)
    assert torch.autograd.gradcheck(lambda x, w, b, s: layer_norm_gelu(x, w, b, shift=s), tensors)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-6), tensors[:2])


@native
def test_threads_do_not_change_a_bit():
    tensors, dy = inputs((3000, 48), torch.float32)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(run(lambda x, w, b, s: layer_norm_gelu(x, w, b, shift=s), tensors, dy))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_without_the_library_it_is_pytorchs(monkeypatch):
    monkeypatch.setattr("jambatalk_kernels.backends.native_library", lambda: (False, "left out"))
    for dtype in (torch.float32, torch.bfloat16):
        tensors, _ = inputs((5, 7), dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = layer_norm_gelu(*tensors[:3], shift=tensors[3])
        assert torch.equal(y, pytorchs(*tensors)) and y.dtype == dtype


@native
def test_a_second_derivative_is_refused():
    (x, weight, bias, _), _ = inputs((3, 4), torch.float32)
    for y in (layer_norm_gelu(x, weight, bias), rms_norm(x, weight, 1e-6)):
        (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="second derivative"):
            dx.sum().backward()
