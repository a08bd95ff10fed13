"""causal_conv1d's Triton kernels against the float64 definition: on a card where there is one, else interpreted."""

import os

import pytest
import torch
from accuracy import assert_accurate, rms_ratio

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported
pytest.importorskip("triton", reason="triton is not installed")

from jambatalk_kernels.causal_conv1d import triton as kernels  # noqa: E402
from jambatalk_kernels.causal_conv1d.heuristics import Tile, backward_tile, forward_tile, time_is_fastest  # noqa: E402
from jambatalk_kernels.causal_conv1d.reference import conv_reference, conv_step_reference  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("x", "weight", "bias", "initial_state")


def small_forward_tile(batch, length, channels, width, itemsize, time_fastest, multiprocessors):
    """Much smaller than a launch's, so that small inputs have many: blocks, runs and tiles all meet each other."""
    return Tile(8, 2, 4, 2, 1, time_fastest, 16)


def small_backward_tile(batch, length, channels, width, itemsize, time_fastest, multiprocessors, edges):
    steps = 2 if width < 8 else 4
    return Tile(8, 2, 8, steps, 1, time_fastest, 16 * steps - (0 if time_fastest else 2 * (width - 1)))


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(kernels, "forward_tile", small_forward_tile)
    monkeypatch.setattr(kernels, "backward_tile", small_backward_tile)
    for name in ("EDGE_CHANNELS", "SUM_CHANNELS", "STEP_CHANNELS"):
        monkeypatch.setattr(kernels, name, 8)
    monkeypatch.setattr(kernels, "SUM_TILES", 2)
    monkeypatch.setattr(kernels, "LOCATE_POSITIONS", 16)


def inputs(batch, length, channels, width, dtype=torch.float64, seed=0, sequences=None, time_fastest=False):
    g = torch.Generator().manual_seed(seed)
    shapes = {
        "x": (batch, length, channels),
        "weight": (channels, width),
        "bias": (channels,),
        "initial_state": (batch if sequences is None else sequences, width - 1, channels),
    }
    named = {k: torch.randn(*s, generator=g, dtype=torch.float64).to(dtype).to(DEVICE) for k, s in shapes.items()}
    if time_fastest:
        named["x"] = named["x"].transpose(1, 2).contiguous().transpose(1, 2)
    return named


def cotangents(named, sequences=None):
    g = torch.Generator().manual_seed(1)
    x, (channels, width) = named["x"], named["weight"].shape
    state_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    grad_y = torch.randn(x.shape, generator=g, dtype=torch.float64).to(x.dtype)
    sequences = x.shape[0] if sequences is None else sequences
    grad_final = torch.randn(sequences, width - 1, channels, generator=g, dtype=torch.float64).to(state_dtype)
    return grad_y.to(DEVICE), grad_final.to(DEVICE)


def reference(named, grads, silu=True, cu=None, dtype=None):
    """Outputs and gradients of the definition, in ``dtype``; a gradient of None is not asked for."""
    leaves = {k: v.detach().to(dtype or v.dtype).requires_grad_() for k, v in named.items()}
    y, final = conv_reference(leaves["x"], leaves["weight"], leaves.get("bias"), silu, leaves.get("initial_state"), cu)
    pairs = [(o, g.to(o.dtype)) for o, g in zip((y, final), grads, strict=True) if g is not None and o.requires_grad]
    outputs, weights = zip(*pairs, strict=True)
    got = torch.autograd.grad(outputs, list(leaves.values()), weights, allow_unused=True, materialize_grads=True)
    return {"y": y.detach(), "final": final.detach(), **dict(zip(leaves, got, strict=True))}


def ours(named, grads, silu=True, cu=None):
    tensors = [named.get(name) for name in NAMES]
    y, final = kernels.conv_forward(*tensors, cu, silu)
    got = kernels.conv_backward(*grads, *tensors, cu, silu)
    for name, grad in zip(NAMES, got, strict=True):
        wanted = (named[name].shape, named[name].dtype) if name in named else ((0,), named["x"].dtype)
        assert (grad.shape, grad.dtype) == wanted, name
    return {"y": y, "final": final, **{k: v for k, v in zip(NAMES, got, strict=True) if k in named}}


def assert_same(got, want, what=None):
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].shape == want[name].shape, (name, what)
        assert rms_ratio(got[name], want[name]) < 1e-13, (name, what)


slow = pytest.mark.slow


@pytest.mark.parametrize(
    "width, time_fastest",
    [(w, False) for w in (1, 2, 3, 4)]
    + [(1, True), (4, True)]
    + [pytest.param(w, t, marks=slow) for w in (5, 8, 16) for t in (False, True)]
    + [pytest.param(w, True, marks=slow) for w in (2, 3)],
)
def test_is_the_reference_in_float64(width, time_fastest, small_tiles):
    for shape in ((1, 40, 5), (2, 3, 9 if width == 4 else 1)):
        named = inputs(*shape, width, time_fastest=time_fastest)
        grads = cotangents(named)
        assert_same(ours(named, grads), reference(named, grads), shape)


@pytest.mark.parametrize(
    "width, time_fastest", [(4, False)] + [pytest.param(*what, marks=slow) for what in ((16, False), (4, True))]
)
def test_with_the_tiles_of_a_launch(width, time_fastest):
    named = inputs(1, 40, 33, width, time_fastest=time_fastest)
    grads = cotangents(named)
    assert_same(ours(named, grads), reference(named, grads))


@pytest.mark.parametrize("without", [("bias",), ("initial_state",), ("bias", "initial_state")], ids=str)
@pytest.mark.parametrize("silu", [False, True])
def test_optional_arguments(without, silu, small_tiles):
    named = {k: v for k, v in inputs(1, 9, 5, 3).items() if k not in without}
    grads = cotangents(named)
    assert_same(ours(named, grads, silu), reference(named, grads, silu))


@pytest.mark.parametrize("missing", [0, 1])
@pytest.mark.parametrize("time_fastest", [False, pytest.param(True, marks=slow)])
def test_a_gradient_that_nobody_gave_is_zero(missing, time_fastest, small_tiles):
    for cu in (None, torch.tensor([0, 2, 17], dtype=torch.int32, device=DEVICE)):
        sequences = None if cu is None else 2
        named = inputs(1, 18, 5, 3, sequences=sequences, time_fastest=time_fastest)
        grads = [None if i == missing else g for i, g in enumerate(cotangents(named, sequences))]
        assert_same(ours(named, grads, cu=cu), reference(named, grads, cu=cu))


BOUNDS = [[0, 0, 3, 20, 20, 21, 30], [3, 7], [-5, 99], [0, 8, 4, 6], [4, 2, 0], [50, 60], [-3, -2]]


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize(
    "width, state, time_fastest",
    [(4, True, False), (1, False, False)]
    + [pytest.param(*what, marks=slow) for what in ((4, False, False), (9, True, False), (3, True, True))],
)
def test_packed_sequences(bounds, width, state, time_fastest, small_tiles):
    """Any boundaries, clamped as the reference does; what lies outside never leaks in, not even a NaN."""
    cu = torch.tensor(bounds, dtype=torch.int32, device=DEVICE)
    clean = cu.long().clamp(0, 30).cummax(0).values
    named = inputs(1, 30, 5, width, sequences=len(bounds) - 1, time_fastest=time_fastest)
    if not state:
        del named["initial_state"]
    grads = cotangents(named, len(bounds) - 1)
    want = reference(named, grads, cu=cu)
    named["x"][:, : clean[0]] = torch.nan
    named["x"][:, clean[-1] :] = torch.nan
    assert_same(ours(named, grads, cu=cu), want)


@slow
def test_many_packed_sequences(small_tiles):
    lengths = torch.randint(0, 4, (40,), generator=torch.Generator().manual_seed(0))
    cu = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int().to(DEVICE)
    named = inputs(1, int(cu[-1]) + 2, 3, 3, sequences=40)
    grads = cotangents(named, 40)
    assert_same(ours(named, grads, cu=cu), reference(named, grads, cu=cu))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_accuracy_rule(dtype, packed):
    """At most twice the error of PyTorch at the same precision, and the absolute bars of the contract."""
    cu = torch.tensor([0, 7, 7, 30], dtype=torch.int32, device=DEVICE) if packed else None
    sequences = 3 if packed else None
    named = inputs(1, 30, 33, 4, dtype, sequences=sequences)
    grads = cotangents(named, sequences)
    exact = reference(named, grads, cu=cu, dtype=torch.float64)
    peer = reference(named, grads, cu=cu)
    for name, got in ours(named, grads, cu=cu).items():
        want = exact[name]
        assert_accurate(got, want, peer[name], 1e-6 if dtype == torch.float32 else 5e-3, name)


@pytest.mark.parametrize("x_dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("other", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_mixed_dtypes(x_dtype, other, small_tiles):
    named = inputs(1, 5, 3, 2)
    named = {k: v.to(x_dtype if k == "x" else other) for k, v in named.items()}
    grads = cotangents(named)
    got, want = ours(named, grads), reference(named, grads, dtype=torch.float64)
    assert got["y"].dtype == x_dtype
    assert got["final"].dtype == (torch.float64 if x_dtype == torch.float64 else torch.float32)
    for name in want:
        # One rounding of the result; float32 sums where x is not float64; float32 in between for bfloat16.
        bound = 2 * torch.finfo(got[name].dtype).eps + (0 if x_dtype == torch.float64 else 1e-6)
        assert rms_ratio(got[name], want[name]) < max(bound, 1e-13), name


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=slow)], ids=str)
@pytest.mark.parametrize("how", ["strided", "slice", "time fastest", "expanded"])
def test_any_strides(how, dtype, small_tiles):
    named = inputs(2, 9, 5, 3, dtype)
    if how == "expanded":
        named = {k: v[:1].expand_as(v) if v.dim() == 3 else v for k, v in named.items()}
    grads = cotangents(named)
    want = ours({k: v.contiguous() for k, v in named.items()}, grads)

    def lay_out(t):
        nan = torch.full_like(t, torch.nan)
        if how == "time fastest":
            return t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() > 1 else t
        if how == "slice" and t.dim() == 3:
            return torch.cat([nan, t, nan], 2)[..., t.shape[2] : 2 * t.shape[2]]
        return t if how == "expanded" else torch.stack([t, nan], -1)[..., 0]

    grads = [lay_out(g) for g in grads]
    if how == "expanded":
        grads[0] = grads[0][:, :, :1].expand_as(grads[0])
        want = ours({k: v.contiguous() for k, v in named.items()}, [grads[0].contiguous(), grads[1]])
    got = ours({k: lay_out(v) for k, v in named.items()}, grads)
    for name in want:
        if how == "time fastest":  # other tiles, another order of sums
            assert rms_ratio(got[name], want[name]) < (1e-6 if dtype == torch.float32 else 5e-3), name
        else:
            assert torch.equal(got[name], want[name]), name


def test_outputs_lie_in_memory_as_their_input(small_tiles):
    for x in (torch.zeros(2, 8, 16), torch.zeros(2, 16, 8).transpose(1, 2), torch.zeros(2, 32, 8)[:, :16].mT):
        x = x.to(DEVICE)
        weight = torch.zeros(16, 2, device=DEVICE)
        y, final = kernels.conv_forward(x, weight, None, None, None, True)
        dx = kernels.conv_backward(y, None, x, weight, None, None, None, True)[0]
        assert y.stride() == dx.stride() == torch.empty_like(x).stride()
        assert time_is_fastest(*y.stride()[1:]) == time_is_fastest(*x.stride()[1:])
        assert final.is_contiguous()


@pytest.mark.parametrize("shape", [(2, 0, 3, 4), (0, 5, 3, 4), (2, 5, 0, 4), (2, 0, 3, 1)], ids=str)
def test_nothing_to_do(shape):
    named = inputs(*shape)
    grads = cotangents(named)
    got = ours(named, grads)
    assert got["y"].shape == shape[:3] and got["final"].shape == (shape[0], shape[3] - 1, shape[2])
    if shape[1] == 0:
        assert torch.equal(got["final"], named["initial_state"])
    assert_same(got, reference(named, grads))
    if shape[0] == 2:
        cu = torch.tensor([0, 0], dtype=torch.int32, device=DEVICE)
        packed = {k: v[:1] if k in ("x", "initial_state") else v for k, v in named.items()}
        grads = [g[:1] for g in grads]
        assert_same(ours(packed, grads, cu=cu), reference(packed, grads, cu=cu))


def test_two_halves_are_the_whole(small_tiles):
    named = inputs(1, 24, 5, 5, torch.float32)
    parameters = named["weight"], named["bias"]
    whole, end = kernels.conv_forward(named["x"], *parameters, named["initial_state"], None, True)
    for cut in (0, 3, 17):
        halves, state = [], named["initial_state"]
        for part in (named["x"][:, :cut], named["x"][:, cut:]):
            y, state = kernels.conv_forward(part, *parameters, state, None, True)
            halves.append(y)
        assert torch.equal(torch.cat(halves, 1), whole) and torch.equal(state, end), cut


@pytest.mark.parametrize("packed", [False, True])
def test_the_same_bytes_twice_and_all_of_them_written(packed, monkeypatch, small_tiles):
    cu = torch.tensor([2, 7, 7, 16], dtype=torch.int32, device=DEVICE) if packed else None
    sequences = 3 if packed else None
    named = inputs(1, 18, 5, 3, torch.float32, sequences=sequences)
    grads = cotangents(named, sequences)
    first = ours(named, grads, cu=cu)

    def poisoned(allocate):
        def call(*arguments, **options):
            tensor = allocate(*arguments, **options)
            return tensor.fill_(torch.nan if tensor.is_floating_point() else 2**30)

        return call

    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
    second = ours(named, grads, cu=cu)
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("width", [1, 2, 4, 16])
def test_steps_are_the_convolution(width, small_tiles):
    named = inputs(2, 5, 9, width)
    want, final = conv_reference(*(named[n] for n in NAMES[:3]), True, named["initial_state"])
    state = named["initial_state"].clone()
    for t in range(5):
        y = kernels.conv_step(state, named["x"][:, t], named["weight"], named["bias"], True)
        torch.testing.assert_close(y, want[:, t], rtol=1e-13, atol=1e-13)
    assert torch.equal(state, final)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_step_changes_any_state_in_place(x_dtype, state_dtype):
    named = inputs(3, 1, 33, 4)
    x, weight, state = named["x"][:, 0].to(x_dtype), named["weight"].float(), named["initial_state"].to(state_dtype)
    # (batch, channels, width) in memory, as other libraries keep it, with a row of somebody else's beside it.
    memory = torch.full((3, 33, 4), torch.nan, dtype=state_dtype, device=DEVICE)
    memory[..., :3] = state.mT
    expected = state.clone()
    want = conv_step_reference(state.double().clone(), x.double(), weight.double())
    conv_step_reference(expected, x, weight)
    got = kernels.conv_step(memory[..., :3].mT, x, weight, None, False)
    assert got.dtype == x_dtype and rms_ratio(got, want) < 2 * torch.finfo(x_dtype).eps
    assert torch.equal(memory[..., :2].mT, expected[:, :2])  # only shifted
    # The interpreter cuts a bfloat16 off where hardware rounds.
    assert rms_ratio(memory[..., 2], expected[:, 2]) <= torch.finfo(state_dtype).eps
    assert memory[..., 3].isnan().all()


def test_step_with_nothing_to_do():
    for batch, channels in ((0, 3), (2, 0)):
        x, weight = torch.zeros(batch, channels, device=DEVICE), torch.zeros(channels, 4, device=DEVICE)
        state = torch.zeros(batch, 3, channels, device=DEVICE)
        assert kernels.conv_step(state, x, weight, None, True).shape == x.shape


def test_orientation():
    assert not time_is_fastest(64, 1) and not time_is_fastest(128, 2)
    assert time_is_fastest(1, 600)
    assert not time_is_fastest(1, 1)  # one channel, or one position: either way


@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("width", [1, 2, 4, 8, 16])
def test_tiles(width, itemsize):
    for choose in (forward_tile, backward_tile):
        for time_fastest in (False, True):
            for shape in ((1, 1, 1), (1, 600, 1024), (8, 2048, 4096), (1, 10**6, 33), (1, 5, 10**6)):
                tile = choose(*shape, width, itemsize, time_fastest, 132)
                for size in tile[:5]:
                    assert size >= 1 and size & (size - 1) == 0, "Triton's axes are powers of two"
                walked = tile.groups * tile.rows * tile.steps
                history = tile.groups * (width - 1)
                behind = history if choose is backward_tile and not time_fastest else 0
                assert tile.positions == walked - behind > 0
                # Every thread has work, and a row of it is one access of up to 16 bytes.
                per_thread = tile.block_c * tile.groups / (32 * tile.warps)
                assert 1 <= per_thread <= max(2, 16 // itemsize)
                assert not time_fastest or (tile.rows * itemsize >= 16 and per_thread == 1)
                assert tile.block_c < 2 * shape[2]


def test_large_inputs_take_large_tiles_and_small_ones_fill_the_card():
    large = forward_tile(8, 2048, 4096, 4, 2, False, 132)
    assert (large.block_c, large.rows, large.warps) == (256, 8, 4) and large.steps > 1
    small = forward_tile(1, 600, 1024, 4, 2, False, 132)
    assert -(-600 // small.positions) * -(-1024 // small.block_c) >= 132
    for shape in ((8, 2048, 4096), (1, 10**6, 64)):
        # dweight's partial sums, written and read: little beside the 6 bytes per element that have to move.
        tile = backward_tile(*shape, 4, 2, False, 132)
        assert 2 * 5 * 4 / tile.positions < 0.1 * 6


def test_offsets_need_64_bits():
    """A batch stride of more than 2^31 elements; of the memory between, nothing is touched."""
    stride = 2**31 + 8
    x = torch.empty(stride + 12, dtype=torch.float16, device=DEVICE).as_strided((2, 6, 2), (stride, 2, 1))
    named = inputs(2, 6, 2, 3)
    x.copy_(named["x"])
    want, final = conv_reference(x.double(), named["weight"], None, False)
    y, state = kernels.conv_forward(x, named["weight"], None, None, None, False)
    assert rms_ratio(y, want) < 1e-3 and torch.equal(state.double(), final)


def test_ahead_of_time_cases_are_whole():
    """Every parameter of every case has a type or a value: tests/jambatalk_kernels/gpu_code.py can compile it."""
    cases = kernels.ahead_of_time_cases()
    assert len({case["name"] for case in cases}) == len(cases)
    for case in cases:
        for name in case["kernel"].arg_names:
            assert (name in case["signature"]) != (name in case["constexprs"]), (case["name"], name)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(16))
def test_random_shapes(seed, monkeypatch):
    g = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high, (), generator=g))

    batch, length, channels, width = draw(1, 3), draw(0, 80), draw(1, 40), draw(1, 17)
    cu, sequences = None, None
    if seed % 2:
        batch, sequences = 1, draw(1, 6)
        cu = torch.randint(-3, length + 4, (sequences + 1,), generator=g).int()
        cu = (cu.sort().values if seed % 4 == 1 else cu).to(DEVICE)
    monkeypatch.setattr(kernels, "_multiprocessors", lambda device: draw(1, 200))
    named = inputs(batch, length, channels, width, seed=seed, sequences=sequences, time_fastest=seed % 3 == 0)
    grads = cotangents(named, sequences)
    assert_same(ours(named, grads, cu=cu), reference(named, grads, cu=cu))
