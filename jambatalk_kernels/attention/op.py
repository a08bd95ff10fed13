"""rope_attention and rope_attention_step: argument checks, backend choice, autograd and shape functions."""

from collections.abc import Mapping

import torch
from torch import Tensor

from jambatalk_kernels.attention import reference
from jambatalk_kernels.attention.reference import KVCache, rotary_table
from jambatalk_kernels.autograd import any_requires_grad, first_derivative
from jambatalk_kernels.backends import Reason, candidates, choose, native_library, without_step_gradients
from jambatalk_kernels.checks import FLOATS, check_cu_seqlens, check_flag, values_are_checked
from jambatalk_kernels.triton_ops import Kernels, TritonOp

__all__ = ["KVCache", "rope_attention", "rope_attention_step", "rotary_table"]

MAX_TRITON_HEAD_DIM = 256


def rope_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    interleaved: bool = False,
    cu_seqlens: Tensor | None = None,
    cache: KVCache | None = None,
    backend: str | None = None,
) -> Tensor:
    """Grouped-query attention with rotary positions. The formula is in `reference.py`.

    Args:
        q: (batch, length, heads, head_dim), float dtype, head_dim even.
        k, v: (batch, length, kv_heads, head_dim); heads % kv_heads == 0.
        cos, sin: (length, head_dim / 2); or with a head axis (length, kv_heads, head_dim / 2), the query heads of a
            group sharing the row of their key head; or per sequence (batch, length, kv_heads or 1, head_dim / 2).
            float32 tables are fine with half-precision q. Differentiable. All ones and zeros: no rotation.
        causal: position i sees j <= i.
        window: i sees only the last `window` positions, its own included; needs `causal`.
        scale: of the scores, positive; head_dim ** -0.5 by default.
        interleaved: pairs are (2f, 2f + 1) instead of (f, f + head_dim / 2).
        cu_seqlens: int32 (sequences + 1,): batch is 1 and several sequences are packed along length; one row of cos and
            sin per packed position. Positions outside of every sequence give zeros. Not together with a cache.
        cache: earlier positions to see as well (chunked prefill); these keys and values are appended, in place. Cached
            keys and values carry no gradient. Needs `causal`. cos and sin are those of the new positions.

    Returns:
        (batch, length, heads, head_dim), dtype of q. Time and memory O(length * window) with a window. Sums in float32,
        in float64 when q is. Deterministic, forward and backward. A query that sees nothing gives zeros and has no
        gradient. No double backward, except on `reference`.

    On a CPU C++ runs, on a GPU Triton up to head_dim 256 (not float64); both flash style: memory O(length), the
    rotation applied on load, keys read once per group; saved for backward are the inputs, the result, one number per
    query and head (Triton: two), and a copy of the cache where there is one. Elsewhere, and as the definition, torch's
    own attention runs behind the rotation. Not so on a CPU, where that was measured (benchmarks/bench_attention.py; Zen
    5 with AVX-512, two threads, (1, 600, 8 heads, 1 kv head, 64), float32, causal): fusing the rotation around torch's
    kernel saves the 3 % that the rotation takes; a kernel of our own saves three quarters, as torch's multiplies at a
    third of the speed of its matrix product.

    Raises:
        TypeError, ValueError: a bad dtype, shape, device or range, naming the argument; a cache without room
            (its positions are on the device, so off the CPU that is checked only with JAMBATALK_KERNELS_CHECK=1, and
            not in compiled code).
    """
    tensors, masks = (q, k, v, cos, sin), (causal, window, scale, interleaved, cu_seqlens, cache)
    chosen = choose("rope_attention", backend, _options("rope_attention", q))
    # A call must cost microseconds: the native op tests its arguments itself, and only when it refuses them is the
    # reason put into words here. What it cannot see is checked first: tracing runs no kernel, and values are optional.
    if chosen != "cpu" or cu_seqlens is not None or torch.compiler.is_compiling():
        _check_attention(q, k, v, cos, sin, *masks)
    if chosen == "reference":
        return reference.rope_attention(*tensors, causal, window, _scale(scale, q), interleaved, cu_seqlens, cache)
    try:
        earlier = (None, None, None) if cache is None else (cache.k, cache.v, cache.position)
        how = (causal, window, _scale(scale, q), interleaved, cu_seqlens, *earlier)
        if torch.is_grad_enabled() and any_requires_grad(*tensors):
            y = _RopeAttention.apply(*tensors, *how, chosen)
        else:
            y = _FORWARD[chosen](*tensors, *how, False)[0]
        if cache is not None:
            with torch.no_grad():  # what is cached carries no gradient
                _APPEND[chosen](k, v, cos, sin, *earlier, interleaved)
                cache.position += q.shape[1]
    except (RuntimeError, TypeError, AttributeError, IndexError):
        _check_attention(q, k, v, cos, sin, *masks)
        raise
    if chosen == "cpu" and cache is not None and not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version((cache.k, cache.v))  # so that autograd sees what was overwritten
    return y


def rope_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: KVCache,
    *,
    window: int | None = None,
    scale: float | None = None,
    interleaved: bool = False,
    backend: str | None = None,
) -> Tensor:
    """`rope_attention` for one new position per sequence; the cache is changed in place. For inference: no gradients.

    Args:
        q: (batch, heads, head_dim). k, v: (batch, kv_heads, head_dim).
        cos, sin: (batch, head_dim / 2) or (batch, kv_heads, head_dim / 2), of each sequence's own position
            (`cache.position` before the call).
        window, scale, interleaved: as in `rope_attention`.

    Returns:
        (batch, heads, head_dim). Cost O(cache capacity), however many positions went before.

    Raises:
        TypeError, ValueError: as `rope_attention`.
    """
    tensors = (q, k, v, cos, sin)
    options = _options("rope_attention_step", q)
    if torch.is_grad_enabled() and any_requires_grad(*tensors):
        options = without_step_gradients(options)
    chosen = choose("rope_attention_step", backend, options)
    if chosen != "cpu" or torch.compiler.is_compiling():
        _check_attention_step(*tensors, cache, window, scale)
    if chosen == "reference":
        return reference.rope_attention_step(*tensors, cache, window, _scale(scale, q), interleaved)
    try:
        y = _STEP[chosen](*tensors, cache.k, cache.v, cache.position, window, _scale(scale, q), interleaved)
        cache.position.add_(1)
    except (RuntimeError, TypeError, AttributeError, IndexError):
        _check_attention_step(*tensors, cache, window, scale)
        raise
    if chosen == "cpu" and not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version((cache.k, cache.v))
    return y


_NO_CUDA = "no CUDA C++ kernel is written for it; Triton's runs on GPUs"
_ON_CPU: Mapping[str, Reason] = {**candidates("rope_attention", torch.empty(0)), "cuda": _NO_CUDA}


def _options(op: str, q: Tensor) -> Mapping[str, Reason]:
    if not isinstance(q, Tensor):
        return _ON_CPU
    too_much = q.dtype == torch.float64 or q.shape[-1:] > (MAX_TRITON_HEAD_DIM,)
    if q.device.type == "cpu" and not too_much:
        return _ON_CPU
    options = {**candidates(op, q), "cuda": _NO_CUDA}
    if too_much and (options["triton"] is None or callable(options["triton"])):
        options["triton"] = f"it takes no float64 and head_dim up to {MAX_TRITON_HEAD_DIM}"
    return options


def _scale(scale: float | None, q: Tensor) -> float:
    if scale is None:
        return q.shape[-1] ** -0.5
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale must be a number or None, got {type(scale).__name__}")
    if not 0 < scale < float("inf"):
        raise ValueError(f"scale must be positive and finite, got {scale}")
    return float(scale)


def _check_attention(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, causal: bool, window: int | None, scale: float | None,
    interleaved: bool, cu_seqlens: Tensor | None, cache: KVCache | None,
) -> None:  # fmt: skip
    _check_qkv(q, k, v, 4, "(batch, length, heads, head_dim)", "(batch, length, kv_heads, head_dim)")
    batch, length, _, head_dim = q.shape
    kv_heads = k.shape[2]
    allowed = [
        (length, head_dim // 2),
        (length, kv_heads, head_dim // 2),
        (batch, length, 1, head_dim // 2),
        (batch, length, kv_heads, head_dim // 2),
    ]
    _check_tables(q, cos, sin, allowed)
    _check_window(window)
    _scale(scale, q)
    check_flag("rope_attention", "causal", causal)
    check_flag("rope_attention", "interleaved", interleaved)
    if window is not None and not causal:
        raise ValueError("window needs causal=True")
    if cu_seqlens is not None:
        if cache is not None:
            raise ValueError("cu_seqlens and cache cannot be combined")
        check_cu_seqlens("rope_attention", cu_seqlens, batch, length, q.device)
    if cache is not None:
        if not causal:
            raise ValueError("cache needs causal=True")
        _check_cache(cache, q, kv_heads, length, window)


def _check_attention_step(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, cache: KVCache, window: int | None, scale: float | None
) -> None:
    _check_qkv(q, k, v, 3, "(batch, heads, head_dim)", "(batch, kv_heads, head_dim)")
    batch, _, head_dim = q.shape
    kv_heads = k.shape[1]
    _check_tables(q, cos, sin, [(batch, head_dim // 2), (batch, kv_heads, head_dim // 2)])
    _check_window(window)
    _scale(scale, q)
    _check_cache(cache, q, kv_heads, 1, window)


def _check_qkv(q: Tensor, k: Tensor, v: Tensor, dims: int, q_shape: str, kv_shape: str) -> None:
    for name, value, shape in (("q", q, q_shape), ("k", k, kv_shape), ("v", v, kv_shape)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        if value.dtype not in FLOATS:
            raise TypeError(f"{name} must be of a float dtype (float32, float64, bfloat16, float16), got {value.dtype}")
        if value.dim() != dims:
            raise ValueError(f"{name} must be {shape}, got shape {tuple(value.shape)}")
        if value.dtype != q.dtype:
            raise TypeError(f"{name} must have the dtype of q ({q.dtype}), got {value.dtype}")
        if value.device != q.device:
            raise ValueError(f"{name} must be on the device of q ({q.device}), got {value.device}")
    if k.shape != v.shape:
        raise ValueError(f"v must have the shape of k {tuple(k.shape)}, got {tuple(v.shape)}")
    if q.shape[:-2] != k.shape[:-2] or q.shape[-1] != k.shape[-1]:
        raise ValueError(f"k must agree with q {tuple(q.shape)} in all but the number of heads, got {tuple(k.shape)}")
    heads, kv_heads = q.shape[-2], k.shape[-2]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"k: the number of key-value heads must divide the {heads} query heads, got {kv_heads}")
    if q.shape[-1] == 0 or q.shape[-1] % 2:
        raise ValueError(f"q: head_dim must be even and positive, got {q.shape[-1]}")


def _check_tables(q: Tensor, cos: Tensor, sin: Tensor, allowed: list[tuple[int, ...]]) -> None:
    for name, value in (("cos", cos), ("sin", sin)):
        if not isinstance(value, Tensor) or value.dtype not in FLOATS:
            raise TypeError(f"{name} must be a float tensor, got {getattr(value, 'dtype', type(value).__name__)}")
        if tuple(value.shape) not in allowed:
            shapes = " or ".join(str(shape) for shape in dict.fromkeys(allowed))
            raise ValueError(f"{name} must have shape {shapes} (a head axis is that of k), got {tuple(value.shape)}")
        if value.device != q.device:
            raise ValueError(f"{name} must be on the device of q ({q.device}), got {value.device}")
    if cos.shape != sin.shape:
        raise ValueError(f"sin must have the shape of cos {tuple(cos.shape)}, got {tuple(sin.shape)}")


def _check_window(window: int | None) -> None:
    if window is None:
        return
    if not isinstance(window, int) or isinstance(window, bool):
        raise TypeError(f"window must be an int or None, got {type(window).__name__}")
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")


def _check_cache(cache: KVCache, q: Tensor, kv_heads: int, length: int, window: int | None) -> None:
    if not isinstance(cache, KVCache):
        raise TypeError(f"cache must be a KVCache, got {type(cache).__name__}")
    batch, head_dim = q.shape[0], q.shape[-1]
    for name, value in (("cache.k", cache.k), ("cache.v", cache.v)):
        if value.dim() != 4 or (value.shape[0], *value.shape[2:]) != (batch, kv_heads, head_dim) or not value.shape[1]:
            raise ValueError(f"{name} must be ({batch}, capacity, {kv_heads}, {head_dim}), got {tuple(value.shape)}")
        if value.device != q.device:
            raise ValueError(f"{name} must be on the device of q ({q.device}), got {value.device}")
    if cache.k.shape != cache.v.shape:
        raise ValueError(f"cache.v must have the shape of cache.k, got {tuple(cache.v.shape)}")
    if cache.position.dtype != torch.int64 or tuple(cache.position.shape) != (batch,):
        raise ValueError(
            f"cache.position must be int64 ({batch},), got {cache.position.dtype} {tuple(cache.position.shape)}"
        )
    if window is not None and cache.capacity >= window:
        return  # a ring: it can never run out
    # A value, not a shape: reading it off a device would wait for the device, and a compiler that traces cannot.
    if batch and not torch.compiler.is_compiling() and (q.device.type == "cpu" or values_are_checked()):
        used = int(cache.position.max())
        if used + length > cache.capacity:
            needed = f"a window of {window}" if window is not None else f"{used} + {length} positions"
            raise ValueError(f"cache: capacity {cache.capacity} is too small for {needed}")


class _RopeAttention(torch.autograd.Function):
    """Saved: the inputs, the result and the logarithm of every softmax's sum; of the cache a copy: it will change."""

    @staticmethod
    def forward(ctx, q, k, v, cos, sin, causal, window, scale, interleaved, cu_seqlens, ck, cv, position, backend):
        ctx.how, ctx.backend = (causal, window, scale, interleaved), backend
        cache = (ck, cv, position)
        y, logsumexp = _FORWARD[backend](q, k, v, cos, sin, *ctx.how, cu_seqlens, *cache, True)
        copies = (None if tensor is None else tensor.clone() for tensor in cache)
        ctx.save_for_backward(q, k, v, cos, sin, y, logsumexp, cu_seqlens, *copies)
        return y

    @staticmethod
    def backward(ctx, grad_y):
        *saved, cu_seqlens, cache_k, cache_v, position = ctx.saved_tensors
        masks = (*ctx.how, cu_seqlens, cache_k, cache_v, position)
        grads = first_derivative("rope_attention", _BACKWARD[ctx.backend], grad_y, *saved, *masks)
        return *grads, *(None,) * 9


def _fake_attention(q, k, v, cos, sin, causal, window, scale, interleaved, cu_seqlens, ck, cv, position, save):
    batch, length, heads, _ = q.shape
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty((batch, heads, length) if save else (0,), dtype=dtype)


def _fake_triton_attention(q, *arguments):
    """Its logsumexp has two parts, so that in float32 no digit of large scores is lost."""
    y, logsumexp = _fake_attention(q, *arguments)
    return y, logsumexp.new_empty((2, *logsumexp.shape)) if arguments[-1] else logsumexp


def _fake_attention_backward(grad_y, q, k, v, cos, sin, *_):
    return tuple(tensor.new_empty(tensor.shape) for tensor in (q, k, v, cos, sin))


def _fake_attention_append(*_):
    return None


def _fake_attention_step(q, *_):
    return q.new_empty(q.shape)


# The schemas of csrc/schemas.h, for the ops that Triton's launchers become; a test compares the two.
SCHEMAS = (
    "rope_attention(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, bool causal, int? window, float scale, "
    "bool interleaved, Tensor? cu_seqlens, Tensor? cache_k, Tensor? cache_v, Tensor? position, bool save) "
    "-> (Tensor y, Tensor logsumexp)",
    "rope_attention_backward(Tensor grad_y, Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor y, "
    "Tensor logsumexp, bool causal, int? window, float scale, bool interleaved, Tensor? cu_seqlens, "
    "Tensor? cache_k, Tensor? cache_v, Tensor? position) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dcos, Tensor dsin)",
    "rope_attention_append(Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) cache_k, Tensor(b!) cache_v, "
    "Tensor position, bool interleaved) -> ()",
    "rope_attention_step(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) cache_k, "
    "Tensor(b!) cache_v, Tensor position, int? window, float scale, bool interleaved) -> Tensor",
)
_MODULE = "jambatalk_kernels.attention.triton"

# Backend -> the op that runs it.
_FORWARD: Kernels = {"triton": TritonOp(SCHEMAS[0], _MODULE, "attention_forward", _fake_triton_attention)}
_BACKWARD: Kernels = {"triton": TritonOp(SCHEMAS[1], _MODULE, "attention_backward", _fake_attention_backward)}
_APPEND: Kernels = {"triton": TritonOp(SCHEMAS[2], _MODULE, "attention_append", _fake_attention_append)}
_STEP: Kernels = {"triton": TritonOp(SCHEMAS[3], f"{_MODULE}_step", "attention_step", _fake_attention_step)}
if native_library()[0]:
    torch.library.register_fake("jambatalk::rope_attention", _fake_attention)
    torch.library.register_fake("jambatalk::rope_attention_backward", _fake_attention_backward)
    torch.library.register_fake("jambatalk::rope_attention_append", _fake_attention_append)
    torch.library.register_fake("jambatalk::rope_attention_step", _fake_attention_step)
    _FORWARD["cpu"] = torch.ops.jambatalk.rope_attention.default
    _BACKWARD["cpu"] = torch.ops.jambatalk.rope_attention_backward.default
    _APPEND["cpu"] = torch.ops.jambatalk.rope_attention_append.default
    _STEP["cpu"] = torch.ops.jambatalk.rope_attention_step.default
