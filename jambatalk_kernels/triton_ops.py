"""How a Triton launcher becomes an op.

An eager call goes straight to the launcher: the dispatcher's detour through Python costs more than a small kernel.
A compiler that traces sees an op of torch.library with a schema and a shape function instead, and no kernel.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["Kernels", "TritonOp"]

Kernels = dict[str, Callable[..., Any]]  # backend -> the op that runs it

NAMESPACE = "jambatalk_triton"
_library = torch.library.Library(NAMESPACE, "DEF")


class TritonOp:
    """``jambatalk_triton::NAME``, which calls ``function`` of ``module``.

    Args:
        schema: as csrc/schemas.h has it for the native op of the same name.
        module: imported at the first call, since importing triton takes a second that CPU users need not wait.
        fake: the shape function, called with the op's arguments.
    """

    def __init__(self, schema: str, module: str, function: str, fake: Callable[..., object]) -> None:
        name = schema[: schema.index("(")]
        self._module, self._function = module, function
        self._launcher: Callable[..., Any] | None = None
        _library.define(schema)
        _library.impl(name, self._launch, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake)
        self._op = getattr(getattr(torch.ops, NAMESPACE), name).default

    def __call__(self, *arguments: Any) -> Any:
        return self._op(*arguments) if torch.compiler.is_compiling() else self._launch(*arguments)

    def _launch(self, *arguments: Any) -> Any:
        if self._launcher is None:
            self._launcher = getattr(importlib.import_module(self._module), self._function)
        index = next(argument for argument in arguments if argument is not None).get_device()
        if index < 0 or index == torch.cuda.current_device():  # -1: a CPU tensor, in Triton's interpreter
            return self._launcher(*arguments)
        with torch.cuda.device(index):
            return self._launcher(*arguments)
