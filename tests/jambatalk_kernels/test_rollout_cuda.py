"""The persistent CUDA kernel of the rollout, run on the host (tests/cuda_on_cpu): against the reference, one block per
sequence and teams of blocks that meet; the watchdog; what is refused."""

from dataclasses import replace

import pytest
import torch
from cuda_on_cpu import build
from test_rollout_native import Sizes, make_inputs, make_program, ratio, to

from jambatalk_kernels import BackendUnavailable, backends
from jambatalk_kernels.rollout import cuda, packing
from jambatalk_kernels.rollout.op import _why_not_cuda, rollout
from jambatalk_kernels.rollout.program import RolloutState

# The card that the host plays holds four blocks at once: two teams of 2, or one of 4, or any number that are alone.
TEAMS = [1, 2, pytest.param(4, marks=pytest.mark.slow)]
ARRANGEMENTS = {"moe-moe": "EMETEME", "m-moe": "MEMTEME", "m-m": "MEMTMEM", "moe-m": "EMETMEM"}
ROUND = Sizes(d=32, inner=64, rank=8, states=16, heads=4, kv_heads=1, head_dim=8, hidden=48)  # the fast paths


@pytest.fixture(scope="module")
def ops():
    return build.load()


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch):
    monkeypatch.setenv("JAMBATALK_KERNELS_CHECK", "1")  # new memory is full of NaN: what is not written shows


@pytest.fixture
def run(ops):
    def run(program, inputs, state=None, lengths=None, *, blocks=1, weights_dtype=None):
        packed = packing._pack(program, weights_dtype or torch.float32, inputs.device, "cuda")
        return cuda.run(ops.rollout, packed, program, inputs, state, lengths, blocks)

    return run


def peers(program, inputs, **options):
    exact = rollout(to(program, torch.float64), inputs.double(), backend="reference", **options)
    return exact, rollout(program, inputs, backend="reference", **options)


def bound(peer, exact):
    """Twice PyTorch's error at the same precision, and the rounding of the exact result to float32."""
    return 2 * ratio(peer, exact) + ratio(exact.float(), exact)


@pytest.mark.parametrize(
    "arrangement", ["moe-moe", "m-m", *(pytest.param(name, marks=pytest.mark.slow) for name in ("m-moe", "moe-m"))]
)
def test_accuracy(run, arrangement):
    program = make_program(ARRANGEMENTS[arrangement], dtype=torch.float32)
    inputs = make_inputs(program, batch=4, frames=40)  # a sequence goes on from its own errors: it is one draw of them
    (exact, exact_end), (peer, _) = peers(program, inputs)
    hidden, end = run(program, inputs)
    assert ratio(hidden, exact) <= 1e-5 and ratio(hidden, exact) <= bound(peer, exact)
    for mine, theirs in zip(end.tensors(), exact_end.tensors(), strict=True):
        assert mine.shape == theirs.shape and ratio(mine, theirs) <= 1e-5


@pytest.mark.parametrize("blocks", TEAMS)
@pytest.mark.parametrize("sizes", [None, ROUND], ids=["odd", "round"])
@pytest.mark.parametrize("weights_dtype", [None, torch.bfloat16])
def test_accuracy_of_teams(run, sizes, blocks, weights_dtype):
    program = make_program("EMT", sizes, window=5, dtype=torch.float32)
    inputs = make_inputs(program, batch=3, frames=9)
    (exact, exact_end), (peer, _) = peers(program.rounded(weights_dtype), inputs)
    hidden, end = run(program, inputs, blocks=blocks, weights_dtype=weights_dtype)
    assert ratio(hidden, exact) <= bound(peer, exact)
    for mine, theirs in zip(end.tensors(), exact_end.tensors(), strict=True):
        assert ratio(mine, theirs) <= 1e-5


@pytest.mark.parametrize("blocks", [1, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("window", [None, 40])
def test_attention_to_many_positions(run, blocks, window):
    """Several stretches of 32 positions in every part; a ring that has wrapped around."""
    sizes = Sizes(d=8, inner=8, heads=6, kv_heads=3, head_dim=4, hidden=8)
    program = make_program("T", sizes, window=window, dtype=torch.float32)
    inputs = make_inputs(program, batch=1, frames=160 if blocks == 1 else 100)
    (exact, _), (peer, _) = peers(program, inputs)
    hidden = run(program, inputs, blocks=blocks)[0]
    assert ratio(hidden, exact) <= bound(peer, exact)


@pytest.mark.parametrize("heads, head_dim", [(1, 128), (20, 2), (3, 34)])
def test_heads_of_other_sizes(run, heads, head_dim):
    sizes = Sizes(d=8, heads=heads, kv_heads=1, head_dim=head_dim, hidden=8)
    program = make_program("T", sizes, dtype=torch.float32)
    inputs = make_inputs(program, batch=1, frames=9)
    (exact, _), (peer, _) = peers(program, inputs)
    assert ratio(run(program, inputs)[0], exact) <= bound(peer, exact)


@pytest.mark.parametrize("sizes", [Sizes(taps=1, states=1, rank=1), Sizes(taps=16, states=33, rank=40)])
def test_mixers_of_other_sizes(run, sizes):
    program = make_program("ME", sizes, experts=17, top_k=16, dtype=torch.float32)
    inputs = make_inputs(program, batch=1, frames=20)
    (exact, _), (peer, _) = peers(program, inputs)
    assert ratio(run(program, inputs, blocks=2)[0], exact) <= bound(peer, exact)


def test_layers_of_different_sizes(run):
    """What a wider layer leaves in memory must not reach a narrower one's padding, NaN least of all."""
    wide = make_program("EM", Sizes(d=10, inner=63, rank=7, states=9, hidden=47), dtype=torch.float32)
    narrow = make_program("EMT", Sizes(d=10, inner=9, rank=1, states=2, hidden=3, head_dim=2), dtype=torch.float32)
    program = replace(wide, layers=(*wide.layers, *narrow.layers))
    inputs = make_inputs(program, batch=2, frames=8)
    (exact, _), (peer, _) = peers(program, inputs)
    for blocks in (1, 2):
        assert ratio(run(program, inputs, blocks=blocks)[0], exact) <= bound(peer, exact)
    dirty = inputs.clone()
    dirty[0] = float("nan")  # the team's first sequence; its second one comes after
    hidden = run(program, dirty, blocks=4)[0]
    assert hidden[0].isnan().all() and torch.equal(hidden[1], run(program, inputs, blocks=4)[0][1])


@pytest.mark.parametrize("blocks", [1, 2])
def test_the_same_bytes_in_any_order_of_threads_and_blocks(ops, run, blocks):
    program = make_program("EMT", dtype=torch.float32)
    inputs = make_inputs(program, batch=3, frames=6)
    hidden, end = run(program, inputs, blocks=blocks)
    ops.order(True)
    again, other = run(program, inputs, blocks=blocks)
    ops.order(False)
    assert torch.equal(hidden, again)
    assert all(torch.equal(a, b) for a, b in zip(end.tensors(), other.tensors(), strict=True))


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("splits", [[1] * 8, [3, 0, 5]])
def test_any_split_gives_the_same_bytes(run, monkeypatch, blocks, window, splits):
    program = make_program("ET", window=window, dtype=torch.float32)
    inputs = make_inputs(program, batch=2, frames=8)
    whole, end = run(program, inputs, blocks=blocks)
    state, start = None, 0
    for size in splits:
        before = None if state is None else [tensor.clone() for tensor in state.tensors()]
        hidden, after = run(program, inputs[:, start : start + size], state, blocks=blocks)
        assert torch.equal(hidden, whole[:, start : start + size])
        assert state is None or all(torch.equal(a, b) for a, b in zip(before, state.tensors(), strict=True))
        state, start = after, start + size
    for mine, theirs in zip(state.tensors(), end.tensors(), strict=True):
        room = min(mine.shape[1], theirs.shape[1]) if mine.dim() == 4 else None
        assert torch.equal(mine[:, :room] if room else mine, theirs[:, :room] if room else theirs)
    monkeypatch.setattr(cuda, "SLICE_FRAMES", 3)  # as the launches of a long clip
    sliced, other = run(program, inputs, blocks=blocks)
    assert torch.equal(sliced, whole)
    assert all(torch.equal(a, b) for a, b in zip(other.tensors(), end.tensors(), strict=True))


@pytest.mark.parametrize("blocks", [1, 2])
def test_lengths_are_as_sequences_alone(run, blocks):
    program = make_program("ET", dtype=torch.float32)
    inputs = make_inputs(program, batch=6, frames=8)
    lengths = torch.tensor([5, 0, 8, 5, -3, 99])
    hidden, state = run(program, inputs, lengths=lengths, blocks=blocks)
    for row, length in enumerate(lengths.clamp(0, 8).tolist()):
        alone, end = run(program, inputs[row : row + 1, :length], blocks=blocks)
        assert torch.equal(hidden[row, :length], alone[0]) and (hidden[row, length:] == 0).all()
        for mine, theirs in zip(state.tensors(), end.tensors(), strict=True):
            assert torch.equal(mine[row], theirs[0])
    assert state.position.tolist() == [5, 0, 8, 5, 0, 8]


def test_more_sequences_than_teams_fit(run):
    program = make_program("M", dtype=torch.float32)
    inputs = make_inputs(program, batch=7, frames=3)
    expected = run(program, inputs)[0]
    for blocks in (2, 3):  # two teams, one team
        assert ratio(run(program, inputs, blocks=blocks)[0], expected) <= 1e-6


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("blocks", [1, 2])
def test_nan_stays_in_its_sequence(run, value, blocks):
    program = make_program("ET", dtype=torch.float32)
    inputs = make_inputs(program, batch=4, frames=6)
    clean = run(program, inputs, blocks=blocks)[0]
    inputs[1, 3, 2] = value
    hidden = run(program, inputs, blocks=blocks)[0]
    assert torch.equal(hidden[[0, 2, 3]], clean[[0, 2, 3]]) and torch.equal(hidden[1, :3], clean[1, :3])
    assert hidden[1, 3:].isnan().all()


def test_strides_of_the_inputs(run):
    program = make_program("M", dtype=torch.float32)
    inputs = make_inputs(program, frames=5)
    whole = run(program, inputs)[0]
    turned = inputs.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    assert torch.equal(run(program, turned)[0], whole)
    assert torch.equal(run(program, inputs[:1].expand(3, -1, -1))[0][2], whole[0])


@pytest.mark.parametrize("blocks", [1, 2])
def test_nothing_to_do(run, blocks):
    program = make_program("ET", dtype=torch.float32)
    hidden, state = run(program, make_inputs(program, frames=0), blocks=blocks)
    assert hidden.shape == (3, 0, 10) and state.position.tolist() == [0] * 3
    hidden, state = run(program, make_inputs(program, batch=0), blocks=blocks)
    assert hidden.shape == (0, 30, 10) and state.batch == 0
    empty = make_program("", dtype=torch.float32)
    inputs = make_inputs(empty, frames=4)
    assert ratio(run(empty, inputs, blocks=blocks)[0], rollout(empty, inputs, backend="reference")[0]) <= 1e-6


@pytest.mark.parametrize("blocks", [1, 2])
def test_without_feedback(run, blocks):
    program = make_program("M", feedback=False, dtype=torch.float32)
    inputs = make_inputs(program, frames=6)
    state = RolloutState.empty(program.layers, 10, 3)
    state.feedback += 0.5
    exact, end = rollout(to(program, torch.float64), inputs.double(), state.map(wider), backend="reference")
    hidden, after = run(program, inputs, state, blocks=blocks)
    assert ratio(hidden, exact) <= 1e-6 and torch.equal(after.feedback, state.feedback)


def wider(tensor):
    return tensor.double() if tensor.is_floating_point() else tensor


def test_ties_of_the_router_go_to_the_lowest_expert(run):
    program = make_program("E", dtype=torch.float32)
    layer = program.layers[0]
    router = torch.zeros_like(layer.mlp.router)
    program = replace(program, layers=(replace(layer, mlp=replace(layer.mlp, router=router)),))
    inputs = make_inputs(program, frames=5)
    assert ratio(run(program, inputs)[0], rollout(program, inputs, backend="reference")[0]) <= 1e-6


def test_angles_after_hours(run):
    """Positions beyond a million frames: the angle's fraction of a turn is taken in float64."""
    program = make_program("T", Sizes(heads=2, kv_heads=1, head_dim=8), window=4, dtype=torch.float32)
    state = RolloutState.empty(program.layers, 10, 1)
    state.position += 3_000_017
    state.mixers[0].position += 3_000_017
    inputs = make_inputs(program, batch=1, frames=5)
    exact = rollout(to(program, torch.float64), inputs.double(), state.map(wider), backend="reference")[0]
    peer = rollout(program, inputs, state, backend="reference")[0]
    assert ratio(run(program, inputs, state)[0], exact) <= bound(peer, exact)


# ---- the watchdog ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", [0, 1, 3])
def test_a_block_that_never_comes_is_an_error(ops, run, lost):
    program = make_program("ET", dtype=torch.float32)
    inputs = make_inputs(program, batch=2, frames=3)
    ops.lose_block(lost)
    try:
        with pytest.raises(RuntimeError, match="did not meet within 4 seconds"):
            run(program, inputs, blocks=2)
        assert torch.equal(run(program, inputs, blocks=1)[0], run(program, inputs, blocks=1)[0])  # nobody to meet
    finally:
        ops.lose_block(-1)
    assert not run(program, inputs, blocks=2)[0].isnan().any()


def test_a_team_larger_than_the_card_is_refused(run):
    program = make_program("M", dtype=torch.float32)
    with pytest.raises(RuntimeError, match="does not hold so many blocks"):
        run(program, make_inputs(program), blocks=5)


# ---- choice and errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "batch, width, multiprocessors, expected",
    [(1, 128, 132, 1), (256, 64, 132, 1), (1, 512, 132, 128), (1, 512, 66, 66), (4, 512, 132, 33), (500, 512, 132, 1)],
)
def test_blocks_per_sequence(batch, width, multiprocessors, expected):
    assert cuda.blocks_per_sequence(batch, width, multiprocessors) == expected


def test_what_it_cannot_run_is_refused_by_name():
    program = make_program("ET", dtype=torch.float32)
    inputs = make_inputs(program)
    with pytest.raises(BackendUnavailable, match="cuda.*inputs are on the CPU"):
        rollout(program, inputs, backend="cuda")
    assert _why_not_cuda(program, inputs, None) is None
    assert "float32" in _why_not_cuda(to(program, torch.bfloat16), inputs.bfloat16(), None)
    assert "16 layers" in _why_not_cuda(replace(program, layers=program.layers * 9), inputs, None)
    assert "head_dim" in _why_not_cuda(make_program("T", Sizes(head_dim=130)), inputs, None)
    assert "16 taps" in _why_not_cuda(make_program("M", Sizes(taps=17)), inputs, None)
    assert "top_k 16" in _why_not_cuda(make_program("E", experts=300), inputs, None)
    assert "KB" in _why_not_cuda(make_program("M", Sizes(d=3000, inner=6000)), inputs, None)
    wide = RolloutState.empty(program.layers, 10, 3, dtype=torch.float64)
    assert "state holds" in _why_not_cuda(program, inputs, wide)


def test_chosen_only_where_it_is_forced_until_a_card_has_shown_it():
    """What `candidates` answers for a card: the graph first, and the persistent kernel after the reference."""
    order = list(backends.gpu_candidates((9, 0), True, "9.0a", validated=False))
    assert order[0] == "triton" and order.index("cuda") > order.index("reference")
    assert not [row for row in backends.VALIDATED if row[0] == "rollout"]


def test_a_plan_of_other_making_is_refused(ops):
    """The last line of defence, below `rollout`: no wild memory is read."""
    program = make_program("ET", dtype=torch.float32)
    inputs = make_inputs(program)
    packed = packing._pack(program, torch.float32, inputs.device, "cuda")
    tensors = [*RolloutState.empty(program.layers, 10, 3, frames=30).tensors(), torch.zeros(1, dtype=torch.int32)]
    lengths, hidden = torch.full((3,), 30), torch.empty_like(inputs)

    def call(plan=packed.plan, storage=packed.storage, state=tensors, end=1, blocks=1):
        ops.rollout(plan, storage, inputs, lengths, hidden, state, 0, end, 1e-6, 1, blocks)

    call()
    for index in range(packed.plan.numel()):
        for value in (-1, 1 << 41):
            plan = packed.plan.clone()
            plan[index] = value
            with pytest.raises(RuntimeError, match="rollout"):
                call(plan)
    for wrong in (
        dict(plan=packed.plan[:-1]), dict(storage=packed.storage[:-64]), dict(state=tensors[:-1]),
        dict(state=[*tensors, tensors[0]]), dict(state=[tensors[0].double(), *tensors[1:]]), dict(end=31),
        dict(blocks=0),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="rollout"):
            call(**wrong)


def test_packed_once_and_in_the_layout_of_the_device():
    program = make_program("EM", dtype=torch.float32)
    for dtype, together in ((torch.float32, 4), (torch.bfloat16, 8)):
        ours, theirs = (packing._pack(program, dtype, torch.device("cpu"), kind) for kind in ("cuda", "cpu"))
        assert ours.frame_bytes == theirs.frame_bytes and ours.storage.numel() >= theirs.storage.numel()
        writer = packing._Writer(torch.float32, dtype == torch.bfloat16, "cuda")
        matrix = torch.arange(33 * 10, dtype=torch.float32).view(33, 10) % 128
        writer.matrix(matrix)
        storage = writer.finish()[1].view(dtype)[: 2 * 16 * 32].view(2, 16 // together, 32, together)
        for out, inner in ((0, 0), (31, 9), (32, 7), (5, 4)):
            place = storage[out // 32, inner // together, out % 32, inner % together]
            assert place == matrix[out, inner]
        assert not storage[0, 10 // together :, :, 10 % together :].any()
