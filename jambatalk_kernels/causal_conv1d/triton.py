"""causal_conv1d on GPUs: Triton kernels and their launchers.

    y_t = activation(bias + sum_k weight[:, k] x_{t - width + 1 + k})

A program computes a tile of positions and channels. Each thread walks along a run of positions with its last inputs in
registers, so an input is loaded once, plus the ``width - 1`` before its run, which the neighbouring run brings into
the cache. With channels fastest in memory a thread owns a few neighbouring channels and loads a position at a time;
with time fastest it owns one channel and loads a whole run in one wide access, split and joined in registers.

Packed sequences: ``bounds`` are the cleaned boundaries; one small kernel finds for every position its sequence and how
many positions of the sequence lie before it (-1: in no sequence). Its 8 bytes per position serve all channels.

Every launch also has programs for the edges of the sequences: the final state, or the gradient of the initial state.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from jambatalk_kernels.causal_conv1d.heuristics import backward_tile, forward_tile, time_is_fastest
from jambatalk_kernels.gpu import next_power_of_2

__all__ = ["ahead_of_time_cases", "conv_backward", "conv_forward", "conv_step"]

EDGE_CHANNELS = 128
LOCATE_POSITIONS = 128
STEP_CHANNELS = 128
SUM_CHANNELS = 32
SUM_TILES = 32
# Of the kernels' run-time integers, those that ahead_of_time_cases() takes as 1 and as no multiple of 16.
_UNIT_STRIDES = ("weight_k", "bias_c", "state_c", "gf_c")
_COUNTS = ("edges", "sequences", "tiles", "weight_c")


@triton.jit
def _cast(value, dtype: tl.constexpr):
    """The interpreter converts bfloat16 from and to float32 only; for the compiler the detour is none."""
    if value.dtype == tl.bfloat16 or dtype == tl.bfloat16:
        value = value.to(tl.float32)
    return value.to(dtype)


@triton.jit
def _load(at, inside, dtype: tl.constexpr, other=0):
    return _cast(tl.load(at, mask=inside, other=other), dtype)


@triton.jit
def _store(at, value, inside):
    tl.store(at, _cast(value, at.dtype.element_ty), mask=inside)


@triton.jit
def _split(x, N: tl.constexpr):
    """[a, b, N] -> N tensors [a, b]"""
    if N == 1:
        return (tl.reshape(x, [x.shape[0], x.shape[1]]),)
    else:
        even, odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1], N // 2, 2]))
        evens = _split(even, N // 2)
        odds = _split(odd, N // 2)
        parts = ()
        for i in tl.static_range(N // 2):
            parts = parts + (evens[i], odds[i])
        return parts


@triton.jit
def _join(parts, N: tl.constexpr):
    """N tensors [a, b] -> [a, b, N]"""
    if N == 1:
        return parts[0][:, :, None]
    else:
        evens = ()
        odds = ()
        for i in tl.static_range(N // 2):
            evens = evens + (parts[2 * i],)
            odds = odds + (parts[2 * i + 1],)
        x = tl.join(_join(evens, N // 2), _join(odds, N // 2))
        return tl.reshape(x, [x.shape[0], x.shape[1], N])


@triton.jit
def _sides(a, TIME_FASTEST: tl.constexpr):
    """A vector over runs of positions as the tile's axis of positions."""
    if TIME_FASTEST:
        return a[None, :]
    else:
        return a[:, None]


@triton.jit
def _channels(a, TIME_FASTEST: tl.constexpr):
    """A vector over channels as the tile's axis of channels."""
    if TIME_FASTEST:
        return a[:, None]
    else:
        return a[None, :]


@triton.jit
def _load_rows(
    at, stride_t, t, length, valid, other, dtype: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr,
    ROWS: tl.constexpr, TIME_FASTEST: tl.constexpr,
):  # fmt: skip
    """A tile for each of the positions t + FIRST .. t + FIRST + COUNT; ``other`` outside of [0, length).

    at: the addresses of position 0. t: the first position of each run, a multiple of ROWS.
    """
    rows = ()
    if TIME_FASTEST:
        for group in tl.static_range(FIRST // ROWS, (FIRST + COUNT + ROWS - 1) // ROWS):
            positions = (t + group * ROWS)[:, :, None] + tl.arange(0, ROWS)[None, None, :]
            inside = (positions >= 0) & (positions < length) & valid[:, :, None]
            parts = _split(_load(at[:, :, None] + positions * stride_t, inside, dtype, other), ROWS)
            for i in tl.static_range(ROWS):
                if (group * ROWS + i >= FIRST) and (group * ROWS + i < FIRST + COUNT):
                    rows = rows + (parts[i],)
    else:
        for i in tl.static_range(FIRST, FIRST + COUNT):
            inside = (t + i < length) & valid
            if i < 0:
                inside = inside & (t + i >= 0)
            rows = rows + (_load(at + (t + i) * stride_t, inside, dtype, other),)
    return rows


@triton.jit
def _store_rows(at, stride_t, t, first, length, valid, rows, ROWS: tl.constexpr, TIME_FASTEST: tl.constexpr):
    """The tiles of positions t .. t + ROWS, where they lie in [first, length); first None: they do not lie before."""
    if TIME_FASTEST:
        positions = t[:, :, None] + tl.arange(0, ROWS)[None, None, :]
        inside = (positions < length) & valid[:, :, None]
        _store(at[:, :, None] + positions * stride_t, _join(rows, ROWS), inside)
    else:
        for i in tl.static_range(ROWS):
            inside = (t + i < length) & valid
            if first is not None:
                inside = inside & (t + i >= first)
            _store(at + (t + i) * stride_t, rows[i], inside)


@triton.jit
def _load_weight(
    weight, c, channels, stride_c, stride_k, dtype: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    TIME_FASTEST: tl.constexpr,
):  # fmt: skip
    """Per tap, the weights of the tile's channels. Loaded as one block: a channel's taps are neighbours in memory."""
    at = _channels(c, TIME_FASTEST)[:, :, None]
    k = tl.arange(0, PADDED)[None, None, :]
    block = _load(weight + at * stride_c + k * stride_k, (at < channels) & (k < WIDTH), dtype)
    return _split(block, PADDED)


@triton.jit
def _last(parts, COUNT: tl.constexpr):
    last = ()
    for i in tl.static_range(len(parts) - COUNT, len(parts)):
        last = last + (parts[i],)
    return last


@triton.jit
def _fill_history(rows, state, stride_row, t, valid, dtype: tl.constexpr, WIDTH: tl.constexpr):
    """Rows of positions t - WIDTH + 1 on: those before position 0 (zero so far) from the initial state.

    state: the addresses of its row 0.
    """
    filled = ()
    for i in tl.static_range(len(rows)):
        row = rows[i]
        if i < WIDTH - 1:
            row += _load(state + (t + i) * stride_row, (t + i < WIDTH - 1) & valid, dtype)
        filled = filled + (row,)
    return filled


@triton.jit
def _tile_parameters(
    weight, bias, block_c, channels, weight_c, weight_k, bias_c, dtype: tl.constexpr, WIDTH: tl.constexpr,
    PADDED: tl.constexpr, BLOCK_C: tl.constexpr, TIME_FASTEST: tl.constexpr,
):  # fmt: skip
    """-> the tile's channels, which of them exist, weights per tap, bias"""
    c_flat = block_c * BLOCK_C + tl.arange(0, BLOCK_C)
    c = _channels(c_flat, TIME_FASTEST)
    valid = c < channels
    w = _load_weight(weight, c_flat, channels, weight_c, weight_k, dtype, WIDTH, PADDED, TIME_FASTEST)
    b = tl.zeros_like(w[0])
    if bias is not None:
        b = _load(bias + c * bias_c, valid, dtype)
    return c, valid, w, b


@triton.jit
def _taps(
    rows, r: tl.constexpr, ahead, sequence, state, stride_sequence, stride_row, valid, dtype: tl.constexpr,
    WIDTH: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The WIDTH inputs of position r of each run, oldest first; packed, those of its own sequence and its state."""
    taps = ()
    for k in tl.static_range(WIDTH):
        tap = rows[r + k]
        if PACKED:
            tap = tl.where(ahead >= WIDTH - 1 - k, tap, 0.0)
            if k < WIDTH - 1 and state is not None:
                before = (ahead >= 0) & (ahead + k < WIDTH - 1) & valid
                at = state + sequence.to(tl.int64) * stride_sequence + (ahead + k) * stride_row
                tap += _load(at, before, dtype)
        taps = taps + (tap,)
    return taps


@triton.jit
def _dot(weight, taps, bias, WIDTH: tl.constexpr):
    total = bias
    for k in tl.static_range(WIDTH):
        total += weight[k] * taps[k]
    return total


@triton.jit
def _sigmoid(x):
    """In float32 as 1 / sqrt(.) squared: with exp2 it is two instructions, where a division takes eight."""
    if x.dtype == tl.float64:
        return 1.0 / (1.0 + tl.exp(-x))
    else:
        root = tl.rsqrt(1.0 + tl.exp2(x * -1.4426950408889634))
        return root * root


@triton.jit
def _sequence(bounds, sequence, length):
    """-> begin, end of a sequence (a batch entry's where nothing is packed)"""
    if bounds is None:
        begin = sequence * 0
        end = begin + length
    else:
        begin = tl.load(bounds + sequence).to(tl.int64)
        end = tl.load(bounds + sequence + 1).to(tl.int64)
    return begin, end


@triton.jit
def _place(tile, length, channels, BLOCK_C: tl.constexpr, POSITIONS: tl.constexpr, TIME_FASTEST: tl.constexpr):
    """Which tile a program has, neighbours in memory first. -> batch entry, block of positions, block of channels"""
    blocks_t = tl.cdiv(length, POSITIONS)
    blocks_c = tl.cdiv(channels, BLOCK_C)
    if TIME_FASTEST:
        block_t = tile % blocks_t
        block_c = tile // blocks_t % blocks_c
    else:
        block_c = tile % blocks_c
        block_t = tile // blocks_c % blocks_t
    return (tile // (blocks_t * blocks_c)).to(tl.int64), block_t.to(tl.int64), block_c.to(tl.int64)


@triton.jit
def _locate_kernel(bounds, sequence_of, ahead_of, length, sequences, SEARCH_STEPS: tl.constexpr, BLOCK: tl.constexpr):
    """Per packed position: its sequence, and how many of that sequence's positions lie before it; -1 in no sequence.

    bounds (sequences + 1,) never falls and stays in [0, length]. Binary search for the number of sequences that end at
    or before the position. Cost: 8 bytes written per position.
    """
    t = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    sequence = tl.zeros([BLOCK], tl.int32)
    for i in tl.static_range(SEARCH_STEPS):
        probe = sequence + (1 << (SEARCH_STEPS - 1 - i))
        end = tl.load(bounds + probe, mask=probe <= sequences, other=0)
        sequence = tl.where((probe <= sequences) & (end <= t), probe, sequence)
    ahead = t - tl.load(bounds + sequence)
    covered = (sequence < sequences) & (ahead >= 0)
    tl.store(sequence_of + t, tl.where(covered, sequence, 0), mask=t < length)
    tl.store(ahead_of + t, tl.where(covered, ahead, -1).to(tl.int32), mask=t < length)


@triton.jit
def _forward_edge(
    program, x, initial_state, bounds, final_state, length, channels, x_batch, x_t, x_c, state_sequence, state_row,
    state_c, dtype: tl.constexpr, HISTORY: tl.constexpr, EDGE_C: tl.constexpr,
):  # fmt: skip
    """The final state of one sequence and EDGE_C channels: its last inputs, or older rows of its initial state."""
    edge_blocks = tl.cdiv(channels, EDGE_C)
    sequence = (program // edge_blocks).to(tl.int64)
    c = (program % edge_blocks).to(tl.int64) * EDGE_C + tl.arange(0, EDGE_C)
    valid = c < channels
    begin, end = _sequence(bounds, sequence, length)
    x_edge = x + c * x_c
    if bounds is None:
        x_edge += sequence * x_batch
    for row in tl.static_range(HISTORY):
        t = end - HISTORY + row + 0 * c  # a vector: the interpreter does not combine a mask with a scalar
        value = _load(x_edge + t * x_t, valid & (t >= begin), dtype)
        if initial_state is not None:
            at = initial_state + sequence * state_sequence + (t - begin + HISTORY) * state_row + c * state_c
            value += _load(at, valid & (t < begin), dtype)
        tl.store(final_state + (sequence * HISTORY + row) * channels + c, value, mask=valid)


@triton.jit
def _forward_kernel(
    x, weight, bias, initial_state, bounds, sequence_of, ahead_of, y, final_state,
    edges, length, channels,
    x_batch, x_t, x_c, weight_c, weight_k, bias_c, state_sequence, state_row, state_c, y_batch, y_t, y_c,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, SILU: tl.constexpr, dtype: tl.constexpr, BLOCK_C: tl.constexpr,
    GROUPS: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, TIME_FASTEST: tl.constexpr, EDGE_C: tl.constexpr,
):  # fmt: skip
    """y and the final state.

    The first ``edges`` programs each write the final state of one sequence and EDGE_C channels; the others a tile of y.
    Cost: x is read and y is written once; width multiply-adds, and an exponential and a division for silu.
    """
    program = tl.program_id(0)
    HISTORY: tl.constexpr = WIDTH - 1
    PACKED: tl.constexpr = bounds is not None
    if program < edges:
        _forward_edge(
            program, x, initial_state, bounds, final_state, length, channels, x_batch, x_t, x_c, state_sequence,
            state_row, state_c, dtype, HISTORY, EDGE_C,
        )  # fmt: skip
    else:
        POSITIONS: tl.constexpr = GROUPS * ROWS * STEPS
        batch, block_t, block_c = _place(program - edges, length, channels, BLOCK_C, POSITIONS, TIME_FASTEST)
        c, valid, w, b = _tile_parameters(
            weight, bias, block_c, channels, weight_c, weight_k, bias_c, dtype, WIDTH, PADDED, BLOCK_C, TIME_FASTEST
        )
        state = None  # the addresses of row 0
        if initial_state is not None:
            state = initial_state + c * state_c
            if not PACKED:
                state += batch * state_sequence
        x_tile = x + batch * x_batch + c * x_c
        STRIDE: tl.constexpr = GROUPS * ROWS if TIME_FASTEST else ROWS
        first = tl.arange(0, GROUPS) * (ROWS if TIME_FASTEST else ROWS * STEPS)
        run = _sides(block_t * POSITIONS + first, TIME_FASTEST)
        everywhere = run >= 0
        history = ()
        if not TIME_FASTEST:
            history = _load_rows(x_tile, x_t, run, length, valid, 0, dtype, -HISTORY, HISTORY, ROWS, False)
            if not PACKED and state is not None:
                history = _fill_history(history, state, state_row, run, valid, dtype, WIDTH)
        for step in range(STEPS):
            t = run + step * STRIDE
            if TIME_FASTEST:
                rows = _load_rows(x_tile, x_t, t, length, valid, 0, dtype, -HISTORY, ROWS + HISTORY, ROWS, True)
                if not PACKED and state is not None:
                    rows = _fill_history(rows, state, state_row, t, valid, dtype, WIDTH)
            else:
                rows = history + _load_rows(x_tile, x_t, t, length, valid, 0, dtype, 0, ROWS, ROWS, False)
                history = _last(rows, HISTORY)
            if PACKED:
                ahead = _load_rows(
                    ahead_of + 0 * t, 1, t, length, everywhere, -1, tl.int32, 0, ROWS, ROWS, TIME_FASTEST
                )
                sequence = _load_rows(
                    sequence_of + 0 * t, 1, t, length, everywhere, 0, tl.int32, 0, ROWS, ROWS, TIME_FASTEST
                )
            outputs = ()
            for r in tl.static_range(ROWS):
                if PACKED:
                    taps = _taps(
                        rows, r, ahead[r], sequence[r], state, state_sequence, state_row, valid, dtype, WIDTH, True
                    )
                else:
                    taps = _taps(rows, r, None, None, None, 0, 0, valid, dtype, WIDTH, False)
                total = _dot(w, taps, b, WIDTH)
                if SILU:
                    total *= _sigmoid(total)
                if PACKED:
                    total = tl.where(ahead[r] >= 0, total, 0.0)
                outputs = outputs + (total,)
            _store_rows(y + batch * y_batch + c * y_c, y_t, t, None, length, valid, outputs, ROWS, TIME_FASTEST)


@triton.jit
def _slope(total, SILU: tl.constexpr):
    """The derivative of the activation at the sum before it."""
    if SILU:
        gate = _sigmoid(total)
        return gate * (1.0 + total * (1.0 - gate))
    else:
        return 1.0


@triton.jit
def _backward_edge(
    program, grad_y, grad_final_state, x, weight, bias, initial_state, bounds, dinitial_state, length, channels,
    g_batch, g_t, g_c, gf_sequence, gf_row, gf_c, x_batch, x_t, x_c, weight_c, weight_k, bias_c,
    state_sequence, state_row, state_c, WIDTH: tl.constexpr, PADDED: tl.constexpr, SILU: tl.constexpr,
    dtype: tl.constexpr, EDGE_C: tl.constexpr,
):  # fmt: skip
    """The gradient of the initial state of one sequence and EDGE_C channels, from the sequence's first outputs."""
    HISTORY: tl.constexpr = WIDTH - 1
    edge_blocks = tl.cdiv(channels, EDGE_C)
    sequence = (program // edge_blocks).to(tl.int64)
    c_flat = (program % edge_blocks).to(tl.int64) * EDGE_C + tl.arange(0, EDGE_C)
    c = c_flat[None, :]
    valid = c < channels
    begin, end = _sequence(bounds, sequence, length)
    batch = sequence
    if bounds is not None:
        batch = sequence * 0
    w = _load_weight(weight, c_flat, channels, weight_c, weight_k, dtype, WIDTH, PADDED, False)
    b = tl.zeros_like(w[0])
    if bias is not None:
        b = _load(bias + c * bias_c, valid, dtype)
    inputs = ()  # the initial state, then the sequence's first HISTORY inputs
    for row in tl.static_range(HISTORY):
        at = initial_state + sequence * state_sequence + row * state_row + c * state_c
        inputs = inputs + (_load(at, valid, dtype),)
    for i in tl.static_range(HISTORY):
        t = begin + i + 0 * c
        inputs = inputs + (_load(x + batch * x_batch + t * x_t + c * x_c, valid & (t < end), dtype),)
    dpre = ()
    for i in tl.static_range(HISTORY):
        t = begin + i + 0 * c
        grad = tl.zeros_like(b)
        if grad_y is not None:
            at = grad_y + batch * g_batch + t * g_t + c * g_c
            grad = _load(at, valid & (t < end), dtype)
        taps = _taps(inputs, i, None, None, None, 0, 0, valid, dtype, WIDTH, False)
        dpre = dpre + (grad * _slope(_dot(w, taps, b, WIDTH), SILU),)
    for row in tl.static_range(HISTORY):  # position row - HISTORY: it reaches the outputs 0 .. row
        grad = tl.zeros_like(b)
        for i in tl.static_range(row + 1):
            grad += w[row - i] * dpre[i]
        if grad_final_state is not None:
            final_row = row - (end - begin) + 0 * c
            at = grad_final_state + sequence * gf_sequence + final_row * gf_row + c * gf_c
            grad += _load(at, valid & (final_row >= 0), dtype)
        at = dinitial_state + (sequence * HISTORY + row) * channels + c
        _store(at, grad, valid)


@triton.jit
def _backward_kernel(
    grad_y, grad_final_state, x, weight, bias, initial_state, bounds, sequence_of, ahead_of,
    dx, partial, dinitial_state, edges, length, channels,
    g_batch, g_t, g_c, gf_sequence, gf_row, gf_c, x_batch, x_t, x_c, weight_c, weight_k, bias_c,
    state_sequence, state_row, state_c, dx_batch, dx_t, dx_c,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, SILU: tl.constexpr, dtype: tl.constexpr, BLOCK_C: tl.constexpr,
    GROUPS: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, TIME_FASTEST: tl.constexpr, EDGE_C: tl.constexpr,
):  # fmt: skip
    """dx, the tiles' sums for dweight and dbias, and the gradient of the initial state.

        dpre_t = grad_y_t activation'(pre_t), pre_t computed again;  dx_p = sum_d weight[:, width - 1 - d] dpre_{p + d}
        dweight[:, k] = sum_t dpre_t x_{t - width + 1 + k};  dbias = sum_t dpre_t

    and grad_final_state is added to the inputs that it came from. A run computes dpre for the ``width - 1`` positions
    after it as well, rather than wait for its neighbour's. partial (tiles, width + 1, channels): a tile's sums over its
    positions, dbias last; :func:`_sum_kernel` adds them up.

    The first ``edges`` programs each write dinitial_state of one sequence and EDGE_C channels.
    Cost: x and grad_y are read and dx is written once; 3 width multiply-adds, an exponential and a division.
    """
    program = tl.program_id(0)
    HISTORY: tl.constexpr = WIDTH - 1
    PACKED: tl.constexpr = bounds is not None
    if program < edges:
        if initial_state is not None:  # else there are no edges
            _backward_edge(
                program, grad_y, grad_final_state, x, weight, bias, initial_state, bounds, dinitial_state, length,
                channels, g_batch, g_t, g_c, gf_sequence, gf_row, gf_c, x_batch, x_t, x_c, weight_c, weight_k, bias_c,
                state_sequence, state_row, state_c, WIDTH, PADDED, SILU, dtype, EDGE_C,
            )  # fmt: skip
    else:
        # Channels fastest: a run walks on with the last inputs and the last dpre in registers and stores dx HISTORY
        # positions behind, so that it ends HISTORY positions after those that it owns. Time fastest: every block of
        # ROWS positions loads and computes the HISTORY positions around it as well.
        BEHIND: tl.constexpr = 0 if TIME_FASTEST else HISTORY
        OWNED: tl.constexpr = ROWS * STEPS - BEHIND
        COUNT: tl.constexpr = ROWS + HISTORY - BEHIND  # positions whose dpre a step computes
        POSITIONS: tl.constexpr = GROUPS * OWNED
        batch, block_t, block_c = _place(program - edges, length, channels, BLOCK_C, POSITIONS, TIME_FASTEST)
        c, valid, w, b = _tile_parameters(
            weight, bias, block_c, channels, weight_c, weight_k, bias_c, dtype, WIDTH, PADDED, BLOCK_C, TIME_FASTEST
        )
        state = None  # the addresses of row 0
        if initial_state is not None:
            state = initial_state + c * state_c
            if not PACKED:
                state += batch * state_sequence
        x_tile = x + batch * x_batch + c * x_c
        STRIDE: tl.constexpr = GROUPS * ROWS if TIME_FASTEST else ROWS
        first = tl.arange(0, GROUPS) * (ROWS if TIME_FASTEST else OWNED)
        run = _sides(block_t * POSITIONS + first, TIME_FASTEST)
        everywhere = run >= 0
        zero = tl.zeros([BLOCK_C, GROUPS] if TIME_FASTEST else [GROUPS, BLOCK_C], dtype)
        sums = (zero,)
        for _ in tl.static_range(WIDTH):
            sums = sums + (zero,)
        history = ()
        dpre = ()
        if not TIME_FASTEST:
            history = _load_rows(x_tile, x_t, run, length, valid, 0, dtype, -HISTORY, HISTORY, ROWS, False)
            if not PACKED and state is not None:
                history = _fill_history(history, state, state_row, run, valid, dtype, WIDTH)
            for _ in tl.static_range(HISTORY):
                dpre = dpre + (zero,)
        for step in range(STEPS):
            t = run + step * STRIDE
            if TIME_FASTEST:
                rows = _load_rows(x_tile, x_t, t, length, valid, 0, dtype, -HISTORY, COUNT + HISTORY, ROWS, True)
                if not PACKED and state is not None:
                    rows = _fill_history(rows, state, state_row, t, valid, dtype, WIDTH)
            else:
                rows = history + _load_rows(x_tile, x_t, t, length, valid, 0, dtype, 0, COUNT, ROWS, False)
                history = _last(rows, HISTORY)
            if grad_y is not None:
                g_tile = grad_y + batch * g_batch + c * g_c
                grads = _load_rows(g_tile, g_t, t, length, valid, 0, dtype, 0, COUNT, ROWS, TIME_FASTEST)
            if PACKED:  # as dpre: from position t - BEHIND on
                ahead = _load_rows(
                    ahead_of + 0 * t, 1, t, length, everywhere, -1, tl.int32, -BEHIND, COUNT + BEHIND, ROWS,
                    TIME_FASTEST,
                )  # fmt: skip
                sequence = _load_rows(
                    sequence_of + 0 * t, 1, t, length, everywhere, 0, tl.int32, -BEHIND, COUNT + BEHIND, ROWS,
                    TIME_FASTEST,
                )  # fmt: skip
            outputs = ()
            for i in tl.static_range(COUNT):
                grad = zero
                if grad_y is not None:
                    if PACKED:
                        taps = _taps(
                            rows, i, ahead[BEHIND + i], sequence[BEHIND + i], state, state_sequence, state_row, valid,
                            dtype, WIDTH, True,
                        )  # fmt: skip
                    else:
                        taps = _taps(rows, i, None, None, None, 0, 0, valid, dtype, WIDTH, False)
                    grad = grads[i] * _slope(_dot(w, taps, b, WIDTH), SILU)
                    if PACKED:
                        grad = tl.where(ahead[BEHIND + i] >= 0, grad, 0.0)
                    if i < ROWS:
                        own = grad
                        if BEHIND + i >= ROWS:  # the run's last positions are the next one's
                            own = tl.where(t + i < run + OWNED, grad, 0.0)
                        added = ()
                        for k in tl.static_range(WIDTH):
                            added = added + (sums[k] + own * taps[k],)
                        sums = added + (sums[WIDTH] + own,)
                dpre = dpre + (grad,)
                if BEHIND + i >= HISTORY:  # every output that the input of that many positions ago reaches is known
                    total = w[HISTORY] * dpre[BEHIND + i - HISTORY]
                    for k in tl.static_range(HISTORY):
                        reached = dpre[BEHIND + i - k]
                        if PACKED:  # only within one sequence
                            reached = tl.where(ahead[BEHIND + i - k] >= HISTORY - k, reached, 0.0)
                        total += w[k] * reached
                    if grad_final_state is not None:  # which holds the sequence's last inputs
                        position = t + (i - HISTORY)
                        if PACKED:
                            of = sequence[BEHIND + i - HISTORY].to(tl.int64)
                            inside = valid & (ahead[BEHIND + i - HISTORY] >= 0)
                            final_row = position - tl.load(bounds + of + 1) + HISTORY
                        else:
                            of = batch
                            inside = valid & (position < length)
                            final_row = position - length + HISTORY
                        at = grad_final_state + of * gf_sequence + final_row * gf_row + c * gf_c
                        total += _load(at, inside & (final_row >= 0), dtype)
                    outputs = outputs + (total,)
            dpre = _last(dpre, BEHIND)
            dx_tile = dx + batch * dx_batch + c * dx_c
            _store_rows(dx_tile, dx_t, t - BEHIND, run, length, valid, outputs, ROWS, TIME_FASTEST)
        tile_of_time = batch * tl.cdiv(length, POSITIONS) + block_t
        c_flat = block_c * BLOCK_C + tl.arange(0, BLOCK_C)
        for k in tl.static_range(WIDTH + 1):
            at = partial + (tile_of_time * (WIDTH + 1) + k) * channels + c_flat
            tl.store(at, tl.sum(sums[k], axis=1 if TIME_FASTEST else 0), mask=c_flat < channels)


@triton.jit
def _sum_kernel(
    partial, dweight, dbias, tiles, channels,
    WIDTH: tl.constexpr, BLOCK_TILES: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The tiles' partial sums (tiles, WIDTH + 1, channels), added in a fixed order -> one tap of dweight, or dbias."""
    c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    k = tl.program_id(1)
    dtype: tl.constexpr = partial.dtype.element_ty
    total = tl.zeros([BLOCK_TILES, BLOCK_C], dtype)
    tile = tl.arange(0, BLOCK_TILES)[:, None].to(tl.int64)
    first = 0
    while first < tiles:  # not a for: the interpreter of Triton 3.6 cannot count to a value given at run time
        at = partial + ((first + tile) * (WIDTH + 1) + k) * channels + c
        total += tl.load(at, mask=(first + tile < tiles) & (c < channels), other=0.0)
        first += BLOCK_TILES
    total = tl.sum(total, axis=0)[None, :]
    if k < WIDTH:
        _store(dweight + c * WIDTH + k, total, c < channels)
    elif dbias is not None:
        _store(dbias + c, total, c < channels)


@triton.jit
def _step_kernel(
    state, x, weight, bias, y, channels,
    state_batch, state_row, state_c, x_batch, x_c, weight_c, weight_k, bias_c,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, SILU: tl.constexpr, dtype: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One position of one batch entry and BLOCK_C channels; the state drops its oldest row and gains x, in place.

    Cost: the state is read and written once; at these sizes the launch is the limit.
    """
    blocks_c = tl.cdiv(channels, BLOCK_C)
    batch = (tl.program_id(0) // blocks_c).to(tl.int64)
    c_flat = (tl.program_id(0) % blocks_c).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    c = c_flat[None, :]
    valid = c < channels
    w = _load_weight(weight, c_flat, channels, weight_c, weight_k, dtype, WIDTH, PADDED, False)
    at = state + batch * state_batch + c * state_c
    rows = ()
    for row in tl.static_range(WIDTH - 1):
        rows = rows + (_load(at + row * state_row, valid, dtype),)
    rows = rows + (_load(x + batch * x_batch + c * x_c, valid, dtype),)
    total = tl.zeros_like(rows[0])
    if bias is not None:
        total += _load(bias + c * bias_c, valid, dtype)
    total = _dot(w, rows, total, WIDTH)
    if SILU:
        total *= _sigmoid(total)
    _store(y + batch * channels + c, total, valid)
    tl.debug_barrier()  # every row is read before one is overwritten, whichever threads hold them
    for row in tl.static_range(WIDTH - 1):
        _store(at + row * state_row, rows[row + 1], valid)


@lru_cache(maxsize=64)
def _multiprocessors(device: torch.device) -> int:
    """One for the interpreter: there the fewest programs are the fastest."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _compute_dtype(x: Tensor) -> tuple[torch.dtype, tl.dtype]:
    return (torch.float64, tl.float64) if x.dtype == torch.float64 else (torch.float32, tl.float32)


def _strides(tensor: Tensor | None, dimensions: int) -> tuple[int, ...]:
    return (0,) * dimensions if tensor is None else tensor.stride()


def _locate(cu_seqlens: Tensor | None, length: int) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """-> the boundaries, cleaned as the reference does; per position its sequence and its place there. No host read."""
    if cu_seqlens is None:
        return None, None, None
    bounds = cu_seqlens.clamp(0, min(length, 2**31 - 1)).cummax(0).values
    sequence_of = cu_seqlens.new_empty((length,))
    ahead_of = cu_seqlens.new_empty((length,))
    if length:
        sequences = cu_seqlens.shape[0] - 1
        _locate_kernel[(-(-length // LOCATE_POSITIONS),)](
            bounds, sequence_of, ahead_of, length, sequences, sequences.bit_length(), LOCATE_POSITIONS,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return bounds, sequence_of, ahead_of


def conv_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """-> y (batch, length, channels) like x, memory order included; final state (sequences, width - 1, channels)"""
    batch, length, channels = x.shape
    width = weight.shape[1]
    dtype, compute = _compute_dtype(x)
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    y = torch.empty_like(x)
    final_state = x.new_empty((sequences, width - 1, channels), dtype=dtype)
    x_strides = x.stride()
    tile = forward_tile(
        batch, length, channels, width, x.element_size(), time_is_fastest(*x_strides[1:]), _multiprocessors(x.device)
    )
    edges = sequences * -(-channels // EDGE_CHANNELS) if width > 1 else 0
    programs = edges + batch * -(-length // tile.positions) * -(-channels // tile.block_c)
    if programs:
        bounds, sequence_of, ahead_of = _locate(cu_seqlens, length)
        _forward_kernel[(programs,)](
            x, weight, bias, initial_state, bounds, sequence_of, ahead_of, y, final_state, edges, length, channels,
            *x_strides, *weight.stride(), *_strides(bias, 1), *_strides(initial_state, 3), *y.stride(),
            width, next_power_of_2(width), silu, compute, tile.block_c, tile.groups, tile.rows, tile.steps,
            tile.time_fastest, EDGE_CHANNELS, num_warps=tile.warps, enable_fp_fusion=True,
        )  # fmt: skip
    return y, final_state


def conv_backward(
    grad_y: Tensor | None,
    grad_final_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> dx (in x's memory order), dweight, dbias, dinitial_state; (0,) for an absent input"""
    batch, length, channels = x.shape
    width = weight.shape[1]
    dtype, compute = _compute_dtype(x)
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dx = torch.empty_like(x)
    dweight = weight.new_empty((channels, width))
    dbias = x.new_empty((0,)) if bias is None else bias.new_empty((channels,))
    dinitial_state = x.new_empty((0,)) if initial_state is None else initial_state.new_empty(initial_state.shape)
    if channels == 0:
        return dx, dweight, dbias, dinitial_state
    x_strides = x.stride()
    tile = backward_tile(
        batch, length, channels, width, x.element_size(), time_is_fastest(*x_strides[1:]), _multiprocessors(x.device),
        any(tensor is not None for tensor in (cu_seqlens, initial_state, grad_final_state)),
    )  # fmt: skip
    tiles = batch * -(-length // tile.positions)
    partial = x.new_empty((tiles, width + 1, channels), dtype=dtype)
    edges = 0 if initial_state is None or width == 1 else sequences * -(-channels // EDGE_CHANNELS)
    programs = edges + tiles * -(-channels // tile.block_c)
    if programs:
        bounds, sequence_of, ahead_of = _locate(cu_seqlens, length)
        _backward_kernel[(programs,)](
            grad_y, grad_final_state, x, weight, bias, initial_state, bounds, sequence_of, ahead_of, dx, partial,
            dinitial_state, edges, length, channels,
            *_strides(grad_y, 3), *_strides(grad_final_state, 3), *x_strides, *weight.stride(), *_strides(bias, 1),
            *_strides(initial_state, 3), *dx.stride(),
            width, next_power_of_2(width), silu, compute, tile.block_c, tile.groups, tile.rows, tile.steps,
            tile.time_fastest, EDGE_CHANNELS, num_warps=tile.warps, enable_fp_fusion=True,
        )  # fmt: skip
    _sum_kernel[(-(-channels // SUM_CHANNELS), width + 1)](
        partial, dweight, None if bias is None else dbias, tiles, channels, width, SUM_TILES, SUM_CHANNELS,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return dx, dweight, dbias, dinitial_state


def conv_step(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """-> y (batch, channels); ``state`` (batch, width - 1, channels) is changed in place"""
    batch, channels = x.shape
    width = weight.shape[1]
    y = x.new_empty((batch, channels))
    programs = batch * -(-channels // STEP_CHANNELS)
    if programs:
        _step_kernel[(programs,)](
            state, x, weight, bias, y, channels,
            *state.stride(), *x.stride(), *weight.stride(), *_strides(bias, 1),
            width, next_power_of_2(width), silu, _compute_dtype(x)[1], STEP_CHANNELS, num_warps=4,
            enable_fp_fusion=True,
        )  # fmt: skip
    return y


def ahead_of_time_cases() -> list[dict]:
    """Configurations that a compiler without a GPU can be asked for, as tests/jambatalk_kernels/gpu_code.py wants them.

    Tiles are those of a large input on 132 multiprocessors. ":16" and the strides of 1 are what a launch finds out.
    """
    pointers = {
        "bounds": "*i32", "sequence_of": "*i32", "ahead_of": "*i32", "final_state": "*fp32", "partial": "*fp32",
        "grad_final_state": "*fp32", "initial_state": "*fp32", "dinitial_state": "*fp32",
    }  # fmt: skip

    def case(name, kernel, element, constexprs, absent=(), time_fastest=False, warps=4):
        constexprs = {**constexprs, **dict.fromkeys(absent)}
        if "WIDTH" in kernel.arg_names and "PADDED" in kernel.arg_names:
            constexprs |= {"PADDED": next_power_of_2(constexprs["WIDTH"]), "dtype": tl.float32}
        for stride in kernel.arg_names:
            along_time, along_channels = (
                stride in ("x_t", "y_t", "g_t", "dx_t"),
                stride in ("x_c", "y_c", "g_c", "dx_c"),
            )
            if (along_time and time_fastest) or (along_channels and not time_fastest) or stride in _UNIT_STRIDES:
                constexprs[stride] = 1
        tensors = ("x", "y", "weight", "bias", "state", "grad_y", "dx", "dweight", "dbias", "initial_state")
        signature = {}
        for argument in kernel.arg_names:
            if argument in constexprs:
                continue
            if argument in pointers:
                signature[argument] = pointers[argument] + ":16"
            elif argument in tensors:
                signature[argument] = f"*{element}:16"
            else:
                signature[argument] = "i32" if argument in _COUNTS else "i32:16"
        return {
            "name": name, "kernel": kernel, "signature": signature, "constexprs": constexprs, "num_warps": warps,
            "num_stages": 3,
        }  # fmt: skip

    def tiled(direction, element, width, time_fastest=False, packed=False, state=False):
        kernel, choose = (
            (_forward_kernel, forward_tile) if direction == "forward" else (_backward_kernel, backward_tile)
        )
        sizes = (8, 2048, 4096, width, 4 if element == "fp32" else 2, time_fastest, 132)
        tile = choose(*sizes, packed or state) if direction == "backward" else choose(*sizes)
        absent = () if packed else ("bounds", "sequence_of", "ahead_of")
        absent += () if state else ("initial_state", "grad_final_state")
        constexprs = {
            "WIDTH": width, "SILU": True, "BLOCK_C": tile.block_c, "GROUPS": tile.groups, "ROWS": tile.rows,
            "STEPS": tile.steps, "TIME_FASTEST": time_fastest, "EDGE_C": EDGE_CHANNELS,
        }  # fmt: skip
        words = [direction, element, f"width {width}"]
        words += ["time fastest"] * time_fastest + ["packed"] * packed + ["state"] * state
        absent = tuple(name for name in absent if name in kernel.arg_names)
        return case(", ".join(words), kernel, element, constexprs, absent, time_fastest, tile.warps)

    return [
        *(
            tiled(direction, *what)
            for direction in ("forward", "backward")
            for what in (
                ("bf16", 4), ("fp32", 4), ("bf16", 8), ("bf16", 16), ("bf16", 4, True), ("bf16", 16, True),
                ("bf16", 4, False, False, True), ("bf16", 4, False, True, True), ("bf16", 4, True, True, True),
            )
        ),
        case("step", _step_kernel, "bf16", {"WIDTH": 4, "SILU": True, "BLOCK_C": STEP_CHANNELS}),
        case("sum", _sum_kernel, "bf16", {"WIDTH": 4, "BLOCK_TILES": SUM_TILES, "BLOCK_C": SUM_CHANNELS}),
        case("locate", _locate_kernel, "bf16", {"SEARCH_STEPS": 5, "BLOCK": LOCATE_POSITIONS}),
    ]  # fmt: skip
