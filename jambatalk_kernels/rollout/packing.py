"""A program as the native rollouts read it: one block of memory and a list of integers (csrc/common/plan.h).

Matrices (out, in) become panels of 32 outputs, [out / 32][in][32], so that a product with a vector is one stream with
outputs in vector lanes; in bfloat16 two neighbours of `in` share a lane, [out / 32][in / 2][32][2]. `in` is padded to a
multiple of 4, `out` to one of 32, with zeros. On a GPU a lane reads 16 bytes at once, so as many neighbours as they
hold lie together, 4 or, in bfloat16, 8, and `in` is padded to a multiple of 8.

Everything else keeps the dtype of the program: norms, biases, the convolution, A (times log2 e, for an exp2), D and the
router, so that the choice of experts is that of the program.
"""

import math
import mmap
import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from jambatalk_kernels.rollout.program import (
    AttentionMixer,
    DenseMLP,
    Layer,
    MambaMixer,
    MoEMLP,
    Program,
    tensors_of,
)

PANEL, ALIGNMENT = 32, 64  # kPanel of csrc/cpu/kernels.h; bytes
INPUT_PADDING = {"cpu": 4, "cuda": 8}  # kInputPadding; csrc/cuda/launch.h


class Packed(NamedTuple):
    plan: Tensor  # (numbers,) int64
    storage: Tensor  # (bytes,) uint8, aligned
    frame_bytes: int  # of the matrices that one sequence reads per frame


class _Kept:
    """What was made of one program, and of which versions of its tensors."""

    def __init__(self, program: Program) -> None:
        self.tensors = tensors_of(program)
        self.counted = [tensor for tensor in self.tensors if not tensor.is_inference()]  # the others have no version
        self.versions: list[int] = []
        self.packed: dict[tuple[torch.dtype, torch.device], Packed] = {}


_kept: weakref.WeakKeyDictionary[Program, _Kept] = weakref.WeakKeyDictionary()


def pack(program: Program, weights_dtype: torch.dtype | None) -> Packed:
    """Made once per program and dtype, and again when a tensor of the program was changed in place."""
    kept = _kept.get(program)
    if kept is None:
        kept = _kept[program] = _Kept(program)
    versions = [tensor._version for tensor in kept.counted] + [tensor.data_ptr() for tensor in kept.tensors]
    if kept.versions != versions:
        kept.versions, kept.packed = versions, {}
    dtype, device = weights_dtype or program.final_norm.dtype, program.final_norm.device
    if (dtype, device) not in kept.packed:
        kept.packed[dtype, device] = _pack(program, dtype, device)
    return kept.packed[dtype, device]


def _padded(size: int, to: int) -> int:
    return -(-size // to) * to


class _Writer:
    """Collects the plan and the sections; `finish` allocates the storage and fills it."""

    def __init__(self, dtype: torch.dtype, half: bool, kind: str) -> None:
        self.dtype, self.half = dtype, half
        # Neighbours of `in` that lie together.
        self.group = 16 // (2 if half else dtype.itemsize) if kind == "cuda" else 2 if half else 1
        self.input_padding = INPUT_PADDING[kind]
        self.plan: list[int] = []
        self.fills: list[tuple[int, int, torch.dtype, Callable[[Tensor], None]]] = []
        self.size = 0

    def numbers(self, *values: int) -> None:
        self.plan += values

    def section(self, elements: int, dtype: torch.dtype, fill: Callable[[Tensor], None]) -> None:
        self.plan.append(self.size)
        self.fills.append((self.size, elements, dtype, fill))
        self.size += _padded(elements * dtype.itemsize, ALIGNMENT)

    def vector(self, values: Tensor | None, pad_to: int = 1, dtype: torch.dtype | None = None) -> None:
        """Rows of the last axis, padded; None: zeros."""
        rows, size = (1, 0) if values is None else (math.prod(values.shape[:-1]), values.shape[-1])
        width = max(_padded(size, pad_to), pad_to)

        def fill(view: Tensor) -> None:
            if values is not None:
                view.view(rows, width)[:, :size] = values.reshape(rows, size)

        self.section(rows * width, dtype or self.dtype, fill)

    def channels(self, rows: list[Tensor]) -> None:
        """Vectors over the channels, as [channels / PANEL][len(rows)][PANEL]."""
        stacked = torch.stack(rows)
        count, size = stacked.shape
        panels = _padded(size, PANEL) // PANEL

        def fill(view: Tensor) -> None:
            whole = torch.zeros(count, panels * PANEL, dtype=stacked.dtype)
            whole[:, :size] = stacked
            view.view(panels, count, PANEL).copy_(whole.view(count, panels, PANEL).transpose(0, 1))

        self.section(panels * count * PANEL, self.dtype, fill)

    def matrix(self, *parts: Tensor, lanes: int = PANEL) -> None:
        """(out, in) each, or (count, out, in) to be packed one by one. Of several parts each begins a panel; those of
        half a panel's lanes share panels, half each."""
        parts = tuple(part if part.dim() == 3 else part[None] for part in parts)
        number, _, size = parts[0].shape
        group, inner = self.group, _padded(size, self.input_padding)
        heights = [_padded(part.shape[1], lanes) // lanes for part in parts]
        panels = sum(heights) * lanes // PANEL

        def fill(view: Tensor) -> None:
            target = view.view(number, panels, inner // group, PANEL, group).transpose(2, 3)
            panel = lane = 0
            for part, height in zip(parts, heights, strict=True):
                _place(target[:, panel : panel + height, lane : lane + lanes], part)
                panel, lane = (panel + height, 0) if lanes == PANEL else (0, lane + lanes)

        self.section(number * panels * inner * PANEL, torch.bfloat16 if self.half else self.dtype, fill)

    def finish(self) -> tuple[Tensor, Tensor]:
        storage = _new_storage(self.size)
        for offset, elements, dtype, fill in self.fills:
            if elements:
                fill(storage[offset : offset + elements * dtype.itemsize].view(dtype))
        return torch.tensor(self.plan, dtype=torch.int64), storage


def _place(target: Tensor, part: Tensor) -> None:
    """part (number, out, in) into target (number, panels, lanes, in / group, group)."""
    number, _, lanes, _, group = target.shape
    part = torch.nn.functional.pad(part, (0, -part.shape[2] % group))
    rows = part.reshape(*part.shape[:2], -1, group)
    whole, rest = divmod(rows.shape[1], lanes)
    target = target[:, :, :, : rows.shape[2]]
    target[:, :whole].copy_(rows[:, : whole * lanes].reshape(number, whole, lanes, *rows.shape[2:]))
    if rest:
        target[:, whole, :rest].copy_(rows[:, whole * lanes :])


def _new_storage(size: int) -> Tensor:
    """Zeros, page-aligned; in large pages where the system has them: the loop reads all of it every frame."""
    memory = mmap.mmap(-1, max(size, ALIGNMENT))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError:  # a kernel without them
            pass
    return torch.frombuffer(memory, dtype=torch.uint8)


def _pack(program: Program, dtype: torch.dtype, device: torch.device, kind: str | None = None) -> Packed:
    """`kind`: of the layout, that of the device where it is not said."""
    program = program.map(Tensor.cpu)
    compute = program.final_norm.dtype
    half = dtype == torch.bfloat16 and compute == torch.float32
    if dtype != compute and not half:
        program = program.rounded(dtype)  # there is no storage of that kind for it
    writer = _Writer(compute, half, kind or device.type)
    width = program.width
    writer.numbers(width, int(half), len(program.layers))
    writer.vector(program.final_norm)
    writer.numbers(int(program.feedback is not None))
    if program.feedback is not None:
        writer.matrix(program.feedback)
        writer.vector(program.feedback_bias, pad_to=_padded(width, PANEL))
    for layer in program.layers:
        _pack_layer(writer, layer)
    plan, storage = writer.finish()
    return Packed(plan, storage.to(device), frame_bytes(program, 2 if half else compute.itemsize))


def _pack_layer(writer: _Writer, layer: Layer) -> None:
    mixer, mlp = layer.mixer, layer.mlp
    writer.numbers(int(isinstance(mixer, AttentionMixer)))
    writer.vector(mixer.norm)
    if isinstance(mixer, MambaMixer):
        inner, conv_width = mixer.conv_weight.shape
        rank, states = mixer.dt_norm.shape[0], mixer.b_norm.shape[0]
        writer.numbers(inner, conv_width, rank, states)
        writer.matrix(*mixer.in_proj.split(inner))
        writer.matrix(mixer.x_proj)
        writer.matrix(mixer.dt_proj)
        writer.matrix(mixer.out_proj)
        bias = torch.zeros_like(mixer.conv_weight[:, 0]) if mixer.conv_bias is None else mixer.conv_bias
        writer.channels([*mixer.conv_weight.unbind(1), bias])
        writer.channels(list((mixer.A.to(writer.dtype) * math.log2(math.e)).unbind(1)))
        writer.channels([mixer.D])
        writer.channels([mixer.dt_bias])
        for norm in (mixer.dt_norm, mixer.b_norm, mixer.c_norm):
            writer.vector(norm)
    else:
        writer.numbers(mixer.heads, mixer.kv_heads, mixer.head_dim, mixer.window or 0)
        exponents = -torch.arange(0, mixer.head_dim, 2, dtype=torch.float64) / mixer.head_dim
        # No rotation is one by no angle.
        frequency = torch.zeros_like(exponents) if mixer.rope_base is None else mixer.rope_base**exponents
        writer.vector(frequency, dtype=torch.float64)
        writer.matrix(torch.cat([mixer.q_proj, mixer.k_proj, mixer.v_proj]))
        writer.matrix(mixer.o_proj)
    writer.vector(mlp.norm)
    experts, top_k = (mlp.w_in.shape[0], mlp.top_k) if isinstance(mlp, MoEMLP) else (1, 1)
    hidden = mlp.w_out.shape[-1]
    writer.numbers(experts, top_k, hidden, int(isinstance(mlp, MoEMLP)))
    if isinstance(mlp, MoEMLP):
        writer.vector(mlp.router, pad_to=PANEL)
    writer.matrix(*mlp.w_in.split(hidden, dim=-2), lanes=PANEL // 2)
    writer.matrix(mlp.w_out)


def frame_bytes(program: Program, itemsize: int) -> int:
    """What one sequence reads per frame: every matrix once, and of the experts those that are chosen."""
    elements = 0 if program.feedback is None else program.feedback.numel()
    for layer in program.layers:
        elements += sum(getattr(layer.mixer, name).numel() for name in layer.mixer.MATRICES)
        share = 1 if isinstance(layer.mlp, DenseMLP) else layer.mlp.top_k / layer.mlp.w_in.shape[0]
        elements += int((layer.mlp.w_in.numel() + layer.mlp.w_out.numel()) * share)
    return elements * itemsize
