"""The loop on a GPU as a replayed CUDA graph: `reference.step` over the Triton step functions, captured once.

Everything that a frame reads or writes has one place for good (`Loop`): the state, a window of inputs, rotary tables
and results, and the number of the frame in that window, which the device counts. So a frame is the same launches
whatever its number, and several frames can be one graph. A call copies the state in, replays, and copies it out;
between, the host only queues work. `lengths` stay on the device too: each frame puts the states of the sequences that
end with it aside.

Cost of a frame: about 90 launches for seven layers (7 of a Mamba mixer, 7 of attention, 2 of a dense MLP, 7 of a
mixture of experts), 1.3 us each and what they do; the weights read once (kernels.md 5 expects 90 to 150 us at d 512).
Memory: the state twice, rounded weights where `weights_dtype` asks for them, and the window.

The first call with a program, batch and dtypes compiles and captures (some tenths of a second); the graphs live as long
as the program. A clip without a window on attention is captured again for every further CAPACITY_STEP frames.
"""

from __future__ import annotations

import contextlib
import math
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from jambatalk_kernels.attention.reference import KVCache
from jambatalk_kernels.moe.heuristics import MATRIX_VECTOR_ASSIGNMENTS
from jambatalk_kernels.rollout import reference
from jambatalk_kernels.rollout.program import AttentionMixer, Layer, MoEMLP, Program, RolloutState, Sublayer, tensors_of

if TYPE_CHECKING:
    from torch.cuda import _POOL_HANDLE

__all__ = ["MATRIX_VECTOR_ROWS", "rollout"]

MATRIX_VECTOR_ROWS = 8  # up to here a product streams its weights and has no use for matrix instructions
WINDOW = 256  # frames whose inputs, tables and results have a place
BUNDLES = (8, 1)  # frames of one graph
CAPACITY_STEP = 512  # of a cache without a window, so that a growing clip is not captured at every call
MOST_LOOPS = 8  # kept per program
ALIGNMENT = 64  # bytes, of every part of a sequence's state


def rollout(
    program: Program, inputs: Tensor, state: RolloutState | None, lengths: Tensor | None,
    weights_dtype: torch.dtype | None,
) -> tuple[Tensor, RolloutState]:  # fmt: skip
    """As `reference.rollout`, with the matrices rounded to ``weights_dtype``."""
    batch, frames, width = inputs.shape
    if batch == 0 or frames == 0:
        if state is None:
            state = RolloutState.empty(program.layers, width, batch, dtype=inputs.dtype, device=inputs.device)
        return torch.zeros_like(inputs), state.clone()
    on_device = torch.cuda.device(inputs.device) if inputs.is_cuda else contextlib.nullcontext()
    with on_device, torch.inference_mode(False), torch.no_grad():  # what is kept must serve calls of every mode
        if lengths is not None:
            lengths = lengths.to(device=inputs.device, dtype=torch.int64).clamp(0, frames)
        capacities = cache_capacities(program, state, frames)
        loop = loop_for(program, inputs, capacities, weights_dtype, lengths is not None)
        return loop(inputs, state, lengths)


def cache_capacities(program: Program, state: RolloutState | None, frames: int) -> tuple[int, ...]:
    """Of every attention layer's cache. Reads the positions of a state, where a layer has no window."""
    capacities = []
    for index, layer in enumerate(program.layers):
        if isinstance(layer.mixer, AttentionMixer):
            cache = None if state is None else state.mixers[index]
            assert cache is None or isinstance(cache, KVCache)  # `op.rollout` checks that the state fits the program
            if layer.mixer.window is not None:
                capacities.append(layer.mixer.window if cache is None else cache.capacity)
            else:
                needed = frames if cache is None else max(cache.capacity, int(cache.position.max()) + frames)
                capacities.append(-(-needed // CAPACITY_STEP) * CAPACITY_STEP)
    return tuple(capacities)


_loops: weakref.WeakKeyDictionary[Program, dict[tuple, Loop]] = weakref.WeakKeyDictionary()


def loop_for(
    program: Program, like: Tensor, capacities: tuple[int, ...], weights_dtype: torch.dtype | None, ragged: bool
) -> Loop:
    """Made once per program, batch and dtypes, and again when a tensor of the program has moved."""
    loops = _loops.setdefault(program, {})
    pointers = tuple(tensor.data_ptr() for tensor in tensors_of(program))
    key = (like.shape[0], like.dtype, capacities, weights_dtype, ragged, pointers)
    loop = loops.pop(key, None)
    if loop is None:
        from jambatalk_kernels.rollout import triton  # which takes a second to import

        graph = CudaGraph if like.is_cuda else NoGraph
        loop = Loop(program, like, capacities, weights_dtype, ragged, triton, graph)
    loops[key] = loop  # the last used comes last
    while len(loops) > MOST_LOOPS:
        loops.pop(next(iter(loops)))
    return loop


class CudaGraph:
    """`run` once for the compilers and libraries, once more recorded; `replay` as often as wanted."""

    def __init__(self, run: Callable[[], None], pool: _POOL_HANDLE | None = None) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            run()
        self.pool = self._graph.pool()
        self.replay = self._graph.replay


class NoGraph:
    """Where there is no GPU, and the kernels run in Triton's interpreter."""

    def __init__(self, run: Callable[[], None], pool: _POOL_HANDLE | None = None) -> None:
        self.pool, self.replay = pool, run


class Loop:
    """A program with all that its frames touch, for one batch size, and the graphs over it."""

    def __init__(
        self, program: Program, like: Tensor, capacities: tuple[int, ...], weights_dtype: torch.dtype | None,
        ragged: bool, kernels: ModuleType, graph: type[CudaGraph] | type[NoGraph],
    ) -> None:  # fmt: skip
        batch, _, width = like.shape
        self.kernels, self.make_graph = kernels, graph
        self.lock = threading.Lock()  # one call at a time ...
        self.free = torch.cuda.Event() if like.is_cuda else None  # ... on the device too, whatever its stream
        self.program, self.copies = stored(program, weights_dtype, batch)
        self.versions = versions(self.copies)
        self.template = template(program, like, capacities)
        self.storage = torch.zeros(batch, row_words(self.template), dtype=torch.int32, device=like.device)
        self.state = views(self.storage, self.template)
        self.kept = torch.empty_like(self.storage) if ragged else None
        self.inputs = like.new_zeros(WINDOW, batch, width)
        self.hidden = like.new_zeros(WINDOW, batch, width)
        self.frame = torch.zeros(1, dtype=torch.int64, device=like.device)
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=like.device)  # counted from the window's start
        mixers = [layer.mixer for layer in program.layers if isinstance(layer.mixer, AttentionMixer)]
        self.rotations = {(mixer.head_dim, mixer.rope_base): mixer for mixer in mixers}
        self.tables = {
            key: torch.zeros(WINDOW, 2, batch, mixer.head_dim // 2, dtype=torch.float32, device=like.device)
            for key, mixer in self.rotations.items()
        }
        self.graphs: dict[int, CudaGraph | NoGraph] = {}

    # ---- one frame: the same launches whatever its number

    def run_frame(self) -> None:
        tables: reference.Tables = {}
        for key, table in self.tables.items():
            cos, sin = table.index_select(0, self.frame)[0].unbind()
            tables[key] = cos, sin
        x = self.inputs.index_select(0, self.frame)[0]
        hidden = reference.step(self.program, x, self.state, tables, self.kernels.TRITON)
        self.hidden.index_copy_(0, self.frame, hidden[None])
        if self.kept is not None:
            self.kernels.keep_ended(self.storage, self.kept, self.lengths, self.frame)
        self.frame += 1

    def run_frames(self, count: int) -> None:
        for _ in range(count):
            self.run_frame()

    def capture(self) -> None:
        """Leaves numbers in the state and the frame; done before a call puts its own there."""
        pool = None
        for count in BUNDLES:
            self.frame.zero_()
            self.graphs[count] = self.make_graph(partial(self.run_frames, count), pool)
            pool = self.graphs[count].pool

    # ---- one call

    def __call__(
        self, inputs: Tensor, state: RolloutState | None, lengths: Tensor | None
    ) -> tuple[Tensor, RolloutState]:
        with self.lock:
            if self.free is not None:
                self.free.wait()
            if not self.graphs:
                self.capture()
            self.refresh()
            self.load(state)
            hidden = self.frames(inputs, lengths)
            result = self.unload(lengths, inputs.shape[1])
            if self.free is not None:
                self.free.record()
        return hidden, result

    def refresh(self) -> None:
        """Rounded weights that have changed since are rounded again, in place."""
        now = versions(self.copies)
        if now != self.versions:
            for original, copy, dtype in self.copies:
                copy.copy_(original.to(dtype))
            self.versions = now

    def load(self, state: RolloutState | None) -> None:
        self.storage.zero_()
        if state is not None:
            for mine, theirs in zip(self.state.tensors(), state.tensors(), strict=True):
                # A cache without a window may have room for more positions here.
                (mine[:, : theirs.shape[1]] if mine.dim() == 4 else mine).copy_(theirs)
        if self.kept is not None:
            self.kept.copy_(self.storage)

    def frames(self, inputs: Tensor, lengths: Tensor | None) -> Tensor:
        batch, frames, width = inputs.shape
        hidden = inputs.new_empty(batch, frames, width)
        for begin in range(0, frames, WINDOW):
            count = min(WINDOW, frames - begin)
            self.inputs[:count].copy_(inputs[:, begin : begin + count].transpose(0, 1))
            positions = torch.arange(WINDOW, device=inputs.device)[:, None] + self.state.position
            for key, mixer in self.rotations.items():
                for kind, values in enumerate(reference.rotary_rows(mixer, positions, torch.float32)):
                    self.tables[key][:, kind].copy_(values)
            if lengths is not None:
                self.lengths.copy_(lengths - begin)
            self.frame.zero_()
            left = count
            for bundle in BUNDLES:
                for _ in range(left // bundle):
                    self.graphs[bundle].replay()
                left %= bundle
            hidden[:, begin : begin + count].copy_(self.hidden[:count].transpose(0, 1))
        if lengths is not None:
            over = torch.arange(frames, device=inputs.device) >= lengths[:, None]
            hidden.masked_fill_(over[:, :, None], 0)
        return hidden

    def unload(self, lengths: Tensor | None, frames: int) -> RolloutState:
        state = self.state
        if lengths is not None and self.kept is not None:  # both or neither
            ended = (lengths < frames)[:, None]
            state = views(torch.where(ended, self.kept, self.storage), self.template)
        return state.map(lambda tensor: tensor.clone(memory_format=torch.contiguous_format))


# ---- a sequence's state as one row of bytes, so that one launch can put it aside


def template(program: Program, like: Tensor, capacities: tuple[int, ...]) -> RolloutState:
    """Shapes and dtypes of the state."""
    state = RolloutState.empty(program.layers, program.width, like.shape[0], dtype=like.dtype, device="meta")
    caches = [mixer for mixer in state.mixers if isinstance(mixer, KVCache)]
    for cache, capacity in zip(caches, capacities, strict=True):
        cache.k, cache.v = (x.new_empty(x.shape[0], capacity, *x.shape[2:]) for x in (cache.k, cache.v))
    return state


def row_bytes(tensor: Tensor) -> int:
    return -(-math.prod(tensor.shape[1:]) * tensor.itemsize // ALIGNMENT) * ALIGNMENT


def row_words(template: RolloutState) -> int:
    return sum(row_bytes(tensor) for tensor in template.tensors()) // 4


def views(storage: Tensor, template: RolloutState) -> RolloutState:
    """The state whose sequences are the rows of `storage` (batch, words) int32."""
    row, offset = storage.view(torch.uint8), 0

    def take(tensor: Tensor) -> Tensor:
        nonlocal offset
        size = math.prod(tensor.shape[1:]) * tensor.itemsize
        part = row[:, offset : offset + size].view(tensor.dtype)
        offset += row_bytes(tensor)
        return part.unflatten(1, tensor.shape[1:]) if tensor.dim() > 1 else part[:, 0]

    return template.map(take)


# ---- weights


def stored(
    program: Program, dtype: torch.dtype | None, batch: int
) -> tuple[Program, list[tuple[Tensor, Tensor, torch.dtype]]]:
    """-> the program with its matrices rounded to `dtype`, and the (original, copy, dtype) of each. They stay in that
    dtype where products take one that is not that of x, which those of few rows do.

    A record of its own in any case: the caller's, the key of a cache, must not be held by what is kept there."""
    if dtype is None or dtype == program.final_norm.dtype:
        return replace(program), []
    copies: list[tuple[Tensor, Tensor, torch.dtype]] = []

    def copy(tensor: Tensor, few: bool) -> Tensor:
        rounded = tensor.to(dtype)
        copies.append((tensor, rounded if few else rounded.to(tensor.dtype), dtype))
        return copies[-1][1]

    few = batch <= MATRIX_VECTOR_ROWS

    def copies_of(record: Sublayer) -> Sublayer:
        small = batch * record.top_k <= MATRIX_VECTOR_ASSIGNMENTS if isinstance(record, MoEMLP) else few
        changed: dict[str, Any] = {name: copy(getattr(record, name), small) for name in record.MATRICES}
        return replace(record, **changed)

    layers = tuple(Layer(copies_of(layer.mixer), copies_of(layer.mlp)) for layer in program.layers)
    feedback = None if program.feedback is None else copy(program.feedback, few)
    return replace(program, layers=layers, feedback=feedback), copies


def versions(copies: list[tuple[Tensor, Tensor, torch.dtype]]) -> list[int]:
    return [-1 if original.is_inference() else original._version for original, _, _ in copies]
