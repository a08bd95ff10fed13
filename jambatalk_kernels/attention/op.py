"""rope_attention and rope_attention_step: argument checks, backend choice, autograd and shape functions."""

from collections.abc import Mapping

import torch
from torch import Tensor

from jambatalk_kernels.attention import reference
from jambatalk_kernels.attention.reference import KVCache, rotary_table  # noqa: F401  (public here)
from jambatalk_kernels.autograd import any_requires_grad, first_derivative
from jambatalk_kernels.backends import Reason, candidates, choose, without_step_gradients
from jambatalk_kernels.checks import values_are_checked
from jambatalk_kernels.triton_ops import TritonOp

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
        (batch, length, heads, head_dim), dtype of q. Time and memory O(length * window) with a window. Softmax in the
        dtype that torch's scaled_dot_product_attention uses (float32 or better for half precision). No double backward.

    On a GPU Triton's kernels run up to head_dim 256 (not float64), flash style: memory O(length), the rotation applied
    on load, keys read once per group; saved for backward are the inputs, the result, one number per query and head, and
    a copy of the cache where there is one. Elsewhere torch's own attention runs behind the rotation.

    Raises:
        TypeError, ValueError: a bad dtype, shape, device or range, naming the argument; a cache without room
            (its positions are on the device, so off the CPU that is checked only with JAMBATALK_KERNELS_CHECK=1, and
            not in compiled code).
    """
    _check_qkv(q, k, v, 4, "(batch, length, heads, head_dim)", "(batch, length, kv_heads, head_dim)")
    batch, length, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    allowed = [
        (length, head_dim // 2),
        (length, kv_heads, head_dim // 2),
        (batch, length, 1, head_dim // 2),
        (batch, length, kv_heads, head_dim // 2),
    ]
    _check_tables(q, cos, sin, allowed)
    _check_window(window)
    if window is not None and not causal:
        raise ValueError("window needs causal=True")
    if cu_seqlens is not None:
        if cache is not None:
            raise ValueError("cu_seqlens and cache cannot be combined")
        if batch != 1:
            raise ValueError(f"cu_seqlens needs batch 1 (sequences packed along length), got batch {batch}")
        if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype != torch.int32:
            raise TypeError("cu_seqlens must be an int32 tensor")
        if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
            raise ValueError(f"cu_seqlens must be (sequences + 1,), got shape {tuple(cu_seqlens.shape)}")
        if cu_seqlens.device != q.device:
            raise ValueError(f"cu_seqlens must be on the device of q ({q.device}), got {cu_seqlens.device}")
    if cache is not None:
        if not causal:
            raise ValueError("cache needs causal=True")
        _check_cache(cache, q, kv_heads, length, window)
    scale = _scale(scale, head_dim)
    if choose("rope_attention", backend, _options("rope_attention", q)) == "reference":
        return reference.rope_attention(q, k, v, cos, sin, causal, window, scale, interleaved, cu_seqlens, cache)
    tensors, how = (q, k, v, cos, sin), (causal, window, scale, interleaved)
    earlier = (None, None, None) if cache is None else (cache.k, cache.v, cache.position)
    if torch.is_grad_enabled() and any_requires_grad(*tensors):
        y = _RopeAttention.apply(*tensors, *how, cu_seqlens, *earlier)
    else:
        y = _FORWARD(*tensors, *how, cu_seqlens, *earlier, False)[0]
    if cache is not None:
        with torch.no_grad():  # what is cached carries no gradient
            _APPEND(k, v, cos, sin, *earlier, interleaved)
            cache.position += length
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
    _check_qkv(q, k, v, 3, "(batch, heads, head_dim)", "(batch, kv_heads, head_dim)")
    batch, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    _check_tables(q, cos, sin, [(batch, head_dim // 2), (batch, kv_heads, head_dim // 2)])
    _check_window(window)
    _check_cache(cache, q, kv_heads, 1, window)
    scale = _scale(scale, head_dim)
    options = _options("rope_attention_step", q)
    if torch.is_grad_enabled() and any_requires_grad(q, k, v, cos, sin):
        options = without_step_gradients(options)
    if choose("rope_attention_step", backend, options) == "reference":
        return reference.rope_attention_step(q, k, v, cos, sin, cache, window, scale, interleaved)
    y = _STEP(q, k, v, cos, sin, cache.k, cache.v, cache.position, window, scale, interleaved)
    cache.position += 1
    return y


def _options(op: str, q: Tensor) -> Mapping[str, Reason]:
    options = dict(candidates(op, q))
    options["cuda"] = "no CUDA C++ kernel is written for it; Triton's runs on GPUs"
    if options["triton"] is None or callable(options["triton"]):
        if q.dtype == torch.float64 or q.shape[-1] > MAX_TRITON_HEAD_DIM:
            options["triton"] = f"it takes no float64 and head_dim up to {MAX_TRITON_HEAD_DIM}"
    if q.device.type == "cpu":
        # Not a fallback: behind the rotation the reference is torch's own attention.
        return {"reference": None, **options, "cpu": "no C++ kernel is written for it; the reference runs torch's own"}
    return options


def _scale(scale: float | None, head_dim: int) -> float:
    if scale is None:
        return head_dim**-0.5
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale must be a number or None, got {type(scale).__name__}")
    if not 0 < scale < float("inf"):
        raise ValueError(f"scale must be positive and finite, got {scale}")
    return float(scale)


def _check_qkv(q: Tensor, k: Tensor, v: Tensor, dims: int, q_shape: str, kv_shape: str) -> None:
    for name, value, shape in (("q", q, q_shape), ("k", k, kv_shape), ("v", v, kv_shape)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        if not value.is_floating_point():
            raise TypeError(f"{name} must be of a float dtype, got {value.dtype}")
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
        if not isinstance(value, Tensor) or not value.is_floating_point():
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
    def forward(ctx, q, k, v, cos, sin, causal, window, scale, interleaved, cu_seqlens, *cache):
        ctx.how = (causal, window, scale, interleaved)
        y, logsumexp = _FORWARD(q, k, v, cos, sin, *ctx.how, cu_seqlens, *cache, True)
        cache = (None if tensor is None else tensor.clone() for tensor in cache)
        ctx.save_for_backward(q, k, v, cos, sin, y, logsumexp, cu_seqlens, *cache)
        return y

    @staticmethod
    def backward(ctx, grad_y):
        *saved, cu_seqlens, cache_k, cache_v, position = ctx.saved_tensors
        masks = (*ctx.how, cu_seqlens, cache_k, cache_v, position)
        grads = first_derivative("rope_attention", _BACKWARD, grad_y, *saved, *masks)
        return *grads, *(None,) * 8


def _fake_attention(q, k, v, cos, sin, causal, window, scale, interleaved, cu_seqlens, ck, cv, position, save):
    batch, length, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, length) if save else (0,), dtype=torch.float32)


def _fake_attention_backward(grad_y, q, k, v, cos, sin, *_):
    return tuple(tensor.new_empty(tensor.shape) for tensor in (q, k, v, cos, sin))


def _fake_attention_append(*_):
    return None


def _fake_attention_step(q, *_):
    return q.new_empty(q.shape)


_FORWARD = TritonOp(
    "rope_attention(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, bool causal, int? window, float scale, "
    "bool interleaved, Tensor? cu_seqlens, Tensor? cache_k, Tensor? cache_v, Tensor? position, bool save) "
    "-> (Tensor y, Tensor logsumexp)",
    "jambatalk_kernels.attention.triton", "attention_forward", _fake_attention,
)  # fmt: skip
_BACKWARD = TritonOp(
    "rope_attention_backward(Tensor grad_y, Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor y, "
    "Tensor logsumexp, bool causal, int? window, float scale, bool interleaved, Tensor? cu_seqlens, "
    "Tensor? cache_k, Tensor? cache_v, Tensor? position) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dcos, Tensor dsin)",
    "jambatalk_kernels.attention.triton", "attention_backward", _fake_attention_backward,
)  # fmt: skip
_APPEND = TritonOp(
    "rope_attention_append(Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) cache_k, Tensor(b!) cache_v, "
    "Tensor position, bool interleaved) -> ()",
    "jambatalk_kernels.attention.triton", "attention_append", _fake_attention_append,
)  # fmt: skip
_STEP = TritonOp(
    "rope_attention_step(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) cache_k, "
    "Tensor(b!) cache_v, Tensor position, int? window, float scale, bool interleaved) -> Tensor",
    "jambatalk_kernels.attention.triton_step", "attention_step", _fake_attention_step,
)  # fmt: skip
