"""rollout on a GPU, by every backend that runs there: against the float64 reference, and the contract of the loop."""

import pytest
import torch

from jambatalk_kernels import BackendUnavailable
from jambatalk_kernels.rollout.op import rollout
from jambatalk_kernels.rollout.program import AttentionMixer, DenseMLP, Layer, MambaMixer, MoEMLP, Program

ARRANGEMENTS = {"moe-moe": "EMETEME", "m-moe": "MEMTEME", "m-m": "MEMTMEM", "moe-m": "EMETMEM"}


def make_program(device, kinds="EMT", d=64, hidden=96, window=40, dtype=torch.float64):
    """Gains such that errors do not grow from frame to frame."""
    g = torch.Generator().manual_seed(0)
    inner, rank, states, heads, kv_heads, experts = 2 * d, -(-d // 16), 16, 4, 1, 4
    head_dim = d // heads

    def random(*shape, scale=1.0):
        return (torch.randn(*shape, generator=g, dtype=torch.float64) * scale).to(dtype).to(device)

    def matrix(*shape, scale=0.7):
        return random(*shape, scale=scale * shape[-1] ** -0.5)

    def near_one(size):
        return 1 + random(size, scale=0.1)

    def mamba():
        decay = -torch.arange(1, states + 1, dtype=dtype, device=device).repeat(inner, 1)
        return MambaMixer(
            near_one(d), matrix(2 * inner, d), random(inner, 4, scale=0.4), random(inner, scale=0.1),
            matrix(rank + 2 * states, inner), near_one(rank), near_one(states), near_one(states), matrix(inner, rank),
            random(inner) - 1, decay, random(inner), matrix(d, inner),
        )  # fmt: skip

    def attention():
        size = kv_heads * head_dim
        return AttentionMixer(
            near_one(d), matrix(d, d, scale=2), matrix(size, d, scale=2), matrix(size, d), matrix(d, d),
            heads, kv_heads, window, 10000.0,
        )  # fmt: skip

    def mlp(kind):
        if kind != "E":
            return DenseMLP(near_one(d), matrix(2 * hidden, d), matrix(d, hidden))
        return MoEMLP(
            near_one(d), matrix(experts, d, scale=2), matrix(experts, 2 * hidden, d), matrix(experts, d, hidden), 2
        )

    layers = tuple(Layer(attention() if kind == "T" else mamba(), mlp(kind)) for kind in kinds)
    return Program(layers, near_one(d), matrix(d, d, scale=0.5), random(d, scale=0.1))


def to(program, dtype):
    """The same numbers, those that `dtype` cannot hold rounded."""
    from dataclasses import fields, replace

    def cast(record):
        tensors = {f.name: getattr(record, f.name) for f in fields(record)}
        return replace(record, **{n: t.to(dtype) for n, t in tensors.items() if isinstance(t, torch.Tensor)})

    return replace(cast(program), layers=tuple(Layer(cast(layer.mixer), cast(layer.mlp)) for layer in program.layers))


def make_inputs(program, batch=2, frames=30, seed=1):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, frames, program.width, generator=g, dtype=torch.float64)
    return x.to(program.final_norm)


def ratio(value, exact):
    return ((value.double() - exact.double()).norm() / exact.double().norm()).item()


@pytest.fixture(params=["triton", "cuda"])
def run(request, device):
    """rollout by each GPU backend that this machine has; by the CPU's where this is a rehearsal."""
    rehearsal = device.type == "cpu"
    if rehearsal and request.param == "cuda":
        pytest.skip("a rehearsal, with the CPU's kernels")
    backend = "cpu" if rehearsal else request.param
    program = to(make_program(device, "M"), torch.float32)
    try:
        rollout(program, make_inputs(program, frames=1), backend=backend)
    except BackendUnavailable as error:
        pytest.skip(str(error))
    return lambda *arguments, **options: rollout(*arguments, **options, backend=backend)


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_600_frames(run, device, arrangement):
    exact_program = make_program(device, ARRANGEMENTS[arrangement])
    program = to(exact_program, torch.float32)
    inputs = make_inputs(exact_program, frames=600)
    exact = rollout(to(program, torch.float64), inputs.float().double(), backend="reference")[0]
    peer = rollout(program, inputs.float(), backend="reference")[0]
    ours = run(program, inputs.float())[0]
    assert ratio(ours, exact) <= 1e-5
    assert ratio(ours, exact) <= 2 * ratio(peer, exact) + ratio(exact.float(), exact)


@pytest.mark.parametrize("batch", [1, 3, 40])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_batches_and_stored_weights(run, device, batch, dtype):
    program = to(make_program(device), torch.float32)
    inputs = make_inputs(program, batch=batch)
    exact = rollout(to(program.rounded(dtype), torch.float64), inputs.double(), backend="reference")[0]
    assert ratio(run(program, inputs, weights_dtype=dtype)[0], exact) <= 1e-5


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("splits", [[1] * 30, [4, 0, 26], [29, 1]])
def test_any_split_gives_the_same_bytes(run, device, window, splits):
    program = to(make_program(device, window=window), torch.float32)
    inputs = make_inputs(program)
    whole, end = run(program, inputs)
    state, start = None, 0
    for size in splits:
        hidden, state = run(program, inputs[:, start : start + size], state)
        assert torch.equal(hidden, whole[:, start : start + size])
        start += size
    for mine, theirs in zip(state.tensors(), end.tensors(), strict=True):
        room = min(mine.shape[1], theirs.shape[1]) if mine.dim() == 4 else None
        assert torch.equal(mine[:, :room] if room else mine, theirs[:, :room] if room else theirs)


def test_lengths_are_as_sequences_alone(run, device):
    program = to(make_program(device), torch.float32)
    inputs = make_inputs(program, batch=5, frames=300)
    lengths = torch.tensor([5, 0, 256, 300, 257], device=device)
    hidden, state = run(program, inputs, lengths=lengths)
    for row, length in enumerate(lengths.tolist()):
        alone, end = run(program, inputs[row : row + 1, :length])
        assert not hidden[row, length:].any()
        for mine, theirs in zip([hidden[:, :length], *state.tensors()], [alone, *end.tensors()], strict=True):
            room = theirs.shape[1] if mine.dim() == 4 else None
            mine = mine[row, :room] if room else mine[row]
            assert (mine - theirs[0]).double().norm() <= 1e-5 * theirs[0].double().norm()
    assert state.position.tolist() == lengths.tolist()


def test_nan_stays_in_its_sequence(run, device):
    program = to(make_program(device), torch.float32)
    inputs = make_inputs(program, batch=3)
    clean = run(program, inputs)[0]
    inputs[1, 3, 2] = torch.nan
    hidden = run(program, inputs)[0]
    assert torch.equal(hidden[[0, 2]], clean[[0, 2]]) and torch.equal(hidden[1, :3], clean[1, :3])
    assert hidden[1, 3:].isnan().all()


def test_equal_bytes_over_runs_and_streams(run, device):
    program = to(make_program(device), torch.float32)
    inputs = make_inputs(program, batch=4, frames=100)
    first, end = run(program, inputs)
    for _ in range(3):
        hidden, state = run(program, inputs)
        assert torch.equal(hidden, first)
        assert all(torch.equal(a, b) for a, b in zip(state.tensors(), end.tensors(), strict=True))
    if device.type == "cuda":
        streams = [torch.cuda.Stream() for _ in range(2)]
        results = []
        for stream in streams * 3:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                results.append(run(program, inputs)[0])
        torch.cuda.synchronize()
        assert all(torch.equal(result, first) for result in results)


def test_does_not_synchronise(run, device, request):
    if device.type == "cpu":
        pytest.skip("a rehearsal: nothing to synchronise with")
    if "cuda" in request.node.name:
        pytest.skip("the persistent kernel's watchdog is read at the end of a call, which waits for it")
    program = to(make_program(device), torch.float32)
    inputs = make_inputs(program)
    lengths = torch.tensor([30, 7], device=device)
    _, state = run(program, inputs, lengths=lengths)  # compiled and captured
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(program, inputs, state, lengths=lengths)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_nothing_to_do(run, device):
    program = to(make_program(device), torch.float32)
    assert run(program, make_inputs(program, frames=0))[0].shape == (2, 0, 64)
    hidden, state = run(program, make_inputs(program, batch=0))
    assert hidden.shape == (0, 30, 64) and state.batch == 0
    assert run(program, make_inputs(program, frames=1))[1].position.tolist() == [1, 1]
