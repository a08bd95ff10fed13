"""Dropout: its shares, its factors, its gradient, in every instruction set."""

import pytest
import torch

from jambatalk_kernels import native_library
from jambatalk_kernels.dropout import Draw, Dropout, dropout


def hashed(index, seed):
    """32 bits of an element's number and a seed."""

    def mix(h):
        h ^= h >> 16
        h = h * 0x21F0AAAD & 0xFFFFFFFF
        h ^= h >> 15
        h = h * 0xD35A2D97 & 0xFFFFFFFF
        return h ^ h >> 15

    return mix(mix(index ^ seed & 0xFFFFFFFF) + (seed >> 32) & 0xFFFFFFFF)


native = pytest.mark.skipif(not native_library()[0], reason=f"no native library: {native_library()[1]}")


@native
@pytest.mark.parametrize("p", [0.1, 0.5, 0.97])
def test_it_drops_as_pytorchs(isa, p):
    torch.manual_seed(0)
    layer, x = Dropout(p), torch.ones(3, 41, 4001).requires_grad_()
    y = layer(x)
    y.sum().backward()
    kept = y != 0
    assert torch.equal(x.grad, y.detach())  # each element times its own factor
    # p is off by at most half of 2^-32, and what is kept is a float32.
    rounding = 2**-33 / (1 - p) + torch.finfo(torch.float32).eps
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / (1 - p)), rtol=rounding, atol=0)
    gone = (~kept).double()
    # Five standard deviations of a share of so many: overall, and of pairs at distances that vectors and rows have.
    assert abs(gone.mean().item() - p) < 5 * (p * (1 - p) / x.numel()) ** 0.5
    flat = gone.flatten()
    for distance in (1, 2, 8, 16, 4001, 4096):
        pairs = (flat[distance:] * flat[:-distance]).mean().item()
        assert abs(pairs - p * p) < 5 * (3 * p * p * (1 - p * p) / x.numel()) ** 0.5
    torch.manual_seed(0)
    assert torch.equal(layer(x), y) and not torch.equal(layer(x), y)
    assert layer.eval()(x) is x


@native
def test_seeds_are_independent(isa):
    torch.manual_seed(0)
    x, p, draws = torch.ones(30011), 0.3, []
    for seed in (0, 1, 2, 1 << 32, -1):
        draws.append(torch.ops.jambatalk.dropout(x, p, seed) == 0)
    for i, a in enumerate(draws):
        for b in draws[:i]:
            assert abs((a & b).double().mean() - p * p) < 5 * (p * p / len(x)) ** 0.5


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_any_dtype_any_strides_and_nothing_at_all(isa, dtype):
    """What is dropped is a function of seed and place, whatever the instruction set and the dtype."""
    torch.manual_seed(0)
    x = torch.randn(37, 111, dtype=torch.float64).to(dtype)
    seed = 0x123456789ABCDEF
    y = torch.ops.jambatalk.dropout(x, 0.25, seed)
    expected = [hashed(i, seed) < 2**30 for i in range(x.numel())]
    assert ((y == 0) & (x != 0)).flatten().tolist() == expected
    # Halves are rounded once from float32, to this side or that: one eps. Else half of it for each of three roundings,
    # of the factor, of its product with x, and of the quotient here. And what subnormal numbers lack.
    numbers = torch.finfo(dtype)
    rounding = numbers.eps * (1 if numbers.bits == 16 else 1.5)
    expected = (x.double() / 0.75).to(dtype)[y != 0]
    torch.testing.assert_close(y[y != 0], expected, rtol=rounding, atol=numbers.smallest_normal * numbers.eps)
    draw = Draw(x.T, 0.25)
    assert torch.equal(draw(x.T), draw(x.T.contiguous()))
    assert dropout(x[:0], 0.25).shape == (0, 111)


@native
def test_nan_comes_through():
    assert dropout(torch.full((64,), float("nan")), 0.5).isnan().all()


def test_all_and_none():
    x = torch.ones(9)
    assert torch.equal(dropout(x, 0.0), x) and not dropout(x, 1.0).any()
    with pytest.raises(ValueError, match="probability"):
        dropout(x, 1.5)


def test_without_the_library_it_is_pytorchs(monkeypatch):
    monkeypatch.setattr("jambatalk_kernels.backends.native_library", lambda: (False, "left out"))
    x = torch.ones(100)
    torch.manual_seed(0)
    y = dropout(x, 0.4)
    torch.manual_seed(0)
    assert torch.equal(y, torch.nn.functional.dropout(x, 0.4))
    draw = Draw(x, 0.4)
    assert torch.equal(draw(x), draw(x)) and set(draw(x).tolist()) == {0.0, draw(x).max().item()}
