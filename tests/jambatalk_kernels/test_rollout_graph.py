"""The rollout as a CUDA graph, without a GPU: its kernels in Triton's interpreter, its frames recorded and replayed by
a stand-in that freezes what a graph freezes."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from test_rollout_native import Sizes, make_inputs, make_program, ratio, to
from torch.nn.functional import rms_norm, silu
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from jambatalk_kernels import BackendUnavailable
from jambatalk_kernels.rollout import graph, reference
from jambatalk_kernels.rollout.op import rollout
from jambatalk_kernels.rollout.program import RolloutState

kernels = pytest.importorskip("jambatalk_kernels.rollout.triton", reason="triton is not installed")

SMALL = Sizes(d=12, inner=20, rank=3, states=4, heads=2, kv_heads=1, head_dim=8, hidden=10)


def small_program(kinds="EMT", **options):
    return make_program(kinds, SMALL, experts=3, dtype=torch.float32, **options)


# ---- the kernels, in the interpreter --------------------------------------------------------------------------------


@pytest.mark.parametrize("kinds, batch", [("ET", 2), ("MT", 1)])
def test_accuracy_in_float32(kinds, batch):
    program = small_program(kinds)
    inputs = make_inputs(program, batch=batch, frames=3)
    exact, exact_end = rollout(to(program, torch.float64), inputs.double(), backend="reference")
    peer = rollout(program, inputs, backend="reference")[0]
    ours, end = rollout(program, inputs, backend="triton")
    assert ratio(ours, exact) <= min(1e-5, 2 * ratio(peer, exact) + ratio(exact.float(), exact))
    for mine, theirs in zip(end.tensors(), exact_end.tensors(), strict=True):
        assert mine.is_contiguous() and ratio(mine, theirs) <= 1e-5


@pytest.mark.parametrize("batch", [1, 9])
def test_bfloat16_weights_are_products_with_the_rounded_matrices(batch):
    """Kept in bfloat16 for few sequences, in float32 for many; the arithmetic is float32 either way."""
    program = small_program("E")
    inputs = make_inputs(program, batch=batch, frames=2)
    ours = rollout(program, inputs, weights_dtype=torch.bfloat16, backend="triton")[0]
    exact = rollout(to(program.rounded(torch.bfloat16), torch.float64), inputs.double(), backend="reference")[0]
    assert ratio(ours, exact) <= 1e-6
    stored = next(iter(graph._loops[program].values())).program.layers[0]
    kinds = {stored.mixer.in_proj.dtype, stored.mlp.w_in.dtype}
    assert kinds == {torch.bfloat16 if batch == 1 else torch.float32}
    assert stored.mlp.router.dtype == torch.float32


def test_a_bfloat16_program():
    program = to(small_program("MT"), torch.bfloat16)
    inputs = make_inputs(program, batch=2, frames=3)
    exact = rollout(to(program, torch.float64), inputs.double(), backend="reference")[0]
    peer = rollout(program, inputs, backend="reference")[0]
    ours, end = rollout(program, inputs, backend="triton")
    assert ours.dtype == torch.bfloat16 and end.mixers[0].scan.dtype == torch.float32
    assert ratio(ours, exact) <= 2 * ratio(peer, exact)


def test_lengths_and_splits_give_the_same_bytes():
    program = small_program("MT", window=2)
    inputs = make_inputs(program, batch=3, frames=4)
    whole, end = rollout(program, inputs, backend="triton")
    lengths = torch.tensor([3, 0, 4])
    hidden, state = rollout(program, inputs, lengths=lengths, backend="triton")
    for row, length in enumerate(lengths.tolist()):
        assert torch.equal(hidden[row, :length], whole[row, :length]) and not hidden[row, length:].any()
    assert state.position.tolist() == [3, 0, 4] and not state.feedback[1].any()
    rest, again = rollout(program, inputs[:1, 3:], state.select(torch.tensor([0])), backend="triton")
    assert torch.equal(rest[0], whole[0, 3:])
    for mine, theirs in zip(again.tensors(), end.tensors(), strict=True):
        assert torch.equal(mine[0], theirs[0])


@pytest.mark.parametrize("rows", [1, 3, 30])
def test_linear(rows):
    g = torch.Generator().manual_seed(0)
    x, w, b, n, r = (torch.randn(*s, generator=g) for s in ((rows, 2 * 37), (21, 37), (21,), (37,), (rows, 21)))
    for options, left in (({"norm": n, "eps": 1e-3}, x[:, ::2]), ({"gated": True}, x), ({"residual": r}, x[:, :37])):
        for bias in (None, b):
            wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
            exact = reference.linear_step(left.double(), w.double(), None if bias is None else b.double(), **wide)
            assert ratio(kernels.linear(left, w, bias, **options), exact) <= 3e-7


def test_norms():
    x, weight = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))[:, ::2], torch.linspace(0.5, 2, 25)
    for sizes in ([25], [5, 20], [11, 7, 7]):
        weights = weight.split(sizes)
        ours, exact = (
            kernels.norms(x, weights, 1e-3),
            reference.norms_step(x.double(), weight.double().split(sizes), 1e-3),
        )
        assert all(ratio(a, b) <= 3e-7 for a, b in zip(ours, exact, strict=True))


# ---- the replayed loop, on a stand-in for a graph -------------------------------------------------------------------


class Recording(TorchDispatchMode):
    """What a CUDA graph keeps: which kernels ran on which memory. Nothing that Python does between them."""

    FORBIDDEN = ("aten::_local_scalar_dense", "aten::nonzero", "aten::item", "aten::equal")

    def __init__(self):
        super().__init__()
        self.tape = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function._schema.name not in self.FORBIDDEN, f"{function} would wait for the device"
        result = function(*args, **(kwargs or {}))
        self.tape.append((function, args, kwargs or {}, result))
        return result


class FakeGraph:
    made = []

    def __init__(self, run, pool=None):
        run()
        with Recording() as recording:
            run()
        self.tape, self.pool, self.replays = recording.tape, "pool", 0
        FakeGraph.made.append(self)

    def replay(self):
        self.replays += 1
        for function, args, kwargs, kept in self.tape:
            results = function(*args, **kwargs)
            for mine, fresh in zip(tree_leaves(kept), tree_leaves(results), strict=True):
                if isinstance(mine, torch.Tensor):
                    mine.copy_(fresh)  # a result of an earlier replay lies in the same memory


def mixed_linear(x, weight, *arguments, **options):
    return reference.linear_step(x, weight.to(x.dtype), *arguments, **options)


def dense_experts(mlp, x, eps):
    """Without a look at the routing on the host."""
    mlp = replace(mlp, w_in=mlp.w_in.to(x.dtype), w_out=mlp.w_out.to(x.dtype))
    normed = rms_norm(x, mlp.norm.shape, mlp.norm, eps)
    weights, chosen = (normed @ mlp.router.T).softmax(-1).topk(mlp.top_k)
    for k in range(mlp.top_k):
        gate, up = torch.einsum("bd,bod->bo", normed, mlp.w_in[chosen[:, k]]).chunk(2, -1)
        x = x + weights[:, k, None] * torch.einsum("bh,bdh->bd", silu(gate) * up, mlp.w_out[chosen[:, k]])
    return x


def keep_ended(state, kept, lengths, frame):
    kept.copy_(torch.where((lengths == frame + 1)[:, None], state, kept))


@pytest.fixture
def replayed(monkeypatch):
    """graph.rollout with PyTorch's operations for kernels, frames recorded and replayed."""
    monkeypatch.setattr(kernels, "TRITON", reference.REFERENCE._replace(linear=mixed_linear, experts=dense_experts))
    monkeypatch.setattr(kernels, "keep_ended", keep_ended)
    monkeypatch.setattr(graph, "NoGraph", FakeGraph)
    monkeypatch.setattr(FakeGraph, "made", [])
    return lambda *arguments, **options: rollout(*arguments, **options, backend="triton")


@pytest.mark.parametrize("window", [None, 7])
def test_replays_equal_the_reference(replayed, window):
    program = small_program("EMTE", window=window)
    inputs = make_inputs(program, batch=2, frames=graph.WINDOW + 21)
    exact, end = rollout(to(program, torch.float64), inputs.double(), backend="reference")
    hidden, state = replayed(program, inputs)
    assert ratio(hidden, exact) <= 1e-5
    for mine, theirs in zip(state.tensors(), end.tensors(), strict=True):
        assert ratio(mine[:, : theirs.shape[1]] if mine.dim() == 4 else mine, theirs) <= 1e-5
    assert [made.replays for made in FakeGraph.made] == [graph.WINDOW // 8 + 2, 5]
    # The same graphs serve other inputs, and the state of the call before is gone.
    other = make_inputs(program, batch=2, frames=11, seed=5)
    assert ratio(replayed(program, other)[0], rollout(program, other, backend="reference")[0]) <= 1e-5
    assert len(FakeGraph.made) == 2


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("splits", [[1] * 30, [4, 0, 26], [29, 1]])
def test_any_split_gives_the_same_bytes(replayed, window, splits):
    program = small_program("ETM", window=window)
    inputs = make_inputs(program)
    whole, end = replayed(program, inputs)
    state, start = None, 0
    for size in splits:
        before = None if state is None else [tensor.clone() for tensor in state.tensors()]
        hidden, after = replayed(program, inputs[:, start : start + size], state)
        assert torch.equal(hidden, whole[:, start : start + size])
        assert state is None or all(torch.equal(a, b) for a, b in zip(before, state.tensors(), strict=True))
        state, start = after, start + size
    assert all(torch.equal(a, b) for a, b in zip(state.tensors(), end.tensors(), strict=True))
    assert len(FakeGraph.made) == 2


def test_lengths_are_as_sequences_alone(replayed):
    program = small_program("ETM")
    frames = graph.WINDOW + 9
    inputs = make_inputs(program, batch=6, frames=frames)
    lengths = torch.tensor([5, 0, graph.WINDOW, 300, -3, graph.WINDOW + 1], dtype=torch.int32)
    hidden, state = replayed(program, inputs, lengths=lengths)
    for row, length in enumerate(lengths.clamp(0, frames).tolist()):
        alone, end = replayed(program, inputs[row : row + 1, :length])
        assert not hidden[row, length:].any()
        for mine, theirs in zip([hidden[:, :length], *state.tensors()], [alone, *end.tensors()], strict=True):
            assert (mine[row] - theirs[0]).double().norm() <= 1e-6 * theirs[0].double().norm()  # exactly 0 at length 0
    _, end = replayed(program, inputs, state, lengths=frames - lengths.clamp(0, frames))
    assert end.position.tolist() == [frames] * 6


def test_nan_stays_in_its_sequence(replayed):
    program = small_program("ETM")
    inputs = make_inputs(program, batch=3)
    clean = replayed(program, inputs)[0]
    inputs[1, 3, 2] = float("nan")
    hidden = replayed(program, inputs)[0]
    assert torch.equal(hidden[[0, 2]], clean[[0, 2]]) and torch.equal(hidden[1, :3], clean[1, :3])
    assert hidden[1, 3:].isnan().all()


def test_weights_that_change_are_seen(replayed):
    """Those that are used as they are, and those of which a rounded copy is kept; no new graph for either."""
    program = small_program("EM")
    inputs = make_inputs(program, frames=4)
    for dtype in (None, torch.bfloat16):
        before = replayed(program, inputs, weights_dtype=dtype)[0]
        made = len(FakeGraph.made)
        program.layers[0].mlp.w_in.mul_(1.5)
        after = replayed(program, inputs, weights_dtype=dtype)[0]
        assert len(FakeGraph.made) == made and not torch.equal(before, after)
        assert ratio(after, rollout(program, inputs, weights_dtype=dtype, backend="reference")[0]) <= 1e-5
    layer = program.layers[1]
    layer.mlp.w_in.data = layer.mlp.w_in.data.clone()  # what the graph reads is no longer what the program has
    replayed(program, inputs)
    assert len(FakeGraph.made) == made + 2


def test_loops_die_with_the_program_and_are_few(replayed):
    program = small_program("M")
    for batch in range(1, graph.MOST_LOOPS + 3):
        replayed(program, make_inputs(program, batch=batch, frames=1))
    assert len(graph._loops[program]) == graph.MOST_LOOPS
    replayed(program, make_inputs(program, batch=2, frames=1), weights_dtype=torch.bfloat16)
    alive = weakref.ref(next(iter(graph._loops[program].values())))
    FakeGraph.made.clear()
    del program
    gc.collect()
    assert alive() is None


def test_calls_of_every_mode_share_a_graph(replayed):
    program = small_program("ET")
    inputs = make_inputs(program, frames=3)
    with torch.inference_mode():
        first, state = replayed(program, inputs)
    second, _ = replayed(program, inputs)
    assert torch.equal(first, second) and len(FakeGraph.made) == 2
    replayed(program, inputs.requires_grad_(), state)


def test_nothing_to_do(replayed):
    program = small_program("ETM")
    hidden, state = replayed(program, make_inputs(program, frames=0))
    assert hidden.shape == (3, 0, 12) and state.position.tolist() == [0] * 3
    hidden, state = replayed(program, make_inputs(program, batch=0))
    assert hidden.shape == (0, 30, 12) and state.batch == 0
    assert not FakeGraph.made


def test_one_row_of_bytes_per_sequence():
    """The state's parts lie in one buffer, aligned, without a gap for convolutions of one tap."""
    program = make_program("MT", replace_taps(SMALL), dtype=torch.bfloat16)
    like = torch.empty(3, 1, 12, dtype=torch.bfloat16)
    template = graph.template(program, like, (5,))
    storage = torch.zeros(3, graph.row_words(template), dtype=torch.int32)
    state = graph.views(storage, template)
    for value, tensor in enumerate(state.tensors(), 1):
        tensor.fill_(value)
    expected = RolloutState.empty(program.layers, 12, 3, dtype=torch.bfloat16, frames=5)
    for value, (mine, theirs) in enumerate(zip(state.tensors(), expected.tensors(), strict=True), 1):
        same_room = mine.shape[2:] == theirs.shape[2:] if mine.dim() == 4 else mine.shape == theirs.shape
        assert same_room and mine.dtype == theirs.dtype and (mine == value).all()
        assert (
            mine.numel() == 0
            or (mine.data_ptr() - storage.data_ptr()) % 64 == 0
            and mine.stride(0) * mine.itemsize % 64 == 0
        )


def replace_taps(sizes):
    changed = Sizes()
    changed.__dict__.update(sizes.__dict__, taps=1)
    return changed


# ---- choice ---------------------------------------------------------------------------------------------------------


def test_what_it_cannot_run_is_refused_by_name():
    program = small_program("ET")
    inputs = make_inputs(program, frames=1)
    with pytest.raises(BackendUnavailable, match="triton.*float64"):
        rollout(to(program, torch.float64), inputs.double(), backend="triton")
    wide = replace(RolloutState.empty(program.layers, 12, 3), feedback=torch.zeros(3, 12, dtype=torch.float64))
    with pytest.raises(BackendUnavailable, match="state holds torch.float64"):
        rollout(program, inputs, wide, backend="triton")
    many = make_program("E", SMALL, experts=257, dtype=torch.float32)
    with pytest.raises(BackendUnavailable, match="256 experts"):
        rollout(many, inputs, backend="triton")
