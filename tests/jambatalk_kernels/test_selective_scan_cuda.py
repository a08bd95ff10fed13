"""The CUDA C++ kernels of selective_scan and its step, run on the host (tests/cuda_on_cpu), against the definition."""

import shutil
import subprocess

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_accurate, rms_ratio
from cuda_on_cpu import build

from jambatalk_kernels.selective_scan.reference import scan_reference, scan_step_reference

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
OPTIONAL = ("D", "z", "delta_bias", "initial_state")
ALONG_TIME = ("u", "delta", "z", "B", "C")

# The card that the host plays has 4 multiprocessors: 128 channels fill it with 4 lanes each, 512 with 2 or 1.
SHAPES = [
    (2, 5, 3, 4),
    (1, 70, 17, 16),  # 16 lanes; more than one chunk and one tile
    (2, 130, 40, 5),
    (3, 64, 16, 1),
    (1, 1, 64, 17),  # 8 lanes of 4 states
    (1, 90, 5, 64),
    (1, 140, 3, 100),
    (1, 260, 3, 256),
    (2, 70, 70, 16),  # 4 lanes
    (1, 70, 520, 16),  # 2 lanes of 8 states
    (2, 40, 400, 7),  # 2 lanes of 4 states; groups of channels in backward
    (1, 40, 1030, 3),  # 1 lane
    (4, 40, 200, 16),  # groups of channels in backward
]


@pytest.fixture(scope="module")
def ops():
    return build.load()


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch):
    monkeypatch.setenv("JAMBATALK_KERNELS_CHECK", "1")  # new memory is full of NaN: what is not written shows


def inputs(batch, length, channels, states, dtype=torch.float64, seed=0, sequences=None):
    """Numbers like a trained layer's: decays between 0.05 and 1, delta around 0.3."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    named = {
        "u": normal(batch, length, channels),
        "delta": normal(batch, length, channels) * 0.5 - 1,
        "A": -torch.exp(normal(channels, states) * 0.5),
        "B": normal(batch, length, states),
        "C": normal(batch, length, states),
        "D": normal(channels),
        "z": normal(batch, length, channels),
        "delta_bias": normal(channels) * 0.1,
        "initial_state": normal(batch if sequences is None else sequences, channels, states),
    }
    return {name: tensor.to(dtype) for name, tensor in named.items()}


def cotangents(y, final, seed=1):
    """Numbers that every dtype holds."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(t.shape, generator=g).bfloat16().to(t.dtype) for t in (y, final)]


def of_reference(named, softplus=True, cu_seqlens=None, dtype=None, which=(True, True)):
    """-> y, final state and the gradients of all inputs; ``which``: are there gradients of y, of the final state?"""
    named = {k: v.detach().to(dtype or v.dtype).requires_grad_() for k, v in named.items()}
    state = named.get("initial_state")
    y, final = scan_reference(*[named.get(k) for k in NAMES[:8]], softplus, state, cu_seqlens)
    given = [g if use else torch.zeros_like(g) for g, use in zip(cotangents(y, final), which, strict=True)]
    grads = torch.autograd.grad([y, final], list(named.values()), given, allow_unused=True, materialize_grads=True)
    return {"y": y.detach(), "final": final.detach(), **dict(zip(named, grads, strict=True))}


def of_kernels(ops, named, softplus=True, cu_seqlens=None, dtype=None, which=(True, True)):
    named = {k: v.detach().to(dtype or v.dtype) for k, v in named.items()}
    tensors = [named.get(name) for name in NAMES]
    y, final, saved = ops.selective_scan(*tensors, cu_seqlens, softplus, True)
    unsaved = ops.selective_scan(*tensors, cu_seqlens, softplus, False)
    assert torch.equal(y, unsaved[0]) and torch.equal(final, unsaved[1]) and unsaved[2].numel() == 0
    assert not saved.isnan().any()
    given = [g if use else None for g, use in zip(cotangents(y, final), which, strict=True)]
    grads = ops.selective_scan_backward(*given, *tensors, cu_seqlens, saved, softplus)
    assert all(g.numel() == 0 for g, name in zip(grads, NAMES, strict=True) if name not in named)
    return {"y": y, "final": final} | {k: g for k, g in zip(NAMES, grads, strict=True) if k in named}


def close(got, want, bar):
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].shape == want[name].shape and got[name].dtype == want[name].dtype, name
        if want[name].numel():
            assert rms_ratio(got[name], want[name]) < bar, (name, rms_ratio(got[name], want[name]))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_definition_in_float64(ops, shape):
    named = inputs(*shape)
    close(of_kernels(ops, named), of_reference(named), 1e-13)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_accuracy_rule(ops, shape, dtype):
    """At most twice the error of PyTorch at the same precision, and the absolute bars of the contract; the same bytes
    whatever the order of threads and blocks."""
    named = {k: v.to(dtype).double() for k, v in inputs(*shape).items()}  # the same numbers for everyone
    exact, peer = of_reference(named), of_reference(named, dtype=dtype)
    ours = of_kernels(ops, named, dtype=dtype)
    ops.order(True)
    again = of_kernels(ops, named, dtype=dtype)
    ops.order(False)
    bar = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 5e-3}[dtype]
    for name, want in exact.items():
        assert ours[name].dtype == (torch.float32 if name == "final" else dtype)
        assert_accurate(ours[name], want, peer[name], bar, name)
        assert torch.equal(ours[name], again[name]), name


@pytest.mark.parametrize("without", [*OPTIONAL, "all"])
def test_every_argument_is_optional(ops, without):
    left_out = OPTIONAL if without == "all" else (without,)
    named = {k: v for k, v in inputs(2, 70, 5, 4).items() if k not in left_out}
    for softplus in (False, True):
        close(of_kernels(ops, named, softplus), of_reference(named, softplus), 1e-13)


@pytest.mark.parametrize("which", [(True, False), (False, True), (False, False)], ids=str)
def test_absent_gradients_are_zero(ops, which):
    named = inputs(2, 40, 18, 16)
    got, want = of_kernels(ops, named, which=which), of_reference(named, which=which)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-12, atol=1e-12, msg=name)


def test_mixed_dtypes(ops):
    half, single, wide = torch.bfloat16, torch.float32, torch.float64
    dtypes = (half, single, single, torch.float16, half, single, half, wide, single)
    named = {k: v.to(d) for (k, v), d in zip(inputs(1, 45, 20, 16).items(), dtypes, strict=True)}
    close(of_kernels(ops, named), of_reference(named), 5e-3)
    wide_inputs = inputs(1, 40, 520, 16) | {"u": inputs(1, 40, 520, 16)["u"].float()}
    close(of_kernels(ops, wide_inputs), of_reference(wide_inputs), 1e-5)
    named["u"] = named["u"].double()  # then everything is computed in float64
    got, want = of_kernels(ops, named), of_reference(named)
    close({k: got[k] for k in ("y", "final", "u")}, {k: want[k] for k in ("y", "final", "u")}, 1e-13)


@pytest.mark.parametrize(
    "bounds",
    [[0, 0, 3, 70, 70, 71, 200], [5, 64, 128, 190], [63, 65, 66, 200], [3, 7], [-5, 999], [0, 8, 4, 6], [4, 2, 0]],
    ids=str,
)
@pytest.mark.parametrize("channels, states", [(18, 5), (6, 80), (150, 16)])
def test_packed_sequences(ops, bounds, channels, states):
    """Separate sequences, whatever the bounds: empty ones, gaps at both ends, values out of order or range."""
    cu = torch.tensor(bounds, dtype=torch.int32)
    for dtype, bar in ((torch.float64, 1e-13), (torch.float32, 1e-5)):
        named = inputs(1, 200, channels, states, dtype, sequences=len(bounds) - 1)
        wide = {k: v.double() for k, v in named.items()}
        got, want = of_kernels(ops, named, cu_seqlens=cu), of_reference(wide, cu_seqlens=cu)
        close({k: v.double() for k, v in got.items()}, want, bar)
        assert (got["y"][:, : max(bounds[0], 0)] == 0).all()


@pytest.mark.parametrize("cut", [0, 1, 37, 64, 65, 128, 150])
def test_two_halves_are_the_whole(ops, cut):
    named = inputs(2, 150, 5, 16, torch.float32)
    tensors = [named[k] for k in NAMES]
    whole, end, _ = ops.selective_scan(*tensors, None, True, False)
    halves, state = [], named["initial_state"]
    for part in (slice(None, cut), slice(cut, None)):
        rest = [named[k][:, part] if k in ALONG_TIME else named[k] for k in NAMES[:8]]
        y, state, _ = ops.selective_scan(*rest, state, None, True, False)
        halves.append(y)
    torch.testing.assert_close(torch.cat(halves, 1), whole, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(state, end, rtol=1e-6, atol=1e-6)


def relayout(tensor, how):
    nan = torch.full_like(tensor, torch.nan)
    if how == "strided":
        return torch.stack([tensor, nan], -1)[..., 0]
    if tensor.dim() != 3:
        return tensor
    if how == "time fastest":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if how == "slice":  # rows of a wider matrix, as in_proj gives them
        return torch.cat([nan, tensor, nan], 2)[..., tensor.shape[2] : 2 * tensor.shape[2]]
    if how == "odd":  # neighbours in memory, aligned to nothing
        return torch.cat([nan[..., :1], tensor], 2)[..., 1:]
    if how == "batch inside":
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    raise ValueError(how)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["time fastest", "strided", "slice", "odd", "batch inside", "mixed"])
@pytest.mark.parametrize("shape", [(2, 72, 16, 16), (2, 70, 19, 5), (1, 64, 144, 16)], ids=str)
def test_any_strides_give_the_same_bytes(ops, shape, how, dtype):
    named = inputs(*shape, dtype)
    want = of_kernels(ops, named)
    if how == "mixed":  # channels fastest in some, time in others
        laid_out = {k: relayout(v, "time fastest") if k in ("delta", "C") else v for k, v in named.items()}
    else:
        laid_out = {k: relayout(v, how) for k, v in named.items()}
    got = of_kernels(ops, laid_out)
    for name in want:
        assert torch.equal(got[name], want[name]), name


def test_gradients_of_any_strides(ops):
    named = inputs(2, 72, 16, 16, torch.bfloat16)
    tensors = [named[k] for k in NAMES]
    y, final, saved = ops.selective_scan(*tensors, None, True, True)
    given = cotangents(y, final)
    want = ops.selective_scan_backward(*given, *tensors, None, saved, True)
    for how in ("time fastest", "strided", "odd", "batch inside"):
        laid_out = [relayout(g, how) for g in given]
        for a, b in zip(ops.selective_scan_backward(*laid_out, *tensors, None, saved, True), want, strict=True):
            assert torch.equal(a, b), how


@pytest.mark.parametrize("shape", [(2, 0, 3, 4), (0, 5, 3, 4), (2, 5, 0, 4), (0, 0, 3, 1)], ids=str)
def test_nothing_to_do(ops, shape):
    named = inputs(*shape)
    got = of_kernels(ops, named)
    assert got["y"].shape == shape[:3] and got["final"].shape == (shape[0], shape[2], shape[3])
    if shape[1] == 0:
        assert torch.equal(got["final"], named["initial_state"])
        assert torch.equal(got["initial_state"], cotangents(got["y"], got["final"])[1])
    for name in ("A", "D", "delta_bias"):
        assert (got[name] == 0).all(), name


def test_no_sequence_of_several_has_a_position(ops):
    named = inputs(1, 6, 5, 3, sequences=3)
    cu = torch.tensor([2, 2, 2, 2], dtype=torch.int32)
    got = of_kernels(ops, named, cu_seqlens=cu)
    assert torch.equal(got["final"], named["initial_state"])
    for name in ("y", "u", "delta", "A", "B", "C", "D", "z", "delta_bias"):
        assert (got[name] == 0).all(), name


def test_softplus_and_extreme_numbers(ops):
    """Decays that vanish, softplus far out on both sides, NaN where PyTorch has it."""
    values = [-1e4, -200.0, -86.0, -30.0, -7.0, -1.0, 0.0, 1.0, 19.9, 20.1, 60.0, 300.0]
    x = torch.tensor(values + torch.linspace(-20, 21, 4096).tolist()).reshape(1, 1, -1)
    zero, one = torch.zeros(x.shape[-1], 1), torch.ones(1, 1, 1)
    # With A = 0, B = C = u = 1 the output is softplus(delta) itself.
    y, *_ = ops.selective_scan(torch.ones_like(x), x, zero, one, one, *[None] * 5, True, False)
    torch.testing.assert_close(y, F.softplus(x.double()).float(), rtol=4e-7, atol=2e-38)
    delta = x[..., :12]
    ones, BC = torch.ones_like(delta), torch.ones(1, 1, 3)
    A = torch.tensor([[-1.0, -1e3, 0.0]]).repeat(12, 1)
    got = ops.selective_scan(ones, delta, A, BC, BC, None, delta, None, torch.ones(1, 12, 3), None, True, False)
    want = scan_reference(ones, delta, A, BC, BC, None, delta, None, True, torch.ones(1, 12, 3))
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-30)
    torch.testing.assert_close(got[1], want[1], rtol=1e-5, atol=1e-30)
    for poisoned in ("u", "delta", "B"):
        args = {"u": ones.clone(), "delta": ones.clone(), "B": BC.clone()}
        args[poisoned][..., 0] = torch.nan
        y, *_ = ops.selective_scan(args["u"], args["delta"], A, args["B"], BC, *[None] * 5, True, False)
        assert y[0, 0, 0].isnan()
        assert poisoned == "B" or not y[0, 0, 1:].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("batch, channels, states", [(2, 21, 16), (1, 3, 1), (3, 5, 19), (1, 4, 100), (0, 3, 4)])
def test_step(ops, batch, channels, states, dtype):
    named = {k: v.to(dtype) for k, v in inputs(batch, 1, channels, states).items()}
    start = named.pop("initial_state")
    row = [named[k][:, 0] if k in ALONG_TIME else named[k] for k in NAMES[:8]]
    bar = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float64: 1e-12}[dtype]
    for softplus in (False, True):
        want_state = start.clone()
        want = scan_step_reference(want_state, *row, softplus)
        for state in (start.clone(), start.transpose(1, 2).contiguous().transpose(1, 2)):
            y = ops.selective_scan_step(state, *row, softplus)
            torch.testing.assert_close(y, want, rtol=bar, atol=bar)
            torch.testing.assert_close(state, want_state, rtol=bar, atol=bar)
    state = start.clone()
    y = ops.selective_scan_step(state, *row[:5], None, None, None, False)
    want_state = start.clone()
    torch.testing.assert_close(y, scan_step_reference(want_state, *row[:5]), rtol=bar, atol=bar)


def test_more_states_than_there_are_kernels_for(ops):
    named = inputs(1, 2, 2, 257)
    with pytest.raises(RuntimeError, match="at most 256 states"):
        ops.selective_scan(*[named[k] for k in NAMES], None, True, False)


def test_heuristics(tmp_path):
    """How many lanes share a channel and how many groups a block takes, of a call's size and the card alone."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    claims = """
#include "cuda/selective_scan.h"
using namespace jambatalk::cuda;
constexpr bool is(ScanShape shape, int lanes, int states) { return shape.lanes == lanes && shape.states == states; }
// (1, 600, 1024) spreads over the card, many channels share less work.
static_assert(is(scan_forward_shape(1, 1024, 16, 132), 16, 1));
static_assert(is(scan_forward_shape(8, 1024, 16, 132), 4, 4));
static_assert(is(scan_forward_shape(16, 2048, 16, 132), 2, 8));
static_assert(is(scan_forward_shape(16, 4096, 4, 132), 1, 4));
static_assert(is(scan_forward_shape(1, 1, 256, 132), 32, 8));
static_assert(is(scan_backward_shape(1, 1024, 16, 132), 16, 1) && is(scan_backward_shape(8, 1024, 16, 132), 4, 4));
// Every number of states has lanes for it.
constexpr bool enough() {
  for (int64_t n = 1; n <= 256; ++n) {
    for (int64_t channels : {1, 1024, 65536}) {
      const ScanShape f = scan_forward_shape(1, channels, n, 132), b = scan_backward_shape(1, channels, n, 132);
      if (f.lanes * f.states < n || b.lanes * b.states < n) return false;
    }
  }
  return true;
}
static_assert(enough());
static_assert(scan_backward_groups(1, 1024, 32, 132) == 1);
static_assert(scan_backward_groups(8, 4096, 32, 132) == 2);
static_assert(scan_backward_groups(64, 4096, 32, 132) == 16);
static_assert(scan_backward_groups(1000, 4096, 32, 132) == 16);
"""
    source = tmp_path / "claims.cpp"
    source.write_text(claims)
    includes = [f"-I{build.HERE}", f"-I{build.CSRC}"]
    done = subprocess.run(
        ["g++", "-std=c++20", "-fsyntax-only", *includes, str(source)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_random_shapes(ops, seed):
    g = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high, (), generator=g))

    batch, length, states = draw(1, 4), draw(1, 200), draw(1, 257 if seed % 4 == 0 else 40)
    channels = draw(1, 20 if states > 40 else 300)
    cu, sequences = None, None
    if seed % 2:
        batch, sequences = 1, draw(1, 6)
        inner = torch.randint(0, length + 1, (sequences - 1,), generator=g).sort().values.tolist()
        cu = torch.tensor([0, *inner, length], dtype=torch.int32)
    named = inputs(batch, length, channels, states, seed=seed, sequences=sequences)
    want = of_reference(named, cu_seqlens=cu)
    close(of_kernels(ops, named, cu_seqlens=cu), want, 1e-12)
    single = of_kernels(ops, named, cu_seqlens=cu, dtype=torch.float32)
    close({k: v.double() for k, v in single.items()}, want, 1e-5)
