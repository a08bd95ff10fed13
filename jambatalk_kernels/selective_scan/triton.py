"""The selective scan on GPUs: Triton kernels and their launchers.

    delta_t = softplus(delta_t + delta_bias)
    h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t;  y_t = (C_t . h_t + D u_t) silu(z_t)

Layout. The state of a program is one tensor (states_per_lane, warps, lanes_c, lanes_n) that Triton lays out with the
first axis in registers, the second over warps and the last two over the 32 lanes of a warp: state n of a channel is
register n % states_per_lane of lane n // states_per_lane. Rows of B and C are thereby read as vectors. Inputs come as
tiles (warps, lanes_c, lanes_n) in which lane l holds position l % steps, so softplus, the gate and the loads are done
once per element, not once per lane; ``_row`` hands one position to all lanes (one shuffle) and ``_collect`` turns the
lanes' partial sums back into a tile (less than one shuffle per position). There is no shared memory and no barrier.

Time is walked by tiles; the next tile of u, delta and z is in flight meanwhile. Channel strides are kept from Triton's
specialisation: with a stride known to be 1 it would re-arrange lanes by shuffles for nothing.

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

from jambatalk_kernels.selective_scan.heuristics import Layout, chunk_length, forward_layout, step_layout
from jambatalk_kernels.selective_scan.reference import compute_dtype

__all__ = ["ahead_of_time_cases", "chunk_states_shape", "scan_forward", "scan_step"]

LOG2E = tl.constexpr(1.4426950408889634)
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
def _row(tile, i: tl.constexpr):
    """The value of position i of a tile, in every lane."""
    return tl.gather(tile, tl.full(tile.shape, i, tl.int32), 3)


@triton.jit
def _collect(parts, lane, bit: tl.constexpr, LANES: tl.constexpr, AXIS: tl.constexpr):
    """Sum each of some tensors (a power of two) over the LANES of an axis; lane l gets the sum of parts[l % tensors].

    Recursive halving: lanes that differ in one bit swap what the other one is to hold, so that n sums over n lanes take
    n - 1 shuffles. With more tensors than lanes some are left: those for which tensor // LANES is 0, 1, and so on.
    Call with bit = 1; ``lane`` is the index along the axis.
    """
    if bit == LANES:
        return parts
    elif len(parts) == 1:
        return _collect((parts[0] + tl.gather(parts[0], lane ^ bit, AXIS),), lane, bit * 2, LANES, AXIS)
    else:
        halved = ()
        odd = (lane & bit) != 0
        for i in tl.static_range(len(parts) // 2):
            first = parts[2 * i]
            second = parts[2 * i + 1]
            halved = halved + (
                tl.where(odd, second, first) + tl.gather(tl.where(odd, first, second), lane ^ bit, AXIS),
            )
        return _collect(halved, lane, bit * 2, LANES, AXIS)


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
    block, STATES_PER_LANE: tl.constexpr, CHANNELS_PER_LANE: tl.constexpr, WARPS: tl.constexpr, LANES_C: tl.constexpr,
    LANES_N: tl.constexpr,
):  # fmt: skip
    """-> lane and channel (int64) of a tile, and state, with a 1 for channels_per_lane: it is the same for both."""
    lane = tl.arange(0, LANES_N)[None, None, None, :]
    channel = tl.arange(0, WARPS)[None, :, None, None] * LANES_C + tl.arange(0, LANES_C)[None, None, :, None]
    channel = channel * CHANNELS_PER_LANE + tl.arange(0, CHANNELS_PER_LANE)[:, None, None, None]
    channel = channel + block.to(tl.int64) * (WARPS * LANES_C * CHANNELS_PER_LANE)
    state = tl.arange(0, STATES_PER_LANE)[:, None, None, None, None] + STATES_PER_LANE * lane[None]
    shape: tl.constexpr = (CHANNELS_PER_LANE, WARPS, LANES_C, LANES_N)
    return (
        tl.broadcast_to(lane, shape),
        tl.broadcast_to(channel, shape),
        tl.broadcast_to(state, (STATES_PER_LANE, 1, WARPS, LANES_C, LANES_N)),
    )


@triton.jit
def _tile_offsets(row, c, channel_ok, stride_t, stride_c):
    """Of the elements of a tile. Where a lane has one channel, that lanes are contiguous is kept from Triton, which
    would re-arrange them by shuffles, and through shared memory at times, for nothing."""
    columns = c * stride_c
    if c.shape[0] == 1:
        columns = tl.where(channel_ok, columns, 0)
    return row.to(tl.int64) * stride_t + columns


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
    STATES_PER_LANE: tl.constexpr, CHANNELS_PER_LANE: tl.constexpr, WARPS: tl.constexpr, LANES_C: tl.constexpr,
    LANES_N: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """The scan of one stretch of one sequence for some channels.

    u, delta, z, y (batch, length, channels); A, initial_state, final_state (.., channels, states); B, C (batch, length,
    states). chunk_states (batch, length // CHUNK, channels, states): h before position (slot + 1) * CHUNK.
    boundaries (sequences, splits, channels, states) and sums (sequences, splits, channels): ENDS writes what a stretch
    does to a zero state and the sum of its deltas; RESUMED reads the state that it starts from.

    Cost per element: reads u, delta, z and writes y once (8 bytes in bfloat16), 4 * STATES / CHUNK bytes of saved
    states; STATES exp2 and 4 more with softplus and gate, which on an H200 bind before memory does; on a 4090 memory.
    """
    pid = tl.program_id(0)
    blocks = tl.cdiv(channels, CHANNELS_PER_LANE * WARPS * LANES_C)
    split = pid // blocks % splits
    sequence = pid // blocks // splits
    begin, end, batch = _sequence_range(cu_seqlens, sequence, length)
    start, stop = _stretch(begin, end, split, splits, CHUNK)

    lane, c, n = _places(pid % blocks, STATES_PER_LANE, CHANNELS_PER_LANE, WARPS, LANES_C, LANES_N)
    row = lane % STEPS
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
        h = tl.zeros((STATES_PER_LANE, CHANNELS_PER_LANE, WARPS, LANES_C, LANES_N), ACC)
    total = tl.zeros((CHANNELS_PER_LANE, WARPS, LANES_C, LANES_N), ACC)

    u += batch * su_b + _tile_offsets(row, c, channel_ok, su_t, su_c)
    delta += batch * sd_b + _tile_offsets(row, c, channel_ok, sd_t, sd_c)
    y += batch * length * channels + _tile_offsets(row, c, channel_ok, channels, 1)
    B += batch * sB_b + n * sB_n
    C += batch * sC_b + n * sC_n
    GATED: tl.constexpr = z is not None and PURPOSE != ENDS
    if GATED:
        z += batch * sz_b + _tile_offsets(row, c, channel_ok, sz_t, sz_c)

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
                drive = _row(x, i)[None] * b
                if STATES_PER_LANE * LANES_N != STATES:
                    drive = tl.where(state_ok, drive, 0.0)  # inf * 0 must not reach y
                h = tl.exp2(_row(now_delta, i)[None] * log2_decay) * h + drive
                if PURPOSE != ENDS:
                    read_c = tl.load(C + (time + i) * sC_t, mask=read, other=0.0).to(ACC)
                    parts = parts + (tl.sum(h * read_c, 0),)
            if PURPOSE != ENDS:
                out = _collect(parts, lane, 1, LANES_N, 3)[0]
                if D is not None:
                    out += skip * now_u
                if GATED:
                    out *= now_z * _sigmoid(now_z)
                tl.store(y + time * channels, out, mask=valid & (lane < STEPS))

    if PURPOSE == ENDS:
        at = (sequence.to(tl.int64) * splits + split) * channels
        tl.store(boundaries + at * STATES + within, h, mask=both_ok)
        tl.store(sums + at + c, _collect((total,), lane, 1, STEPS, 3)[0], mask=channel_ok & (lane == 0))
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
    STATES_PER_LANE: tl.constexpr, CHANNELS_PER_LANE: tl.constexpr, WARPS: tl.constexpr, LANES_C: tl.constexpr,
    LANES_N: tl.constexpr,
):  # fmt: skip
    """boundaries[:, split]: what the stretch does to a zero state -> the state that it starts from."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(channels, CHANNELS_PER_LANE * WARPS * LANES_C)
    sequence = (pid // blocks).to(tl.int64)
    lane, c, n = _places(pid % blocks, STATES_PER_LANE, CHANNELS_PER_LANE, WARPS, LANES_C, LANES_N)
    channel_ok = c < channels
    both_ok = channel_ok[None] & (n < STATES)
    n = n.to(tl.int64)
    log2_decay = tl.load(A + c[None] * sA_c + n * sA_n, mask=both_ok, other=0.0).to(ACC) * LOG2E
    if initial_state is not None:
        h = tl.load(initial_state + sequence * si_s + c[None] * si_c + n * si_n, mask=both_ok, other=0.0).to(ACC)
    else:
        h = tl.zeros((STATES_PER_LANE, CHANNELS_PER_LANE, WARPS, LANES_C, LANES_N), ACC)
    for i in range(splits):
        at = (sequence * splits + (splits - 1 - i if REVERSE else i)) * channels
        pointers = boundaries + at * STATES + c[None] * STATES + n
        added = tl.load(pointers, mask=both_ok, other=0.0)
        decay = tl.exp2(tl.load(sums + at + c, mask=channel_ok, other=0.0)[None] * log2_decay)
        tl.store(pointers, h, mask=both_ok)
        h = decay * h + added


# ---- step -----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["su_b", "sd_b", "sz_b", "sB_b", "sC_b", "ss_b"])
def _step_kernel(
    state, u, delta, A, B, C, D, z, delta_bias, y, channels,
    ss_b, ss_c, ss_n, su_b, su_c, sd_b, sd_c, sA_c, sA_n, sB_b, sB_n, sC_b, sC_n, sD, sz_b, sz_c, sbias,
    STATES: tl.constexpr, SOFTPLUS: tl.constexpr, ACC: tl.constexpr,
    STATES_PER_LANE: tl.constexpr, CHANNELS_PER_LANE: tl.constexpr, WARPS: tl.constexpr, LANES_C: tl.constexpr,
    LANES_N: tl.constexpr,
):  # fmt: skip
    """One position: the state (batch, channels, states) is read, advanced and written in place, y (batch, channels).

    Cost: the state twice (8 bytes per channel and state in float32); at small batches the latency of two loads.
    """
    pid = tl.program_id(0)
    blocks = tl.cdiv(channels, CHANNELS_PER_LANE * WARPS * LANES_C)
    batch = (pid // blocks).to(tl.int64)
    lane, c, n = _places(pid % blocks, STATES_PER_LANE, CHANNELS_PER_LANE, WARPS, LANES_C, LANES_N)
    channel_ok = c < channels
    state_ok = n < STATES
    both_ok = channel_ok[None] & state_ok
    n = n.to(tl.int64)
    state += batch * ss_b + c[None] * ss_c + n * ss_n
    h = tl.load(state, mask=both_ok, other=0.0).to(ACC)
    log2_decay = tl.load(A + c[None] * sA_c + n * sA_n, mask=both_ok, other=0.0).to(ACC) * LOG2E
    b = tl.load(B + batch * sB_b + n * sB_n, mask=state_ok, other=0.0).to(ACC)
    read_c = tl.load(C + batch * sC_b + n * sC_n, mask=state_ok, other=0.0).to(ACC)
    now_u = tl.load(u + batch * su_b + _tile_offsets(lane * 0, c, channel_ok, 0, su_c), mask=channel_ok, other=0.0).to(
        ACC
    )
    raw = tl.load(delta + batch * sd_b + _tile_offsets(lane * 0, c, channel_ok, 0, sd_c), mask=channel_ok, other=0.0)
    bias = None
    if delta_bias is not None:
        bias = tl.load(delta_bias + c * sbias, mask=channel_ok, other=0.0).to(ACC)
    now_delta = _positive_delta(raw, bias, channel_ok, SOFTPLUS, ACC)
    drive = (now_delta * now_u)[None] * b
    if STATES_PER_LANE * LANES_N != STATES:
        drive = tl.where(state_ok, drive, 0.0)
    h = tl.exp2(now_delta[None] * log2_decay) * h + drive
    tl.store(state, h, mask=both_ok)
    out = _collect((tl.sum(h * read_c, 0),), lane, 1, LANES_N, 3)[0]
    if D is not None:
        out += tl.load(D + c * sD, mask=channel_ok, other=0.0).to(ACC) * now_u
    if z is not None:
        now_z = tl.load(
            z + batch * sz_b + _tile_offsets(lane * 0, c, channel_ok, 0, sz_c), mask=channel_ok, other=0.0
        ).to(ACC)
        out *= now_z * _sigmoid(now_z)
    tl.store(y, out, mask=channel_ok & (lane == 0))


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
            sums, length, channels, sequences, splits, *arguments, purpose, *layout[:6], num_warps=layout.warps,
        )  # fmt: skip

    if splits > 1:
        launch(ENDS.value, None)
        _join_kernel[(sequences * blocks,)](
            A, initial_state, boundaries, sums, channels, splits, *of_A, *of_state, states, acc, False, *layout[:5],
            num_warps=layout.warps,
        )  # fmt: skip
    launch((RESUMED if splits > 1 else WHOLE).value, chunk_states if save_states else None)
    return y, final_state, chunk_states


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
        tl.float64 if u.dtype == torch.float64 else tl.float32, *layout[:5], num_warps=layout.warps,
    )  # fmt: skip
    return y


def _strides(tensor: Tensor | None, dims: int) -> tuple[int, ...]:
    return (0,) * dims if tensor is None else tensor.stride()


# ---- proof ----------------------------------------------------------------------------------------------------------


def ahead_of_time_cases() -> list[dict]:
    """Launches that tests compile without a GPU: every kernel as a trained model calls it, on a card of 128 SMs."""
    forward = {"SOFTPLUS": True, "ACC": tl.float32}
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
        constants = {**forward, "STATES": states, "CHUNK": chunk_length(states), "PURPOSE": purpose.value}
        cases.append(_case(name, _forward_kernel, layout, {**constants, "STEPS": layout.steps}, without))
    layout = forward_layout(1, 60_000, 256, 16, 128)
    constants = {"STATES": 16, "ACC": tl.float32, "REVERSE": False}
    cases.append(_case("join", _join_kernel, layout, constants, {"initial_state": None}))
    cases.append(_case("step", _step_kernel, step_layout(1, 1024, 16), {**forward, "STATES": 16}, {}))
    return cases


_FLOAT32 = ("A", "D", "delta_bias", "initial_state", "final_state", "chunk_states", "boundaries", "sums", "state")


def _case(name: str, kernel, layout: Layout, constants: dict, without: dict) -> dict:
    """bfloat16 activations and float32 parameters, all contiguous, aligned as torch allocates."""
    names = ("STATES_PER_LANE", "CHANNELS_PER_LANE", "WARPS", "LANES_C", "LANES_N")
    constexprs = {**constants, **without, **dict(zip(names, layout[:5], strict=True))}
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
