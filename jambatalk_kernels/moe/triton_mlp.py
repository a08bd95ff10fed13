"""Triton kernels of `moe_mlp`: grouped matrix products with gather, activation and routing weight fused in.

    y[t] = sum over slots k of  w[t, k] * W_out[e] act(W_in[e] x[t]),   e = experts[t, k]

An assignment a = t * top_k + k; row r of an intermediate is assignment order[r], so an expert's rows are neighbours.

    forward   pre = W_in[e] x[t]                       saved for the backward pass
              h = w * act(pre)                         in the same kernel; rounded once, after the weight
              rows[a] = W_out[e] h,  y[t] = the sum of rows[t * top_k + k] over k, in order
    backward  g = W_out[e]^T dy[t],  dw = <g, act(pre)>,  dpre = w * g * act'(pre),  h again: one kernel
              rows[a] = W_in[e]^T dpre,  dx[t] = their sum over k, in order
              dW_out[e] = sum of dy[t] h^T,  dW_in[e] = sum of dpre x[t]^T  over the rows of e, in order

So the experts' outputs are never kept, every sum has a fixed order, and nothing is added by atomics. Tokens are
gathered while the tiles are loaded; no padded copy of x exists. The grid is a bound from sizes alone: each program
finds its expert and rows in `offsets`, and those past the last tile leave. Indices are clamped, so that a routing that
is not from `moe_route` reads no foreign memory.

Where every token goes to every expert (top_k == experts; one expert is the least case), the second product runs over
all experts' hidden features at once, as one product of depth experts * hidden, no rows[a] and no sum after, unless so
few programs would leave the GPU idle. With 16
assignments or fewer, matrix-vector kernels stream each needed expert's weights once, many rows in parallel.

float32, bfloat16 and float16, sums in float32; float32 products are IEEE unless torch allows TF32. float64: refused.

Cost: 2 * tokens * top_k * hidden * (2 d + d_out) operations forward (swiglu) and twice as many backward, with
tokens * top_k * (3 hidden + d_out) elements written and read between the kernels; bound by the matrix units from about
200 rows per expert on, below by the bytes of the experts' weights. Source: kernels.md 1.5; the fused epilogues and
dw = <g, act> are SonicMoE's (arXiv 2512.14080), the bound on the grid is vLLM's.
"""

from __future__ import annotations

import functools
import sys

import torch
import triton
import triton.language as tl
from torch import Tensor

from jambatalk_kernels.gpu import Device, next_power_of_2
from jambatalk_kernels.moe import heuristics
from jambatalk_kernels.moe.heuristics import MAX_EXPERTS, MAX_TOP_K
from jambatalk_kernels.triton_interpreter import dot, rounded

__all__ = ["ahead_of_time_cases", "mlp_backward", "mlp_forward"]

_GROUP = tl.constexpr(8)  # tiles of rows that pass over the columns together, so that L2 serves their weights


# ---- pieces ---------------------------------------------------------------------------------------------------------


@triton.jit
def _clamped(value, low, high):
    return tl.minimum(tl.maximum(value.to(tl.int32), low), high)


@triton.jit
def _tile_and_column(tiles, columns):
    """This program's tile of rows and block of columns, in the order that shares weights in L2."""
    program = tl.program_id(0)
    width = _GROUP * columns
    first = program // width * _GROUP
    height = tl.minimum(tiles - first, _GROUP)
    return first + program % width % height, program % width // height


@triton.jit
def _rows_of_tile(tile, offsets, assignments, experts, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr):
    """-> (expert, first row, end of the expert's rows); expert >= experts where there is no such tile."""
    e = tl.arange(0, BLOCK_E)
    begins = _clamped(tl.load(offsets + e, mask=e < experts, other=0), 0, assignments)
    ends = _clamped(tl.load(offsets + 1 + e, mask=e < experts, other=0), 0, assignments)
    tiles = (tl.maximum(ends - begins, 0) + BLOCK_M - 1) // BLOCK_M
    until = tl.cumsum(tiles, 0)
    expert = tl.sum((until <= tile).to(tl.int32), 0)
    expert = tl.where(expert < BLOCK_E, expert, experts)
    here = e == expert
    skipped = tl.sum(tl.where(here, until - tiles, 0), 0)
    begin = tl.sum(tl.where(here, begins, 0), 0)
    end = tl.sum(tl.where(here, ends, 0), 0)
    return expert, begin + (tile - skipped) * BLOCK_M, end


@triton.jit
def _activate(gate, up, ACTIVATION: tl.constexpr):
    if ACTIVATION == "swiglu":
        return gate / (1.0 + tl.exp(-gate)) * up
    elif ACTIVATION == "gelu":
        return 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    else:
        return tl.where(gate < 0.0, 0.0, gate)  # NaN stays NaN


@triton.jit
def _activate_backward(gate, up, grad, ACTIVATION: tl.constexpr):
    """-> the gradients of gate and up (of gate twice, where there is no up)."""
    if ACTIVATION == "swiglu":
        sigmoid = 1.0 / (1.0 + tl.exp(-gate))
        return grad * up * sigmoid * (1.0 + gate * (1.0 - sigmoid)), grad * gate * sigmoid
    elif ACTIVATION == "gelu":
        normal = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
        density = 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
        slope = grad * (normal + gate * density)
        return slope, slope
    else:
        slope = tl.where(gate > 0.0, grad, 0.0)
        return slope, slope


@triton.jit
def _halves(tile):
    """The left and the right half of the columns. Epilogues go by quarters: a whole tile's would not fit registers."""
    return tl.split(tl.permute(tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _load_k(pointers, k, left, other_mask, EVEN: tl.constexpr, AXIS: tl.constexpr):
    """A tile of which the last block along the summed axis may be short; `left` is what is left of that axis."""
    if EVEN:
        return tl.load(pointers, mask=other_mask, other=0.0)
    else:
        return tl.load(pointers, mask=tl.expand_dims(k < left, AXIS) & other_mask, other=0.0)


# ---- matrix products ------------------------------------------------------------------------------------------------


@triton.jit
def _store_first_product(gate, up, first_n, to, ACTIVATION: tl.constexpr, SAVE: tl.constexpr):
    """Columns first_n .. of the first product's epilogue."""
    activated, preactivation, row, inside, weight, hidden = to
    n = first_n + tl.arange(0, gate.shape[1])
    stored = inside[:, None] & (n < hidden)[None, :]
    kind = activated.dtype.element_ty
    at = row.to(tl.int64)[:, None] * hidden + n[None, :]
    tl.store(activated + at, rounded(_activate(gate, up, ACTIVATION) * weight[:, None], kind), mask=stored)
    if SAVE:
        if ACTIVATION == "swiglu":
            at = row.to(tl.int64)[:, None] * (2 * hidden) + n[None, :]
            tl.store(preactivation + at + hidden, rounded(up, kind), mask=stored)
        tl.store(preactivation + at, rounded(gate, kind), mask=stored)


@triton.jit
def _first_product_kernel(
    x, weights, order, offsets, w_in, activated, preactivation,
    assignments, experts, features, hidden, tiles, columns,
    stride_xt, stride_xd, stride_we, stride_wr, stride_wd,
    TOP_K: tl.constexpr, ACTIVATION: tl.constexpr, SAVE: tl.constexpr, PRECISION: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """activated[r] = w act(W_in[e] x[t]) and, for the backward pass, preactivation[r] = W_in[e] x[t]."""
    tile, column = _tile_and_column(tiles, columns)
    expert, first, end = _rows_of_tile(tile, offsets, assignments, experts, BLOCK_M, BLOCK_E)
    if expert >= experts:
        return
    row = first + tl.arange(0, BLOCK_M)
    inside = row < end
    row = tl.minimum(row, end - 1)  # past the end: the last row again, not stored
    assignment = _clamped(tl.load(order + row), 0, assignments - 1)
    token = (assignment // TOP_K).to(tl.int64)
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    held = (n < hidden)[None, :]
    every_row = tl.full((BLOCK_M, 1), True, tl.int1)
    a = x + token[:, None] * stride_xt + k.to(tl.int64)[None, :] * stride_xd
    b = w_in + expert.to(tl.int64) * stride_we + k.to(tl.int64)[:, None] * stride_wd
    b_gate = b + n.to(tl.int64)[None, :] * stride_wr
    b_up = b + (hidden + n).to(tl.int64)[None, :] * stride_wr
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, features, BLOCK_K):
        left = features - start
        rows = _load_k(a, k, left, every_row, EVEN, 0)
        gate = dot(rows, _load_k(b_gate, k, left, held, EVEN, 1), gate, PRECISION)
        if ACTIVATION == "swiglu":
            up = dot(rows, _load_k(b_up, k, left, held, EVEN, 1), up, PRECISION)
        a += BLOCK_K * stride_xd
        b_gate += BLOCK_K * stride_wd
        b_up += BLOCK_K * stride_wd
    weight = tl.load(weights + assignment).to(tl.float32)
    gate_left, gate_right = _halves(gate)
    up_left, up_right = _halves(up)
    QUARTER: tl.constexpr = BLOCK_N // 4
    first_n = column * BLOCK_N
    to = (activated, preactivation, row, inside, weight, hidden)
    gate_a, gate_b = _halves(gate_left)
    up_a, up_b = _halves(up_left)
    _store_first_product(gate_a, up_a, first_n, to, ACTIVATION, SAVE)
    _store_first_product(gate_b, up_b, first_n + QUARTER, to, ACTIVATION, SAVE)
    gate_a, gate_b = _halves(gate_right)
    up_a, up_b = _halves(up_right)
    _store_first_product(gate_a, up_a, first_n + 2 * QUARTER, to, ACTIVATION, SAVE)
    _store_first_product(gate_b, up_b, first_n + 3 * QUARTER, to, ACTIVATION, SAVE)


@triton.jit
def _grouped_product_kernel(
    rows_in, order, offsets, w, rows_out,
    assignments, experts, depth, width, tiles, columns, stride_we, stride_wk, stride_wn,
    PRECISION: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """rows_out[order[r], n] = sum over k of rows_in[r, k] w[e, k, n]; both contiguous."""
    tile, column = _tile_and_column(tiles, columns)
    expert, first, end = _rows_of_tile(tile, offsets, assignments, experts, BLOCK_M, BLOCK_E)
    if expert >= experts:
        return
    row = first + tl.arange(0, BLOCK_M)
    inside = row < end
    row = tl.minimum(row, end - 1)
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    held = (n < width)[None, :]
    every_row = tl.full((BLOCK_M, 1), True, tl.int1)
    a = rows_in + row.to(tl.int64)[:, None] * depth + k[None, :]
    b = w + expert.to(tl.int64) * stride_we
    b = b + k.to(tl.int64)[:, None] * stride_wk + n.to(tl.int64)[None, :] * stride_wn
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, depth, BLOCK_K):
        left = depth - start
        rows = _load_k(a, k, left, every_row, EVEN, 0)
        total = dot(rows, _load_k(b, k, left, held, EVEN, 1), total, PRECISION)
        a += BLOCK_K
        b += BLOCK_K * stride_wk
    assignment = _clamped(tl.load(order + row), 0, assignments - 1).to(tl.int64)
    at = assignment[:, None] * width + n[None, :]
    tl.store(rows_out + at, rounded(total, rows_out.dtype.element_ty), mask=inside[:, None] & held)


@triton.jit
def _all_experts_product_kernel(
    rows_in, w, y, tokens, experts, depth, width, tiles, columns, stride_we, stride_wk, stride_wn,
    PRECISION: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y[t, n] = sum over e and k of rows_in[e * tokens + t, k] w[e, k, n]: every token has a row of every expert."""
    tile, column = _tile_and_column(tiles, columns)
    token = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = token < tokens
    token = tl.minimum(token, tokens - 1)
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    held = (n < width)[None, :]
    every_row = tl.full((BLOCK_M, 1), True, tl.int1)
    a = rows_in + token.to(tl.int64)[:, None] * depth + k[None, :]
    b = w + k.to(tl.int64)[:, None] * stride_wk + n.to(tl.int64)[None, :] * stride_wn
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    steps = tl.cdiv(depth, BLOCK_K)
    for step in range(0, experts * steps):  # one loop, so that the pipeline of loads never runs empty
        expert = (step // steps).to(tl.int64)
        start = step % steps * BLOCK_K
        left = depth - start
        rows = _load_k(a + (expert * tokens * depth + start), k, left, every_row, EVEN, 0)
        right = _load_k(b + (expert * stride_we + start.to(tl.int64) * stride_wk), k, left, held, EVEN, 1)
        total = dot(rows, right, total, PRECISION)
    at = token.to(tl.int64)[:, None] * width + n[None, :]
    tl.store(y + at, rounded(total, y.dtype.element_ty), mask=inside[:, None] & held)


@triton.jit
def _store_hidden_gradient(grad, first_n, to, ACTIVATION: tl.constexpr):
    """Columns first_n .. of that kernel's epilogue; -> their part of <g, act(pre)>."""
    preactivation, activated, grad_preactivation, row, inside, weight, hidden = to
    n = first_n + tl.arange(0, grad.shape[1])
    held = (n < hidden)[None, :]
    stored = inside[:, None] & held
    kind = activated.dtype.element_ty
    at_value = row.to(tl.int64)[:, None] * hidden + n[None, :]
    if ACTIVATION == "swiglu":
        at = row.to(tl.int64)[:, None] * (2 * hidden) + n[None, :]
        up = tl.load(preactivation + at + hidden, mask=stored, other=0.0).to(tl.float32)
    else:
        at = at_value
        up = 0.0
    gate = tl.load(preactivation + at, mask=stored, other=0.0).to(tl.float32)
    value = _activate(gate, up, ACTIVATION)
    tl.store(activated + at_value, rounded(value * weight[:, None], kind), mask=stored)
    grad_gate, grad_up = _activate_backward(gate, up, grad * weight[:, None], ACTIVATION)
    tl.store(grad_preactivation + at, rounded(grad_gate, kind), mask=stored)
    if ACTIVATION == "swiglu":
        tl.store(grad_preactivation + at + hidden, rounded(grad_up, kind), mask=stored)
    return tl.sum(tl.where(held, grad * value, 0.0), 1)


@triton.jit
def _hidden_gradient_kernel(
    grad_y, weights, order, offsets, w_out, preactivation, activated, grad_preactivation, grad_weights,
    assignments, experts, width, hidden, tiles, columns,
    stride_gt, stride_gd, stride_we, stride_wd, stride_wh,
    TOP_K: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """With g = W_out[e]^T dy[t]: activated[r] = w act(pre), grad_preactivation[r] = w g act'(pre), and of the weight's
    gradient <g, act(pre)> the part of these hidden features, in grad_weights[column, a]."""
    tile, column = _tile_and_column(tiles, columns)
    expert, first, end = _rows_of_tile(tile, offsets, assignments, experts, BLOCK_M, BLOCK_E)
    if expert >= experts:
        return
    row = first + tl.arange(0, BLOCK_M)
    inside = row < end
    row = tl.minimum(row, end - 1)
    assignment = _clamped(tl.load(order + row), 0, assignments - 1)
    token = (assignment // TOP_K).to(tl.int64)
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    held = (n < hidden)[None, :]
    every_row = tl.full((BLOCK_M, 1), True, tl.int1)
    a = grad_y + token[:, None] * stride_gt + k.to(tl.int64)[None, :] * stride_gd
    b = w_out + expert.to(tl.int64) * stride_we
    b = b + k.to(tl.int64)[:, None] * stride_wd + n.to(tl.int64)[None, :] * stride_wh
    grad = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, width, BLOCK_K):
        left = width - start
        rows = _load_k(a, k, left, every_row, EVEN, 0)
        grad = dot(rows, _load_k(b, k, left, held, EVEN, 1), grad, PRECISION)
        a += BLOCK_K * stride_gd
        b += BLOCK_K * stride_wd
    weight = tl.load(weights + assignment).to(tl.float32)
    left, right = _halves(grad)
    QUARTER: tl.constexpr = BLOCK_N // 4
    first_n = column * BLOCK_N
    to = (preactivation, activated, grad_preactivation, row, inside, weight, hidden)
    a, b = _halves(left)
    part = _store_hidden_gradient(a, first_n, to, ACTIVATION)
    part += _store_hidden_gradient(b, first_n + QUARTER, to, ACTIVATION)
    a, b = _halves(right)
    part += _store_hidden_gradient(a, first_n + 2 * QUARTER, to, ACTIVATION)
    part += _store_hidden_gradient(b, first_n + 3 * QUARTER, to, ACTIVATION)
    tl.store(grad_weights + column.to(tl.int64) * assignments + assignment, part, mask=inside)


@triton.jit
def _weight_gradient_kernel(
    left, right, order, offsets, out, assignments, experts, rows_left, rows_right, columns,
    stride_lr, stride_lc, stride_rr, stride_rc,
    TOP_K: tl.constexpr, GATHER_LEFT: tl.constexpr, PRECISION: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[s, e] = sum of left[.]^T right[.] over part s of the expert's rows, in order; out is contiguous.

    One of the two has a row per token (GATHER_LEFT: the left one), the other a row per sorted assignment.
    """
    m = tl.program_id(0) // columns * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    expert = tl.program_id(1)
    split = tl.program_id(2)
    begin = _clamped(tl.load(offsets + expert), 0, assignments)
    end = _clamped(tl.load(offsets + expert + 1), 0, assignments)
    if SPLITS > 1:
        share = (tl.maximum(end - begin, 0) + SPLITS * BLOCK_K - 1) // (SPLITS * BLOCK_K) * BLOCK_K
        begin += split * share
        end = tl.minimum(end, begin + share)
    held_m = (m < rows_left)[:, None]
    held_n = (n < rows_right)[None, :]
    a = left + m.to(tl.int64)[:, None] * stride_lc
    b = right + n.to(tl.int64)[None, :] * stride_rc
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(begin, end, BLOCK_K):
        row = start + tl.arange(0, BLOCK_K)
        inside = row < end
        token = _clamped(tl.load(order + row, mask=inside, other=0), 0, assignments - 1) // TOP_K
        at_left = (token if GATHER_LEFT else row).to(tl.int64)[None, :] * stride_lr
        at_right = (row if GATHER_LEFT else token).to(tl.int64)[:, None] * stride_rr
        total = dot(
            tl.load(a + at_left, mask=held_m & inside[None, :], other=0.0),
            tl.load(b + at_right, mask=inside[:, None] & held_n, other=0.0),
            total,
            PRECISION,
        )
    matrix = (split * experts + expert).to(tl.int64) * rows_left
    at = (matrix + m.to(tl.int64)[:, None]) * rows_right + n[None, :]
    tl.store(out + at, rounded(total, out.dtype.element_ty), mask=held_m & held_n)


@triton.jit
def _sum_kernel(
    parts, out, rows, columns, terms, stride_row, stride_term, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    """out[r, c] = sum over j, in order, of parts[r * stride_row + j * stride_term + c]; out is contiguous."""
    row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)[:, None]
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    held = (row < rows) & (column < columns)
    pointers = parts + row * stride_row + column
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for _ in range(terms):
        total += tl.load(pointers, mask=held, other=0.0).to(tl.float32)
        pointers += stride_term
    tl.store(out + row * columns + column, rounded(total, out.dtype.element_ty), mask=held)


# ---- 16 assignments or fewer ----------------------------------------------------------------------------------------


@triton.jit
def _first_vector_kernel(
    x, weights, chosen, order, offsets, w_in, activated, preactivation,
    assignments, experts, features, hidden, stride_xt, stride_xd, stride_we, stride_wr, stride_wd,
    TOP_K: tl.constexpr, ACTIVATION: tl.constexpr, SAVE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """activated[a] (float32) and preactivation[r]. The program of an expert's first row works for all of its rows."""
    first = tl.program_id(1)
    expert = _clamped(tl.load(chosen + _clamped(tl.load(order + first), 0, assignments - 1)), 0, experts - 1)
    if tl.load(offsets + expert) != first:
        return
    end = _clamped(tl.load(offsets + expert + 1), 0, assignments)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    held = n < hidden
    b = w_in + expert.to(tl.int64) * stride_we + k.to(tl.int64)[None, :] * stride_wd
    b_gate = b + n.to(tl.int64)[:, None] * stride_wr
    b_up = b + (hidden + n).to(tl.int64)[:, None] * stride_wr
    for row in range(first, end):
        assignment = _clamped(tl.load(order + row), 0, assignments - 1)
        a = x + (assignment // TOP_K).to(tl.int64) * stride_xt + k.to(tl.int64) * stride_xd
        gates = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        ups = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for start in range(0, features, BLOCK_K):
            mask = held[:, None] & (k < features - start)[None, :]
            step = tl.cast(start, tl.int64)
            value = tl.load(a + step * stride_xd, mask=k < features - start, other=0.0).to(tl.float32)[None, :]
            gates += tl.load(b_gate + step * stride_wd, mask=mask, other=0.0).to(tl.float32) * value
            if ACTIVATION == "swiglu":
                ups += tl.load(b_up + step * stride_wd, mask=mask, other=0.0).to(tl.float32) * value
        gate = tl.sum(gates, 1)
        up = tl.sum(ups, 1)
        weight = tl.load(weights + assignment).to(tl.float32)
        tl.store(activated + assignment * hidden + n, _activate(gate, up, ACTIVATION) * weight, mask=held)
        if SAVE:
            kind = preactivation.dtype.element_ty
            if ACTIVATION == "swiglu":
                tl.store(preactivation + row * (2 * hidden) + n, rounded(gate, kind), mask=held)
                tl.store(preactivation + row * (2 * hidden) + hidden + n, rounded(up, kind), mask=held)
            else:
                tl.store(preactivation + row * hidden + n, rounded(gate, kind), mask=held)


@triton.jit
def _second_vector_kernel(
    activated, chosen, w_out, y, experts, hidden, width, stride_we, stride_wn, stride_wh,
    TOP_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y[t] = sum over slots of W_out[e] activated[a]."""
    token = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    held = n < width
    b = w_out + n.to(tl.int64)[:, None] * stride_wn + k.to(tl.int64)[None, :] * stride_wh
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for slot in range(TOP_K):
        assignment = token * TOP_K + slot
        expert = _clamped(tl.load(chosen + assignment), 0, experts - 1).to(tl.int64)
        for start in range(0, hidden, BLOCK_K):
            near = k < hidden - start
            value = tl.load(activated + assignment * hidden + start + k, mask=near, other=0.0)[None, :]
            pointers = b + (expert * stride_we + tl.cast(start, tl.int64) * stride_wh)
            total += tl.load(pointers, mask=held[:, None] & near[None, :], other=0.0).to(tl.float32) * value
    tl.store(y + token * width + n, rounded(tl.sum(total, 1), y.dtype.element_ty), mask=held)


# ---- launchers ------------------------------------------------------------------------------------------------------


@functools.cache
def _device(index: int) -> Device:
    if index < 0:
        return Device((8, 0), 108)  # in the interpreter: an A100
    properties = torch.cuda.get_device_properties(index)
    return Device((properties.major, properties.minor), properties.multi_processor_count)


def _precision(x: Tensor) -> str:
    return "tf32" if x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _check(x: Tensor, weights: Tensor, experts: int) -> None:
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"moe_mlp: the Triton kernels take float32, bfloat16 and float16, got x of {x.dtype}")
    if experts > MAX_EXPERTS or weights.shape[1] > MAX_TOP_K:
        raise ValueError(
            f"moe_mlp: the Triton kernels take up to {MAX_EXPERTS} experts and top_k up to {MAX_TOP_K}, "
            f"got {experts} experts and top_k {weights.shape[1]}"
        )
    if weights.numel() >= 2**31:
        raise ValueError(
            f"moe_mlp: tokens * top_k must be less than 2**31, got {weights.shape[0]} * {weights.shape[1]}"
        )


def _sum(parts: Tensor, out: Tensor, terms: int, stride_row: int, stride_term: int) -> None:
    rows, columns = out.shape
    block_c = min(next_power_of_2(columns), 512)
    block_r = 1024 // block_c if rows > 1 else 1
    _sum_kernel[(triton.cdiv(rows, block_r), triton.cdiv(columns, block_c))](
        parts, out, rows, columns, terms, stride_row, stride_term, BLOCK_R=block_r, BLOCK_C=block_c, num_warps=4
    )


def _rows_to_tokens(rows: Tensor, order: Tensor, offsets: Tensor, w: Tensor, top_k: int) -> Tensor:
    """result[t] = the sum over t's assignments of rows[r] w[e]; w is (experts, depth, width)."""
    assignments, depth = rows.shape
    experts, _, width = w.shape
    tokens = assignments // top_k
    result = rows.new_empty(tokens, width)
    device = _device(rows.get_device())
    every = top_k == experts and heuristics.all_experts_in_one_product(tokens, width, experts, device)
    groups, group_rows = (1, tokens) if every else (experts, triton.cdiv(assignments, experts))
    plan = heuristics.product_plan(group_rows, width, depth, groups, rows.element_size(), device, even=every)
    tiles = triton.cdiv(tokens, plan.block_m) if every else heuristics.max_tiles(assignments, experts, plan.block_m)
    columns = triton.cdiv(width, plan.block_n)
    sizes = (depth, width, tiles, columns, *w.stride())
    constants = dict(
        PRECISION=_precision(rows), EVEN=depth % plan.block_k == 0,
        BLOCK_M=plan.block_m, BLOCK_N=plan.block_n, BLOCK_K=plan.block_k,
        num_warps=plan.num_warps, num_stages=plan.num_stages,
    )  # fmt: skip
    if every:
        _all_experts_product_kernel[(tiles * columns,)](rows, w, result, tokens, experts, *sizes, **constants)
        return result
    per_assignment = result if top_k == 1 else rows.new_empty(assignments, width)
    _grouped_product_kernel[(tiles * columns,)](
        rows, order, offsets, w, per_assignment, assignments, experts, *sizes,
        BLOCK_E=next_power_of_2(experts), **constants,
    )  # fmt: skip
    if top_k > 1:
        _sum(per_assignment, result, top_k, top_k * width, width)
    return result


def mlp_forward(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    order: Tensor,
    offsets: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    activation: str,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """-> y (tokens, d_out) and, with `save`, preactivation (tokens * top_k, rows of w_in), else an empty tensor.

    x, w_in and w_out of one dtype with any strides; the other arguments as in `Routing`. preactivation has x's dtype
    and its rows stand in the order of `order`.
    """
    tokens, features = x.shape
    num_experts, width, hidden = w_out.shape
    top_k = weights.shape[1]
    _check(x, weights, num_experts)
    assignments = tokens * top_k
    preactivation = x.new_empty((assignments, w_in.shape[1]) if save else 0)
    if 0 in (tokens, width, hidden):
        return x.new_zeros(tokens, width), preactivation
    weights = weights.contiguous()
    operands = 2 if activation == "swiglu" else 1
    if assignments <= heuristics.MATRIX_VECTOR_ASSIGNMENTS:
        y = x.new_empty(tokens, width)
        activated = x.new_empty(assignments, hidden, dtype=torch.float32)
        first = heuristics.vector_plan(hidden, features, operands)
        _first_vector_kernel[(triton.cdiv(hidden, first.block_n), assignments)](
            x, weights, experts, order, offsets, w_in, activated, preactivation,
            assignments, num_experts, features, hidden, *x.stride(), *w_in.stride(),
            TOP_K=top_k, ACTIVATION=activation, SAVE=save,
            BLOCK_N=first.block_n, BLOCK_K=first.block_k, num_warps=first.num_warps,
        )  # fmt: skip
        second = heuristics.vector_plan(width, hidden)
        _second_vector_kernel[(triton.cdiv(width, second.block_n), tokens)](
            activated, experts, w_out, y, num_experts, hidden, width, *w_out.stride(),
            TOP_K=top_k, BLOCK_N=second.block_n, BLOCK_K=second.block_k, num_warps=second.num_warps,
        )  # fmt: skip
        return y, preactivation
    plan = heuristics.product_plan(
        triton.cdiv(assignments, num_experts), hidden, features, num_experts, x.element_size(),
        _device(x.get_device()), operands=operands,
    )  # fmt: skip
    tiles = heuristics.max_tiles(assignments, num_experts, plan.block_m)
    columns = triton.cdiv(hidden, plan.block_n)
    activated = x.new_empty(assignments, hidden)
    _first_product_kernel[(tiles * columns,)](
        x, weights, order, offsets, w_in, activated, preactivation,
        assignments, num_experts, features, hidden, tiles, columns, *x.stride(), *w_in.stride(),
        TOP_K=top_k, ACTIVATION=activation, SAVE=save, PRECISION=_precision(x), EVEN=features % plan.block_k == 0,
        BLOCK_M=plan.block_m, BLOCK_N=plan.block_n, BLOCK_K=plan.block_k, BLOCK_E=next_power_of_2(num_experts),
        num_warps=plan.num_warps, num_stages=plan.num_stages,
    )  # fmt: skip
    return _rows_to_tokens(activated, order, offsets, w_out.transpose(1, 2), top_k), preactivation


def _weight_gradient(
    left: Tensor, right: Tensor, order: Tensor, offsets: Tensor, top_k: int, gather_left: bool
) -> Tensor:
    """(experts, columns of left, columns of right); left or right has a row per token, the other one per assignment."""
    assignments, experts = order.shape[0], offsets.shape[0] - 1
    rows_left, rows_right = left.shape[1], right.shape[1]
    plan, splits = heuristics.weight_gradient_plan(
        triton.cdiv(assignments, experts), rows_left, rows_right, experts, left.element_size(),
        _device(left.get_device()),
    )  # fmt: skip
    result = left.new_empty(experts, rows_left, rows_right)
    parts = result if splits == 1 else left.new_empty(splits, *result.shape, dtype=torch.float32)
    columns = triton.cdiv(rows_right, plan.block_n)
    _weight_gradient_kernel[(triton.cdiv(rows_left, plan.block_m) * columns, experts, splits)](
        left, right, order, offsets, parts, assignments, experts, rows_left, rows_right, columns,
        *left.stride(), *right.stride(),
        TOP_K=top_k, GATHER_LEFT=gather_left, PRECISION=_precision(left), SPLITS=splits,
        BLOCK_M=plan.block_m, BLOCK_N=plan.block_n, BLOCK_K=plan.block_k,
        num_warps=plan.num_warps, num_stages=plan.num_stages,
    )  # fmt: skip
    if splits > 1:
        _sum(parts, result.view(-1, rows_right), splits, rows_right, result.numel())
    return result


def mlp_backward(
    grad_y: Tensor,
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    order: Tensor,
    offsets: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    preactivation: Tensor | list[Tensor],
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> the gradients of x, weights, w_in and w_out, contiguous, in the dtypes of those.

    preactivation as `mlp_forward` saved it, or in a list, out of which it is taken, to be freed as soon as it is read;
    grad_y may have any strides. Experts without tokens get zeros.
    """
    if isinstance(preactivation, list):
        preactivation = preactivation.pop()
    tokens, features = x.shape
    num_experts, width, hidden = w_out.shape
    top_k = weights.shape[1]
    _check(x, weights, num_experts)
    assignments = tokens * top_k
    if 0 in (tokens, features, width, hidden):
        dx, dweights, dw_in, dw_out = (t.new_zeros(t.shape) for t in (x, weights, w_in, w_out))
        return dx, dweights, dw_in, dw_out
    weights = weights.contiguous()
    plan = heuristics.product_plan(
        triton.cdiv(assignments, num_experts), hidden, width, num_experts, x.element_size(),
        _device(x.get_device()), long_epilogue=True,
    )  # fmt: skip
    tiles = heuristics.max_tiles(assignments, num_experts, plan.block_m)
    columns = triton.cdiv(hidden, plan.block_n)
    activated = x.new_empty(assignments, hidden)
    grad_preactivation = torch.empty_like(preactivation)
    grad_weight_parts = x.new_empty(columns, assignments, dtype=torch.float32)
    _hidden_gradient_kernel[(tiles * columns,)](
        grad_y, weights, order, offsets, w_out, preactivation, activated, grad_preactivation, grad_weight_parts,
        assignments, num_experts, width, hidden, tiles, columns,
        *grad_y.stride(), *w_out.stride(),
        TOP_K=top_k, ACTIVATION=activation, PRECISION=_precision(x), EVEN=width % plan.block_k == 0,
        BLOCK_M=plan.block_m, BLOCK_N=plan.block_n, BLOCK_K=plan.block_k, BLOCK_E=next_power_of_2(num_experts),
        num_warps=plan.num_warps, num_stages=plan.num_stages,
    )  # fmt: skip
    grad_weights = torch.empty_like(weights)
    _sum(grad_weight_parts, grad_weights.view(1, -1), columns, 0, assignments)
    # In this order, and nothing kept that has been read: the peak of a training step's memory is here.
    del preactivation, grad_weight_parts
    grad_w_out = _weight_gradient(grad_y, activated, order, offsets, top_k, gather_left=True)
    del activated
    grad_x = _rows_to_tokens(grad_preactivation, order, offsets, w_in, top_k)
    grad_w_in = _weight_gradient(grad_preactivation, x, order, offsets, top_k, gather_left=False)
    return grad_x, grad_weights, grad_w_in, grad_w_out


def ahead_of_time_cases(capability: int) -> list[dict]:
    """What launches at the bars' sizes are compiled as on 128 multiprocessors of that capability (90: sm_90)."""
    from unittest.mock import patch

    from jambatalk_kernels.triton_launches import recorded_launches

    cases = []
    for sizes in (
        (torch.bfloat16, 4096, 8, 2, 1024, 1024, "swiglu", True),  # the bars' sizes
        (torch.bfloat16, 4096, 8, 8, 1024, 1024, "swiglu", False),  # every expert
        (torch.bfloat16, 600, 8, 2, 512, 1024, "swiglu", True),  # one clip
        (torch.bfloat16, 4800, 4, 2, 512, 1024, "gelu", True),  # eight clips, the experts of the presets
        (torch.float32, 600, 8, 2, 512, 1024, "swiglu", True),
        (torch.bfloat16, 1, 8, 2, 512, 1024, "swiglu", False),  # one step of a rollout
        (torch.float16, 100, 7, 1, 97, 97, "relu", True),  # no multiple of anything
    ):

        def run(sizes=sizes):
            dtype, tokens, experts, top_k, d, hidden, activation, backward = sizes
            x = torch.empty(tokens, d, dtype=dtype)
            w_in = torch.empty(experts, hidden * (2 if activation == "swiglu" else 1), d, dtype=dtype)
            w_out = torch.empty(experts, d, hidden, dtype=dtype)
            routing = (
                torch.empty(tokens, top_k),
                *(torch.empty(n, dtype=torch.int32) for n in ((tokens, top_k), tokens * top_k, experts + 1)),
            )
            y, preactivation = mlp_forward(x, *routing, w_in, w_out, activation, backward)
            if backward:
                mlp_backward(y, x, *routing, w_in, w_out, preactivation, activation)

        dtype, tokens, experts, top_k, d, hidden, activation, _ = sizes
        label = f"{str(dtype)[6:]} {activation}, {tokens} tokens, {experts} experts, top {top_k}, {d} x {hidden}"
        with patch.object(sys.modules[__name__], "_device", lambda _: Device(divmod(capability, 10), 128)):
            cases += recorded_launches(sys.modules[__name__], label, run)
    return cases
