"""The CUDA C++ kernels of causal_conv1d and its step, run on the host (tests/cuda_on_cpu), against the definition."""

import gpu_code
import pytest
import torch
from accuracy import assert_accurate, rms_ratio
from cuda_on_cpu import build

from jambatalk_kernels.causal_conv1d.reference import conv_reference, conv_step_reference

NAMES = ("x", "weight", "bias", "initial_state")
SHAPES = [(2, 7, 17), (1, 150, 40), (1, 1, 4), (3, 33, 8)]  # odd channels go one by one, multiples of 4 as vectors


@pytest.fixture(scope="module")
def ops():
    return build.load()


@pytest.fixture(autouse=True)
def _poisoned_outputs(monkeypatch):
    monkeypatch.setenv("JAMBATALK_KERNELS_CHECK", "1")  # new memory is full of NaN: what is not written shows


def inputs(batch, length, channels, width, dtype=torch.float64, seed=0, sequences=None):
    g = torch.Generator().manual_seed(seed)
    shapes = {
        "x": (batch, length, channels),
        "weight": (channels, width),
        "bias": (channels,),
        "initial_state": (batch if sequences is None else sequences, width - 1, channels),
    }
    return {k: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype) for k, shape in shapes.items()}


def cotangents(y, final, seed=1):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(t.shape, generator=g, dtype=torch.float64).to(t.dtype) for t in (y, final)]


def of_reference(named, silu=True, cu_seqlens=None, dtype=None, which=(True, True)):
    """-> y, final state and the gradients of all inputs; ``which``: are there gradients of y, of the final state?"""
    named = {k: v.detach().to(dtype or v.dtype).requires_grad_() for k, v in named.items()}
    y, final = conv_reference(
        named["x"], named["weight"], named.get("bias"), silu, named.get("initial_state"), cu_seqlens
    )
    given = [g if use else torch.zeros_like(g) for g, use in zip(cotangents(y, final), which, strict=True)]
    grads = torch.autograd.grad([y, final], list(named.values()), given, materialize_grads=True)
    return {"y": y.detach(), "final": final.detach(), **dict(zip(named, grads, strict=True))}


def of_kernels(ops, named, silu=True, cu_seqlens=None, dtype=None, which=(True, True)):
    named = {k: v.detach().to(dtype or v.dtype) for k, v in named.items()}
    tensors = [named.get(name) for name in NAMES]
    y, final = ops.causal_conv1d(*tensors, cu_seqlens, silu)
    given = [g if use else None for g, use in zip(cotangents(y, final), which, strict=True)]
    grads = ops.causal_conv1d_backward(*given, *tensors, cu_seqlens, silu)
    assert all(g.numel() == 0 for g, name in zip(grads, NAMES, strict=True) if name not in named)
    return {"y": y, "final": final} | {k: g for k, g in zip(NAMES, grads, strict=True) if k in named}


def assert_same(got, want, bar=1e-13):
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].shape == want[name].shape and got[name].dtype == want[name].dtype, name
        assert rms_ratio(got[name], want[name]) <= bar, (name, rms_ratio(got[name], want[name]))


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("width", range(1, 17))
def test_every_width_is_the_reference_in_float64(ops, width, silu):
    for shape in SHAPES:
        named = inputs(*shape, width)
        assert_same(of_kernels(ops, named, silu), of_reference(named, silu))


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 8, 11, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_accuracy_rule(ops, dtype, width):
    """At most twice the error of PyTorch at the same precision, and the absolute bars of the contract."""
    for shape in ((2, 300, 40), (2, 100, 201)):
        named = {k: v.to(dtype).double() for k, v in inputs(*shape, width).items()}
        exact, peer = of_reference(named), of_reference(named, dtype=dtype)
        ours = of_kernels(ops, named, dtype=dtype)
        for name, want in exact.items():
            assert_accurate(ours[name], want, peer[name], 1e-6 if dtype == torch.float32 else 5e-3, name)


@pytest.mark.parametrize(
    "cu", [[0, 5, 5, 6, 40], [3, 3, 20, 31], [0, 40], [40, 40], [0, 1, 2, 3, 4, 5, 40, 40]], ids=str
)
@pytest.mark.parametrize("width", [1, 2, 4, 7, 16])
def test_packed(ops, cu, width):
    """Empty sequences, sequences shorter than the width, positions outside of all."""
    cu_seqlens = torch.tensor(cu, dtype=torch.int32)
    for channels in (12, 3):
        named = inputs(1, 40, channels, width, sequences=len(cu) - 1)
        assert_same(of_kernels(ops, named, True, cu_seqlens), of_reference(named, True, cu_seqlens))
        single = {k: v.float().double() for k, v in named.items()}
        ours = of_kernels(ops, single, True, cu_seqlens, torch.float32)
        want = of_reference(single, True, cu_seqlens)
        assert_same({k: v.double() for k, v in ours.items()}, want, 1e-6)


def test_wild_cu_seqlens_are_clamped(ops):
    wild = torch.tensor([-9, 4, 2, 2**31 - 1, 7, -(2**31)], dtype=torch.int32)
    named = inputs(1, 10, 8, 4, sequences=5)
    assert_same(of_kernels(ops, named, True, wild), of_reference(named, True, wild))
    many = torch.randint(-5, 45, (700,), generator=torch.Generator().manual_seed(3), dtype=torch.int32)
    named = inputs(1, 40, 4, 3, sequences=699)
    assert_same(of_kernels(ops, named, True, many), of_reference(named, True, many))
    strided = torch.stack([many, many], 1)[:, 0]
    assert_same(of_kernels(ops, named, True, strided), of_kernels(ops, named, True, many), 0.0)


def test_any_strides(ops):
    named = inputs(2, 30, 12, 4)
    want = of_kernels(ops, named)
    channel_first = {
        k: v.transpose(-1, -2).contiguous().transpose(-1, -2) if v.dim() > 1 else v for k, v in named.items()
    }
    spread = {k: torch.stack([v, torch.full_like(v, torch.nan)], -1)[..., 0] for k, v in named.items()}
    for layout in (channel_first, spread):
        assert_same(of_kernels(ops, layout), want)
    # Offsets and row lengths that forbid vectors, in the dtype that has them.
    single = {k: v.float() for k, v in named.items()}
    want = of_kernels(ops, single)
    for offset in (0, 1, 2, 4):
        wide = torch.full((2, 30, 12 + 5), torch.nan)
        wide[..., offset : offset + 12] = single["x"]
        assert_same(of_kernels(ops, single | {"x": wide[..., offset : offset + 12]}), want, 1e-6)
    expanded = single | {"x": single["x"][:, :1].expand(2, 30, 12)}
    assert_same(of_kernels(ops, expanded), of_kernels(ops, {k: v.contiguous() for k, v in expanded.items()}), 0.0)


def test_gradients_of_any_layout(ops):
    named = {k: v.float() for k, v in inputs(2, 30, 12, 4).items()}
    tensors = list(named.values())
    y, final = ops.causal_conv1d(*tensors, None, True)
    grad_y, grad_final = cotangents(y, final)
    want = ops.causal_conv1d_backward(grad_y, grad_final, *tensors, None, True)
    for layout in (lambda t: t.transpose(1, 2).contiguous().transpose(1, 2), lambda t: t.double()):
        got = ops.causal_conv1d_backward(layout(grad_y), layout(grad_final), *tensors, None, True)
        for mine, theirs in zip(got, want, strict=True):
            assert mine.dtype == theirs.dtype and rms_ratio(mine, theirs) < 1e-6


@pytest.mark.parametrize("which", [(True, False), (False, True)])
@pytest.mark.parametrize("without", [(), ("bias",), ("initial_state",), ("bias", "initial_state")])
def test_what_is_absent(ops, which, without):
    for silu in (False, True):
        named = {k: v for k, v in inputs(2, 9, 8, 4).items() if k not in without}
        assert_same(of_kernels(ops, named, silu, which=which), of_reference(named, silu, which=which))


def test_mixed_dtypes(ops):
    types = (torch.bfloat16, torch.float32, torch.float16, torch.float64)
    for turn in range(4):
        named = inputs(2, 25, 12, 5)
        named = {k: v.to(types[(i + turn) % 4]) for i, (k, v) in enumerate(named.items())}
        ours = of_kernels(ops, named)
        want = of_reference({k: v.double() for k, v in named.items()})
        for name in named:
            assert ours[name].dtype == named[name].dtype and rms_ratio(ours[name], want[name]) < 5e-3
        assert ours["y"].dtype == named["x"].dtype and rms_ratio(ours["y"], want["y"]) < 5e-3
        assert ours["final"].dtype == (torch.float64 if named["x"].dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8), (2, 5, 0), (0, 0, 0)], ids=str)
def test_nothing_to_do(ops, shape):
    for width in (1, 4):
        named = inputs(*shape, width)
        ours, want = of_kernels(ops, named), of_reference(named)
        for name in want:
            assert torch.equal(ours[name], want[name]), name
    if shape[0] == 2 and shape[1] == 0:
        named = inputs(1, 0, 8, 4, sequences=3)
        cu = torch.zeros(4, dtype=torch.int32)
        assert torch.equal(of_kernels(ops, named, True, cu)["final"], named["initial_state"])


def test_infinity_stays_where_the_taps_reach(ops):
    """A width that is not compiled runs in a larger one; its missing taps must not turn infinity into NaN."""
    for width in (1, 5, 9, 13):
        named = {k: v.float() for k, v in inputs(1, 40, 8, width).items()}
        named["x"][0, 3] = torch.inf
        y, _ = ops.causal_conv1d(*named.values(), None, False)
        assert torch.isfinite(y[:, :3]).all() and torch.isfinite(y[:, 3 + width :]).all()
        assert torch.isinf(y[:, 3]).all()
        dx, *_ = ops.causal_conv1d_backward(torch.ones_like(y), None, *named.values(), None, False)
        assert torch.isfinite(dx).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_do_not_depend_on_the_order_of_threads(ops, dtype):
    """Blocks, warps and lanes the other way round, and again: nothing races, nothing is left to chance."""
    cu = torch.tensor([2, 9, 9, 60], dtype=torch.int32)
    cases = [(inputs(3, 60, 40, 4), None), (inputs(1, 60, 9, 6, sequences=3), cu), (inputs(8, 70, 512, 4), None)]
    for named, cu_seqlens in cases:
        first = of_kernels(ops, named, True, cu_seqlens, dtype)
        ops.order(True)
        try:
            second = of_kernels(ops, named, True, cu_seqlens, dtype)
        finally:
            ops.order(False)
        for name in first:
            assert torch.equal(first[name].view(torch.uint8), second[name].view(torch.uint8)), name


@pytest.mark.parametrize("width", [1, 2, 3, 4, 7, 16])
def test_steps_are_the_sequence(ops, width):
    for silu in (False, True):
        named = inputs(3, 9, 10, width)
        want, final = conv_reference(*list(named.values())[:3], silu, named["initial_state"])
        state = named["initial_state"].clone()
        tail = (named["weight"], named["bias"])
        got = torch.stack([ops.causal_conv1d_step(state, named["x"][:, t], *tail, silu) for t in range(9)], 1)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(state, final, rtol=0, atol=0)


def test_a_step_of_any_dtype_and_layout(ops):
    for types in ((torch.bfloat16, torch.float32, torch.float16), (torch.float32, torch.bfloat16, torch.bfloat16)):
        named = inputs(3, 1, 10, 4)
        x, weight, state = (named[k].to(t) for k, t in zip(("x", "weight", "initial_state"), types, strict=True))
        x = torch.stack([x, x], -1)[:, 0, :, 0]
        state = state.transpose(1, 2).contiguous().transpose(1, 2)
        want_state = state.clone()
        want = conv_step_reference(want_state, x, weight, None, True)
        got = ops.causal_conv1d_step(state, x, weight, None, True)
        assert got.dtype == x.dtype and rms_ratio(got, want) < 5e-3
        assert torch.equal(state, want_state)
    empty = torch.zeros(0, 3, 10)
    assert ops.causal_conv1d_step(empty, torch.zeros(0, 10), torch.ones(10, 4), None, True).shape == (0, 10)


def test_wrong_calls_are_refused_by_name(ops):
    x, weight = torch.ones(1, 5, 4), torch.ones(4, 3)
    for arguments, message in (
        ((x, torch.ones(4, 17), None, None, None, False), "causal_conv1d: .*width 1 to 16"),
        ((x, torch.ones(5, 3), None, None, None, False), "causal_conv1d: weight: expected size 4 in dimension 0"),
        (
            (x, weight, torch.ones(4, dtype=torch.int32), None, None, False),
            "causal_conv1d: bias: expected a float dtype",
        ),
        ((x, weight, None, torch.ones(1, 3, 4), None, False), "causal_conv1d: initial_state: expected size 2"),
        ((x, weight, None, None, torch.zeros(2), False), "causal_conv1d: cu_seqlens: expected int32"),
        ((x[0], weight, None, None, None, False), "causal_conv1d: expected x"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.causal_conv1d(*arguments)


@pytest.mark.slow
def test_machine_code():
    """Rows move in vectors, loads before arithmetic; two special functions and few instructions per element."""
    if gpu_code.nvcc() is None or gpu_code.missing_tools() is not None:
        pytest.skip("no nvcc, or no disassembler, on this machine")
    codes = gpu_code.compile_cuda("csrc/cuda/causal_conv1d.cu", "sm_90a")
    for dtype, bits, most in (("__nv_bfloat16", 64, 19), ("float", 128, 24)):
        (code,) = (c for name, c in codes.items() if f"conv_forward_kernel<{dtype}, float, 4, 4, 8>" in name)
        loop = code.hot_loop("FFMA")
        elements = 8 * 4  # eight positions of four channels
        assert loop.count(rf"LDG.*\.{bits}") == loop.count("LDG") == 8
        assert loop.count(rf"STG.*\.{bits}") == loop.count("STG") == 8
        assert loop.count("MUFU") == 2 * elements, "e^x and the division of silu"
        # A row takes 8 (4) bytes per element of an H200's 4.8 TB/s: there is time for 50 (25) instructions.
        assert len(loop.instructions) <= most * elements
        assert code.local_memory == 0
