"""A decoder as data: what `rollout` runs, and the state that it carries from frame to frame.

A program is a list of layer records. Each layer is  x += mixer(norm(x));  x += mlp(norm(x)),  with a Mamba or an
attention mixer and a dense or a mixture-of-experts MLP. Matrices are stored as torch.nn.Linear stores them: (out, in).
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from jambatalk_kernels.attention.reference import KVCache


@dataclass(frozen=True)
class MambaMixer:
    norm: Tensor  # (d,) RMSNorm weight, as every *norm below
    in_proj: Tensor  # (2 * inner, d): the scan's input rows first, then the gate z
    conv_weight: Tensor  # (inner, width)
    conv_bias: Tensor | None  # (inner,)
    x_proj: Tensor  # (rank + 2 * states, inner): dt, B, C
    dt_norm: Tensor  # (rank,)
    b_norm: Tensor  # (states,)
    c_norm: Tensor  # (states,)
    dt_proj: Tensor  # (inner, rank)
    dt_bias: Tensor  # (inner,), before the softplus
    A: Tensor  # (inner, states), negative, float32 or better
    D: Tensor  # (inner,)
    out_proj: Tensor  # (d, inner)

    MATRICES = ("in_proj", "x_proj", "dt_proj", "out_proj")


@dataclass(frozen=True)
class AttentionMixer:
    norm: Tensor  # (d,)
    q_proj: Tensor  # (heads * head_dim, d)
    k_proj: Tensor  # (kv_heads * head_dim, d)
    v_proj: Tensor  # (kv_heads * head_dim, d)
    o_proj: Tensor  # (d, heads * head_dim)
    heads: int
    kv_heads: int
    window: int | None  # frames seen, the current one included; None: all of them
    rope_base: float | None  # None: no rotation

    MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj")

    @property
    def head_dim(self) -> int:
        return self.q_proj.shape[0] // self.heads


@dataclass(frozen=True)
class DenseMLP:
    norm: Tensor  # (d,)
    w_in: Tensor  # (2 * hidden, d): the gate rows first; swiglu
    w_out: Tensor  # (d, hidden)

    MATRICES = ("w_in", "w_out")


@dataclass(frozen=True)
class MoEMLP:
    norm: Tensor  # (d,)
    router: Tensor  # (experts, d); never rounded by weights_dtype, so that the choice of experts is kept
    w_in: Tensor  # (experts, 2 * hidden, d)
    w_out: Tensor  # (experts, d, hidden)
    top_k: int

    MATRICES = ("w_in", "w_out")


@dataclass(frozen=True)
class Layer:
    mixer: MambaMixer | AttentionMixer
    mlp: DenseMLP | MoEMLP


@dataclass(frozen=True, eq=False)  # compared and hashed by identity: what is derived from a program is kept beside it
class Program:
    """hidden_t = final_norm(layers(inputs_t + feedback_t));   feedback_{t+1} = feedback @ hidden_t + feedback_bias.

    The first frame's feedback comes with the state; in a new state it is zero (motion_{-1} = 0).
    """

    layers: tuple[Layer, ...]
    final_norm: Tensor  # (d,)
    feedback: Tensor | None  # (d, d): W_m W_out; None: nothing is fed back
    feedback_bias: Tensor | None  # (d,): W_m b_out
    eps: float = 1e-6

    @property
    def width(self) -> int:
        return self.final_norm.shape[0]

    def map(self, function: Callable[[Tensor], Tensor]) -> "Program":
        """A program with `function` applied to every tensor."""

        def mapped(record: Record) -> Record:
            values = {field.name: getattr(record, field.name) for field in fields(record)}
            changed: dict[str, Any] = {n: function(v) for n, v in values.items() if isinstance(v, Tensor)}
            return replace(record, **changed)

        layers = tuple(Layer(mapped(layer.mixer), mapped(layer.mlp)) for layer in self.layers)
        return replace(mapped(self), layers=layers)

    def rounded(self, dtype: torch.dtype | None) -> "Program":
        """The same program with its matrices rounded to `dtype` (values only; they keep their own dtype)."""
        if dtype is None:
            return self

        def round_matrices(record: Sublayer) -> Sublayer:
            return replace(
                record,
                **{name: getattr(record, name).to(dtype).to(getattr(record, name).dtype) for name in record.MATRICES},
            )

        layers = tuple(Layer(round_matrices(layer.mixer), round_matrices(layer.mlp)) for layer in self.layers)
        feedback = None if self.feedback is None else self.feedback.to(dtype).to(self.feedback.dtype)
        return replace(self, layers=layers, feedback=feedback)


Record = TypeVar("Record", bound=MambaMixer | AttentionMixer | DenseMLP | MoEMLP | Program)
Sublayer = TypeVar("Sublayer", bound=MambaMixer | AttentionMixer | DenseMLP | MoEMLP)


def tensors_of(program: Program) -> list[Tensor]:
    """Every tensor of its records, in a fixed order."""
    records = [program, *(record for layer in program.layers for record in (layer.mixer, layer.mlp))]
    values = [getattr(record, field.name) for record in records for field in fields(record)]
    return [value for value in values if isinstance(value, Tensor)]


@dataclass
class MambaState:
    conv: Tensor  # (batch, width - 1, inner): the last inputs of the convolution, oldest first
    scan: Tensor  # (batch, inner, states), float32 or better


def _parts(mixer: MambaState | KVCache) -> tuple[Tensor, ...]:
    return (mixer.conv, mixer.scan) if isinstance(mixer, MambaState) else (mixer.k, mixer.v, mixer.position)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


AXES = {"conv": 3, "scan": 3, "k": 4, "v": 4, "feedback": 2, "position": 1}  # of a state's tensors, the batch first
KIND = "jambatalk rollout state 1"  # in the header of its file


@dataclass
class RolloutState:
    """Everything that the decoder must remember for the next frame, per sequence (the first axis of every tensor)."""

    mixers: list[MambaState | KVCache]  # one per layer
    feedback: Tensor  # (batch, d): what the previous frame's motion adds to the next frame's input
    position: Tensor  # (batch,) int64: frames seen so far

    @property
    def batch(self) -> int:
        return self.position.shape[0]

    @staticmethod
    def empty(
        layers: Sequence[Layer],
        width: int,
        batch: int,
        *,
        frames: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> "RolloutState":
        """The state before the first frame. `frames` sizes the cache of attention without a window (it can grow)."""
        mixers: list[MambaState | KVCache] = []
        scan_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        for layer in layers:
            mixer = layer.mixer
            if isinstance(mixer, MambaMixer):
                inner, conv_width = mixer.conv_weight.shape
                mixers.append(
                    MambaState(
                        conv=torch.zeros(batch, conv_width - 1, inner, dtype=dtype, device=device),
                        scan=torch.zeros(batch, inner, mixer.A.shape[1], dtype=scan_dtype, device=device),
                    )
                )
            else:
                capacity = max(frames, 1) if mixer.window is None else mixer.window
                mixers.append(
                    KVCache.empty(batch, capacity, mixer.kv_heads, mixer.head_dim, dtype=dtype, device=device)
                )
        return RolloutState(
            mixers,
            torch.zeros(batch, width, dtype=dtype, device=device),
            torch.zeros(batch, dtype=torch.int64, device=device),
        )

    def map(self, function: Callable[[Tensor], Tensor]) -> "RolloutState":
        """A state with `function` applied to every tensor."""
        mixers = [type(mixer)(*map(function, _parts(mixer))) for mixer in self.mixers]
        return RolloutState(mixers, function(self.feedback), function(self.position))

    def clone(self) -> "RolloutState":
        """A copy, contiguous."""
        return self.map(_copy)

    def select(self, rows: Tensor) -> "RolloutState":
        """A copy with only these sequences."""
        return self.map(lambda tensor: tensor.index_select(0, rows))

    def put(self, rows: Tensor, other: "RolloutState") -> None:
        """Overwrite these sequences, in place, with those of `other`."""
        for mine, theirs in zip(self.tensors(), other.tensors(), strict=True):
            mine.index_copy_(0, rows, theirs)

    def tensors(self) -> list[Tensor]:
        return [*(tensor for mixer in self.mixers for tensor in _parts(mixer)), self.feedback, self.position]

    def with_room(self, layers: Sequence[Layer], frames: int) -> "RolloutState":
        """A contiguous copy whose attention caches have room for `frames` more frames. A cache that must grow grows by
        half, so that a stream of short calls does not meet a full one each time."""
        mixers: list[MambaState | KVCache] = []
        for index, (layer, mixer) in enumerate(zip(layers, self.mixers, strict=True)):
            grows = isinstance(layer.mixer, AttentionMixer) and layer.mixer.window is None
            if isinstance(mixer, KVCache) and grows and self.batch:
                seen = int(mixer.position.max())
                if seen > mixer.capacity:
                    raise ValueError(
                        f"state.mixers[{index}] has room for {mixer.capacity} of its {seen} positions: it comes from "
                        "attention with a window, and this program has none"
                    )
                if seen + frames > mixer.capacity:
                    mixers.append(mixer.grown(max(seen + frames, mixer.capacity * 3 // 2)))
                    continue
            mixers.append(type(mixer)(*map(_copy, _parts(mixer))))
        return RolloutState(mixers, _copy(self.feedback), _copy(self.position))

    # ---- files ----

    def to_tensors(self) -> dict[str, Tensor]:
        """Its tensors by name: "mixers.0.conv" and so on, "feedback", "position"."""
        named = {"feedback": self.feedback, "position": self.position}
        for index, mixer in enumerate(self.mixers):
            named |= {f"mixers.{index}.{field.name}": getattr(mixer, field.name) for field in fields(mixer)}
        return named

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor]) -> "RolloutState":
        """What `to_tensors` gave, as a state again. Raises ValueError, one line, for tensors that are no state; whether
        it fits a program is `rollout`'s to check."""
        left = dict(tensors)
        mixers: list[MambaState | KVCache] = []
        batch = left["position"].shape[0] if "position" in left and left["position"].dim() == 1 else None

        def take(name: str) -> Tensor:
            if name not in left:
                raise ValueError(f"not the state of a rollout: {name} is missing")
            tensor, kind = left.pop(name), name.rsplit(".", 1)[-1]
            if tensor.dim() != AXES[kind] or tensor.shape[0] != batch:
                raise ValueError(
                    f"not the state of a rollout: {name} must have {AXES[kind]} axes and the batch ({batch}) first, "
                    f"got shape {tuple(tensor.shape)}"
                )
            counts = kind == "position"
            if tensor.dtype != torch.int64 if counts else not tensor.is_floating_point():
                raise ValueError(f"not the state of a rollout: {name} must not be {tensor.dtype}")
            if counts and batch and int(tensor.min()) < 0:
                raise ValueError(f"not the state of a rollout: {name} is negative")
            return tensor

        while any(name.startswith(f"mixers.{len(mixers)}.") for name in left):
            prefix = f"mixers.{len(mixers)}."
            kind = MambaState if f"{prefix}conv" in left else KVCache
            mixers.append(kind(*(take(prefix + field.name) for field in fields(kind))))
        state = RolloutState(mixers, take("feedback"), take("position"))
        if left:
            raise ValueError(f"not the state of a rollout: it has no place for {min(left)}")
        return state

    def save(self, path: str | os.PathLike) -> None:
        """Write a safetensors file, by an atomic rename. A rollout goes on from it anywhere: with the same bytes on the
        same backend and instruction set, to rounding on others."""
        from safetensors.torch import save_file

        path = Path(path)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            named = {name: tensor.detach().cpu() for name, tensor in self.to_tensors().items()}
            save_file({name: _copy(tensor) for name, tensor in named.items()}, partial, metadata={"kind": KIND})
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    @staticmethod
    def load(path: str | os.PathLike, device: torch.device | str = "cpu") -> "RolloutState":
        """Read what `save` wrote. Raises ValueError, one line that names the file, where that is something else, and
        OSError where it cannot be read."""
        from safetensors import SafetensorError, safe_open

        with open(path, "rb"):  # what the system says of a file that cannot be read is clearer
            pass
        try:
            with safe_open(path, "pt") as file:
                if (file.metadata() or {}).get("kind") != KIND:
                    raise ValueError("not the state of a rollout")
                state = RolloutState.from_tensors({name: file.get_tensor(name) for name in file.keys()})
        except SafetensorError as error:
            raise ValueError(f"{path}: not a whole safetensors file: {str(error).splitlines()[0]}") from None
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        return state.map(lambda tensor: tensor.to(device))
