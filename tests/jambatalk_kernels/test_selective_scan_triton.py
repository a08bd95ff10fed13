"""The Triton kernels of the selective scan against the definition: in the interpreter, or on a card where there is one.

The launchers are called as they are; what the op does around them is tested in test_selective_scan.py.
"""

import pytest
import torch
from test_selective_scan import inputs, rms_ratio

from jambatalk_kernels.selective_scan.heuristics import Layout
from jambatalk_kernels.selective_scan.reference import scan_reference

pytest.importorskip("triton", reason="triton is not installed")
from jambatalk_kernels.selective_scan import triton as scan  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ARGUMENTS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
# States per lane, channels per lane, warps, lanes along channels, lanes along states, steps, splits.
LAYOUTS = {
    "whole": Layout(4, 2, 1, 8, 4, 4, 1),
    "warps": Layout(2, 1, 2, 4, 8, 4, 1),
    "few": Layout(1, 1, 1, 2, 16, 8, 1),
    "split": Layout(4, 1, 1, 8, 4, 4, 3),
}


@pytest.fixture
def layout(request, monkeypatch):
    monkeypatch.setattr(scan, "_forward_layout", lambda *sizes: LAYOUTS[request.param])
    return LAYOUTS[request.param]


def on_device(named, **without):
    return {name: named[name].to(DEVICE) if name in named else None for name in ARGUMENTS}


def forward(named, cu_seqlens=None, softplus=True, save=False):
    named = {name: named.get(name) for name in ARGUMENTS}
    return scan.scan_forward(*named.values(), cu_seqlens, softplus, save)


def reference(named, cu_seqlens=None, softplus=True):
    named = dict(named)
    initial_state = named.pop("initial_state", None)
    return scan_reference(**named, delta_softplus=softplus, initial_state=initial_state, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("layout", LAYOUTS, indirect=True)
def test_forward_is_the_reference(layout):
    named = inputs(2, 70, 9, 13)
    for got, want in zip(forward(named), reference(named), strict=False):
        assert got.dtype == want.dtype and rms_ratio(got, want) < 1e-13
