"""What the launchers would launch, told to a compiler that has no GPU: for tests that read machine code."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
import triton

__all__ = ["recorded_launches"]

_TYPES = {
    torch.float64: "*fp64", torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16",
    torch.int64: "*i64", torch.int32: "*i32",
}  # fmt: skip


def recorded_launches(module: ModuleType, label: str, run: Callable[[], object]) -> list[dict[str, Any]]:
    """The launches of `module`'s kernels that `run()` makes, on meta tensors, as cases for `triton.compile`.

    A case has ``name`` (the kernel's, and `label`), ``kernel``, ``signature`` (":16" where a launch would see a
    multiple of 16), ``constexprs`` (among them the integers that are 1, as in a launch), ``num_warps``, ``num_stages``
    and ``launches``: for each launch its ``turn`` among those of `run()`, its ``grid``, and ``sizes``, the integers
    among its arguments.
    """
    cases: list[dict[str, Any]] = []
    turns = itertools.count()

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return functools.partial(self.record, grid)

        def record(
            self, grid: tuple[int, ...], *arguments: Any, num_warps: int = 4, num_stages: int = 3, **constants: Any
        ) -> None:
            kernel = self.kernel
            named = dict(zip(kernel.arg_names, arguments, strict=False)) | constants
            signature = {name: "constexpr" if name in constants else _kind(named[name]) for name in kernel.arg_names}
            case = {
                "kernel": kernel,
                "signature": signature,
                "constexprs": {name: named[name] for name, kind in signature.items() if kind == "constexpr"},
                "num_warps": num_warps,
                "num_stages": num_stages,
            }
            same = next((other for other in cases if all(other[key] == case[key] for key in case)), None)
            if same is None:
                again = sum(other["kernel"] is kernel for other in cases)
                name = f"{kernel.__name__.strip('_')} {label}" + (f" ({again + 1})" if again else "")
                same = {"name": name, **case, "launches": []}
                cases.append(same)
            sizes = {name: value for name, value in named.items() if type(value) is int}
            same["launches"].append({"turn": next(turns), "grid": list(grid), "sizes": sizes})

    kernels: dict[str, Any] = {
        name: Recorder(v) for name, v in vars(module).items() if isinstance(v, triton.JITFunction)
    }
    with patch.multiple(module, **kernels), torch.device("meta"):
        run()
    return cases


def _kind(value: torch.Tensor | float | None) -> str:
    if isinstance(value, torch.Tensor):
        return _TYPES[value.dtype] + ":16"
    if isinstance(value, float):
        return "fp32"
    if value is None or value == 1:
        return "constexpr"
    return ("i32" if value < 2**31 else "i64") + (":16" if value % 16 == 0 else "")
