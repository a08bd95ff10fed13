"""The native rollout: the state's copy, the threads' arrangement, and slices short enough to be interrupted."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from jambatalk_kernels.rollout.packing import pack
from jambatalk_kernels.rollout.program import Program, RolloutState

SMALL = 1 << 20  # bytes of weights per frame below which threads that share a product cost more than they save
WORKER_BYTES = 1 << 19  # of them at least for each of such threads
MOST_WORKERS = 16  # a product of the `vocaset` preset has as many panels at least
FEW = 4  # sequences that share one load of the weights from cache, in the kernel
SLICE_SECONDS = 0.2  # Ctrl-C is heard between two calls
SLICE_FRAMES = 256


def arrange(batch: int, threads: int, frame_bytes: int) -> tuple[int, int]:
    """-> how many sequences run together, sharing every read of the weights, and how many threads share the products of
    such a group (with 1, every thread has groups of its own). The result does not depend on it, only the time."""
    per_thread = -(-batch // threads)
    if frame_bytes < SMALL:
        return max(1, min(FEW, per_thread)), 1
    if batch >= FEW * threads:
        return per_thread, 1
    return max(1, batch), max(1, min(threads, MOST_WORKERS, frame_bytes // WORKER_BYTES))


def first_slice(batch: int, frame_bytes: int) -> int:
    """Frames of the first call, before their time is known: some 2 GB of weights, at a tenth of a second or so."""
    return max(1, min(16, (1 << 31) // max(1, batch * frame_bytes)))


def rollout(
    op: Callable[..., None], program: Program, inputs: Tensor, state: RolloutState | None, lengths: Tensor | None,
    weights_dtype: torch.dtype | None,
) -> tuple[Tensor, RolloutState]:  # fmt: skip
    """``op``: torch.ops.jambatalk.rollout. The rest as `reference.rollout`, with the matrices rounded to
    ``weights_dtype``; stored in it where that is bfloat16."""
    batch, frames, width = inputs.shape
    packed = pack(program, weights_dtype)
    if state is None:
        state = RolloutState.empty(program.layers, width, batch, frames=frames, dtype=inputs.dtype)
    else:
        state = state.with_room(program.layers, frames)
    last = frames if batch else 0
    if lengths is None:
        lengths = torch.full((batch,), frames)
        hidden = inputs.new_empty(batch, frames, width)
    else:
        lengths = lengths.to(device="cpu", dtype=torch.int64).clamp(0, frames)
        hidden = inputs.new_zeros(batch, frames, width)
        last = int(lengths.max()) if batch else 0
    group, workers = arrange(batch, torch.get_num_threads(), packed.frame_bytes)
    tensors = state.tensors()
    begin, step = 0, first_slice(batch, packed.frame_bytes)
    while begin < last:
        end = min(begin + step, last)
        started = time.perf_counter()
        op(packed.plan, packed.storage, inputs, lengths, hidden, tensors, begin, end, program.eps, group, workers)
        pace = SLICE_SECONDS * (end - begin) / max(time.perf_counter() - started, 1e-6)
        begin, step = end, max(1, min(SLICE_FRAMES, int(pace)))
    return hidden, state
