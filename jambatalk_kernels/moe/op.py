"""Public mixture-of-experts functions: checks and backend choice. The definition is in `reference.py`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from jambatalk_kernels import backends
from jambatalk_kernels.moe import reference
from jambatalk_kernels.moe.reference import Routing

ACTIVATIONS = ("swiglu", "gelu", "relu")


def moe_route(logits: Tensor, top_k: int, *, renormalize: bool = False, backend: str | None = None) -> Routing:
    """Choose `top_k` experts per token.

    Softmax over all experts in float32 (float64 for float64 logits), the `top_k` largest, ties to the lowest index.
    The weights are those probabilities (Eq. 4-5 of JambaTalk; Jamba), divided by their sum only with `renormalize`.

    Args:
        logits: (tokens, experts), any float dtype. Gradients flow from `weights` and `probabilities`.
        top_k: 1 .. experts.

    Returns:
        `Routing` (see there); no capacity, no dropped tokens.

    Raises:
        TypeError, ValueError: a bad dtype, shape or range, naming the argument.
    """
    _require_float("logits", logits)
    if logits.dim() != 2:
        raise ValueError(f"logits must be (tokens, experts), got shape {tuple(logits.shape)}")
    if not isinstance(top_k, int) or isinstance(top_k, bool):
        raise TypeError(f"top_k must be an int, got {type(top_k).__name__}")
    if not 1 <= top_k <= logits.shape[1]:
        raise ValueError(f"top_k must be between 1 and the number of experts {logits.shape[1]}, got {top_k}")
    backends.choose("moe_route", backend, {"reference": None})
    return reference.moe_route(logits, top_k, renormalize)


def load_balancing_loss(routing: Routing | Sequence[Routing]) -> Tensor:
    """Jamba's (Switch Transformer's) loss: experts * sum_e f_e P_e.

    f_e is the number of picks of expert e per token (all `top_k` counted), P_e its mean probability. It is `top_k` when
    the load is even and grows towards experts * top_k. A sequence of routings (one per layer) is pooled as Jamba does:
    as though all their tokens had met one router. Differentiable through the probabilities; 0 when there are no tokens.
    """
    if isinstance(routing, Routing):
        return reference.load_balancing_loss(routing)
    routings = list(routing)
    if not routings:
        raise ValueError("routing must be a Routing or a non-empty sequence of them, got an empty sequence")
    if len({(r.weights.shape[1], r.probabilities.shape[1]) for r in routings}) > 1:
        raise ValueError("routing: layers to be pooled must agree in top_k and in the number of experts")
    pooled = Routing(
        weights=torch.cat([r.weights for r in routings]),
        experts=torch.cat([r.experts for r in routings]),
        probabilities=torch.cat([r.probabilities for r in routings]),
        order=routings[0].order,  # not read by the loss
        offsets=torch.stack([r.offsets for r in routings]).sum(0),
    )
    return reference.load_balancing_loss(pooled)


def moe_mlp(
    x: Tensor, routing: Routing, w_in: Tensor, w_out: Tensor, *, activation: str = "swiglu", backend: str | None = None
) -> Tensor:
    """y[t] = sum over slots k of  weights[t, k] * W_out[e] act(W_in[e] x[t]),  e = experts[t, k].

    Args:
        x: (tokens, d), any float dtype.
        routing: from `moe_route` for the same tokens.
        w_in: (experts, 2 * hidden, d) for swiglu, the gate rows first; (experts, hidden, d) for gelu and relu.
        w_out: (experts, d_out, hidden).
        activation: swiglu (silu(gate) * up) | gelu (exact) | relu.

    Returns:
        (tokens, d_out) in the dtype of x. Gradients for x, w_in, w_out and routing.weights.

    Cost: 2 * tokens * top_k * hidden * (2 d + d_out) operations for swiglu; on the CPU each expert runs on one
    contiguous block of its tokens, elsewhere the reference runs every expert on every token.

    Raises:
        TypeError, ValueError: a bad dtype, shape, device or name, naming the argument.
    """
    _require_float("x", x)
    if not isinstance(routing, Routing):
        raise TypeError(f"routing must be a Routing from moe_route, got {type(routing).__name__}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if x.dim() != 2:
        raise ValueError(f"x must be (tokens, d), got shape {tuple(x.shape)}")
    if routing.weights.shape[0] != x.shape[0]:
        raise ValueError(f"routing is for {routing.weights.shape[0]} tokens, but x has {x.shape[0]}")
    experts = routing.probabilities.shape[1]
    for name, weight in (("w_in", w_in), ("w_out", w_out)):
        if weight.dim() != 3 or weight.shape[0] != experts:
            raise ValueError(f"{name} must be 3-D with {experts} experts first, got shape {tuple(weight.shape)}")
        if weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"{name} must have the dtype of x ({x.dtype}), got {weight.dtype}")
        if weight.device != x.device:
            raise ValueError(f"{name} must be on the device of x ({x.device}), got {weight.device}")
    if w_in.shape[2] != x.shape[1]:
        raise ValueError(f"w_in must take {x.shape[1]} features (the last size of x), got shape {tuple(w_in.shape)}")
    hidden = w_out.shape[2]
    rows = 2 * hidden if activation == "swiglu" else hidden
    if w_in.shape[1] != rows:
        raise ValueError(
            f"w_in must have {rows} rows per expert for {activation} with w_out {tuple(w_out.shape)}, "
            f"got shape {tuple(w_in.shape)}"
        )
    backends.choose("moe_mlp", backend, {"reference": None})
    return reference.moe_mlp(x, routing, w_in, w_out, activation)


def _require_float(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{name} must be of a float dtype, got {value.dtype}")
