"""The selective scan on GPUs: Triton kernels and their launchers.

    delta_t = softplus(delta_t + delta_bias)
    h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t;  y_t = (C_t . h_t + D u_t) silu(z_t)

Layout. The state of a program is one tensor (states_per_lane, channels_per_lane, warps, 32) that Triton lays out with
the first two axes in registers, the third over warps and the last over the lanes of a warp: state n of a channel is
register n % states_per_lane of one of the channel's lanes_n lanes. Rows of B and C are thereby read as vectors. Inputs
come as tiles (channels_per_lane, warps, 32) in which lane l of a channel holds position l % steps, so softplus, the
gate and the loads are done once per element, not once per lane; ``_row`` hands one position to all lanes (one shuffle)
and ``_collect`` turns the lanes' partial sums back into a tile (less than one shuffle per position). Forward has no
shared memory and no barrier.

Time is walked by tiles; the next tile of u, delta and z is in flight meanwhile.

Where sequences x channels do not fill the card, time is split: every stretch runs from a zero state and leaves its end
and the sum of its deltas (its decay is exp(A * sum)), a small kernel walks over the stretches, and the scan proper
starts each from its right state.

Packed sequences: a program walks one sequence. Chunks of saved states are counted from position 0 of the pack, so that
a slot belongs to one sequence.

Source: Gu and Dao, "Mamba" (arXiv 2312.00752), algorithm 2; the layout is ours.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from jambatalk_kernels.selective_scan.heuristics import (
    SCRATCH_ELEMENTS,
    Layout,
    backward_layout,
    chunk_length,
    forward_layout,
    step_layout,
)
from jambatalk_kernels.selective_scan.reference import compute_dtype

__all__ = ["ahead_of_time_cases", "chunk_states_shape", "scan_backward", "scan_forward", "scan_step"]

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# What a launch of the forward kernel is for: the scan; the ends of stretches; the scan from given starts.
WHOLE, ENDS, RESUMED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


# ---- pieces ---------------------------------------------------------------------------------------------------------


@triton.jit
def _log1p_unit(x):
    """log(1 + x) for x in [0, 1], accurate near 0 too: 2 atanh(x / (2 + x)), coefficients as in csrc/common/math.h."""
    s = x / (x + 2)
    q = s * s
    if x.dtype == tl.float64:
        p = q * 0.0886987444026829566 + 0.0495141265907419645
        p = p * q + 0.0679315674360467106
        p = p * q + 0.0768214779711296478
        p = p * q + 0.0909140703450945813
        p = p * q + 0.111110964523747011
        p = p * q + 0.142857145289979404
        p = p * q + 0.199999999980248555
        p = p * q + 0.333333333333388472
    else:
        p = q * 0.140059931245908045 + 0.140009027009058756
        p = p * q + 0.200107636151252674
        p = p * q + 0.3333320814293106
    return 2 * s * (p * q + 1)


@triton.jit
def _softplus(x):
    """log(1 + e^x); x itself above 20, as torch.nn.functional.softplus."""
    return tl.where(x > 20, x, tl.maximum(x, 0) + _log1p_unit(tl.exp(-tl.abs(x))))


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def _row(tile, i: tl.constexpr, lane, LANES_N: tl.constexpr):
    """The value of position i of a tile, in every lane of the channel."""
    return tl.gather(tile, lane - lane % LANES_N + i, 2)


@triton.jit
def _collect(parts, lane, FIRST: tl.constexpr, END: tl.constexpr):
    """Sum each of some tensors (a power of two of them) over the lanes that differ in the bits FIRST, 2 FIRST, .. < END
    of their number; lane l gets the sum of parts[l // FIRST % tensors].

    Recursive halving: lanes that differ in one bit swap what the other one is to hold, so that n sums over n lanes take
    n - 1 shuffles. With more tensors than lanes some are left: those for which tensor // lanes is 0, 1, and so on.
    """
    AXIS: tl.constexpr = len(lane.shape) - 1
    if FIRST == END:
        return parts
    elif len(parts) == 1:
        return _collect((parts[0] + tl.gather(parts[0], lane ^ FIRST, AXIS),), lane, FIRST * 2, END)
    else:
        halved = ()
        odd = (lane & FIRST) != 0
        for i in tl.static_range(len(parts) // 2):
            first = parts[2 * i]
            second = parts[2 * i + 1]
            halved = halved + (
                tl.where(odd, second, first) + tl.gather(tl.where(odd, first, second), lane ^ FIRST, AXIS),
            )
        return _collect(halved, lane, FIRST * 2, END)


@triton.jit
def _running_bound(cu_seqlens, last, length):
    """cu_seqlens[last] after clamping to [0, length] and taking the running maximum; -> int32."""
    bound = 0
    for i in range(0, last + 1, 128):
        at = i + tl.arange(0, 128)
        bound = tl.maximum(bound, tl.max(tl.load(cu_seqlens + at, mask=at <= last, other=0)))
    return tl.minimum(bound, length)


@triton.jit
def _sequence_range(cu_seqlens, sequence, length):
    """-> the first position of a sequence, the one after its last, and its batch row."""
    if cu_seqlens is None:
        return 0, length, sequence.to(tl.int64)
    else:
        begin = _running_bound(cu_seqlens, sequence, length)
        end = tl.minimum(tl.maximum(begin, tl.load(cu_seqlens + sequence + 1)), length)
        return begin, end, sequence.to(tl.int64) * 0


@triton.jit
def _stretch(begin, end, split, splits, CHUNK: tl.constexpr):
    """The positions that one of ``splits`` stretches of a sequence covers (none where start >= stop); whole chunks."""
    first = begin // CHUNK
    each = tl.cdiv(tl.cdiv(end, CHUNK) - first, splits)
    start = tl.maximum(begin, (first + split * each) * CHUNK)
    stop = tl.minimum(end, (first + (split + 1) * each) * CHUNK)
    return start, stop


@triton.jit
def _places(
    block, STATES_PER_LANE: tl.constexpr, CHANNELS_PER_LANE: tl.constexpr, WARPS: tl.constexpr, LANES_N: tl.constexpr
):
    """-> lane and channel (int64) of a tile, and state, with a 1 for channels_per_lane: it is the same for both."""
    lane = tl.arange(0, 32)[None, None, :]
    channel = tl.arange(0, WARPS)[None, :, None] * (32 // LANES_N) + lane // LANES_N
    channel = channel * CHANNELS_PER_LANE + tl.arange(0, CHANNELS_PER_LANE)[:, None, None]
    channel = channel + block.to(tl.int64) * (CHANNELS_PER_LANE * WARPS * 32 // LANES_N)
    state = tl.arange(0, STATES_PER_LANE)[:, None, None, None] + STATES_PER_LANE * (lane % LANES_N)[None]
    lane = tl.broadcast_to(lane, (CHANNELS_PER_LANE, WARPS, 32))
    return lane, channel, tl.broadcast_to(state, (STATES_PER_LANE, 1, WARPS, 32))


@triton.jit
def _positive_delta(raw, bias, valid, SOFTPLUS: tl.constexpr, ACC: tl.constexpr):
    """delta after bias and softplus; 0 where not valid, so that such a position changes no state."""
    delta = raw.to(ACC)
    if bias is not None:
        delta = delta + bias
    if SOFTPLUS:
        delta = _softplus(delta)
    return tl.where(valid, delta, 0.0)


# ---- forward --------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["splits"])
def _forward_kernel(
    u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, y, final_state, chunk_states, boundaries, sums,
    length, channels, sequences, splits,
    su_b, su_t, su_c, sd_b, sd_t, sd_c, sA_c, sA_n, sB_b, sB_t, sB_n, sC_b, sC_t, sC_n, sD, sz_b, sz_t, sz_c, sbias,
    si_s, si_c, si_n,
    STATES: tl.constexpr, CHUNK: tl.constexpr, SOFTPLUS: tl.constexpr, ACC: tl.constexpr, PURPOSE: tl.constexpr,
    STATES_PER_LANE: tl.constexpr, CHANNELS_PER_LANE: tl.constexpr, WARPS: tl.constexpr, LANES_N: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    """The scan of one stretch of one sequence for some channels.

    u, delta, z, y (batch, length, channels); A, initial_state, final_state (.., channels, states); B, C (batch, length,
    states). chunk_states (batch, length // CHUNK, channels, states): h before position (slot + 1) * CHUNK.
    boundaries (sequences, splits, channels, states) and sums (sequences, splits, channels): ENDS writes what a stretch
    does to a zero state and the sum of its deltas; RESUMED reads the state that it starts from.

    Cost per element: reads u, delta, z and writes y once (8 bytes in bfloat16), 4 * STATES / CHUNK bytes of saved
    states; STATES exp2 and 4 more with softplus and gate, which on an H200 bind before memory does; on a 4090 memory.
    """
    tl.static_assert(LANES_N % STEPS == 0 and CHUNK % STEPS == 0)
    pid = tl.program_id(0)
    blocks = tl.cdiv(channels, CHANNELS_PER_LANE * WARPS * 32 // LANES_N)
    split = pid // blocks % splits
    sequence = pid // blocks // splits
    begin, end, batch = _sequence_range(cu_seqlens, sequence, length)
    start, stop = _stretch(begin, end, split, splits, CHUNK)

    lane, c, n = _places(pid % blocks, STATES_PER_LANE, CHANNELS_PER_LANE, WARPS, LANES_N)
    row = lane % LANES_N % STEPS
    channel_ok = c < channels
    state_ok = n < STATES
    both_ok = channel_ok[None] & state_ok
    origin = n * 0  # what a scalar needs to become a mask: the interpreter broadcasts no scalar of int1
    n = n.to(tl.int64)
    within = c[None] * STATES + n  # of a contiguous (channels, states)
    log2_decay = tl.load(A + c[None] * sA_c + n * sA_n, mask=both_ok, other=0.0).to(ACC) * LOG2E
    bias = None
    if delta_bias is not None:
        bias = tl.load(delta_bias + c * sbias, mask=channel_ok, other=0.0).to(ACC)
    if D is not None:
        skip = tl.load(D + c * sD, mask=channel_ok, other=0.0).to(ACC)

    if PURPOSE == RESUMED:
        at = (sequence.to(tl.int64) * splits + split) * channels * STATES
        h = tl.load(boundaries + at + within, mask=both_ok, other=0.0)
    elif PURPOSE == WHOLE and initial_state is not None:
        at = sequence.to(tl.int64) * si_s
        h = tl.load(initial_state + at + c[None] * si_c + n * si_n, mask=both_ok, other=0.0).to(ACC)
    else:
        h = tl.zeros((STATES_PER_LANE, CHANNELS_PER_LANE, WARPS, 32), ACC)
    total = tl.zeros((CHANNELS_PER_LANE, WARPS, 32), ACC)

    u += batch * su_b + row.to(tl.int64) * su_t + c * su_c
    delta += batch * sd_b + row.to(tl.int64) * sd_t + c * sd_c
    y += batch * length * channels + row.to(tl.int64) * channels + c
    B += batch * sB_b + n * sB_n
    C += batch * sC_b + n * sC_n
    GATED: tl.constexpr = z is not None and PURPOSE != ENDS
    if GATED:
        z += batch * sz_b + row.to(tl.int64) * sz_t + c * sz_c

    # Part 1 is the whole tiles, without masks of time; 0 and 2 are what a tile has of it at either end.
    whole_start = tl.cdiv(start, STEPS) * STEPS
    whole_stop = tl.maximum(whole_start, stop // STEPS * STEPS)
    for part in tl.static_range(0 if cu_seqlens is not None else 1, 3):
        if part == 0:
            from_, to = start - start % STEPS, tl.minimum(whole_start, stop)
        elif part == 1:
            from_, to = whole_start, whole_stop
        else:
            from_, to = whole_stop, stop
        if part == 1:
            time = tl.cast(from_, tl.int64)
            valid = channel_ok & (from_ + row < to)
            next_u = tl.load(u + time * su_t, mask=valid, other=0.0)
            next_delta = tl.load(delta + time * sd_t, mask=valid, other=0.0)
            if GATED:
                next_z = tl.load(z + time * sz_t, mask=valid, other=0.0)
        for t in range(from_, to, STEPS):
            time = tl.cast(t, tl.int64)
            if chunk_states is not None:
                if (t % CHUNK == 0) & (t >= begin) & (t > 0):
                    slot = batch * (length // CHUNK) + (t // CHUNK - 1)
                    tl.store(chunk_states + slot * channels * STATES + within, h, mask=both_ok)
            if part == 1:
                valid = channel_ok
                now_u = next_u.to(ACC)
                raw_delta = next_delta
                if GATED:
                    now_z = next_z.to(ACC)
                ahead = tl.cast(tl.minimum(t + STEPS, to - STEPS), tl.int64)  # the last tile is read twice, not beyond
                next_u = tl.load(u + ahead * su_t, mask=channel_ok, other=0.0)
                next_delta = tl.load(delta + ahead * sd_t, mask=channel_ok, other=0.0)
                if GATED:
                    next_z = tl.load(z + ahead * sz_t, mask=channel_ok, other=0.0)
            else:
                valid = channel_ok & (t + row >= start) & (t + row < stop)
                now_u = tl.load(u + time * su_t, mask=valid, other=0.0).to(ACC)
                raw_delta = tl.load(delta + time * sd_t, mask=valid, other=0.0)
                if GATED:
                    now_z = tl.load(z + time * sz_t, mask=valid, other=0.0).to(ACC)
            now_delta = _positive_delta(raw_delta, bias, valid, SOFTPLUS, ACC)
            x = now_delta * now_u
            if PURPOSE == ENDS:
                total += now_delta
            parts = ()
            for i in tl.static_range(STEPS):
                read = state_ok
                if part != 1:
                    read = state_ok & (origin + (t + i) >= start) & (origin + (t + i) < stop)
                b = tl.load(B + (time + i) * sB_t, mask=read, other=0.0).to(ACC)
                drive = _row(x, i, lane, LANES_N)[None] * b
                if STATES_PER_LANE * LANES_N != STATES:
                    drive = tl.where(state_ok, drive, 0.0)  # inf * 0 must not reach y
                h = tl.exp2(_row(now_delta, i, lane, LANES_N)[None] * log2_decay) * h + drive
                if PURPOSE != ENDS:
                    read_c = tl.load(C + (time + i) * sC_t, mask=read, other=0.0).to(ACC)
                    parts = parts + (tl.sum(h * read_c, 0),)
            if PURPOSE != ENDS:
                out = _collect(parts, lane, 1, LANES_N)[0]
                if D is not None:
                    out += skip * now_u
                if GATED:
                    out *= now_z * _sigmoid(now_z)
                tl.store(y + time * channels, out, mask=valid & (lane % LANES_N < STEPS))

    if PURPOSE == ENDS:
        at = (sequence.to(tl.int64) * splits + split) * channels
        tl.store(boundaries + at * STATES + within, h, mask=both_ok)
        tl.store(sums + at + c, _collect((total,), lane, 1, STEPS)[0], mask=channel_ok & (lane % LANES_N == 0))
    else:
        if (stop == end) & ((start < stop) | ((begin == end) & (split == 0))):
            tl.store(final_state + sequence.to(tl.int64) * channels * STATES + within, h, mask=both_ok)
        if cu_seqlens is not None:
            if split == 0:
                # Positions before the first sequence and after the last one.
                if sequence == 0:
                    _fill_with_zeros(y, 0, begin, channels, row, channel_ok, STEPS)
                if sequence == sequences - 1:
                    _fill_with_zeros(y, end, length, channels, row, channel_ok, STEPS)


@triton.jit
def _fill_with_zeros(pointers, start, stop, stride, row, ok, STEPS: tl.constexpr):
    for t in range(start, stop, STEPS):
        tl.store(pointers + tl.cast(t, tl.int64) * stride, tl.zeros(row.shape, tl.float32), mask=ok & (t + row < stop))


@triton.jit
def _join_kernel(
    A, initial_state, boundaries, sums, channels, splits, sA_c, sA_n, si_s, si_c, si_n,
    STATES: tl.constexpr, ACC: tl.constexpr, REVERSE: tl.constexpr,
    STATES_PER_LANE: tl.constexpr, CHANNELS_PER_LANE: tl.constexpr, WARPS: tl.constexpr, LANES_N: tl.constexpr,
):  # fmt: skip
    """boundaries[:, split]: what the stretch does to a zero state -> the state that it starts from."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(channels, CHANNELS_PER_LANE * WARPS * 32 // LANES_N)
    sequence = (pid // blocks).to(tl.int64)
    lane, c, n = _places(pid % blocks, STATES_PER_LANE, CHANNELS_PER_LANE, WARPS, LANES_N)
    channel_ok = c < channels
    both_ok = channel_ok[None] & (n < STATES)
    n = n.to(tl.int64)
    log2_decay = tl.load(A + c[None] * sA_c + n * sA_n, mask=both_ok, other=0.0).to(ACC) * LOG2E
    if initial_state is not None:
        h = tl.load(initial_state + sequence * si_s + c[None] * si_c + n * si_n, mask=both_ok, other=0.0).to(ACC)
    else:
        h = tl.zeros((STATES_PER_LANE, CHANNELS_PER_LANE, WARPS, 32), ACC)
    for i in range(splits):
        at = (sequence * splits + (splits - 1 - i if REVERSE else i)) * channels
        pointers = boundaries + at * STATES + c[None] * STATES + n
        added = tl.load(pointers, mask=both_ok, other=0.0)
        decay = tl.exp2(tl.load(sums + at + c, mask=channel_ok, other=0.0)[None] * log2_decay)
        tl.store(pointers, h, mask=both_ok)
        h = decay * h + added


# ---- backward -------------------------------------------------------------------------------------------------------


@triton.jit
def _gate(grad_y, now_z):
    """-> the gradient of y before the gate, the sigmoid of z."""
    sigmoid = _sigmoid(now_z)
    return grad_y * now_z * sigmoid, sigmoid


@triton.jit(do_not_specialize=["splits"])
def _backward_ends_kernel(
    grad_y, delta, A, C, z, delta_bias, cu_seqlens, boundaries, sums, length, channels, splits,
    sg_b, sg_t, sg_c, sd_b, sd_t, sd_c, sA_c, sA_n, sC_b, sC_t, sC_n, sz_b, sz_t, sz_c, sbias,
    STATES: tl.constexpr, CHUNK: tl.constexpr, SOFTPLUS: tl.constexpr, ACC: tl.constexpr,
    STATES_PER_LANE: tl.constexpr, CHANNELS_PER_LANE: tl.constexpr, WARPS: tl.constexpr, LANES_N: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    """What leaves a stretch towards its past where nothing enters it from its future, and the sum of its deltas."""
    tl.static_assert(LANES_N % STEPS == 0 and CHUNK % STEPS == 0)
    pid = tl.program_id(0)
    blocks = tl.cdiv(channels, CHANNELS_PER_LANE * WARPS * 32 // LANES_N)
    split = pid // blocks % splits
    sequence = pid // blocks // splits
    begin, end, batch = _sequence_range(cu_seqlens, sequence, length)
    start, stop = _stretch(begin, end, split, splits, CHUNK)
    lane, c, n = _places(pid % blocks, STATES_PER_LANE, CHANNELS_PER_LANE, WARPS, LANES_N)
    row = lane % LANES_N % STEPS
    channel_ok = c < channels
    state_ok = n < STATES
    both_ok = channel_ok[None] & state_ok
    n = n.to(tl.int64)
    log2_decay = tl.load(A + c[None] * sA_c + n * sA_n, mask=both_ok, other=0.0).to(ACC) * LOG2E
    bias = None
    if delta_bias is not None:
        bias = tl.load(delta_bias + c * sbias, mask=channel_ok, other=0.0).to(ACC)
    grad_y += batch * sg_b + row.to(tl.int64) * sg_t + c * sg_c
    delta += batch * sd_b + row.to(tl.int64) * sd_t + c * sd_c
    C += batch * sC_b + n * sC_n
    if z is not None:
        z += batch * sz_b + row.to(tl.int64) * sz_t + c * sz_c

    total = tl.zeros((CHANNELS_PER_LANE, WARPS, 32), ACC)
    g = tl.zeros((STATES_PER_LANE, CHANNELS_PER_LANE, WARPS, 32), ACC)
    tiles = tl.cdiv(stop, STEPS) - start // STEPS
    for tile in range(0, tiles):
        t = (start // STEPS + tiles - 1 - tile) * STEPS
        time = tl.cast(t, tl.int64)
        valid = channel_ok & (t + row >= start) & (t + row < stop)
        raw = tl.load(delta + time * sd_t, mask=valid, other=0.0)
        now_grad = tl.load(grad_y + time * sg_t, mask=valid, other=0.0).to(ACC)
        if z is not None:
            now_grad, _ = _gate(now_grad, tl.load(z + time * sz_t, mask=valid, other=0.0).to(ACC))
        now_delta = _positive_delta(raw, bias, valid, SOFTPLUS, ACC)
        total += now_delta
        for i in tl.static_range(STEPS - 1, -1, -1):
            at = tl.cast(tl.minimum(tl.maximum(t + i, start), stop - 1), tl.int64)
            read_c = tl.load(C + at * sC_t, mask=state_ok, other=0.0).to(ACC)
            g += read_c * _row(now_grad, i, lane, LANES_N)[None]
            g *= tl.exp2(_row(now_delta, i, lane, LANES_N)[None] * log2_decay)
    at = (sequence.to(tl.int64) * splits + split) * channels
    tl.store(boundaries + at * STATES + c[None] * STATES + n, g, mask=both_ok)
    tl.store(sums + at + c, _collect((total,), lane, 1, STEPS)[0], mask=channel_ok & (lane % LANES_N == 0))


@triton.jit(do_not_specialize=["splits", "first"])
def _backward_kernel(
    grad_y, grad_final, u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, chunk_states, boundaries,
    du, ddelta, dz, dinitial, rows, sums_A, sums_D, sums_bias, scratch,
    length, channels, sequences, splits, first,
    sg_b, sg_t, sg_c, sf_s, sf_c, sf_n,
    su_b, su_t, su_c, sd_b, sd_t, sd_c, sA_c, sA_n, sB_b, sB_t, sB_n, sC_b, sC_t, sC_n, sD, sz_b, sz_t, sz_c, sbias,
    si_s, si_c, si_n,
    STATES: tl.constexpr, CHUNK: tl.constexpr, SOFTPLUS: tl.constexpr, ACC: tl.constexpr,
    STATES_PER_LANE: tl.constexpr, CHANNELS_PER_LANE: tl.constexpr, WARPS: tl.constexpr, LANES_N: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    """Gradients over one stretch of one sequence for some channels. With a_t = exp(delta_t A), w_t = a_t h_{t-1} and
    e_t the gradient of y_t before the gate:

        g_t = C_t e_t + a_{t+1} g_{t+1}           dC_t = sum over channels of e_t h_t     dB_t = same of g_t delta_t u_t
        d(delta_t u_t) = sum over states g_t B_t  ddelta_t = u_t of that + sum over states g_t w_t A
        dA = sum over t of g_t w_t delta_t        dD = sum over t of e_t u_t              dinitial = a_begin g_begin

    Chunk by chunk from the last: a walk forward from the saved state leaves the state before every tile in ``scratch``
    (few, rewritten by every chunk, so they stay in the caches); then tile by tile from the last, a_t and w_t of a tile
    are computed into registers and the tile is walked back.

    rows (blocks, 2, batch, length, states): dB and dC summed over this program's channels: recursive halving over
    lanes, then over warps in shared memory. sums_A (sequences * splits, channels, states), sums_D and sums_bias
    (sequences * splits, channels). The launcher adds these up; every order is fixed.

    Cost per element: reads u, delta, z, grad_y, writes du, ddelta, dz (14 bytes in bfloat16), 8 * STATES / channels of
    a program for ``rows``, twice 4 * STATES / STEPS through the caches; 2 * STATES exp2 and 9 more.
    """
    tl.static_assert(LANES_N % STEPS == 0 and CHUNK % STEPS == 0)
    pid = tl.program_id(0)
    blocks = tl.cdiv(channels, CHANNELS_PER_LANE * WARPS * 32 // LANES_N)
    block = pid % blocks
    split = pid // blocks % splits
    sequence = first + pid // blocks // splits
    begin, end, batch = _sequence_range(cu_seqlens, sequence, length)
    start, stop = _stretch(begin, end, split, splits, CHUNK)

    lane, c, n = _places(block, STATES_PER_LANE, CHANNELS_PER_LANE, WARPS, LANES_N)
    row = lane % LANES_N % STEPS
    channel_ok = c < channels
    state_ok = n < STATES
    both_ok = channel_ok[None] & state_ok
    local = (c - tl.cast(block, tl.int64) * (CHANNELS_PER_LANE * WARPS * 32 // LANES_N))[None]
    TILES: tl.constexpr = CHUNK // STEPS
    KEPT: tl.constexpr = STATES_PER_LANE * CHANNELS_PER_LANE * WARPS * 32
    scratch += tl.cast(pid, tl.int64) * (TILES * KEPT) + local * (STATES_PER_LANE * LANES_N) + n
    n = n.to(tl.int64)
    within = c[None] * STATES + n  # of a contiguous (channels, states)
    log2_decay = tl.load(A + c[None] * sA_c + n * sA_n, mask=both_ok, other=0.0).to(ACC) * LOG2E
    bias = None
    if delta_bias is not None:
        bias = tl.load(delta_bias + c * sbias, mask=channel_ok, other=0.0).to(ACC)
    if D is not None:
        skip = tl.load(D + c * sD, mask=channel_ok, other=0.0).to(ACC)
    state_zeros = tl.zeros((STATES_PER_LANE, CHANNELS_PER_LANE, WARPS, 32), ACC)
    zeros = tl.zeros((CHANNELS_PER_LANE, WARPS, 32), ACC)

    # g: the gradient of the state after the positions still to be walked.
    part = sequence.to(tl.int64) * splits + split
    if boundaries is not None:
        g = tl.load(boundaries + part * channels * STATES + within, mask=both_ok, other=0.0)
    elif grad_final is not None:
        at = sequence.to(tl.int64) * sf_s
        g = tl.load(grad_final + at + c[None] * sf_c + n * sf_n, mask=both_ok, other=0.0).to(ACC)
    else:
        g = state_zeros
    dA = state_zeros
    dD = zeros
    dbias = zeros

    u += batch * su_b + row.to(tl.int64) * su_t + c * su_c
    delta += batch * sd_b + row.to(tl.int64) * sd_t + c * sd_c
    B += batch * sB_b + n * sB_n
    C += batch * sC_b + n * sC_n
    out = batch * length * channels + row.to(tl.int64) * channels + c
    du += out
    ddelta += out
    if grad_y is not None:
        grad_y += batch * sg_b + row.to(tl.int64) * sg_t + c * sg_c
    if z is not None:
        z += batch * sz_b + row.to(tl.int64) * sz_t + c * sz_c
        dz += out
    # Once summed over channels, lanes hold rows of dB and dC in turn, of as many positions as there are lanes for them.
    row_lane = tl.arange(0, 32)[None, None, :] + tl.zeros((STATES_PER_LANE, WARPS, 1), tl.int32)
    AT_ONCE: tl.constexpr = 32 // LANES_N if 32 // LANES_N < 2 * STEPS else 2 * STEPS  # rows in one tensor
    kept = tl.arange(0, 32)[None, :] // LANES_N
    row_state = tl.arange(0, STATES_PER_LANE)[:, None] + STATES_PER_LANE * (tl.arange(0, 32) % LANES_N)[None, :]
    batches = 1 if cu_seqlens is not None else sequences
    row_total = tl.cast(batches, tl.int64) * length * STATES
    rows += tl.cast(block, tl.int64) * 2 * row_total + batch * length * STATES

    chunks = tl.cdiv(stop, CHUNK) - start // CHUNK
    for k in range(0, chunks):
        chunk = start // CHUNK + chunks - 1 - k
        low = tl.maximum(chunk * CHUNK, start)
        high = tl.minimum((chunk + 1) * CHUNK, stop)
        base = low - low % STEPS
        tiles = tl.cdiv(high - base, STEPS)

        if (chunk > 0) & (chunk * CHUNK >= begin):
            slot = batch * (length // CHUNK) + (chunk - 1)
            h = tl.load(chunk_states + slot * channels * STATES + within, mask=both_ok, other=0.0)
        elif initial_state is not None:
            at = sequence.to(tl.int64) * si_s
            h = tl.load(initial_state + at + c[None] * si_c + n * si_n, mask=both_ok, other=0.0).to(ACC)
        else:
            h = state_zeros
        time = tl.cast(base, tl.int64)
        valid = channel_ok & (base + row >= low) & (base + row < high)
        next_u = tl.load(u + time * su_t, mask=valid, other=0.0)
        next_delta = tl.load(delta + time * sd_t, mask=valid, other=0.0)
        for tile in range(0, tiles - 1):
            tl.store(scratch + tile * KEPT, h)
            t = base + tile * STEPS
            now_u = next_u.to(ACC)
            now_delta = _positive_delta(next_delta, bias, valid, SOFTPLUS, ACC)
            time = tl.cast(t + STEPS, tl.int64)
            valid = channel_ok & (t + STEPS + row < high)
            next_u = tl.load(u + time * su_t, mask=valid, other=0.0)
            next_delta = tl.load(delta + time * sd_t, mask=valid, other=0.0)
            x = now_delta * now_u
            for i in tl.static_range(STEPS):
                at = tl.cast(tl.maximum(t + i, low), tl.int64)
                b = tl.load(B + at * sB_t, mask=state_ok, other=0.0).to(ACC)
                decay = tl.exp2(_row(now_delta, i, lane, LANES_N)[None] * log2_decay)
                h = decay * h + _row(x, i, lane, LANES_N)[None] * b
        tl.debug_barrier()

        # What the walk forward left in next_u and next_delta is of the last tile, where the walk back begins.
        if grad_y is not None:
            next_grad = tl.load(grad_y + time * sg_t, mask=valid, other=0.0)
        if z is not None:
            next_z = tl.load(z + time * sz_t, mask=valid, other=0.0)
        for back in range(0, tiles):
            tile = tiles - 1 - back
            t = base + tile * STEPS
            time = tl.cast(t, tl.int64)
            now_valid = valid
            now_u = next_u.to(ACC)
            raw = next_delta.to(ACC)
            e = zeros
            if grad_y is not None:
                e = next_grad.to(ACC)
            if z is not None:
                now_z = next_z.to(ACC)
                grad = e
                e, sigmoid = _gate(grad, now_z)
            now_delta = _positive_delta(raw, bias, now_valid, SOFTPLUS, ACC)
            x = now_delta * now_u
            # The tile before, and the state that it starts from.
            valid = channel_ok & (t - STEPS + row >= low)
            next_u = tl.load(u + (time - STEPS) * su_t, mask=valid, other=0.0)
            next_delta = tl.load(delta + (time - STEPS) * sd_t, mask=valid, other=0.0)
            if grad_y is not None:
                next_grad = tl.load(grad_y + (time - STEPS) * sg_t, mask=valid, other=0.0)
            if z is not None:
                next_z = tl.load(z + (time - STEPS) * sz_t, mask=valid, other=0.0)

            decays = ()
            hs = ()
            cs = ()
            dcs = ()
            parts_y = ()
            for i in tl.static_range(STEPS):
                # Beyond either end is a position of no weight; the nearest row stands for its row.
                at = tl.cast(tl.minimum(tl.maximum(t + i, low), high - 1), tl.int64)
                b = tl.load(B + at * sB_t, mask=state_ok, other=0.0).to(ACC)
                read_c = tl.load(C + at * sC_t, mask=state_ok, other=0.0).to(ACC)
                decay = tl.exp2(_row(now_delta, i, lane, LANES_N)[None] * log2_decay)
                hs = hs + (h,)
                h = decay * h + _row(x, i, lane, LANES_N)[None] * b
                if z is not None:
                    parts_y = parts_y + (tl.sum(h * read_c, 0),)
                dcs = dcs + (tl.sum(h * _row(e, i, lane, LANES_N)[None], 1),)
                decays = decays + (decay,)
                cs = cs + (read_c,)
            if z is not None:
                y = _collect(parts_y, lane, 1, LANES_N)[0]
                if D is not None:
                    y += skip * now_u
                now_dz = grad * y * sigmoid * (1 + now_z * (1 - sigmoid))
                tl.store(dz + time * channels, now_dz, mask=now_valid & (lane % LANES_N < STEPS))

            parts_x = ()
            parts_s = ()
            parts_row = ()
            for i in tl.static_range(STEPS - 1, -1, -1):
                x_i = _row(x, i, lane, LANES_N)[None]
                # Read again, from the cache: the registers for it are not there.
                at = tl.cast(tl.minimum(tl.maximum(t + i, low), high - 1), tl.int64)
                b = tl.load(B + at * sB_t, mask=state_ok, other=0.0).to(ACC)
                g += cs[i] * _row(e, i, lane, LANES_N)[None]
                parts_x = (tl.sum(g * b, 0),) + parts_x
                parts_row = (tl.sum(g * x_i, 1), dcs[i]) + parts_row
                g *= decays[i]
                gw = g * hs[i]
                dA += gw * _row(now_delta, i, lane, LANES_N)[None]
                parts_s = (tl.sum(gw * log2_decay, 0),) + parts_s
            dx = _collect(parts_x, lane, 1, LANES_N)[0]
            ds = _collect(parts_s, lane, 1, LANES_N)[0] * LN2
            now_du = now_delta * dx
            if D is not None:
                now_du += skip * e
                dD += e * now_u
            now_ddelta = now_u * dx + ds
            if SOFTPLUS:
                if bias is not None:
                    raw += bias
                now_ddelta = tl.where(raw > 20, now_ddelta, now_ddelta * _sigmoid(raw))
            if bias is not None:
                dbias += tl.where(now_valid, now_ddelta, 0.0)
            tl.store(du + time * channels, now_du, mask=now_valid & (lane % LANES_N < STEPS))
            tl.store(ddelta + time * channels, now_ddelta, mask=now_valid & (lane % LANES_N < STEPS))

            parts_row = _collect(parts_row, row_lane, LANES_N, 32)
            for i in tl.static_range(len(parts_row)):
                which = kept % AT_ONCE + i * AT_ONCE
                position = t + which // 2
                at = (which % 2).to(tl.int64) * row_total + position.to(tl.int64) * STATES + row_state
                ok = (position >= low) & (position < high) & (row_state < STATES) & (kept < AT_ONCE)
                tl.store(rows + at, tl.sum(parts_row[i], 1), mask=ok)
            h = tl.load(scratch + tl.maximum(tile - 1, 0) * KEPT)
        tl.debug_barrier()

    # A lane beyond STEPS holds the same positions again.
    tl.store(sums_A + part * channels * STATES + within, dA, mask=both_ok)
    if D is not None:
        tl.store(
            sums_D + part * channels + c, _collect((dD,), lane, 1, STEPS)[0], mask=channel_ok & (lane % LANES_N == 0)
        )
    if delta_bias is not None:
        dbias = _collect((dbias,), lane, 1, STEPS)[0]
        tl.store(sums_bias + part * channels + c, dbias, mask=channel_ok & (lane % LANES_N == 0))
    if initial_state is not None:
        if ((start == begin) & (start < stop)) | ((begin == end) & (split == 0)):
            tl.store(dinitial + sequence.to(tl.int64) * channels * STATES + within, g, mask=both_ok)
    if cu_seqlens is not None:
        # Positions before the first sequence and after the last one.
        if (sequence == 0) & (split == 0):
            _fill_outside(du, ddelta, dz, rows, 0, begin, channels, row, channel_ok, row_total, STATES, STEPS)
        if (sequence == sequences - 1) & (split == 0):
            _fill_outside(du, ddelta, dz, rows, end, length, channels, row, channel_ok, row_total, STATES, STEPS)


@triton.jit
def _fill_outside(
    du, ddelta, dz, rows, start, stop, channels, row, ok, row_total, STATES: tl.constexpr, STEPS: tl.constexpr
):
    _fill_with_zeros(du, start, stop, channels, row, ok, STEPS)
    _fill_with_zeros(ddelta, start, stop, channels, row, ok, STEPS)
    if dz is not None:
        _fill_with_zeros(dz, start, stop, channels, row, ok, STEPS)
    state = tl.arange(0, 256)
    for t in range(start, stop):
        at = rows + tl.cast(t, tl.int64) * STATES + state
        tl.store(at, tl.zeros((256,), tl.float32), mask=state < STATES)
        tl.store(at + row_total, tl.zeros((256,), tl.float32), mask=state < STATES)


# ---- step -----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["su_b", "sd_b", "sz_b", "sB_b", "sC_b", "ss_b"])
def _step_kernel(
    state, u, delta, A, B, C, D, z, delta_bias, y, channels,
    ss_b, ss_c, ss_n, su_b, su_c, sd_b, sd_c, sA_c, sA_n, sB_b, sB_n, sC_b, sC_n, sD, sz_b, sz_c, sbias,
    STATES: tl.constexpr, SOFTPLUS: tl.constexpr, ACC: tl.constexpr,
    STATES_PER_LANE: tl.constexpr, CHANNELS_PER_LANE: tl.constexpr, WARPS: tl.constexpr, LANES_N: tl.constexpr,
):  # fmt: skip
    """One position: the state (batch, channels, states) is read, advanced and written in place, y (batch, channels).

    Cost: the state twice (8 bytes per channel and state in float32); at small batches the latency of two loads.
    """
    pid = tl.program_id(0)
    blocks = tl.cdiv(channels, CHANNELS_PER_LANE * WARPS * 32 // LANES_N)
    batch = (pid // blocks).to(tl.int64)
    lane, c, n = _places(pid % blocks, STATES_PER_LANE, CHANNELS_PER_LANE, WARPS, LANES_N)
    channel_ok = c < channels
    state_ok = n < STATES
    both_ok = channel_ok[None] & state_ok
    n = n.to(tl.int64)
    state += batch * ss_b + c[None] * ss_c + n * ss_n
    h = tl.load(state, mask=both_ok, other=0.0).to(ACC)
    log2_decay = tl.load(A + c[None] * sA_c + n * sA_n, mask=both_ok, other=0.0).to(ACC) * LOG2E
    b = tl.load(B + batch * sB_b + n * sB_n, mask=state_ok, other=0.0).to(ACC)
    read_c = tl.load(C + batch * sC_b + n * sC_n, mask=state_ok, other=0.0).to(ACC)
    u += batch * su_b + c * su_c
    delta += batch * sd_b + c * sd_c
    y += batch * channels + c
    now_u = tl.load(u, mask=channel_ok, other=0.0).to(ACC)
    raw = tl.load(delta, mask=channel_ok, other=0.0)
    bias = None
    if delta_bias is not None:
        bias = tl.load(delta_bias + c * sbias, mask=channel_ok, other=0.0).to(ACC)
    now_delta = _positive_delta(raw, bias, channel_ok, SOFTPLUS, ACC)
    drive = (now_delta * now_u)[None] * b
    if STATES_PER_LANE * LANES_N != STATES:
        drive = tl.where(state_ok, drive, 0.0)
    h = tl.exp2(now_delta[None] * log2_decay) * h + drive
    tl.store(state, h, mask=both_ok)
    out = _collect((tl.sum(h * read_c, 0),), lane, 1, LANES_N)[0]
    if D is not None:
        out += tl.load(D + c * sD, mask=channel_ok, other=0.0).to(ACC) * now_u
    if z is not None:
        z += batch * sz_b + c * sz_c
        now_z = tl.load(z, mask=channel_ok, other=0.0).to(ACC)
        out *= now_z * _sigmoid(now_z)
    tl.store(y, out, mask=channel_ok & (lane % LANES_N == 0))


# ---- launchers ------------------------------------------------------------------------------------------------------


def chunk_states_shape(batch: int, length: int, channels: int, states: int) -> tuple[int, int, int, int]:
    """Of the states that forward saves: before every chunk of positions but the first."""
    return batch, length // chunk_length(states), channels, states


@functools.cache
def _multiprocessors(device: int) -> int:
    """Of a GPU; in the interpreter (device -1) programs run one by one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device >= 0 else 1


@functools.cache
def _forward_layout(sequences: int, length: int, channels: int, states: int, device: int) -> Layout:
    return forward_layout(sequences, length, channels, states, _multiprocessors(device))


@functools.cache
def _backward_layout(sequences: int, length: int, channels: int, states: int, device: int) -> Layout:
    major, minor = torch.cuda.get_device_capability(device) if device >= 0 else (8, 0)
    return backward_layout(sequences, length, channels, states, _multiprocessors(device), 10 * major + minor)


def scan_forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None, delta_softplus: bool,
    save_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> y, final state, the states that backward needs (empty unless ``save_states``)."""
    batch, length, channels = u.shape
    states = A.shape[1]
    dtype = compute_dtype(u.dtype)
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    y = u.new_empty((batch, length, channels))
    final_state = u.new_empty((sequences, channels, states), dtype=dtype)
    saved = chunk_states_shape(batch, length, channels, states) if save_states else (0,)
    chunk_states = u.new_empty(saved, dtype=dtype)
    if final_state.numel() == 0:
        return y, final_state, chunk_states
    layout = _forward_layout(sequences, length, channels, states, u.get_device())
    splits = layout.splits
    boundaries = sums = None
    if splits > 1:
        boundaries = u.new_empty((sequences, splits, channels, states), dtype=dtype)
        sums = u.new_empty((sequences, splits, channels), dtype=dtype)
    blocks = -(-channels // layout.channels)
    acc = tl.float64 if dtype == torch.float64 else tl.float32
    of_A = A.stride()
    of_state = _strides(initial_state, 3)
    arguments = (
        *u.stride(), *delta.stride(), *of_A, *B.stride(), *C.stride(), *_strides(D, 1), *_strides(z, 3),
        *_strides(delta_bias, 1), *of_state, states, chunk_length(states), delta_softplus, acc,
    )  # fmt: skip

    def launch(purpose: int, chunk_states: Tensor | None) -> None:
        _forward_kernel[(sequences * splits * blocks,)](
            u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, y, final_state, chunk_states, boundaries,
            sums, length, channels, sequences, splits, *arguments, purpose, *layout.constants(), layout.steps,
            num_warps=layout.warps,
        )  # fmt: skip

    if splits > 1:
        launch(ENDS.value, None)
        _join_kernel[(sequences * blocks,)](
            A, initial_state, boundaries, sums, channels, splits, *of_A, *of_state, states, acc, False,
            *layout.constants(), num_warps=layout.warps,
        )  # fmt: skip
    launch((RESUMED if splits > 1 else WHOLE).value, chunk_states if save_states else None)
    return y, final_state, chunk_states


def scan_backward(
    grad_y: Tensor | None, grad_final_state: Tensor | None, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None, z: Tensor | None, delta_bias: Tensor | None, initial_state: Tensor | None,
    cu_seqlens: Tensor | None, chunk_states: Tensor, delta_softplus: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """-> gradients of u, delta, A, B, C, D, z, delta_bias, initial_state in their dtypes; empty where there is none."""
    batch, length, channels = u.shape
    states = A.shape[1]
    dtype = compute_dtype(u.dtype)
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    du, ddelta, dz, dinitial = (
        u.new_empty((0,)) if tensor is None else torch.empty(tensor.shape, dtype=tensor.dtype, device=u.device)
        for tensor in (u, delta, z, initial_state)
    )
    layout = _backward_layout(sequences, length, channels, states, u.get_device())
    splits = layout.splits
    blocks = -(-channels // layout.channels)
    rows = u.new_empty((blocks, 2, batch, length, states), dtype=dtype)
    sums_A = u.new_empty((sequences * splits, channels, states), dtype=dtype)
    sums_D = None if D is None else u.new_empty((sequences * splits, channels), dtype=dtype)
    sums_bias = None if delta_bias is None else u.new_empty((sequences * splits, channels), dtype=dtype)
    if sums_A.numel():
        acc = tl.float64 if dtype == torch.float64 else tl.float32
        of_grad, of_A, of_final = _strides(grad_y, 3), A.stride(), _strides(grad_final_state, 3)
        of_z, of_bias = _strides(z, 3), _strides(delta_bias, 1)
        constants = (states, chunk_length(states), delta_softplus, acc)
        boundaries = None
        if splits > 1:
            boundaries = u.new_empty((sequences, splits, channels, states), dtype=dtype)
            sums = u.new_empty((sequences, splits, channels), dtype=dtype)
            if grad_y is None:
                grad_y = torch.zeros_like(u)
                of_grad = grad_y.stride()
            _backward_ends_kernel[(sequences * splits * blocks,)](
                grad_y, delta, A, C, z, delta_bias, cu_seqlens, boundaries, sums, length, channels, splits, *of_grad,
                *delta.stride(), *of_A, *C.stride(), *of_z, *of_bias, *constants, *layout.constants(), layout.steps,
                num_warps=layout.warps,
            )  # fmt: skip
            _join_kernel[(sequences * blocks,)](
                A, grad_final_state, boundaries, sums, channels, splits, *of_A, *of_final, states, acc, True,
                *layout.constants(), num_warps=layout.warps,
            )  # fmt: skip
        # The states before the tiles of a chunk, for as many sequences at a time as stay within a bound.
        kept = splits * blocks * layout.channels * layout.states_per_lane * layout.lanes_n * chunk_length(states)
        kept = kept // layout.steps
        together = max(1, min(sequences, SCRATCH_ELEMENTS // kept))
        scratch = u.new_empty((together * kept,), dtype=dtype)
        for first in range(0, sequences, together):
            programs = min(together, sequences - first) * splits * blocks
            _backward_kernel[(programs,)](
                grad_y, grad_final_state, u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, chunk_states,
                boundaries, du, ddelta, None if z is None else dz, dinitial, rows, sums_A, sums_D, sums_bias, scratch,
                length, channels, sequences, splits, first, *of_grad, *of_final, *u.stride(), *delta.stride(), *of_A,
                *B.stride(), *C.stride(), *_strides(D, 1), *of_z, *of_bias, *_strides(initial_state, 3), *constants,
                *layout.constants(), layout.steps, num_warps=layout.warps,
            )  # fmt: skip
    # A tensor of its own for each, even where it is empty: outputs of an op may not share memory.
    return (
        du, ddelta, sums_A.sum(0).to(A.dtype), rows[:, 0].sum(0).to(B.dtype), rows[:, 1].sum(0).to(C.dtype),
        u.new_empty((0,)) if D is None or sums_D is None else sums_D.sum(0).to(D.dtype), dz,
        u.new_empty((0,)) if delta_bias is None or sums_bias is None else sums_bias.sum(0).to(delta_bias.dtype),
        dinitial,
    )  # fmt: skip


def scan_step(
    state: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, delta_softplus: bool,
) -> Tensor:  # fmt: skip
    """-> y (batch, channels); ``state`` becomes the next one in place."""
    batch, channels = u.shape
    states = A.shape[1]
    y = u.new_empty((batch, channels))
    if y.numel() == 0:
        return y
    layout = step_layout(batch, channels, states)
    _step_kernel[(batch * -(-channels // layout.channels),)](
        state, u, delta, A, B, C, D, z, delta_bias, y, channels,
        *state.stride(), *u.stride(), *delta.stride(), *A.stride(), *B.stride(), *C.stride(), *_strides(D, 1),
        *_strides(z, 2), *_strides(delta_bias, 1), states, delta_softplus,
        tl.float64 if u.dtype == torch.float64 else tl.float32, *layout.constants(), num_warps=layout.warps,
    )  # fmt: skip
    return y


def _strides(tensor: Tensor | None, dims: int) -> tuple[int, ...]:
    return (0,) * dims if tensor is None else tensor.stride()


# ---- proof ----------------------------------------------------------------------------------------------------------


def ahead_of_time_cases(capability: int = 120) -> list[dict]:
    """Launches that tests compile without a GPU: every kernel as a trained model calls it, on a card of 128 SMs and of
    that capability; what is launched on the newest compiles for all."""
    softplus = {"SOFTPLUS": True, "ACC": tl.float32}
    cases = []
    for name, layout, states, purpose, saves in (
        ("forward", forward_layout(8, 2048, 2048, 16, 128), 16, WHOLE, False),
        ("forward_saving", forward_layout(8, 2048, 2048, 16, 128), 16, WHOLE, True),
        ("forward_few_channels", forward_layout(1, 600, 1024, 16, 128), 16, WHOLE, False),
        ("forward_many_states", forward_layout(8, 2048, 2048, 256, 128), 256, WHOLE, False),
        ("forward_ends", forward_layout(1, 60_000, 256, 16, 128), 16, ENDS, False),
        ("forward_resumed", forward_layout(1, 60_000, 256, 16, 128), 16, RESUMED, False),
    ):
        without = {"initial_state": None, "cu_seqlens": None}
        if not saves:
            without["chunk_states"] = None
        if purpose.value == WHOLE.value:
            without |= {"boundaries": None, "sums": None}
        constants = {**softplus, "STATES": states, "CHUNK": chunk_length(states), "PURPOSE": purpose.value}
        cases.append(_case(name, _forward_kernel, layout, {**constants, "STEPS": layout.steps}, without))
    layout = forward_layout(1, 60_000, 256, 16, 128)
    constants = {"STATES": 16, "ACC": tl.float32, "REVERSE": False}
    cases.append(_case("join", _join_kernel, layout, constants, {"initial_state": None}))
    absent = dict.fromkeys(("initial_state", "dinitial", "grad_final", "cu_seqlens", "boundaries"))
    for name, layout, states in (
        ("backward", backward_layout(8, 2048, 2048, 16, 128, capability), 16),
        ("backward_few_channels", backward_layout(1, 600, 1024, 16, 128, capability), 16),
        ("backward_many_states", backward_layout(8, 2048, 2048, 256, 128, capability), 256),
    ):
        constants = {**softplus, "STATES": states, "CHUNK": chunk_length(states), "STEPS": layout.steps}
        cases.append(_case(name, _backward_kernel, layout, constants, absent))
    layout = backward_layout(1, 60_000, 256, 16, 128, capability)
    constants = {**softplus, "STATES": 16, "CHUNK": chunk_length(16), "STEPS": layout.steps}
    cases.append(_case("backward_ends", _backward_ends_kernel, layout, constants, {"cu_seqlens": None}))
    cases.append(_case("step", _step_kernel, step_layout(1, 1024, 16), {**softplus, "STATES": 16}, {}))
    return cases


_FLOAT32 = (
    "A", "D", "delta_bias", "initial_state", "final_state", "chunk_states", "boundaries", "sums", "state", "grad_final",
    "dinitial", "rows", "sums_A", "sums_D", "sums_bias", "scratch",
)  # fmt: skip


def _case(name: str, kernel, layout: Layout, constants: dict, without: dict) -> dict:
    """bfloat16 activations and float32 parameters, all contiguous, aligned as torch allocates."""
    names = ("STATES_PER_LANE", "CHANNELS_PER_LANE", "WARPS", "LANES_N")
    constexprs = {**constants, **without, **dict(zip(names, layout.constants(), strict=True))}
    untouched = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
    signature = {}
    for parameter in kernel.arg_names:
        if parameter in ("length", "sequences", "splits") or parameter in untouched:
            signature[parameter] = "i32"
        elif parameter == "channels":
            signature[parameter] = "i32:16"
        elif parameter == "cu_seqlens":
            signature[parameter] = "*i32:16"
        elif parameter in ("sD", "sbias") or parameter.endswith("_n"):
            constexprs[parameter] = 1
        elif parameter.startswith("s") and parameter[2:3] == "_":
            signature[parameter] = "i32:16"
        elif parameter not in constexprs:
            signature[parameter] = "*fp32:16" if parameter in _FLOAT32 else "*bf16:16"
    return {
        "name": name, "kernel": kernel, "signature": signature, "constexprs": constexprs, "num_warps": layout.warps,
    }  # fmt: skip
