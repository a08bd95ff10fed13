"""The native rollout against the reference: the same numbers for any arrangement, batch, split and number of threads;
packing; interruption; what is refused."""

import contextlib
import gc
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import fields, replace
from pathlib import Path
from unittest import mock

import pytest
import torch

from jambatalk_kernels import BackendUnavailable, KVCache, native_library, use_backend
from jambatalk_kernels.rollout import cpu, packing
from jambatalk_kernels.rollout.op import rollout
from jambatalk_kernels.rollout.program import (
    AttentionMixer,
    DenseMLP,
    Layer,
    MambaMixer,
    MoEMLP,
    Program,
    RolloutState,
)

LOADED, WHY_NOT = native_library()
pytestmark = pytest.mark.skipif(not LOADED, reason=WHY_NOT)

if LOADED:
    import _jambatalk_native

    ISAS = _jambatalk_native.supported_cpu_isas()
else:
    ISAS = []


@pytest.fixture(params=ISAS)
def isa(request):
    before = _jambatalk_native.cpu_isa()
    _jambatalk_native.set_cpu_isa(request.param)
    yield request.param
    _jambatalk_native.set_cpu_isa(before)


class Sizes:
    """Defaults: nothing is a multiple of a panel, a vector or the padding."""

    def __init__(self, d=10, inner=37, taps=4, rank=3, states=5, heads=4, kv_heads=2, head_dim=6, hidden=19):
        self.d, self.inner, self.taps, self.rank, self.states = d, inner, taps, rank, states
        self.heads, self.kv_heads, self.head_dim, self.hidden = heads, kv_heads, head_dim, hidden


def make_program(
    kinds, sizes=None, *, window=7, rope_base=50.0, experts=5, top_k=2, feedback=True, bias=True, dtype=torch.float64
):
    """kinds: the layers as in `ARRANGEMENTS`. Gains are such that the loop is stable: errors do not grow."""
    s = sizes or Sizes()
    generator = torch.Generator().manual_seed(0)

    def random(*shape, scale=1.0):
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale

    def matrix(*shape, scale=0.7):
        return random(*shape, scale=scale * shape[-1] ** -0.5)

    def near_one(size):
        return 1 + random(size, scale=0.1)

    def mamba():
        return MambaMixer(
            norm=near_one(s.d), in_proj=matrix(2 * s.inner, s.d), conv_weight=random(s.inner, s.taps, scale=0.4),
            conv_bias=random(s.inner, scale=0.1) if bias else None, x_proj=matrix(s.rank + 2 * s.states, s.inner),
            dt_norm=near_one(s.rank), b_norm=near_one(s.states), c_norm=near_one(s.states),
            dt_proj=matrix(s.inner, s.rank), dt_bias=random(s.inner) - 1,
            A=-torch.arange(1, s.states + 1, dtype=torch.float64).repeat(s.inner, 1), D=random(s.inner),
            out_proj=matrix(s.d, s.inner),
        )  # fmt: skip

    def attention():
        size = s.kv_heads * s.head_dim
        return AttentionMixer(
            near_one(s.d), matrix(s.heads * s.head_dim, s.d, scale=2), matrix(size, s.d, scale=2), matrix(size, s.d),
            matrix(s.d, s.heads * s.head_dim), s.heads, s.kv_heads, window, rope_base,
        )  # fmt: skip

    def dense():
        return DenseMLP(near_one(s.d), matrix(2 * s.hidden, s.d), matrix(s.d, s.hidden))

    def moe():
        return MoEMLP(
            near_one(s.d), matrix(experts, s.d, scale=2), matrix(experts, 2 * s.hidden, s.d),
            matrix(experts, s.d, s.hidden), top_k,
        )  # fmt: skip

    layers = tuple(Layer(attention() if k == "T" else mamba(), moe() if k == "E" else dense()) for k in kinds)
    program = Program(
        layers, near_one(s.d), matrix(s.d, s.d, scale=0.5) if feedback else None,
        random(s.d, scale=0.1) if feedback and bias else None,
    )  # fmt: skip
    return to(program, dtype)


def to(program, dtype):
    def cast(record):
        tensors = {f.name: getattr(record, f.name) for f in fields(record)}
        return replace(record, **{n: t.to(dtype) for n, t in tensors.items() if isinstance(t, torch.Tensor)})

    return replace(cast(program), layers=tuple(Layer(cast(layer.mixer), cast(layer.mlp)) for layer in program.layers))


def make_inputs(program, batch=3, frames=30, seed=1):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(batch, frames, program.width, generator=generator, dtype=torch.float64)
    return inputs.to(program.final_norm.dtype)


def ratio(value, exact):
    return ((value.double() - exact.double()).norm() / exact.double().norm()).item()


def assert_states(mine, theirs, tolerance):
    for a, b in zip(mine.tensors(), theirs.tensors(), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@contextlib.contextmanager
def arranged(group, workers, threads=2):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with mock.patch.object(cpu, "arrange", lambda *_: (group, workers)):
            yield
    finally:
        torch.set_num_threads(before)


KINDS = ["M", "E", "T", "EMETEME", "MEMTMEM", "TT", ""]


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("batch", [1, 2, 7])
def test_float64_equals_the_reference(isa, kinds, batch):
    program = make_program(kinds)
    inputs = make_inputs(program, batch)
    hidden, state = rollout(program, inputs, backend="cpu")
    expected, end = rollout(program, inputs, backend="reference")
    assert ratio(hidden, expected) < 1e-12
    assert_states(state, end, 1e-11)


@pytest.mark.parametrize(
    "change",
    [
        dict(window=None), dict(window=1), dict(rope_base=None), dict(feedback=False), dict(bias=False),
        dict(experts=1, top_k=1), dict(experts=3, top_k=3), dict(sizes=Sizes(taps=1)), dict(sizes=Sizes(taps=16)),
        dict(sizes=Sizes(d=32, inner=64, rank=4, states=16, head_dim=64, hidden=32)),
        dict(sizes=Sizes(d=1, inner=1, rank=1, states=1, heads=1, kv_heads=1, head_dim=2, hidden=1)),
        dict(sizes=Sizes(heads=6, kv_heads=6, head_dim=150)),
    ],
    ids=lambda change: ",".join(f"{k}={'...' if k == 'sizes' else v}" for k, v in change.items()),
)  # fmt: skip
def test_every_option_equals_the_reference(isa, change):
    program = make_program("EMT", **change)
    inputs = make_inputs(program)
    hidden, state = rollout(program, inputs, backend="cpu")
    expected, end = rollout(program, inputs, backend="reference")
    assert ratio(hidden, expected) < 1e-12
    assert_states(state, end, 1e-11)


@pytest.mark.parametrize(
    "kinds, batch",
    [
        ("EMETEME", 1),
        pytest.param("MEMTEME", 2, marks=pytest.mark.slow),
        ("MEMTMEM", 1),
        pytest.param("EMETMEM", 3, marks=pytest.mark.slow),
    ],
)
def test_float32_is_as_accurate_as_the_reference(kinds, batch):
    """The four arrangements, 600 frames fed back into themselves."""
    sizes = Sizes(d=64, inner=128, rank=4, states=16, heads=4, kv_heads=1, head_dim=16, hidden=128)
    program = make_program(kinds, sizes, window=50, experts=4)
    inputs = make_inputs(program, batch=batch, frames=600).float()
    single = to(program, torch.float32)
    exact = rollout(to(single, torch.float64), inputs.double(), backend="reference")[0]
    ours, theirs = (rollout(single, inputs, backend=name)[0] for name in ("cpu", "reference"))
    assert ratio(ours, theirs) <= 1e-5
    assert ratio(ours, exact) <= 2 * ratio(theirs, exact) + 1e-7


def test_bfloat16_storage_computes_with_the_rounded_matrices_exactly(isa):
    program = make_program("EMT", dtype=torch.float32)
    inputs = make_inputs(program)
    stored = rollout(program, inputs, weights_dtype=torch.bfloat16, backend="cpu")[0]
    assert torch.equal(stored, rollout(program.rounded(torch.bfloat16), inputs, backend="cpu")[0])
    assert not torch.equal(stored, rollout(program, inputs, backend="cpu")[0])
    half, wide = packing.pack(program, torch.bfloat16), packing.pack(program, None)
    assert 2 * half.frame_bytes == wide.frame_bytes and half.storage.numel() < 0.8 * wide.storage.numel()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_matrices_in_a_float64_program(dtype):
    program = make_program("EMT")
    inputs = make_inputs(program)
    mine, theirs = (rollout(program, inputs, weights_dtype=dtype, backend=name)[0] for name in ("cpu", "reference"))
    assert ratio(mine, theirs) < 1e-12
    assert ratio(mine, rollout(program, inputs, backend="cpu")[0]) > 1e-5


@pytest.mark.parametrize("group, workers", [(1, 1), (2, 1), (3, 1), (5, 1), (5, 2), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_bytes_whoever_computes_them(isa, group, workers, dtype):
    program = make_program("EMTE", dtype=dtype)
    inputs = make_inputs(program, batch=5)
    lengths = torch.tensor([30, 7, 0, 30, 11])
    with arranged(1, 1, threads=1):
        hidden, state = rollout(program, inputs, lengths=lengths, backend="cpu")
    for threads in (2, 5):
        with arranged(group, workers, threads):
            other, end = rollout(program, inputs, lengths=lengths, backend="cpu")
        assert torch.equal(hidden, other)
        assert all(torch.equal(a, b) for a, b in zip(state.tensors(), end.tensors(), strict=True))


def test_a_team_inside_of_a_busy_pool_does_not_hang():
    """Several Python threads with teams of more threads than there are cores."""
    program = make_program("EMT", dtype=torch.float32)
    inputs = make_inputs(program, batch=1, frames=40)
    expected = rollout(program, inputs, backend="cpu")[0]
    results = [None] * 3

    def work(i):
        results[i] = rollout(program, inputs, backend="cpu")[0]

    with arranged(1, 6, threads=6):
        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(results))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert all(torch.equal(result, expected) for result in results)


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("splits", [[1] * 30, [4, 0, 26], [29, 1]])
def test_any_split_gives_the_same_bytes(window, splits):
    program = make_program("ETM", window=window, dtype=torch.float32)
    inputs = make_inputs(program)
    whole, end = rollout(program, inputs, backend="cpu")
    state, start = None, 0
    for size in splits:
        hidden, state = rollout(program, inputs[:, start : start + size], state, backend="cpu")
        assert torch.equal(hidden, whole[:, start : start + size])
        start += size
    assert state.position.tolist() == [30, 30, 30]
    for mine, theirs in zip(state.tensors(), end.tensors(), strict=True):
        # A cache that grew on the way may have other room to spare.
        room = min(mine.shape[1], theirs.shape[1]) if mine.dim() == 4 else None
        assert torch.equal(mine[:, :room] if room else mine, theirs[:, :room] if room else theirs)


def test_state_goes_from_backend_to_backend_and_is_not_changed():
    program = make_program("ETM")
    inputs = make_inputs(program)
    whole = rollout(program, inputs, backend="reference")[0]
    for first, second in (("cpu", "reference"), ("reference", "cpu")):
        _, state = rollout(program, inputs[:, :11], backend=first)
        before = [tensor.clone() for tensor in state.tensors()]
        hidden, _ = rollout(program, inputs[:, 11:], state, backend=second)
        assert ratio(hidden, whole[:, 11:]) < 1e-12
        assert all(torch.equal(a, b) for a, b in zip(before, state.tensors(), strict=True))


def test_lengths_are_as_sequences_alone():
    program = make_program("ETM", dtype=torch.float32)
    inputs = make_inputs(program, batch=6)
    lengths = torch.tensor([5, 0, 30, 5, -3, 99])
    hidden, state = rollout(program, inputs, lengths=lengths, backend="cpu")
    for row, length in enumerate(lengths.clamp(0, 30).tolist()):
        alone, alone_state = rollout(program, inputs[row : row + 1, :length], backend="cpu")
        assert torch.equal(hidden[row, :length], alone[0]) and (hidden[row, length:] == 0).all()
        assert all(torch.equal(a[row], b[0]) for a, b in zip(state.tensors(), alone_state.tensors(), strict=True))
    again, end = rollout(program, inputs, state, lengths=30 - lengths.clamp(0, 30), backend="cpu")
    assert end.position.tolist() == [30] * 6


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_stays_in_its_sequence(value):
    program = make_program("ETM", dtype=torch.float32)
    inputs = make_inputs(program, batch=4)
    clean = rollout(program, inputs, backend="cpu")[0]
    inputs[1, 3, 2] = value
    hidden = rollout(program, inputs, backend="cpu")[0]
    assert torch.equal(hidden[[0, 2, 3]], clean[[0, 2, 3]]) and torch.equal(hidden[1, :3], clean[1, :3])
    assert hidden[1, 3:].isnan().all()


def test_strides_of_the_inputs():
    program = make_program("ETM")
    inputs = make_inputs(program)
    whole = rollout(program, inputs, backend="cpu")[0]
    turned = inputs.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    assert torch.equal(rollout(program, turned, backend="cpu")[0], whole)
    assert torch.equal(rollout(program, inputs[:1].expand(3, -1, -1), backend="cpu")[0][2], whole[0])


def test_nothing_to_do():
    program = make_program("ETM")
    hidden, state = rollout(program, make_inputs(program, frames=0), backend="cpu")
    assert hidden.shape == (3, 0, 10) and state.position.tolist() == [0] * 3
    hidden, state = rollout(program, make_inputs(program, batch=0), backend="cpu")
    assert hidden.shape == (0, 30, 10) and state.batch == 0
    assert rollout(program, make_inputs(program, frames=1), backend="cpu")[1].position.tolist() == [1] * 3


def test_ties_of_the_router_go_to_the_lowest_expert():
    program = make_program("E")
    layer = program.layers[0]
    router = torch.zeros_like(layer.mlp.router)  # rows that are equal but not zero may differ by rounding
    program = replace(program, layers=(replace(layer, mlp=replace(layer.mlp, router=router)),))
    inputs = make_inputs(program)
    assert ratio(*(rollout(program, inputs, backend=name)[0] for name in ("cpu", "reference"))) < 1e-12


# ---- packing --------------------------------------------------------------------------------------------------------


def test_packed_once_per_program_and_again_when_it_changed():
    program = make_program("ETM", dtype=torch.float32)
    inputs = make_inputs(program)
    first = packing.pack(program, None)
    assert packing.pack(program, None) is first
    before = rollout(program, inputs, backend="cpu")[0]
    program.layers[0].mlp.w_in.mul_(1.5)
    assert packing.pack(program, None) is not first
    after = rollout(program, inputs, backend="cpu")[0]
    assert not torch.equal(before, after)
    assert ratio(after, rollout(program, inputs, backend="reference")[0]) < 1e-5


def test_packed_matrices_die_with_the_program():
    program = make_program("M", dtype=torch.float32)
    alive = weakref.ref(packing.pack(program, None).storage)
    packing.pack(program, torch.float16)
    assert alive() is not None
    del program
    gc.collect()
    assert alive() is None


def test_inference_tensors_can_be_packed():
    with torch.inference_mode():
        program = make_program("M")
        hidden = rollout(program, make_inputs(program), backend="cpu")[0]
    assert torch.equal(hidden, rollout(make_program("M"), make_inputs(program), backend="cpu")[0])


# ---- interruption and memory ----------------------------------------------------------------------------------------


@pytest.fixture
def interruptible():
    """A shell starts what it puts into the background with SIGINT ignored, and Python leaves it so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_interrupt_is_heard_and_the_state_stays_usable(interruptible):
    program = make_program("EMT" * 3, Sizes(d=64, inner=128, hidden=256), dtype=torch.float32)
    inputs = make_inputs(program, batch=1, frames=50)
    _, state = rollout(program, inputs[:, :20], backend="cpu")
    before = [tensor.clone() for tensor in state.tensors()]
    rest = rollout(program, inputs[:, 20:], state, backend="cpu")[0]
    sent = []

    def interrupt():
        time.sleep(0.3)
        sent.append(time.perf_counter())
        signal.raise_signal(signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        rollout(program, inputs[:, 20:21].expand(-1, 500_000, -1), state, backend="cpu")
    heard = time.perf_counter()
    thread.join()
    assert heard - sent[0] < 1
    assert all(torch.equal(a, b) for a, b in zip(before, state.tensors(), strict=True))
    assert torch.equal(rollout(program, inputs[:, 20:], state, backend="cpu")[0], rest)


MEMORY = """
import resource, torch
from jambatalk_kernels import rollout
from test_rollout_native import make_program, make_inputs

program = make_program("ETM", window=30, dtype=torch.float32)
inputs = make_inputs(program, batch=2, frames=1).expand(-1, 60_000, -1)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10

rollout(program, inputs[:, :600], backend="cpu")
before = peak()
hidden, _ = rollout(program, inputs, backend="cpu")
print(peak() - before - hidden.numel() * 4)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units elsewhere")
def test_memory_does_not_grow_with_the_clip():
    run = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, cwd=Path(__file__).parent)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 1 << 20


ALLOCATIONS = """
#include <stddef.h>
extern void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t);
static long count;
long allocations(void) { return __atomic_load_n(&count, __ATOMIC_RELAXED); }
#define COUNT __atomic_add_fetch(&count, 1, __ATOMIC_RELAXED)
void *malloc(size_t n) { COUNT; return __libc_malloc(n); }
void *calloc(size_t n, size_t m) { COUNT; return __libc_calloc(n, m); }
void *realloc(void *p, size_t n) { COUNT; return __libc_realloc(p, n); }
void *aligned_alloc(size_t a, size_t n) { COUNT; return __libc_memalign(a, n); }
"""

COUNTED = """
import ctypes, torch
from jambatalk_kernels.rollout import packing
from jambatalk_kernels.rollout.program import RolloutState
from test_rollout_native import make_program, make_inputs

torch.set_num_threads(1)
program = make_program("EMT", dtype=torch.float32)
packed, inputs = packing.pack(program, None), make_inputs(program, batch=3, frames=200)
tensors = RolloutState.empty(program.layers, program.width, 3, frames=200).tensors()
lengths, hidden = torch.full((3,), 200), torch.empty_like(inputs)
allocations = ctypes.CDLL(None).allocations

def count(frames, group, workers):
    before = allocations()
    torch.ops.jambatalk.rollout(
        packed.plan, packed.storage, inputs, lengths, hidden, tensors, 0, frames, 1e-6, group, workers
    )
    return allocations() - before

for group, workers in ((1, 1), (3, 1), (3, 2)):
    count(200, group, workers)
    print(count(1, group, workers), count(200, group, workers))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="counts by the inner names of glibc")
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_nothing_is_allocated_in_the_loop(tmp_path):
    (tmp_path / "count.c").write_text(ALLOCATIONS)
    library = tmp_path / "count.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, tmp_path / "count.c"], check=True)
    environment = os.environ | {"LD_PRELOAD": str(library)}
    run = subprocess.run(
        [sys.executable, "-c", COUNTED], capture_output=True, text=True, cwd=Path(__file__).parent, env=environment
    )
    assert run.returncode == 0, run.stderr
    counts = [tuple(map(int, line.split())) for line in run.stdout.splitlines()]
    assert len(counts) == 3 and all(one == many > 0 for one, many in counts), counts


# ---- choice and errors ----------------------------------------------------------------------------------------------


def test_chosen_where_it_can_run():
    program = make_program("ET", dtype=torch.float32)
    inputs = make_inputs(program)
    assert torch.equal(rollout(program, inputs)[0], rollout(program, inputs, backend="cpu")[0])
    with use_backend("cpu"), pytest.raises(BackendUnavailable, match="bfloat16"):
        rollout(to(program, torch.bfloat16), inputs.bfloat16())
    with pytest.raises(BackendUnavailable, match="cuda.*on the CPU"):
        rollout(program, inputs, backend="cuda")
    wide = RolloutState.empty(program.layers, 10, 3, dtype=torch.float64)
    with pytest.raises(BackendUnavailable, match="state holds torch.float64"):
        rollout(program, inputs, wide, backend="cpu")


def test_autocast_changes_nothing():
    program = make_program("ET", dtype=torch.float32)
    inputs = make_inputs(program)
    for backend in ("cpu", "reference"):
        expected = rollout(program, inputs, backend=backend)[0]
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(rollout(program, inputs, backend=backend)[0], expected)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    "change, error, text",
    [
        (lambda s: s.mixers.__setitem__(0, s.mixers[1]), TypeError, r"state\.mixers\[0\] must be a MambaState"),
        (lambda s: s.mixers.__setitem__(1, s.mixers[0]), TypeError, r"state\.mixers\[1\] must be a KVCache"),
        (lambda s: setattr(s.mixers[0], "conv", torch.zeros(3, 2, 37)), ValueError, r"mixers\[0\]\.conv"),
        (lambda s: setattr(s.mixers[0], "scan", torch.zeros(3, 5, 37)), ValueError, r"mixers\[0\]\.scan"),
        (lambda s: setattr(s.mixers[1], "k", torch.zeros(3, 7, 2, 5)), ValueError, r"mixers\[1\]\.k"),
        (lambda s: setattr(s.mixers[1], "v", torch.zeros(3, 8, 2, 6)), ValueError, r"mixers\[1\]\.v"),
        (lambda s: s.mixers.__setitem__(1, KVCache.empty(3, 6, 2, 6)), ValueError, r"mixers\[1\] .*room for 7"),
        (lambda s: setattr(s.mixers[1], "position", torch.zeros(3)), TypeError, r"mixers\[1\]\.position"),
        (lambda s: setattr(s, "feedback", torch.zeros(3, 9)), ValueError, r"state\.feedback"),
        (lambda s: setattr(s, "position", torch.zeros(3, dtype=torch.int32)), TypeError, r"state\.position"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_by_name(backend, change, error, text):
    program = make_program("MT", dtype=torch.float32)
    state = RolloutState.empty(program.layers, 10, 3)
    change(state)
    with pytest.raises(error, match=text):
        rollout(program, make_inputs(program), state, backend=backend)


def test_a_plan_of_other_making_is_refused():
    """The last line of defence, below `rollout`: no wild memory is read."""
    program = make_program("ET", dtype=torch.float32)
    inputs = make_inputs(program)
    packed = packing.pack(program, None)
    tensors = RolloutState.empty(program.layers, 10, 3, frames=30).tensors()
    op, lengths, hidden = torch.ops.jambatalk.rollout, torch.full((3,), 30), torch.empty_like(inputs)

    def call(plan=packed.plan, storage=packed.storage, state=tensors, end=30):
        op(plan, storage, inputs, lengths, hidden, state, 0, end, 1e-6, 1, 1)

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
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="rollout"):
            call(**wrong)


@pytest.mark.parametrize(
    "batch, threads, frame_bytes, expected",
    [
        (1, 1, 10**8, (1, 1)),
        (8, 1, 10**8, (8, 1)),
        (1, 2, 10**8, (1, 2)),
        (3, 2, 10**8, (3, 2)),
        (8, 2, 10**8, (4, 1)),
        (1, 64, 10**8, (1, 16)),
        (1, 64, 2 * 10**6, (1, 3)),
        (1, 2, 10**5, (1, 1)),
        (2, 2, 10**5, (1, 1)),
        (100, 2, 10**5, (4, 1)),
        (0, 2, 10**8, (1, 2)),
    ],
)
def test_arrangement(batch, threads, frame_bytes, expected):
    assert cpu.arrange(batch, threads, frame_bytes) == expected


def test_slices_are_short_also_before_a_frame_was_timed():
    assert cpu.first_slice(1, 10**8) == 16
    assert cpu.first_slice(64, 10**8) == 1
    assert cpu.first_slice(0, 0) == 16
