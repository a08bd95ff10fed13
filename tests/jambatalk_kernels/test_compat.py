"""compat: the call signatures of mamba_ssm and causal_conv1d, what they mean, and transformers on our ops."""

import importlib
import importlib.util
import inspect
import os
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accuracy import rms_ratio
from torch.utils._python_dispatch import TorchDispatchMode

from jambatalk_kernels import compat, native_library, use_backend
from jambatalk_kernels.compat import (
    causal_conv1d_fn,
    causal_conv1d_update,
    mamba_inner_fn,
    selective_scan_fn,
    selective_state_update,
)

LOADED, _WHY = native_library()
pytestmark = pytest.mark.skipif(
    not LOADED and os.environ.get("JAMBATALK_BUILD") == "none", reason="built with JAMBATALK_BUILD=none"
)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64).to(
        dtype
    )


# ---- what the calls mean, in plain PyTorch --------------------------------------------------------------------------


def per_channel(matrix, dim, length):
    """Any form of B or C -> (batch or 1, dim, states, length)."""
    if matrix.dim() == 2:
        return matrix[None, :, :, None].expand(1, -1, -1, length)
    if matrix.dim() == 3:
        return matrix[:, None].expand(-1, dim, -1, -1)
    return matrix.repeat_interleave(dim // matrix.shape[1], 1)


def scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, state=None):
    """The definition, channel-first, one position after the other, with a B and a C of every channel's own."""
    batch, dim, length = u.shape
    B, C = per_channel(B, dim, length), per_channel(C, dim, length)
    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    if delta_softplus:
        delta = F.softplus(delta)
    h = u.new_zeros(batch, dim, A.shape[1]) if state is None else state
    ys = []
    for t in range(length):
        d = delta[:, :, t, None]
        h = torch.exp(d * A) * h + d * B[..., t] * u[:, :, t, None]
        ys.append((C[..., t] * h).sum(-1))
    y = torch.stack(ys, -1) if ys else u * 0
    if D is not None:
        y = y + D[:, None] * u
    if z is not None:
        y = y * F.silu(z)
    return y, h


def conv(x, weight, bias=None, silu=False, history=None):
    """history (batch, dim, width - 1), or zeros."""
    width = weight.shape[1]
    history = x.new_zeros(*x.shape[:2], width - 1) if history is None else history
    y = F.conv1d(torch.cat([history, x], -1), weight[:, None], bias, groups=x.shape[1])
    return F.silu(y) if silu else y


def scan_inputs(batch=2, dim=12, states=4, length=9, form_B="variable", form_C="variable", dtype=torch.float64):
    forms = {
        "variable": (batch, states, length),
        "2 groups": (batch, 2, states, length),
        "3 groups": (batch, 3, states, length),
        "constant": (dim, states),
    }
    named = {
        "u": normal(batch, dim, length, seed=1),
        "delta": normal(batch, dim, length, seed=2) * 0.5 - 1,
        "A": -torch.exp(normal(dim, states, seed=3) * 0.5),
        "B": normal(*forms[form_B], seed=4),
        "C": normal(*forms[form_C], seed=5),
        "D": normal(dim, seed=6),
        "z": normal(batch, dim, length, seed=7),
        "delta_bias": normal(dim, seed=8) * 0.1,
    }
    return {name: value.to(dtype) for name, value in named.items()}


def compare(call, definition, named):
    """Outputs and gradients of every tensor in ``named``."""
    outputs = []
    for function in (call, definition):
        leaves = {k: v.detach().clone().requires_grad_() for k, v in named.items()}
        results = function(**leaves)
        results = results if isinstance(results, tuple) else (results,)
        weights = [normal(*r.shape, seed=9) for r in results]
        gradients = torch.autograd.grad(results, list(leaves.values()), weights)
        outputs.append([*results, *gradients])
    for name, got, want in zip([*(f"output {i}" for i in range(len(results))), *named], *outputs, strict=True):
        assert got.shape == want.shape, name
        assert rms_ratio(got, want) < 1e-12, name


# ---- signatures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function, signature",
    [
        (
            selective_scan_fn,
            "u delta A B C D=None z=None delta_bias=None delta_softplus=False return_last_state=False",
        ),
        (
            mamba_inner_fn,
            "xz conv1d_weight conv1d_bias x_proj_weight delta_proj_weight out_proj_weight out_proj_bias A B=None "
            "C=None D=None delta_bias=None B_proj_bias=None C_proj_bias=None delta_softplus=True checkpoint_lvl=1 "
            "b_rms_weight=None c_rms_weight=None dt_rms_weight=None b_c_dt_rms_eps=1e-06",
        ),
        (
            selective_state_update,
            "state x dt A B C D=None z=None dt_bias=None dt_softplus=False state_batch_indices=None",
        ),
        (
            causal_conv1d_fn,
            "x weight bias=None seq_idx=None initial_states=None return_final_states=False final_states_out=None "
            "activation=None",
        ),
        (
            causal_conv1d_update,
            "x conv_state weight bias=None activation=None cache_seqlens=None conv_state_indices=None",
        ),
    ],
    ids=lambda v: getattr(v, "__name__", None),
)
def test_arguments_are_theirs(function, signature):
    parameters = inspect.signature(function).parameters.values()
    mine = " ".join(p.name if p.default is p.empty else f"{p.name}={p.default}" for p in parameters)
    assert mine == signature
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)


# ---- selective_scan_fn ----------------------------------------------------------------------------------------------

FORMS = ["variable", "2 groups", "constant"]


@pytest.mark.parametrize("form_C", FORMS)
@pytest.mark.parametrize("form_B", FORMS)
def test_scan_with_every_form_of_B_and_C(form_B, form_C):
    named = scan_inputs(form_B=form_B, form_C=form_C)
    compare(
        lambda **leaves: selective_scan_fn(**leaves, delta_softplus=True, return_last_state=True),
        lambda **leaves: scan(**leaves, delta_softplus=True),
        named,
    )


def test_groups_of_B_and_C_may_differ():
    named = scan_inputs(form_B="2 groups", form_C="3 groups")
    compare(lambda **leaves: selective_scan_fn(**leaves, return_last_state=True), scan, named)


@pytest.mark.parametrize("form", ["variable", "constant"])
@pytest.mark.parametrize("left_out", ["D", "z", "delta_bias"])
def test_scan_options(left_out, form):
    named = scan_inputs(form_B=form)
    del named[left_out]
    compare(lambda **leaves: selective_scan_fn(**leaves), lambda **leaves: scan(**leaves)[0], named)


def test_scan_positional_as_they_call_it():
    named = scan_inputs()
    y, last = selective_scan_fn(*named.values(), True, True)
    want = scan(**named, delta_softplus=True)
    torch.testing.assert_close((y, last), want)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scan_dtypes(dtype, form):
    """y in u's dtype, state in float32; the error is that of rounding inputs and output, in every form of B."""
    named = scan_inputs(length=40, form_B=form, dtype=dtype)
    for name in ("A", "D", "delta_bias"):  # as callers pass them
        named[name] = named[name].float()
    y, last = selective_scan_fn(**named, delta_softplus=True, return_last_state=True)
    want, want_last = scan(**{k: v.double() for k, v in named.items()}, delta_softplus=True)
    assert y.dtype == dtype and last.dtype == torch.float32
    assert rms_ratio(y, want) <= {torch.float32: 1e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4}[dtype]
    assert rms_ratio(last, want_last) <= 1e-6


def channel_last(tensor):
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


class Allocations(TorchDispatchMode):
    """The ops that ran, and those of PyTorch's that made new memory of ``limit`` numbers or more."""

    def __init__(self, limit):
        super().__init__()
        self.limit, self.ran, self.large = limit, [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.ran.append(func.name())
        inside = {
            t.untyped_storage().data_ptr() for t in (*args, *(kwargs or {}).values()) if isinstance(t, torch.Tensor)
        }
        for out in result if isinstance(result, (tuple, list)) else (result,):
            if (
                isinstance(out, torch.Tensor)
                and not func.name().startswith("jambatalk")
                and out.untyped_storage().nbytes() >= self.limit * out.element_size()
                and out.untyped_storage().data_ptr() not in inside
            ):
                self.large.append(func.name())
        return result


LAYOUTS = {
    "channel-first": torch.Tensor.clone,
    "channel-last": channel_last,
    "half of xz": lambda t: torch.cat([t, t], 1)[:, t.shape[1] :],
    "half of a channel-last xz": lambda t: channel_last(torch.cat([t, t], 1))[:, t.shape[1] :],
}


@pytest.mark.parametrize("layout_of_delta", LAYOUTS)
@pytest.mark.parametrize("layout_of_u", LAYOUTS)
def test_mixed_layouts_are_read_in_place(layout_of_u, layout_of_delta):
    """Forward and backward: PyTorch allocates nothing as large as u, and the numbers do not depend on the layout."""
    plain = scan_inputs(dim=48, length=64, dtype=torch.float32)
    grad = normal(*plain["u"].shape, dtype=torch.float32)
    results = []
    for layouts in (("channel-first",) * 2, (layout_of_u, layout_of_delta)):
        named = dict(plain)
        named["u"], named["z"] = (LAYOUTS[layouts[0]](plain[k]) for k in ("u", "z"))
        named["delta"] = LAYOUTS[layouts[1]](plain["delta"])
        leaves = {k: v.requires_grad_() for k, v in named.items()}
        with Allocations(plain["u"].numel()) as seen:
            y = selective_scan_fn(**leaves, delta_softplus=True)
            gradients = torch.autograd.grad(y, list(leaves.values()), grad)
        assert seen.large == [] and any(name.startswith("jambatalk") for name in seen.ran)
        results.append([y, *gradients])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_the_allocation_counter_sees_copies():
    x = torch.zeros(2, 8, 16)
    with Allocations(x.numel()) as seen:
        x.transpose(1, 2).contiguous()
        x.view(16, 16)
    assert len(seen.large) == 1 and len(seen.ran) >= 2


def test_scan_of_nothing():
    for batch, dim, length in ((0, 12, 5), (2, 0, 5), (2, 12, 0)):
        for form_B in FORMS:
            named = scan_inputs(batch, dim, 4, length, form_B=form_B)
            y, last = selective_scan_fn(**named, return_last_state=True)
            assert y.shape == (batch, dim, length) and last.shape == (batch, dim, 4)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"A": torch.zeros(12, 4, dtype=torch.complex64)}, ValueError, "A: complex A is not supported"),
        ({"A": torch.zeros(12, 0)}, ValueError, "A: expected at least one state"),
        ({"u": [1.0]}, TypeError, "u: expected a tensor, got list"),
        ({"u": torch.zeros(2, 12)}, ValueError, r"u: expected shape \(batch, dim, length\), got \(2, 12\)"),
        ({"delta": torch.zeros(2, 9, 12)}, ValueError, r"delta: .*dim=12, length=9.*got \(2, 9, 12\)"),
        ({"B": torch.zeros(2, 9, 4)}, ValueError, r"B: .*states=4, length=9"),
        ({"B": torch.zeros(12, 3)}, ValueError, r"B: .*dim=12, states=4"),
        ({"C": torch.zeros(2, 5, 4, 9)}, ValueError, "C: expected a number of groups that divides dim=12"),
        ({"C": torch.zeros(2, 0, 4, 9)}, ValueError, "C: expected a number of groups"),
        ({"C": None}, TypeError, "C: expected a tensor, got NoneType"),
        ({"D": torch.zeros(12, 1)}, ValueError, r"D: expected shape \(dim=12\)"),
        ({"z": torch.zeros(2, 12, 9, dtype=torch.int32)}, TypeError, "z: expected a float dtype"),
        ({"delta_bias": torch.zeros(12, device="meta")}, ValueError, "delta_bias: expected device cpu, got meta"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_scan_errors_name_the_argument(change, error, message):
    with pytest.raises(error, match="selective_scan_fn: " + message):
        selective_scan_fn(**{**scan_inputs(dtype=torch.float32), **change})


# ---- mamba_inner_fn -------------------------------------------------------------------------------------------------


def inner_inputs(batch=2, dim=6, states=4, length=7, rank=3, out=5, width=4):
    return {
        "xz": normal(batch, 2 * dim, length, seed=1),
        "conv1d_weight": normal(dim, 1, width, seed=2),
        "conv1d_bias": normal(dim, seed=3),
        "x_proj_weight": normal(rank + 2 * states, dim, seed=4) * 0.5,
        "delta_proj_weight": normal(dim, rank, seed=5) * 0.5,
        "out_proj_weight": normal(out, dim, seed=6),
        "out_proj_bias": normal(out, seed=7),
        "A": -torch.exp(normal(dim, states, seed=8) * 0.5),
        "D": normal(dim, seed=9),
        "delta_bias": normal(dim, seed=10),
    }


def inner(
    xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias, A, B=None, C=None,
    D=None, delta_bias=None, B_proj_bias=None, C_proj_bias=None, b_rms_weight=None, c_rms_weight=None,
    dt_rms_weight=None,
):  # fmt: skip
    def norm(value, weight, axis):
        if weight is None:
            return value
        value = value / (value.square().mean(axis, keepdim=True) + 1e-6).sqrt()
        return value * weight[:, None]

    x, z = xz.chunk(2, 1)
    u = conv(x, conv1d_weight[:, 0], conv1d_bias, silu=True)
    rank, states = delta_proj_weight.shape[1], A.shape[1]
    rows = torch.einsum("bdl,rd->brl", u, x_proj_weight)
    delta = norm(torch.einsum("brl,dr->bdl", rows[:, :rank], delta_proj_weight), dt_rms_weight, 1)
    if B is None:
        B = rows[:, rank : rank + states] + (0 if B_proj_bias is None else B_proj_bias[:, None])
    if C is None:
        C = rows[:, -states:] + (0 if C_proj_bias is None else C_proj_bias[:, None])
    B, C = norm(B, b_rms_weight, -2), norm(C, c_rms_weight, -2)
    y, _ = scan(u, delta, A, B, C, D, z, delta_bias, True)
    y = torch.einsum("bdl,od->blo", y, out_proj_weight)
    return y if out_proj_bias is None else y + out_proj_bias


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"B_proj_bias": normal(4), "C_proj_bias": normal(4, seed=1)},
        {"b_rms_weight": normal(4), "c_rms_weight": normal(4, seed=1), "dt_rms_weight": normal(6)},
        {"B": normal(6, 4), "C": normal(6, 4, seed=1)},
        {"B": normal(2, 4, 7)},
        {"C": normal(2, 3, 4, 7), "c_rms_weight": normal(4)},
    ],
    ids=lambda extra: "+".join(extra) or "plain",
)
def test_inner(extra):
    named = {**inner_inputs(), **extra}
    if "B" in extra and "C" in extra:
        named["x_proj_weight"] = named["x_proj_weight"][:3]  # the rows of dt only
    elif "B" in extra:
        named["x_proj_weight"] = named["x_proj_weight"][:7]
    compare(mamba_inner_fn, inner, named)


def test_inner_without_biases_and_positional():
    named = inner_inputs()
    named["conv1d_bias"] = named["out_proj_bias"] = None
    got = mamba_inner_fn(*list(named.values())[:8], None, None, named["D"], named["delta_bias"])
    torch.testing.assert_close(got, inner(**named))


def test_inner_copies_nothing_as_large_as_its_input():
    named = {k: v.float() for k, v in inner_inputs(dim=64, length=128, out=4).items()}
    for xz in (named["xz"], channel_last(named["xz"])):
        with torch.no_grad(), Allocations(xz.numel() // 2) as seen:
            mamba_inner_fn(**{**named, "xz": xz})
        # One product: delta_proj, whose output is as large as u.
        assert [name for name in seen.large if "mm" not in name and "linear" not in name] == []
        assert len(seen.large) == 1


def assert_accurate(y, named):
    """At most twice the error of the same computation in PyTorch, all of it in bfloat16."""
    exact, torchs = (inner(**{k: v.to(dtype) for k, v in named.items()}) for dtype in (torch.float64, torch.bfloat16))
    assert rms_ratio(y, exact) <= 2 * rms_ratio(torchs, exact)


def test_inner_in_half_precision_takes_float32_parameters():
    """As transformers passes them: weights in bfloat16; A, D and all biases in float32."""
    named = inner_inputs(length=20)
    low = {
        k: v.bfloat16() if k in ("xz", "conv1d_bias") or k.endswith("weight") else v.float() for k, v in named.items()
    }
    y = mamba_inner_fn(**low)
    assert y.dtype == torch.bfloat16
    assert_accurate(y, low)


def test_inner_under_autocast():
    named = {k: v.float() for k, v in inner_inputs(length=20).items()}
    named["xz"] = named["xz"].bfloat16()  # as in_proj gives it there
    with torch.autocast("cpu", torch.bfloat16):
        y = mamba_inner_fn(**named)
    assert y.dtype == torch.bfloat16
    assert_accurate(y, named)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"xz": torch.zeros(2, 13, 7)}, ValueError, r"xz: .*2 \* dim=12"),
        ({"A": torch.zeros(6, 4, dtype=torch.complex64)}, ValueError, "A: complex"),
        ({"conv1d_weight": torch.zeros(6, 4)}, ValueError, r"conv1d_weight: .*got \(6, 4\)"),
        ({"x_proj_weight": torch.zeros(10, 6)}, ValueError, "x_proj_weight: expected at least 11 rows"),
        ({"delta_proj_weight": torch.zeros(5, 3)}, ValueError, "delta_proj_weight: "),
        ({"out_proj_weight": torch.zeros(5, 7)}, ValueError, "out_proj_weight: "),
        ({"out_proj_bias": torch.zeros(6)}, ValueError, "out_proj_bias: .*out=5"),
        ({"B_proj_bias": torch.zeros(3)}, ValueError, "B_proj_bias: .*states=4"),
        ({"dt_rms_weight": torch.zeros(3)}, ValueError, "dt_rms_weight: .*dim=6"),
        ({"B": torch.zeros(2, 7, 4)}, ValueError, "B: .*states=4, length=7"),
        ({"B": torch.zeros(6, 4), "b_rms_weight": torch.zeros(4)}, ValueError, "b_rms_weight: a constant B"),
        ({"checkpoint_lvl": 2}, ValueError, "checkpoint_lvl: expected 0 or 1, got 2"),
        (
            {"out_proj_weight": torch.zeros(5, 6).half()},
            TypeError,
            "out_proj_weight: expected the dtype of xz.*float16",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_inner_errors_name_the_argument(change, error, message):
    with pytest.raises(error, match="mamba_inner_fn: " + message):
        mamba_inner_fn(**{**{k: v.float() for k, v in inner_inputs().items()}, **change})


# ---- selective_state_update -----------------------------------------------------------------------------------------


def step_inputs(batch=3, heads=None, groups=None, dim=5, states=4):
    row = (batch, dim) if heads is None else (batch, heads, dim)
    matrix = (batch, states) if groups is None else (batch, groups, states)
    return {
        "state": normal(*row, states),
        "x": normal(*row, seed=1),
        "dt": normal(*row, seed=2),
        "A": -torch.exp(normal(*row[1:], states, seed=3)),
        "B": normal(*matrix, seed=4),
        "C": normal(*matrix, seed=5),
        "D": normal(*row[1:], seed=6),
        "z": normal(*row, seed=7),
        "dt_bias": normal(*row[1:], seed=8),
    }


def step(state, x, dt, A, B, C, D, z, dt_bias):
    """-> y, new state"""
    heads = state.shape[1]
    if state.dim() == 4:
        B, C = (m.repeat_interleave(heads // m.shape[1], 1)[:, :, None] for m in (B, C))
    else:
        B, C = B.reshape(B.shape[0], 1, -1), C.reshape(C.shape[0], 1, -1)
    dt = F.softplus(dt + dt_bias)[..., None]
    state = torch.exp(dt * A) * state + dt * B * x[..., None]
    return ((state * C).sum(-1) + D * x) * F.silu(z), state


@pytest.mark.parametrize("heads, groups", [(None, None), (None, 1), (4, 1), (4, 2), (4, 4), (1, 1)])
@pytest.mark.parametrize("strided", [False, True])
def test_state_update(heads, groups, strided):
    named = step_inputs(heads=heads, groups=groups)
    want, want_state = step(**named)
    if strided:  # no two axes of the state can be seen as one
        named["state"] = torch.stack([named["state"], named["state"]], -2)[..., 0, :].transpose(0, 1).contiguous()
        named["state"] = named["state"].transpose(0, 1)
    state = named["state"]
    y = selective_state_update(**named, dt_softplus=True)
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(state, want_state)


def test_state_update_of_permuted_heads_is_in_place():
    named = step_inputs(heads=4, groups=2)
    want, want_state = step(**named)
    memory = named["state"].permute(2, 0, 3, 1).contiguous()  # dim, batch, states, heads
    named["state"] = memory.permute(1, 3, 0, 2)
    torch.testing.assert_close(selective_state_update(**named, dt_softplus=True), want)
    torch.testing.assert_close(memory.permute(1, 3, 0, 2), want_state)


def test_state_update_with_parameters_of_a_head_expanded():
    """Mamba-2's form: one A, dt and D per head, expanded."""
    named = step_inputs(heads=4, groups=2)
    for name, axes in (("A", (1, 2)), ("D", (1,)), ("dt_bias", (1,)), ("dt", (2,))):
        for axis in axes:
            named[name] = named[name].narrow(axis, 0, 1).expand_as(named[name])
    want, want_state = step(**named)
    torch.testing.assert_close(selective_state_update(**named, dt_softplus=True), want)
    torch.testing.assert_close(named["state"], want_state)


@pytest.mark.parametrize("heads", [None, 4])
def test_state_update_by_index(heads):
    """Rows 0, 1 and 3 have entries 5, 2 and 0; row 2 is padding; entries 1, 3 and 4 stay as they are."""
    named = step_inputs(batch=4, heads=heads, groups=1 if heads else None)
    indices = torch.tensor([5, 2, -1, 0], dtype=torch.int32)
    entries = normal(6, *named["state"].shape[1:], seed=20)
    real = torch.tensor([0, 1, 3])
    named["state"] = entries[indices[real].long()]
    rows = {k: v[real] if k in ("x", "dt", "B", "C", "z") else v for k, v in named.items()}
    want, want_state = step(**rows)
    want_entries = entries.clone()
    want_entries[indices[real].long()] = want_state
    named["state"] = entries
    y = selective_state_update(**named, dt_softplus=True, state_batch_indices=indices)
    torch.testing.assert_close(y[real], want)
    assert (y[2] == 0).all()
    torch.testing.assert_close(entries, want_entries)
    before = entries.clone()
    y = selective_state_update(**named, dt_softplus=True, state_batch_indices=torch.tensor([-1, 6, 99, -7]))
    assert (y == 0).all() and torch.equal(entries, before)


def test_state_update_without_options_and_of_nothing():
    named = step_inputs()
    for name in ("D", "z", "dt_bias"):
        del named[name]
    want_state = torch.exp(named["dt"][..., None] * named["A"]) * named["state"]
    want_state = want_state + (named["dt"] * named["x"])[..., None] * named["B"][:, None]
    y = selective_state_update(**named)
    torch.testing.assert_close(y, (want_state * named["C"][:, None]).sum(-1))
    torch.testing.assert_close(named["state"], want_state)
    for shape in (dict(batch=0), dict(batch=0, heads=2, groups=1), dict(heads=0, groups=1), dict(dim=0)):
        empty = step_inputs(**shape)
        assert selective_state_update(**empty).shape == empty["x"].shape
    empty = step_inputs(batch=0)
    y = selective_state_update(
        **{**empty, "state": named["state"]}, state_batch_indices=torch.zeros(0, dtype=torch.int32)
    )
    assert y.shape == (0, 5)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"state": torch.zeros(3, 5)}, ValueError, r"state: .*got \(3, 5\)"),
        ({"state": None}, TypeError, "state: expected a tensor"),
        ({"x": torch.zeros(2, 5)}, ValueError, "x: .*batch=3"),
        ({"dt": torch.zeros(3, 6)}, ValueError, "dt: .*dim=5"),
        ({"A": torch.zeros(5, 4, dtype=torch.complex64)}, ValueError, "A: complex"),
        ({"B": torch.zeros(3, 2, 4)}, ValueError, "B: expected a number of groups that divides heads=1"),
        ({"C": torch.zeros(3, 3)}, ValueError, "C: .*states=4"),
        ({"D": torch.zeros(4)}, ValueError, "D: .*dim=5"),
        ({"z": torch.zeros(3, 5, dtype=torch.int64)}, TypeError, "z: expected a float dtype"),
        ({"state_batch_indices": [0, 1, 2]}, TypeError, "state_batch_indices: expected an integer tensor"),
        ({"state_batch_indices": torch.zeros(3)}, TypeError, "state_batch_indices: .*float32"),
        ({"state_batch_indices": torch.zeros(2, dtype=torch.int32)}, ValueError, "state_batch_indices: .*batch=3"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_state_update_errors_name_the_argument(change, error, message):
    with pytest.raises(error, match="selective_state_update: " + message):
        selective_state_update(**{**{k: v.float() for k, v in step_inputs().items()}, **change})


def test_checked_values(monkeypatch):
    monkeypatch.setenv("JAMBATALK_KERNELS_CHECK", "1")
    named = step_inputs()
    with pytest.raises(ValueError, match="state_batch_indices: expected numbers below 3"):
        selective_state_update(**named, state_batch_indices=torch.tensor([0, 1, 3]))


# ---- causal_conv1d_fn -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2, 4, 7])
@pytest.mark.parametrize("activation", [None, "silu", "swish"])
def test_conv(width, activation):
    named = {"x": normal(2, 5, 9), "weight": normal(5, width), "bias": normal(5)}
    compare(
        lambda **leaves: causal_conv1d_fn(**leaves, activation=activation),
        lambda **leaves: conv(**leaves, silu=activation is not None),
        named,
    )


@pytest.mark.parametrize("length", [1, 2, 9])
def test_conv_with_states(length):
    named = {"x": normal(2, 5, length), "weight": normal(5, 4), "bias": normal(5), "initial_states": normal(2, 5, 3)}
    compare(
        lambda **leaves: causal_conv1d_fn(**leaves, return_final_states=True, activation="silu"),
        lambda x, weight, bias, initial_states: (
            conv(x, weight, bias, True, initial_states),
            torch.cat([initial_states, x], -1)[..., -3:],
        ),
        named,
    )


def test_conv_writes_final_states_where_told():
    x, weight = normal(2, 5, 2, dtype=torch.bfloat16), normal(5, 4)
    out = torch.full((2, 5, 3), torch.nan, dtype=torch.bfloat16)
    y, final = causal_conv1d_fn(x, weight, return_final_states=True, final_states_out=out)
    assert final is out and y.dtype == final.dtype == torch.bfloat16
    assert torch.equal(out, F.pad(x, (1, 0)))
    untouched = torch.full_like(out, torch.nan)
    assert isinstance(causal_conv1d_fn(x, weight, final_states_out=untouched), torch.Tensor)
    assert untouched.isnan().all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_conv_reads_any_layout_in_place(layout):
    x = LAYOUTS[layout](normal(2, 32, 64, dtype=torch.float32)).requires_grad_()
    weight = normal(32, 4, dtype=torch.float32)
    with Allocations(x.numel()) as seen:
        y = causal_conv1d_fn(x, weight, activation="silu")
        torch.autograd.grad(y, x, torch.ones_like(x))
    assert [name for name in seen.large if name != "aten::ones_like"] == []
    torch.testing.assert_close(y, conv(x, weight, silu=True))


@pytest.mark.parametrize("layout", ["channel-first", "channel-last", "half of a channel-last xz"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_conv_of_packed_sequences(layout, dtype):
    """Runs of equal numbers do not see each other, in any row of the batch; negative numbers are padding."""
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2], [0, 0, 5, 5, 5, 5, -1, -1, 3]], dtype=dtype)

    def definition(x, weight, bias):
        rows = []
        for row, numbers in zip(x, seq_idx.tolist(), strict=True):
            starts = [i for i in range(9) if i == 0 or numbers[i] != numbers[i - 1]]
            runs = zip(starts, [*starts[1:], 9], strict=True)
            rows.append(
                torch.cat([conv(row[None, :, a:b], weight, bias, True)[0] * (numbers[a] >= 0) for a, b in runs], -1)
            )
        return torch.stack(rows)

    named = {"x": normal(2, 5, 9), "weight": normal(5, 4), "bias": normal(5)}
    compare(
        lambda x, weight, bias: causal_conv1d_fn(LAYOUTS[layout](x), weight, bias, seq_idx, activation="silu"),
        definition,
        named,
    )


def test_packed_sequences_of_a_channel_last_input_are_read_in_place():
    x = channel_last(normal(2, 32, 64, dtype=torch.float32))
    with Allocations(x.numel()) as seen:
        causal_conv1d_fn(x, normal(32, 4, dtype=torch.float32), seq_idx=torch.zeros(2, 64, dtype=torch.int32))
    assert seen.large == []


def test_conv_of_nothing():
    for batch, dim, length in ((0, 5, 9), (2, 0, 9), (2, 5, 0)):
        x, weight = torch.zeros(batch, dim, length), torch.zeros(dim, 4)
        assert causal_conv1d_fn(x, weight).shape == x.shape
        assert causal_conv1d_fn(x, weight, seq_idx=torch.zeros(batch, length, dtype=torch.int32)).shape == x.shape
        y, final = causal_conv1d_fn(x, weight, return_final_states=True)
        assert final.shape == (batch, dim, 3)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": torch.zeros(2, 5)}, ValueError, r"x: expected shape \(batch, dim, length\)"),
        ({"weight": torch.zeros(4, 4)}, ValueError, "weight: .*dim=5"),
        ({"weight": torch.zeros(5, 17)}, ValueError, "weight: expected a width from 1 to 16"),
        ({"bias": torch.zeros(4)}, ValueError, "bias: .*dim=5"),
        ({"activation": "gelu"}, ValueError, "activation: expected None or 'silu', got 'gelu'"),
        ({"initial_states": torch.zeros(2, 5, 4)}, ValueError, r"initial_states: .*width - 1=3"),
        ({"return_final_states": True, "final_states_out": torch.zeros(2, 3, 5)}, ValueError, "final_states_out: "),
        ({"seq_idx": torch.zeros(2, 8, dtype=torch.int32)}, ValueError, r"seq_idx: .*batch=2, length=9.*got \(2, 8\)"),
        ({"seq_idx": torch.zeros(2, 9)}, TypeError, "seq_idx: .*float32"),
        ({"seq_idx": [0] * 9}, TypeError, "seq_idx: expected an integer tensor"),
        (
            {"seq_idx": torch.zeros(2, 9, dtype=torch.int32), "initial_states": torch.zeros(2, 5, 3)},
            ValueError,
            "initial_states: does not go with seq_idx",
        ),
        (
            {"seq_idx": torch.zeros(2, 9, dtype=torch.int32), "return_final_states": True},
            ValueError,
            "return_final_states: does not go with seq_idx",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_conv_errors_name_the_argument(change, error, message):
    with pytest.raises(error, match="causal_conv1d(_fn)?: " + message):
        causal_conv1d_fn(**{"x": torch.zeros(2, 5, 9), "weight": torch.zeros(5, 4), **change})


# ---- causal_conv1d_update -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [3, 4, 6])
@pytest.mark.parametrize("length", [None, 1, 2, 5, 8])
def test_conv_update(length, columns):
    """All columns of the state move on; the convolution reads the last three."""
    x = normal(2, 5) if length is None else normal(2, 5, length)
    state, weight, bias = normal(2, 5, columns, seed=1), normal(5, 4), normal(5)
    whole = torch.cat([state, x if length else x[..., None]], -1)
    want = conv(whole, weight, bias, True)[..., columns:]
    memory = torch.stack([state, state], -1)
    view = memory[..., 0]
    for form in (state, view):
        y = causal_conv1d_update(x, form, weight, bias, "silu")
        torch.testing.assert_close(y, want if length else want[..., 0])
        assert torch.equal(form, whole[..., -columns:])
    assert torch.equal(memory[..., 0], view)


def test_conv_update_of_width_one():
    x, state, weight = normal(2, 5), normal(2, 5, 2, seed=1), normal(5, 1)
    want_state = torch.cat([state[..., 1:], x[..., None]], -1)
    torch.testing.assert_close(causal_conv1d_update(x, state, weight), x * weight[:, 0])
    assert torch.equal(state, want_state)
    assert causal_conv1d_update(x, torch.zeros(2, 5, 0), weight).shape == (2, 5)


@pytest.mark.parametrize("length", [1, 2, 7])
def test_conv_update_of_a_ring(length):
    columns, at = 5, torch.tensor([3, 9], dtype=torch.int32)
    x, state, weight = normal(2, 3, length), normal(2, 3, columns, seed=1), normal(3, 4)
    want_y, want_state = [], state.clone()
    for b in range(2):
        past = torch.stack([state[b, :, (int(at[b]) - k) % columns] for k in (3, 2, 1)], -1)
        want_y.append(conv(x[b : b + 1], weight, None, False, past[None])[0])
        for t in range(length):
            want_state[b, :, (int(at[b]) + t) % columns] = x[b, :, t]
    y = causal_conv1d_update(x, state, weight, cache_seqlens=at)
    torch.testing.assert_close(y, torch.stack(want_y))
    assert torch.equal(state, want_state)


@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("length", [1, 2])
def test_conv_update_by_index(length, ring):
    x, entries, weight = normal(4, 3, length), normal(6, 3, 4, seed=1), normal(3, 4)
    indices = torch.tensor([-1, 5, 2, 0], dtype=torch.int32)
    at = torch.tensor([9, 4, 5, 6], dtype=torch.int32) if ring else None
    used = indices[1:].long()
    want_entries = entries.clone()
    picked = entries[used]
    want = causal_conv1d_update(x[1:], picked, weight, cache_seqlens=None if at is None else at[1:])
    want_entries[used] = picked
    y = causal_conv1d_update(x, entries, weight, cache_seqlens=at, conv_state_indices=indices)
    assert torch.equal(y[1:], want) and (y[0] == 0).all()
    assert torch.equal(entries, want_entries)


def test_conv_update_continues_the_convolution():
    x, weight, bias = normal(2, 5, 12), normal(5, 4), normal(5)
    whole = causal_conv1d_fn(x, weight, bias, activation="silu")
    for columns in (3, 4):
        state, position, parts = torch.zeros(2, 5, columns, dtype=torch.float64), 0, []
        for length in (1, 3, 1, 1, 5, 1):
            part = x[..., position : position + length]
            parts.append(causal_conv1d_update(part, state, weight, bias, "silu"))
            position += length
        torch.testing.assert_close(torch.cat(parts, -1), whole)


def test_conv_update_has_gradients_and_leaves_the_state_out_of_the_graph():
    for length in (1, 3):
        named = {"x": normal(2, 5, length), "weight": normal(5, 4), "bias": normal(5)}
        state = normal(2, 5, 4, seed=3)

        def call(state=state, **leaves):
            memory = state.clone()
            y = causal_conv1d_update(leaves["x"], memory, leaves["weight"], leaves["bias"], "silu")
            assert not memory.requires_grad
            return y

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            compare(call, lambda state=state, **v: conv(**v, silu=True, history=state[..., 1:]), named)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": torch.zeros(2, 4)}, ValueError, "weight: .*dim=4"),
        ({"x": None}, TypeError, "x: expected a tensor"),
        ({"conv_state": torch.zeros(2, 5, 2)}, ValueError, "conv_state: expected width - 1 = 3 columns or more"),
        ({"conv_state": torch.zeros(3, 5, 3)}, ValueError, "conv_state: .*batch=2"),
        ({"activation": "relu"}, ValueError, "activation: "),
        ({"cache_seqlens": torch.zeros(3, dtype=torch.int32)}, ValueError, "cache_seqlens: .*batch=2"),
        ({"cache_seqlens": 3}, TypeError, "cache_seqlens: expected an integer tensor"),
        ({"conv_state_indices": torch.zeros(2)}, TypeError, "conv_state_indices: .*float32"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_conv_update_errors_name_the_argument(change, error, message):
    arguments = {"x": torch.zeros(2, 5), "conv_state": torch.zeros(2, 5, 3), "weight": torch.zeros(5, 4), **change}
    with pytest.raises(error, match="causal_conv1d(_update|_step)?: " + message):
        causal_conv1d_update(**arguments)


def test_use_backend_works_around_a_call():
    named = scan_inputs()
    with use_backend("reference"), Allocations(1) as seen:
        selective_scan_fn(**named)
    assert not any(name.startswith("jambatalk") for name in seen.ran)
    with use_backend("cpu"), Allocations(1) as seen:
        selective_scan_fn(**named)
    assert "jambatalk::selective_scan" in seen.ran


@pytest.mark.parametrize("name", ["scan", "inner", "state update", "conv", "conv update"])
def test_compiles_without_a_graph_break(name):
    slots = torch.tensor([1, -1])
    state, conv_state = normal(2, 4, 5, 4), normal(2, 5, 4)
    row = {k: v for k, v in step_inputs(batch=2, heads=4, groups=2).items() if k != "state"}
    call, named = {
        "scan": (selective_scan_fn, scan_inputs(form_B="2 groups", form_C="constant")),
        "inner": (mamba_inner_fn, inner_inputs()),
        "state update": (lambda **v: selective_state_update(state.clone(), **v, state_batch_indices=slots), row),
        "conv": (causal_conv1d_fn, {"x": normal(2, 5, 9), "weight": normal(5, 4), "initial_states": normal(2, 5, 3)}),
        "conv update": (
            lambda **v: causal_conv1d_update(conv_state=conv_state.clone(), **v, conv_state_indices=slots),
            {"x": normal(2, 5), "weight": normal(5, 4)},
        ),
    }[name]
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    if name == "inner":  # PyTorch's own products in it may be given other strides, and so round otherwise
        assert rms_ratio(compiled(**named), call(**named)) < 1e-13
    else:
        torch.testing.assert_close(compiled(**named), call(**named), rtol=0, atol=0)


# ---- install --------------------------------------------------------------------------------------------------------

alone = pytest.mark.skipif(
    any(importlib.util.find_spec(package) for package in ("mamba_ssm", "causal_conv1d")),
    reason="mamba_ssm or causal_conv1d is installed: these tests stand in for them",
)
NAMES = ["mamba_ssm", "mamba_ssm.ops.selective_scan_interface", "mamba_ssm.ops.triton.selective_state_update"]


@pytest.fixture
def clean():
    """No model file of transformers has looked yet, and nothing stays installed."""
    hidden = {
        n: sys.modules.pop(n) for n in list(sys.modules) if n.startswith("transformers.models.") and ".modeling_" in n
    }
    yield
    compat.uninstall()
    sys.modules.update(hidden)


@alone
def test_install(clean):
    assert compat.install() == ("mamba_ssm", "causal_conv1d")
    for name in (*NAMES, "causal_conv1d", "causal_conv1d.causal_conv1d_interface"):
        assert importlib.util.find_spec(name).name == name
        assert importlib.import_module(name) is sys.modules[name]
    import causal_conv1d
    import mamba_ssm.ops.triton.selective_state_update
    from causal_conv1d.causal_conv1d_interface import causal_conv1d_fn as a
    from mamba_ssm.ops.selective_scan_interface import mamba_inner_fn as b
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update as c

    assert (a, b, c) == (causal_conv1d_fn, mamba_inner_fn, selective_state_update)
    assert mamba_ssm.selective_scan_fn is selective_scan_fn
    assert mamba_ssm.ops.triton.selective_state_update.selective_state_update is selective_state_update
    assert causal_conv1d.causal_conv1d_update is causal_conv1d_update
    with pytest.raises(ImportError):
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined  # noqa: F401

    before = dict(sys.modules)
    assert compat.install() == ("mamba_ssm", "causal_conv1d")
    assert sys.modules == before
    compat.uninstall()
    assert not [name for name in sys.modules if name.startswith(("mamba_ssm", "causal_conv1d"))]
    assert importlib.util.find_spec("causal_conv1d") is None


@alone
def test_install_one_package(clean):
    assert compat.install("causal_conv1d") == ("causal_conv1d",)
    assert "mamba_ssm" not in sys.modules
    assert compat.install(["mamba_ssm"]) == ("mamba_ssm",)
    with pytest.raises(ValueError, match="install: packages: .*got 'fla'"):
        compat.install(("mamba_ssm", "fla"))


@alone
def test_a_package_that_is_there_stays_unless_told(clean, monkeypatch, tmp_path):
    """On disk, not imported; then imported."""
    (tmp_path / "mamba_ssm").mkdir()
    (tmp_path / "mamba_ssm" / "__init__.py").write_text("real = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    for _ in range(2):
        with pytest.warns(RuntimeWarning, match=r"mamba_ssm is installed and stays"):
            assert compat.install() == ("causal_conv1d",)
        assert importlib.import_module("mamba_ssm").real
    real = sys.modules["mamba_ssm"]
    assert compat.install(override=True) == ("mamba_ssm", "causal_conv1d")
    assert sys.modules["mamba_ssm"].selective_scan_fn is selective_scan_fn
    compat.uninstall()
    assert sys.modules["mamba_ssm"] is real
    del sys.modules["mamba_ssm"]


@alone
def test_too_late_is_said(clean, monkeypatch):
    name = "transformers.models.mamba.modeling_mamba"
    looked = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, looked)
    compat.install()  # it has looked nothing up
    compat.uninstall()
    looked.causal_conv1d_fn = lambda: None
    with pytest.raises(RuntimeError, match=f"install: too late for {name}: "):
        compat.install()
    assert "mamba_ssm" not in sys.modules
    assert compat.install("mamba_ssm") == ("mamba_ssm",)  # of which it has nothing
    with pytest.warns(RuntimeWarning, match="too late"):
        assert compat.install(allow_late=True) == ("mamba_ssm", "causal_conv1d")


# ---- transformers ---------------------------------------------------------------------------------------------------


class Calls(TorchDispatchMode):
    """How often each of our ops ran."""

    def __init__(self):
        super().__init__()
        self.count = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "jambatalk":
            name = func.name().removeprefix("jambatalk::")
            self.count[name] = self.count.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def run_models() -> dict:
    """transformers' Mamba and Jamba: outputs and gradients, evaluating and training; prefill and steps with a cache."""
    from transformers import JambaConfig, JambaModel, MambaConfig, MambaModel

    mamba = MambaConfig(vocab_size=50, hidden_size=24, state_size=6, num_hidden_layers=2, use_bias=True)
    jamba = JambaConfig(
        vocab_size=50, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, num_experts=2,
        mamba_d_state=6, mamba_dt_rank=3,
    )  # fmt: skip
    results = {}
    for name, kind, config in (("mamba", MambaModel, mamba), ("jamba", JambaModel, jamba)):
        torch.manual_seed(0)
        model = kind(config)
        tokens = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(1))
        mask = torch.ones(2, 12, dtype=torch.long)
        mask[1, :4] = 0
        for mode in ("eval", "train"):
            getattr(model, mode)()
            with Calls() as calls:
                y = model(tokens, attention_mask=mask, use_cache=False).last_hidden_state
                loss = (y * normal(*y.shape).float())[mask.bool()].sum()
                gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
            results[f"{name} {mode}"] = y.detach()[mask.bool()]
            for (parameter, _), gradient in zip(model.named_parameters(), gradients, strict=True):
                if gradient is not None:
                    results[f"{name} {mode} d {parameter}"] = gradient
            results[f"{name} {mode} calls"] = calls.count
        model.eval()
        with torch.no_grad(), Calls() as calls:
            output = model(tokens[:, :6], use_cache=True)
            parts = [output.last_hidden_state]
            cache_name = "cache_params" if name == "mamba" else "past_key_values"
            for t in range(6, 12):
                output = model(tokens[:, t : t + 1], **{cache_name: output[cache_name]}, use_cache=True)
                parts.append(output.last_hidden_state)
        results[f"{name} steps"] = torch.cat(parts, 1)
        results[f"{name} steps calls"] = calls.count
    return results


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """run_models() here, where nothing is installed, and after install() in a process of its own."""
    path = tmp_path_factory.mktemp("models") / "installed.pt"
    roots = [Path(compat.__file__).parents[1], Path(__file__).parents[1], os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, roots))}
    process = subprocess.Popen([sys.executable, __file__, path], env=environment, stderr=subprocess.PIPE, text=True)
    plain = run_models()
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "falling back" not in errors  # transformers' word for its own path
    return {"plain": plain, "installed": torch.load(path, weights_only=True)}


@alone
@pytest.mark.parametrize("name", ["mamba", "jamba"])
def test_transformers_outputs_and_gradients_are_unchanged(models, name):
    plain, installed = ({k: v for k, v in models[how].items() if k.startswith(name)} for how in models)
    assert plain.keys() == installed.keys() and len(plain) > 30
    for key, want in plain.items():
        if not key.endswith("calls"):
            assert installed[key].shape == want.shape and installed[key].dtype == want.dtype, key
            assert rms_ratio(installed[key], want) < 1e-5, key


@alone
@pytest.mark.parametrize("name, mixers", [("mamba", 2), ("jamba", 1)])
def test_transformers_really_runs_on_our_ops(models, name, mixers):
    for mode in ("eval", "train"):
        assert models["plain"][f"{name} {mode} calls"] == {}
        assert models["installed"][f"{name} {mode} calls"] == {
            op: mixers
            for op in ("selective_scan", "selective_scan_backward", "causal_conv1d", "causal_conv1d_backward")
        }
    assert models["plain"][f"{name} steps calls"] == {}
    assert models["installed"][f"{name} steps calls"] == {
        "selective_scan": mixers,
        "causal_conv1d": mixers,
        "selective_scan_step": 6 * mixers,
        "causal_conv1d_step": 6 * mixers,
    }


@alone
def test_availability_checks_of_transformers_accept_the_modules(clean):
    from transformers.utils.import_utils import _is_package_available

    compat.install()
    for package in ("mamba_ssm", "causal_conv1d"):
        available, version = _is_package_available(package, return_version=True)
        assert available and version == sys.modules[package].__version__


if __name__ == "__main__":
    torch.set_num_threads(1)
    compat.install()
    torch.save(run_models(), sys.argv[1])
