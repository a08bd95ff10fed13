"""The rollout as a persistent CUDA kernel (csrc/cuda/rollout.cu): the state's copy, how many blocks work on a sequence,
and slices short enough to be interrupted."""

from collections.abc import Callable

import torch
from torch import Tensor

from jambatalk_kernels.rollout.packing import Packed, pack
from jambatalk_kernels.rollout.program import MambaMixer, MoEMLP, Program, RolloutState

SMALL_WIDTH = 128  # up to here a block that works alone is faster than a team that must meet 42 times a frame
MOST_BLOCKS = 128  # of one sequence: the largest products of the `vocaset` preset are 256 tasks
SLICE_FRAMES = 2048  # of one launch, after which the watchdog is read and Ctrl-C is heard
# csrc/cuda/launch.h, rollout.cu
MOST_LAYERS, MOST_HEAD_DIM, MOST_EXPERTS, MOST_SLOTS = 16, 128, 256, 16
MOST_VECTOR_BYTES = 72 << 10  # and 24 KB for what does not grow with the program


def vector_bytes(program: Program) -> int:
    """Of what one sequence keeps in shared memory at most; padding and attention's parts left out."""
    mixed = activated = 0
    for layer in program.layers:
        mixer, mlp = layer.mixer, layer.mlp
        if isinstance(mixer, MambaMixer):
            mixed = max(mixed, 3 * mixer.A.shape[0] + 2 * (mixer.dt_norm.shape[0] + 2 * mixer.A.shape[1]))
        else:
            mixed = max(mixed, 2 * (mixer.heads + mixer.kv_heads) * mixer.head_dim)
        activated = max(activated, (mlp.top_k if isinstance(mlp, MoEMLP) else 1) * mlp.w_out.shape[-1])
    return 4 * (3 * program.width + mixed + activated)


def blocks_per_sequence(batch: int, width: int, multiprocessors: int) -> int:
    if width <= SMALL_WIDTH:
        return 1
    return max(1, min(MOST_BLOCKS, multiprocessors // max(batch, 1)))


def rollout(
    op: Callable[..., None], program: Program, inputs: Tensor, state: RolloutState | None, lengths: Tensor | None,
    weights_dtype: torch.dtype | None,
) -> tuple[Tensor, RolloutState]:  # fmt: skip
    """``op``: torch.ops.jambatalk.rollout. As `reference.rollout`, with the matrices rounded to ``weights_dtype``;
    stored in it where that is bfloat16. Waits for the device at the end of every slice."""
    multiprocessors = torch.cuda.get_device_properties(inputs.device).multi_processor_count
    blocks = blocks_per_sequence(inputs.shape[0], program.width, multiprocessors)
    return run(op, pack(program, weights_dtype), program, inputs, state, lengths, blocks)


def run(
    op: Callable[..., None], packed: Packed, program: Program, inputs: Tensor, state: RolloutState | None,
    lengths: Tensor | None, blocks: int,
) -> tuple[Tensor, RolloutState]:  # fmt: skip
    batch, frames, width = inputs.shape
    if state is None:
        state = RolloutState.empty(
            program.layers, width, batch, frames=frames, dtype=inputs.dtype, device=inputs.device
        )
    else:
        state = state.with_room(program.layers, frames).map(Tensor.contiguous)
    if lengths is None:
        lengths = torch.full((batch,), frames, device=inputs.device)
        hidden = torch.empty_like(inputs, memory_format=torch.contiguous_format)
    else:
        lengths = lengths.to(device=inputs.device, dtype=torch.int64).clamp(0, frames)
        hidden = torch.zeros_like(inputs, memory_format=torch.contiguous_format)
    late = torch.zeros(1, dtype=torch.int32, device=inputs.device)
    tensors = [*state.tensors(), late]
    for begin in range(0, frames if batch else 0, SLICE_FRAMES):
        end = min(begin + SLICE_FRAMES, frames)
        op(packed.plan, packed.storage, inputs, lengths, hidden, tensors, begin, end, program.eps, 1, blocks)
        if late.item():
            raise RuntimeError(
                "rollout: the blocks of the persistent CUDA kernel did not meet within 4 seconds (is the GPU shared "
                'with something that holds it?); backend="triton" needs no such meeting'
            )
    return hidden, state
