"""Argument checks that every op shares: one error message for every kind of bad tensor.

The reference runs behind these checks. A native op tests its arguments in C++, because a call must cost microseconds;
when it refuses them, the call comes here to say what is wrong in the caller's words.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["FLOATS", "check_cu_seqlens", "check_flag", "check_tensor", "values_are_checked"]

FLOATS = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))


def values_are_checked() -> bool:
    """``JAMBATALK_KERNELS_CHECK=1``: also validate values, which may synchronise with the device."""
    return os.environ.get("JAMBATALK_KERNELS_CHECK", "0") not in ("", "0")


def check_tensor(
    op: str, name: str, value: object, axes: Sequence[str], sizes: Sequence[int | None], device: torch.device | None
) -> None:
    """Raise unless ``value`` is a floating tensor with these sizes (None: any) on this device (None: any).

    Errors: ``TypeError`` for something that is not a tensor or not of a float dtype, ``ValueError`` for a wrong shape
    or device. Each names the op, the argument, what was expected and what came.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name}: expected a tensor, got {type(value).__name__}")
    shape = tuple(value.shape)
    if len(shape) != len(sizes) or any(
        want is not None and want != got for want, got in zip(sizes, shape, strict=False)
    ):
        wanted = ", ".join(axis if size is None else f"{axis}={size}" for axis, size in zip(axes, sizes, strict=False))
        raise ValueError(f"{op}: {name}: expected shape ({wanted}), got {shape}")
    if value.layout != torch.strided or value.is_nested:
        kind = "nested" if value.is_nested else str(value.layout)
        raise TypeError(f"{op}: {name}: expected a dense tensor, got a {kind} one")
    if value.dtype not in FLOATS:
        raise TypeError(
            f"{op}: {name}: expected a float dtype (float32, float64, bfloat16, float16), got {value.dtype}"
        )
    if device is not None and value.device != device:
        raise ValueError(f"{op}: {name}: expected device {device}, got {value.device}")


def check_flag(op: str, name: str, value: object) -> None:
    if value is not True and value is not False:
        raise TypeError(f"{op}: {name}: expected a bool, got {type(value).__name__}")


def check_cu_seqlens(op: str, cu_seqlens: object, batch: int, length: int, device: torch.device) -> None:
    """Raise unless ``cu_seqlens`` can describe packed sequences: int32 (sequences + 1,), batch 1.

    Its values are on the device and are not read, except with ``JAMBATALK_KERNELS_CHECK=1``: then they must start at 0,
    never fall, and end at ``length``. Unchecked, kernels clamp them to that range.
    """
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"{op}: cu_seqlens: expected an int32 tensor (sequences + 1,), got {type(cu_seqlens).__name__}")
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"{op}: cu_seqlens: expected dtype torch.int32, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(
            f"{op}: cu_seqlens: expected shape (sequences + 1,) with one sequence or more, "
            f"got {tuple(cu_seqlens.shape)}"
        )
    if cu_seqlens.device != device:
        raise ValueError(f"{op}: cu_seqlens: expected device {device}, got {cu_seqlens.device}")
    if batch != 1:
        raise ValueError(f"{op}: packed sequences (cu_seqlens) need batch 1, got batch {batch}")
    # A traced or a meta tensor has no values.
    if type(cu_seqlens) is Tensor and device.type != "meta" and values_are_checked():
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != length or any(a > b for a, b in zip(bounds, bounds[1:], strict=False)):
            raise ValueError(f"{op}: cu_seqlens: expected values that rise from 0 to length={length}, got {bounds}")
