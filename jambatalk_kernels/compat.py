"""Drop-in call signatures of ``mamba_ssm`` and ``causal_conv1d`` on the ops of this package, on every backend.

    from jambatalk_kernels.compat import selective_scan_fn          # in place of mamba_ssm's import, or
    jambatalk_kernels.compat.install()                              # for code that imports them by name

Names, argument order, shapes and defaults are theirs as documented (mamba_ssm up to 2.2, causal_conv1d up to 1.5); the
code is not. Sequences are channel-first there, (batch, dim, length), and channel-last here, so a call transposes views:
no input is copied, whatever its strides, but where a docstring says so. Results are channel-first views of channel-last
memory. Dtypes mix as in the ops below, which also choose the backend (``use_backend`` works around a call),
and all results are differentiable in all inputs, the last states included, where the originals stop some gradients.

Errors: ``TypeError``/``ValueError`` that name the argument.
"""

from __future__ import annotations

import importlib.util
import math
import sys
import types
import warnings
from collections.abc import Iterable
from importlib.machinery import ModuleSpec
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from jambatalk_kernels.causal_conv1d.op import causal_conv1d, causal_conv1d_step
from jambatalk_kernels.checks import check_tensor, values_are_checked
from jambatalk_kernels.linear import linear
from jambatalk_kernels.selective_scan.op import selective_scan, selective_scan_step
from jambatalk_kernels.selective_scan.reference import compute_dtype

__all__ = [
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "install",
    "mamba_inner_fn",
    "selective_scan_fn",
    "selective_state_update",
    "uninstall",
]


# ---- mamba_ssm ------------------------------------------------------------------------------------------------------


@overload
def selective_scan_fn(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = ..., z: Tensor | None = ...,
    delta_bias: Tensor | None = ..., delta_softplus: bool = ..., return_last_state: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def selective_scan_fn(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = ..., z: Tensor | None = ...,
    delta_bias: Tensor | None = ..., delta_softplus: bool = ..., *, return_last_state: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def selective_scan_fn(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = ..., z: Tensor | None = ...,
    delta_bias: Tensor | None = ..., delta_softplus: bool = ..., return_last_state: bool = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``mamba_ssm.ops.selective_scan_interface.selective_scan_fn`` on :func:`jambatalk_kernels.selective_scan`.

    Args:
        u, delta, z: (batch, dim, length), any strides, not necessarily the same.
        A: (dim, states), real.
        B, C: each (batch, states, length), grouped (batch, groups, states, length) with dim a multiple of groups, or
            constant in time (dim, states). D, delta_bias: (dim,).

    Returns: y (batch, dim, length) in u's dtype [, last state (batch, dim, states) in float32, or float64 when u is].

    Cost: that of :func:`jambatalk_kernels.selective_scan`, without copies. Groups run one after the other on slices of
    the channels and their outputs are joined: one copy of y. A constant B or C runs one scan of one state for each
    state: gradients then keep length * dim * states numbers, and half-precision u is copied to float32.

    Differs: complex A is an error (Mamba-1 is real), groups of B and C may differ in number, the last state has a
    gradient.
    """
    arguments = (u, delta, A, B, C, D, z, delta_bias)
    plain = isinstance(B, Tensor) and isinstance(C, Tensor) and B.dim() == C.dim() == 3
    if not plain:
        _check_scan(*arguments)
    try:
        u, delta, z = u.transpose(1, 2), delta.transpose(1, 2), None if z is None else z.transpose(1, 2)
        scan = _scan_one_group if plain else _scan_groups
        y, last_state = scan(u, delta, A, B.mT, C.mT, D, z, delta_bias, delta_softplus=delta_softplus)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
        # A plain call is checked by the op, in microseconds; its refusal is put into the words of this signature.
        _check_scan(*arguments)
        raise
    y = y.transpose(1, 2)
    return (y, last_state) if return_last_state else y


def _scan_groups(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, *, delta_softplus: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Channel-last scan in slices of the channels, such that each has one B and one C. -> y, last state

    B, C: (batch, length, states), (batch, groups, length, states), or (states, channels) where they are constant.
    """
    channels = u.shape[2]
    groups = math.lcm(*(matrix.shape[1] if matrix.dim() == 4 and channels else 1 for matrix in (B, C)))
    width = channels // groups

    def in_groups(tensor: Tensor, axis: int = -1) -> list[Tensor]:
        # split, not slices: the gradient of a slice is a tensor of zeros as large as the whole, for every group.
        return [tensor] if groups == 1 else list(tensor.split(width, axis))

    def matrices(matrix: Tensor) -> list[Tensor]:
        if matrix.dim() == 2:
            return in_groups(matrix.mT, 0)
        if matrix.dim() == 3:
            return [matrix] * groups
        own = matrix.unbind(1)
        return [own[group * len(own) // groups] for group in range(groups)]

    by_channel = [[None] * groups if tensor is None else in_groups(tensor) for tensor in (D, z, delta_bias)]
    parts = zip(in_groups(u), in_groups(delta), in_groups(A, 0), matrices(B), matrices(C), *by_channel, strict=True)
    ys, last_states = zip(*(_scan_one_group(*part, delta_softplus=delta_softplus) for part in parts), strict=True)
    return (ys[0], last_states[0]) if groups == 1 else (torch.cat(ys, 2), torch.cat(last_states, 1))


def _scan_one_group(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, *, delta_softplus: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Channel-last scan with B and C (batch, length, states), or (channels, states): constant. -> y, last state"""
    if B.dim() == 3 and C.dim() == 3:
        return selective_scan(
            u, delta, A, B, C, D, z, delta_bias=delta_bias, delta_softplus=delta_softplus, return_final_state=True
        )
    # The state is linear in B and the output in C, so a constant one can be multiplied after the scan. It differs from
    # channel to channel, which the op's B and C cannot: hence state by state, each with B or C of one.
    dtype = compute_dtype(u.dtype)
    exact = u.to(dtype)
    one = exact.new_ones(()).expand(*u.shape[:2], 1)
    y, last_states = torch.zeros_like(exact), []
    for A_n, B_n, C_n in zip(A.split(1, -1), B.split(1, -1), C.split(1, -1), strict=True):
        y_n, h_n = selective_scan(
            exact, delta, A_n, one if B.dim() == 2 else B_n, one if C.dim() == 2 else C_n, delta_bias=delta_bias,
            delta_softplus=delta_softplus, return_final_state=True,
        )  # fmt: skip
        for constant in (B_n, C_n):
            if constant.dim() == 2:
                y_n = y_n * constant.squeeze(1).to(dtype)
        last_states.append(h_n * B_n.to(dtype) if B.dim() == 2 else h_n)
        y = y + y_n
    if D is not None:
        y = y + D.to(dtype) * exact
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(u.dtype), torch.cat(last_states, -1)


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """``mamba_ssm.ops.selective_scan_interface.mamba_inner_fn``: a Mamba mixer from after in_proj to its output.

        x, z = xz;  u = silu(conv(x));  dt, B, C = x_proj(u);  delta = delta_proj(dt)
        out_proj(scan(u, delta, A, B, C, D, z))

    Args:
        xz: (batch, 2 * dim, length). conv1d_weight: (dim, 1, width). conv1d_bias, D, delta_bias: (dim,).
        x_proj_weight: (rank + 2 * states, dim), rows of dt, B and C; those of a given B or C may be left out.
        delta_proj_weight: (dim, rank). out_proj_weight: (out, dim). out_proj_bias: (out,). A: (dim, states), real.
        B, C: None, from x_proj, or given in any form of :func:`selective_scan_fn`.
        B_proj_bias, C_proj_bias: (states,), added to B and C from x_proj.
        b_rms_weight, c_rms_weight: (states,): RMS norm over the states of B and C (not of constant ones).
        dt_rms_weight: (dim,): RMS norm over the channels of delta, after delta_proj as there (Jamba's is before it).

    Returns: (batch, length, out).

    Differs: ``checkpoint_lvl`` is checked and has no effect. The original recomputes conv and delta_proj in backward at
    level 1; here u and delta are kept (two tensors like x) and nothing runs twice. Autocast rules the three projections
    as it does ``F.linear``; without it their weights have xz's dtype. out_proj_bias is cast to its weight's dtype.
    """
    op = "mamba_inner_fn"
    check_tensor(op, "xz", xz, ("batch", "2 * dim", "length"), (None, None, None), None)
    device = xz.device
    states = _check_A(op, A, None, device)
    dim = A.shape[0]
    check_tensor(op, "xz", xz, ("batch", "2 * dim", "length"), (None, 2 * dim, None), None)
    check_tensor(op, "conv1d_weight", conv1d_weight, ("dim", "1", "width"), (dim, 1, None), device)
    check_tensor(op, "delta_proj_weight", delta_proj_weight, ("dim", "rank"), (dim, None), device)
    rank = delta_proj_weight.shape[1]
    check_tensor(op, "x_proj_weight", x_proj_weight, ("rank + 2 * states", "dim"), (None, dim), device)
    least = rank + states * ((B is None) + (C is None))
    if x_proj_weight.shape[0] < least:
        raise ValueError(f"{op}: x_proj_weight: expected at least {least} rows, got {tuple(x_proj_weight.shape)}")
    check_tensor(op, "out_proj_weight", out_proj_weight, ("out", "dim"), (None, dim), device)
    _check_vectors(op, "out", out_proj_weight.shape[0], device, out_proj_bias=out_proj_bias)
    _check_vectors(
        op, "dim", dim, device, conv1d_bias=conv1d_bias, D=D, delta_bias=delta_bias, dt_rms_weight=dt_rms_weight
    )
    _check_vectors(
        op, "states", states, device, B_proj_bias=B_proj_bias, C_proj_bias=C_proj_bias, b_rms_weight=b_rms_weight,
        c_rms_weight=c_rms_weight,
    )  # fmt: skip
    if not torch.is_autocast_enabled(device.type):
        for name, weight in (
            ("x_proj_weight", x_proj_weight), ("delta_proj_weight", delta_proj_weight),
            ("out_proj_weight", out_proj_weight),
        ):  # fmt: skip
            if weight.dtype != xz.dtype:
                raise TypeError(f"{op}: {name}: expected the dtype of xz, {xz.dtype}, got {weight.dtype}")
    if checkpoint_lvl not in (0, 1):
        raise ValueError(f"{op}: checkpoint_lvl: expected 0 or 1, got {checkpoint_lvl!r}")

    x, z = xz.transpose(1, 2).chunk(2, dim=-1)
    u = causal_conv1d(x, conv1d_weight[:, 0], conv1d_bias, activation="silu")
    projected = linear(u, x_proj_weight)
    delta = linear(projected[..., :rank], delta_proj_weight)
    if dt_rms_weight is not None:
        delta = _rms_norm(delta, dt_rms_weight, b_c_dt_rms_eps)
    # Where both are there, B's rows come first; C's are always the last.
    from_x = {"B": projected[..., rank : rank + states], "C": projected[..., projected.shape[-1] - states :]}
    given = {"B": (B, B_proj_bias, b_rms_weight), "C": (C, C_proj_bias, c_rms_weight)}
    matrices: list[Tensor] = []
    for name, (matrix, bias, norm) in given.items():
        if matrix is None:
            matrix = from_x[name] if bias is None else from_x[name] + bias.to(projected.dtype)
            matrix = matrix.transpose(1, 2)
        else:
            _check_input_matrix(op, name, matrix, xz.shape[0], dim, states, xz.shape[2], device)
        if norm is not None:
            if matrix.dim() == 2:
                raise ValueError(f"{op}: {name.lower()}_rms_weight: a constant {name} (dim, states) has no norm")
            matrix = _rms_norm(matrix.transpose(-1, -2), norm, b_c_dt_rms_eps).transpose(-1, -2)
        matrices.append(matrix)
    y = selective_scan_fn(
        u.transpose(1, 2), delta.transpose(1, 2), A, matrices[0], matrices[1], D, z.transpose(1, 2), delta_bias,
        delta_softplus,
    )  # fmt: skip
    bias = None if out_proj_bias is None else out_proj_bias.to(out_proj_weight.dtype)
    return linear(y.transpose(1, 2), out_proj_weight, bias)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Over the last axis, computed in float32 or better, in x's dtype."""
    dtype = compute_dtype(x.dtype)
    return F.rms_norm(x.to(dtype), x.shape[-1:], weight.to(dtype), eps).to(x.dtype)


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """``mamba_ssm.ops.triton.selective_state_update.selective_state_update``: one position, ``state`` changed in place.

    Args:
        state: (batch, dim, states) or (batch, heads, dim, states), any float dtype, any strides.
        x, dt, z: (batch, dim) or (batch, heads, dim). A: (dim, states) or (heads, dim, states), real.
        B, C: (batch, states) or (batch, groups, states), heads a multiple of groups.
        D, dt_bias: (dim,) or (heads, dim).
        state_batch_indices: int32 or int64 (batch,): state is (entries, ...), and row b of the batch uses the entry
            with this number; they must differ. A number outside of the entries means a padded row: its y is zero and
            no state changes (``JAMBATALK_KERNELS_CHECK=1`` makes numbers from ``entries`` on an error).

    Returns: y (batch, dim) or (batch, heads, dim), as the state, in x's dtype.

    Cost: that of :func:`jambatalk_kernels.selective_scan_step` per group. Copied: A with heads where it is expanded,
    and the chosen entries with ``state_batch_indices``. Gradients: as the step's (on ``reference``, with a warning).
    """
    op = "selective_state_update"
    if state_batch_indices is None and isinstance(state, Tensor) and state.dim() == 3:
        try:  # Mamba-1's form: the op checks it, in microseconds
            return selective_scan_step(state, x, dt, A, B, C, D, z, delta_bias=dt_bias, delta_softplus=dt_softplus)
        except (RuntimeError, TypeError, ValueError):
            pass  # an axis of one too many, which is allowed, or an error: told apart below
    has_heads = isinstance(state, Tensor) and state.dim() == 4
    # Tensors; D, z and dt_bias may be None.
    named: dict[str, Any] = {
        "state": state,
        "x": x,
        "dt": dt,
        "A": A,
        "B": B,
        "C": C,
        "D": D,
        "z": z,
        "dt_bias": dt_bias,
    }
    named = _with_heads(op, named, one_state_per_row=state_batch_indices is None)
    state, x, dt, A, B, C, D, z, dt_bias = named.values()
    entries, heads, dim, _ = state.shape
    batch, groups = B.shape[:2]

    slots = None
    if state_batch_indices is not None:
        slots = _Slots(op, "state_batch_indices", state_batch_indices, entries, batch, state.device)
        before = state[slots.entries]
        x, dt, B, C = (value[slots.rows] for value in (x, dt, B, C))
        z = None if z is None else z[slots.rows]
    after = state if slots is None else before.clone()
    # Heads and channels become one axis where the state can be seen that way; else every head goes alone.
    together = max(heads // groups, 1) if after.stride(1) == dim * after.stride(2) else 1
    outputs = []
    for first in range(0, heads, together):
        part, group = slice(first, first + together), first * groups // heads
        outputs.append(
            selective_scan_step(
                after[:, part].flatten(1, 2), x[:, part].flatten(1, 2), dt[:, part].flatten(1, 2),
                A[part].flatten(0, 1), B[:, group], C[:, group], None if D is None else D[part].flatten(),
                None if z is None else z[:, part].flatten(1, 2),
                delta_bias=None if dt_bias is None else dt_bias[part].flatten(), delta_softplus=dt_softplus,
            )
        )  # fmt: skip
    y = outputs[0] if len(outputs) == 1 else torch.cat([x.new_empty(batch, 0), *outputs], 1)
    if slots is not None:
        y = slots.store(state, before, after, y)
    return y.unflatten(1, (heads, dim)) if has_heads else y


def _with_heads(op: str, named: dict[str, Any], one_state_per_row: bool) -> dict[str, Any]:
    """Check the arguments of selective_state_update, and give those without heads or groups an axis of one for them.

    -> the same tensors by name; D, z and dt_bias may be None."""
    for name, value in named.items():
        without = {"state": 3, "D": 1, "dt_bias": 1}.get(name, 2)  # axes where there are no heads and groups
        if isinstance(value, Tensor) and value.dim() == without:
            named[name] = value.unsqueeze(0 if name in ("A", "D", "dt_bias") else 1)
    check_tensor(op, "state", named["state"], ("batch", "heads", "dim", "states"), (None,) * 4, None)
    entries, heads, dim, states = named["state"].shape
    x, B = named["x"], named["B"]
    device = named["state"].device
    row, parameter, matrix = ("batch", "heads", "dim"), ("heads", "dim"), ("batch", "groups", "states")
    check_tensor(op, "x", x, row, (entries if one_state_per_row else None, heads, dim), device)
    batch = x.shape[0]
    _check_real(op, named["A"])
    check_tensor(op, "A", named["A"], (*parameter, "states"), (heads, dim, states), device)
    check_tensor(op, "B", B, matrix, (batch, None, states), device)
    if B.shape[1] < 1 or heads % B.shape[1]:
        raise ValueError(f"{op}: B: expected a number of groups that divides heads={heads}, got {tuple(B.shape)}")
    check_tensor(op, "C", named["C"], matrix, tuple(B.shape), device)
    for name, wanted, sizes in (
        ("dt", row, (batch, heads, dim)), ("z", row, (batch, heads, dim)), ("D", parameter, (heads, dim)),
        ("dt_bias", parameter, (heads, dim)),
    ):  # fmt: skip
        if name == "dt" or named[name] is not None:
            check_tensor(op, name, named[name], wanted, sizes, device)
    return named


class _Slots:
    """Which entry of a large state belongs to which row of the batch, without reading a value on the host.

    A row without an entry (its number is out of range) repeats the first row that has one, so that what it stores is
    what is stored there anyway; where no row has one, all store what they found.
    """

    def __init__(self, op: str, name: str, indices: Tensor, entries: int, batch: int, device: torch.device) -> None:
        _check_integers(op, name, indices, device, batch=batch)
        if batch and not entries:
            raise ValueError(f"{op}: {name}: the state has no entries")
        if values_are_checked() and indices.numel() and int(indices.max()) >= entries:
            raise ValueError(f"{op}: {name}: expected numbers below {entries}, got {indices.tolist()}")
        self.valid = (indices >= 0) & (indices < entries)
        self.rows = torch.arange(batch, device=device)
        if batch:
            self.rows = torch.where(self.valid, self.rows, self.valid.int().argmax())
        self.entries = indices.long()[self.rows].clamp(0, max(entries - 1, 0))

    def store(self, state: Tensor, before: Tensor, after: Tensor, y: Tensor) -> Tensor:
        """Write the new states back. -> y, zero in the rows without an entry"""
        has_entry = self.valid[self.rows].reshape(-1, *(1,) * (state.dim() - 1))
        with torch.no_grad():
            state.index_copy_(0, self.entries, torch.where(has_entry, after, before))
        return torch.where(self.valid.reshape(-1, *(1,) * (y.dim() - 1)), y, y.new_zeros(()))


# ---- causal_conv1d --------------------------------------------------------------------------------------------------


@overload
def causal_conv1d_fn(
    x: Tensor, weight: Tensor, bias: Tensor | None = ..., seq_idx: Tensor | None = ...,
    initial_states: Tensor | None = ..., return_final_states: Literal[False] = ...,
    final_states_out: Tensor | None = ..., activation: str | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def causal_conv1d_fn(
    x: Tensor, weight: Tensor, bias: Tensor | None = ..., seq_idx: Tensor | None = ...,
    initial_states: Tensor | None = ..., *, return_final_states: Literal[True],
    final_states_out: Tensor | None = ..., activation: str | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def causal_conv1d_fn(
    x: Tensor, weight: Tensor, bias: Tensor | None = ..., seq_idx: Tensor | None = ...,
    initial_states: Tensor | None = ..., return_final_states: bool = ...,
    final_states_out: Tensor | None = ..., activation: str | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``causal_conv1d.causal_conv1d_fn`` on :func:`jambatalk_kernels.causal_conv1d`.

    Args:
        x: (batch, dim, length), any strides. weight: (dim, width), width 1 to 16. bias: (dim,).
        seq_idx: int32 or int64 (batch, length): the number of the sequence that each position belongs to. A run of
            equal numbers is one sequence, which sees nothing of its neighbours; a negative number is padding and gives
            zeros. Not together with states, as there.
        initial_states: (batch, dim, width - 1), the inputs before the first position, oldest first.
        final_states_out: (batch, dim, width - 1), written to where ``return_final_states`` is set.
        activation: None, "silu" or "swish".

    Returns: y (batch, dim, length) in x's dtype [, final states (batch, dim, width - 1) in x's dtype].

    Differs: any width to 16 and any layout, also with states. ``seq_idx`` reads the number of sequences on the host
    (on a GPU that waits for it; ``cu_seqlens`` of the op itself does not) and copies x unless it is channel-last. Two
    runs with the same number and less than ``width - 1`` positions between them are two sequences here, one there.
    """
    op = "causal_conv1d_fn"
    if seq_idx is not None:
        _check_conv(op, x, weight, bias, None)
        for name, value in (("initial_states", initial_states), ("return_final_states", return_final_states or None)):
            if value is not None:
                raise ValueError(f"{op}: {name}: does not go with seq_idx; jambatalk_kernels.causal_conv1d has both")
        return _conv_of_sequences(x, weight, bias, seq_idx, activation)
    try:
        history = None if initial_states is None else initial_states.transpose(1, 2)
        y, final_states = causal_conv1d(
            x.transpose(1, 2), weight, bias, activation=activation, initial_state=history, return_final_state=True
        )
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
        _check_conv(op, x, weight, bias, initial_states)  # what the op refused, in the words of this signature
        raise
    y = y.transpose(1, 2)
    if not return_final_states:
        return y
    final_states = final_states.transpose(1, 2).to(x.dtype)
    if final_states_out is not None:
        axes = ("batch", "dim", "width - 1")
        check_tensor(op, "final_states_out", final_states_out, axes, final_states.shape, x.device)
        final_states = final_states_out.copy_(final_states)
    return y, final_states


def _conv_of_sequences(
    x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor, activation: str | None
) -> Tensor:
    """The rows of the batch as one packed row, cut wherever ``seq_idx`` changes."""
    batch, dim, length = x.shape
    _check_integers("causal_conv1d_fn", "seq_idx", seq_idx, x.device, batch=batch, length=length)
    starts = torch.ones(batch, length, dtype=torch.bool, device=x.device)
    starts[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    bounds = F.pad(starts.flatten(), (0, 1), value=True).nonzero().flatten().int()
    if batch * length == 0:  # nothing to cut, and cu_seqlens needs a sequence
        bounds = bounds.new_zeros(2)
    packed = x.transpose(1, 2).reshape(1, batch * length, dim)
    y = causal_conv1d(packed, weight, bias, activation=activation, cu_seqlens=bounds).view(batch, length, dim)
    padding = seq_idx < 0
    if padding.any():
        y = y.masked_fill(padding.unsqueeze(-1), 0)
    return y.transpose(1, 2)


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """``causal_conv1d.causal_conv1d_update``: the next position or positions, ``conv_state`` changed in place.

    Args:
        x: (batch, dim) or (batch, dim, length). weight: (dim, width), width 1 to 16. bias: (dim,).
        conv_state: (batch, dim, state length), the last inputs, oldest first; width - 1 columns or more. Any strides
            and float dtype. All columns move on; the convolution reads the last width - 1.
        cache_seqlens: int32 or int64 (batch,): conv_state is a ring instead; x goes to column ``cache_seqlens % state
            length`` and those that follow.
        conv_state_indices: int32 or int64 (batch,): conv_state is (entries, dim, state length), and row b of the batch
            uses the entry with this number; they must differ. A number outside of the entries means a padded row:
            its y is zero and no state changes (``JAMBATALK_KERNELS_CHECK=1``: numbers from ``entries`` on are errors).
        activation: None, "silu" or "swish".

    Returns: y, x's shape and dtype. Gradients: of x, weight and bias; through conv_state as it was before the call.
    """
    op = "causal_conv1d_update"
    one_position = isinstance(x, Tensor) and x.dim() == 2
    if one_position:
        x = x.unsqueeze(-1)
    _check_conv(op, x, weight, bias, None)
    batch, dim, length = x.shape
    rows = None if conv_state_indices is not None else batch
    check_tensor(op, "conv_state", conv_state, ("batch", "dim", "state length"), (rows, dim, None), x.device)
    columns, history = conv_state.shape[2], weight.shape[1] - 1
    if columns < history:
        raise ValueError(
            f"{op}: conv_state: expected width - 1 = {history} columns or more, got {tuple(conv_state.shape)}"
        )
    if cache_seqlens is not None:
        _check_integers(op, "cache_seqlens", cache_seqlens, x.device, batch=batch)

    arguments = weight, bias, activation
    if conv_state_indices is None:
        y = _conv_update(x, conv_state, *arguments, cache_seqlens)
    else:
        slots = _Slots(op, "conv_state_indices", conv_state_indices, conv_state.shape[0], batch, x.device)
        before = conv_state[slots.entries]
        after = before.clone()
        ring = None if cache_seqlens is None else cache_seqlens[slots.rows]
        y = slots.store(conv_state, before, after, _conv_update(x[slots.rows], after, *arguments, ring))
    return y.squeeze(-1) if one_position else y


def _conv_update(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    cache_seqlens: Tensor | None,
) -> Tensor:
    """causal_conv1d_update with the state of just these rows. -> y (batch, dim, length)"""
    columns, length, history = state.shape[2], x.shape[2], weight.shape[1] - 1
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, state, weight, bias))
    if length == 1 and cache_seqlens is None and history and not needs_grad:
        older = columns - history  # columns that the convolution does not read, but that move on all the same
        if older:
            moved = state[:, :, 1 : older + 1]
            state[:, :, :older] = moved if older == 1 else moved.clone()
        recent = state[:, :, older:].transpose(1, 2)
        return causal_conv1d_step(recent, x[..., 0], weight, bias, activation=activation).unsqueeze(-1)

    if cache_seqlens is None:
        # A copy: the state changes before a gradient is asked for.
        recent = state[:, :, columns - history :].clone()
    else:
        behind = torch.arange(-history, 0, device=x.device) + cache_seqlens.long().unsqueeze(1)
        recent = state.gather(2, _ring_columns(behind, state))
    y = causal_conv1d(x.transpose(1, 2), weight, bias, activation=activation, initial_state=recent.transpose(1, 2))
    kept = min(length, columns)
    with torch.no_grad():
        newest = x[:, :, length - kept :].to(state.dtype)
        if cache_seqlens is None:
            state.copy_(torch.cat([state[:, :, kept:], newest], 2))
        else:
            ahead = torch.arange(length - kept, length, device=x.device) + cache_seqlens.long().unsqueeze(1)
            state.scatter_(2, _ring_columns(ahead, state), newest)
    return y.transpose(1, 2)


def _ring_columns(positions: Tensor, state: Tensor) -> Tensor:
    """(batch, n) positions -> (batch, dim, n) columns of the ring that hold them."""
    return torch.remainder(positions, max(state.shape[2], 1)).unsqueeze(1).expand(-1, state.shape[1], -1)


# ---- checks ---------------------------------------------------------------------------------------------------------


def _check_real(op: str, A: object) -> None:
    if isinstance(A, Tensor) and A.is_complex():
        raise ValueError(f"{op}: A: complex A is not supported (Mamba-1 is real), got {A.dtype}")


def _check_A(op: str, A: Tensor, dim: int | None, device: torch.device) -> int:
    """-> states"""
    _check_real(op, A)
    check_tensor(op, "A", A, ("dim", "states"), (dim, None), device)
    if A.shape[1] < 1:
        raise ValueError(f"{op}: A: expected at least one state, got shape {tuple(A.shape)}")
    return A.shape[1]


def _check_vectors(op: str, axis: str, size: int, device: torch.device, **vectors: Tensor | None) -> None:
    for name, value in vectors.items():
        if value is not None:
            check_tensor(op, name, value, (axis,), (size,), device)


def _check_integers(op: str, name: str, value: object, device: torch.device, **axes: int) -> None:
    """An int32 or int64 tensor with these axes."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name}: expected an integer tensor ({', '.join(axes)}), got {type(value).__name__}")
    if value.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: {name}: expected dtype torch.int32 or torch.int64, got {value.dtype}")
    if tuple(value.shape) != tuple(axes.values()):
        wanted = ", ".join(f"{axis}={size}" for axis, size in axes.items())
        raise ValueError(f"{op}: {name}: expected shape ({wanted}), got {tuple(value.shape)}")
    if value.device != device:
        raise ValueError(f"{op}: {name}: expected device {device}, got {value.device}")


def _check_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None,
) -> None:  # fmt: skip
    op, positions = "selective_scan_fn", ("batch", "dim", "length")
    check_tensor(op, "u", u, positions, (None, None, None), None)
    batch, dim, length = u.shape
    states = _check_A(op, A, dim, u.device)
    check_tensor(op, "delta", delta, positions, (batch, dim, length), u.device)
    for name, value in (("B", B), ("C", C)):
        _check_input_matrix(op, name, value, batch, dim, states, length, u.device)
    if z is not None:
        check_tensor(op, "z", z, positions, (batch, dim, length), u.device)
    _check_vectors(op, "dim", dim, u.device, D=D, delta_bias=delta_bias)


def _check_conv(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, initial_states: Tensor | None) -> None:
    check_tensor(op, "x", x, ("batch", "dim", "length"), (None, None, None), None)
    batch, dim, _ = x.shape
    check_tensor(op, "weight", weight, ("dim", "width"), (dim, None), x.device)
    _check_vectors(op, "dim", dim, x.device, bias=bias)
    if initial_states is not None:
        sizes = (batch, dim, weight.shape[1] - 1)
        check_tensor(op, "initial_states", initial_states, ("batch", "dim", "width - 1"), sizes, x.device)


def _check_input_matrix(
    op: str, name: str, value: object, batch: int, dim: int, states: int, length: int, device: torch.device
) -> None:
    """B or C: variable, grouped or constant."""
    if isinstance(value, Tensor) and value.dim() == 2:
        check_tensor(op, name, value, ("dim", "states"), (dim, states), device)
    elif isinstance(value, Tensor) and value.dim() == 4:
        axes = ("batch", "groups", "states", "length")
        check_tensor(op, name, value, axes, (batch, None, states, length), device)
        if value.shape[1] < 1 or dim % value.shape[1]:
            raise ValueError(
                f"{op}: {name}: expected a number of groups that divides dim={dim}, got {tuple(value.shape)}"
            )
    else:
        check_tensor(op, name, value, ("batch", "states", "length"), (batch, states, length), device)


# ---- under their names ----------------------------------------------------------------------------------------------

# Modules and what is found in them. The versions are of the interface: below 2.0.4, where mamba_ssm began to have the
# kernels of Mamba-2, which are not here, so that code that asks for those by version goes its own way.
_MODULES: dict[str, dict[str, dict[str, object]]] = {
    "mamba_ssm": {
        "mamba_ssm": {
            "__version__": "1.2.2+jambatalk",
            "selective_scan_fn": selective_scan_fn,
            "mamba_inner_fn": mamba_inner_fn,
        },
        "mamba_ssm.ops": {},
        "mamba_ssm.ops.selective_scan_interface": {
            "selective_scan_fn": selective_scan_fn,
            "mamba_inner_fn": mamba_inner_fn,
        },
        "mamba_ssm.ops.triton": {},
        "mamba_ssm.ops.triton.selective_state_update": {"selective_state_update": selective_state_update},
    },
    "causal_conv1d": {
        "causal_conv1d": {
            "__version__": "1.5.0+jambatalk",
            "causal_conv1d_fn": causal_conv1d_fn,
            "causal_conv1d_update": causal_conv1d_update,
        },
        "causal_conv1d.causal_conv1d_interface": {
            "causal_conv1d_fn": causal_conv1d_fn,
            "causal_conv1d_update": causal_conv1d_update,
        },
    },
}
# What transformers' model files call the functions that they looked up; such a file looks once, when it is imported.
_LOOKED_UP = {
    "mamba_ssm": {
        "selective_scan_fn",
        "mamba_inner_fn",
        "selective_state_update",
        "mamba_selective_scan",
        "mamba_selective_state_update",
    },
    "causal_conv1d": {"causal_conv1d_fn", "causal_conv1d_update"},
}
_displaced: dict[str, dict[str, types.ModuleType]] = {}  # package -> what was in sys.modules before install()


def install(
    packages: Iterable[str] = ("mamba_ssm", "causal_conv1d"), *, override: bool = False, allow_late: bool = False
) -> tuple[str, ...]:
    """Serve ``import mamba_ssm`` and ``import causal_conv1d`` from here, for code that imports them by name.

        from jambatalk_kernels import compat
        compat.install()
        from transformers import JambaModel, MambaModel     # they now run on these ops, on CPU and GPU

    ``transformers`` (tested with 5.23) looks the functions up when one of its model files is imported, and uses what it
    finds on any device. So install first, best before the first import of ``transformers``. Releases that ask for a
    CUDA device or for a distribution's metadata before they look do not find these modules on a CPU.

    Registered: the functions of this module, under ``mamba_ssm``, ``mamba_ssm.ops.selective_scan_interface``,
    ``mamba_ssm.ops.triton.selective_state_update``, ``causal_conv1d`` and ``causal_conv1d.causal_conv1d_interface``.
    Nothing else of the two packages is there: importing it is an ``ImportError``, which is how ``transformers`` notes
    that the kernels of Mamba-2 are missing and goes its own way.

    Args:
        packages: which of the two.
        override: also replace a package that is installed. Otherwise it stays, with a ``RuntimeWarning``.
        allow_late: warn instead of raising when model files of ``transformers`` have looked already: they keep what
            they found, those imported later find these ops.

    Returns: the packages, of those asked for, that are served from here. A second call changes nothing.

    Errors: ``ValueError`` for another package, ``RuntimeError`` when it is too late.
    """
    packages = (packages,) if isinstance(packages, str) else tuple(packages)
    for package in packages:
        if package not in _MODULES:
            raise ValueError(f"install: packages: expected some of {', '.join(_MODULES)}, got {package!r}")
    wanted = []
    for package in packages:
        if package in _displaced:
            continue
        if not override and _is_installed(package):
            warnings.warn(
                f"install: {package} is installed and stays; install(override=True) replaces it",
                RuntimeWarning,
                stacklevel=2,
            )
            continue
        wanted.append(package)
    late = _model_files_with(set().union(*(_LOOKED_UP[package] for package in wanted)))
    if late:
        message = (
            f"install: too late for {', '.join(late)}: imported already, with the functions found then; "
            "call install() before"
        )
        if not allow_late:
            raise RuntimeError(f"{message}, or pass allow_late=True to serve the imports that follow")
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    for package in wanted:
        _displaced[package] = {name: sys.modules.pop(name) for name in _modules_of(package)}
        for name, contents in _MODULES[package].items():
            sys.modules[name] = _module(name, contents)
        for name in _MODULES[package]:
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], child, sys.modules[name])
    return tuple(package for package in packages if package in _displaced)


def uninstall() -> None:
    """Undo :func:`install`: the packages are found, or not found, as before. Who imported them keeps what it has."""
    while _displaced:
        package, before = _displaced.popitem()
        for name in _modules_of(package):
            del sys.modules[name]
        sys.modules.update(before)


def _module(name: str, contents: dict[str, object]) -> types.ModuleType:
    is_package = any(other.startswith(f"{name}.") for modules in _MODULES.values() for other in modules)
    module = types.ModuleType(name, f"{name} on the ops of jambatalk_kernels; see jambatalk_kernels.compat.install.")
    # A spec, so that importlib.util.find_spec finds the module; a path with nothing on it, so that a submodule that is
    # not here is "not found".
    module.__spec__ = ModuleSpec(name, None, origin=__name__, is_package=is_package)
    if is_package:
        module.__path__ = []
    module.__package__ = name if is_package else name.rpartition(".")[0]
    vars(module).update(contents)
    return module


def _modules_of(package: str) -> list[str]:
    return [name for name in sys.modules if name == package or name.startswith(f"{package}.")]


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # imported, by someone who gave it no spec
        return True


def _model_files_with(names: set[str]) -> list[str]:
    # vars, not getattr: transformers' packages import on access.
    return sorted(
        name
        for name, module in list(sys.modules.items())
        if name.startswith("transformers.models.") and ".modeling_" in name and names & vars(module).keys()
    )
