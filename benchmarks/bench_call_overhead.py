"""What a call costs before any work, beside an empty native op and beside torch.add: one position, eight channels."""

from __future__ import annotations

import pytest
import torch

from benchmarks.results import Case
from jambatalk_kernels import (
    KVCache,
    causal_conv1d,
    causal_conv1d_step,
    rope_attention,
    rope_attention_step,
    selective_scan,
    selective_scan_step,
)

CALLS = 1000


def tiny():
    named = {
        "u": torch.randn(1, 1, 8), "A": -torch.rand(8, 4), "B": torch.randn(1, 1, 4), "D": torch.randn(8),
        "weight": torch.randn(8, 4), "state": torch.zeros(1, 8, 4), "history": torch.zeros(1, 3, 8),
        "leaf": torch.randn(1, 1, 8, requires_grad=True), "table": torch.randn(1, 4),
        "cache": KVCache.empty(1, 4, 1, 8),
    }  # fmt: skip
    heads = {"heads": named["u"][None], "leaf_heads": named["leaf"][None]}  # one head of eight features
    return named | heads | {"row": named["u"][:, 0], "B_row": named["B"][:, 0]}


FORWARD = {
    "selective_scan": lambda i: selective_scan(i["u"], i["u"], i["A"], i["B"], i["B"], i["D"], i["u"]),
    "causal_conv1d": lambda i: causal_conv1d(i["u"], i["weight"]),
    "selective_scan_step": lambda i: selective_scan_step(
        i["state"], i["row"], i["row"], i["A"], i["B_row"], i["B_row"], i["D"], i["row"]
    ),
    "causal_conv1d_step": lambda i: causal_conv1d_step(i["history"], i["row"], i["weight"]),
    "rope_attention": lambda i: rope_attention(*[i["heads"]] * 3, *[i["table"]] * 2),
    "rope_attention_step": lambda i: rope_attention_step(*[i["u"]] * 3, *[i["table"]] * 2, i["cache"], window=4),
}
WITH_GRADIENTS = {
    "selective_scan": lambda i: selective_scan(i["leaf"], i["u"], i["A"], i["B"], i["B"], i["D"], i["u"]),
    "causal_conv1d": lambda i: causal_conv1d(i["leaf"], i["weight"]),
    "rope_attention": lambda i: rope_attention(i["leaf_heads"], *[i["heads"]] * 2, *[i["table"]] * 2),
}


def overhead(contest, native, op, call, grad, most):
    case = Case(
        f"{op} overhead of a call{' with gradients' if grad else ''}", op, "cpu", bytes=0, operations={},
        limit="Python and the dispatcher", facts={"threads": 1, "isa": native.cpu_isa(), "cached": True},
    )  # fmt: skip
    empty = torch.ops.jambatalk.empty_op.default
    with torch.set_grad_enabled(grad):
        contest(
            case, call, [tiny()],
            {"empty op": lambda i: empty(i["u"]), "torch.add": lambda i: torch.add(i["u"], i["u"])},
            rounds=9, calls=CALLS,
        )  # fmt: skip
    case.bar("microseconds", case.seconds["ours"] * 1e6, most=most)


@pytest.mark.parametrize("op", FORWARD)
def test_without_gradients(contest, native, op):
    overhead(contest, native, op, FORWARD[op], grad=False, most=10)


@pytest.mark.parametrize("op", WITH_GRADIENTS)
def test_with_gradients(contest, native, op):
    overhead(contest, native, op, WITH_GRADIENTS[op], grad=True, most=30)
