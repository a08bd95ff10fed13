"""moe_route, load_balancing_loss and moe_mlp: argument checks, backend choice, autograd and shape functions."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from jambatalk_kernels.autograd import any_requires_grad, first_derivative
from jambatalk_kernels.backends import Reason, candidates, choose, native_library
from jambatalk_kernels.checks import check_flag, check_tensor
from jambatalk_kernels.moe import reference
from jambatalk_kernels.moe.reference import Routing
from jambatalk_kernels.triton_ops import Kernels, TritonOp

__all__ = ["Routing", "load_balancing_loss", "moe_mlp", "moe_route"]

ACTIVATIONS = ("swiglu", "gelu", "relu")


def moe_route(logits: Tensor, top_k: int, *, renormalize: bool = False, backend: str | None = None) -> Routing:
    """Choose `top_k` experts per token.

    Softmax over all experts in float32 (float64 for float64 logits), the `top_k` largest, ties to the lowest index.
    The weights are those probabilities (Eq. 4-5 of JambaTalk; Jamba), divided by their sum only with `renormalize`.

    A row without a softmax (it holds NaN or +infinity, or only -infinity) gets experts 0 .. top_k - 1 with weights and
    probabilities NaN: nothing raises, no index is out of range, and the NaN is seen where it ends up.

    Args:
        logits: (tokens, experts), any float dtype. Gradients flow from `weights`, `probabilities` and
            `probability_sums`; a second derivative works on `reference` and raises on the others.
        top_k: 1 .. experts.

    Returns:
        `Routing` (see there); no capacity, no dropped tokens. Deterministic.

    Cost: on the CPU about experts * (20 + top_k) operations a token, then three passes over the assignments. On a GPU
    one launch for few tokens and two for many, bound by their latency; `triton` and `cuda` take up to 256 experts and
    top_k 16.

    Raises:
        TypeError, ValueError: a bad dtype, shape or range, naming the argument.
    """
    check_tensor("moe_route", "logits", logits, ("tokens", "experts"), (None, None), None)
    if not isinstance(top_k, int) or isinstance(top_k, bool):
        raise TypeError(f"moe_route: top_k: expected an int, got {type(top_k).__name__}")
    if not 1 <= top_k <= logits.shape[1]:
        raise ValueError(f"moe_route: top_k: expected 1 to {logits.shape[1]}, the number of experts, got {top_k}")
    check_flag("moe_route", "renormalize", renormalize)
    chosen = choose("moe_route", backend, _options("moe_route", logits, logits.shape[1], top_k))
    if chosen == "reference":
        return reference.moe_route(logits, top_k, renormalize)
    if torch.is_grad_enabled() and logits.requires_grad:
        return Routing(*_MoERoute.apply(logits, top_k, renormalize, chosen))
    return Routing(*_ROUTE[chosen](logits, top_k, renormalize))


def load_balancing_loss(routing: Routing | Sequence[Routing]) -> Tensor:
    """Jamba's (Switch Transformer's) loss: experts * sum_e f_e P_e.

    f_e is the number of picks of expert e per token (all `top_k` counted), P_e its mean probability. It is `top_k` when
    the load is even and grows towards experts * top_k. A sequence of routings (one per layer) is pooled as Jamba does:
    as though all their tokens had met one router. Differentiable through the probabilities; 0 when there are no tokens.

    f_e and P_e were counted and summed while routing (`offsets`, `probability_sums`): no pass over the tokens is made.
    """
    routings = [routing] if isinstance(routing, Routing) else list(routing)
    if not routings:
        raise ValueError("routing must be a Routing or a non-empty sequence of them, got an empty sequence")
    for one in routings:
        if not isinstance(one, Routing):
            raise TypeError(f"routing: expected a Routing or a sequence of them, got {type(one).__name__}")
    if len({(r.weights.shape[1], r.probability_sums.shape[0]) for r in routings}) > 1:
        raise ValueError("routing: layers to be pooled must agree in top_k and in the number of experts")
    return reference.load_balancing_loss(routings)


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
        (tokens, d_out) in the dtype of x. Gradients for x, w_in, w_out and routing.weights; a second derivative works
        on `reference` and raises on the others. Under autocast the products are in autocast's dtype. Deterministic:
        equal bytes on every run; and y and the gradients of x and of routing.weights are the same bytes for a token
        wherever in the batch it stands. Those of w_in and w_out are sums over the tokens in their order, so that
        another order changes their rounding.

    Cost: 2 * tokens * top_k * hidden * (2 d + d_out) operations for swiglu, which bind it. On `cpu` the experts'
    products are ours (csrc/cpu/grouped_product.h), on one contiguous segment of its tokens per expert: tokens are
    gathered while they are laid out for the product, and the activation is done on sums that are still in the cache.
    PyTorch's own were measured beside them: on a Zen 5 core at the sizes of the model they do 90 float32 GFLOP/s (their
    library takes AVX2 there) where ours is made for the 237 of AVX-512, 390 in bfloat16, and 1 to 22 in float16; and
    the bytes of a row depend there on how many rows stand with it (fewer than four in float32, any number that is no
    multiple of four in float64), here they do not. Up to 16 assignments without gradients run as matrix-vector
    products that read each needed expert once, and where every expert sees every token the tokens are laid out once
    for all. Backward saves the preactivations, (tokens * top_k, rows of w_in), and no expert's output.

    Raises:
        TypeError, ValueError: a bad dtype, shape, device or name, naming the argument.
    """
    _check_mlp(x, routing, w_in, w_out, activation)
    chosen = choose("moe_mlp", backend, _options("moe_mlp", x, w_in.shape[0], routing.weights.shape[1]))
    if chosen == "reference":
        return reference.moe_mlp(x, routing, w_in, w_out, activation)
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type):
        narrow = torch.get_autocast_dtype(x.device.type)
        x, w_in, w_out = x.to(narrow), w_in.to(narrow), w_out.to(narrow)
    # Small, and usually contiguous as they come from moe_route; the reference's are not.
    weights = routing.weights.to(torch.float64 if x.dtype == torch.float64 else torch.float32).contiguous()
    indices = tuple(index.contiguous() for index in (routing.experts, routing.order, routing.offsets))
    if torch.is_grad_enabled() and any_requires_grad(x, weights, w_in, w_out):
        return _MoEMLP.apply(x, weights, *indices, w_in, w_out, activation, chosen).to(dtype)
    return _MLP[chosen](x, weights, *indices, w_in, w_out, activation, False)[0].to(dtype)


def _options(op: str, like: Tensor, experts: int, top_k: int) -> Mapping[str, Reason]:
    options = dict(candidates(op, like))
    if op == "moe_mlp":
        options["cuda"] = "its products are Triton's on every GPU; CUDA C++ does the routing"
    for backend in ("triton", "cuda"):
        if options[backend] is None or callable(options[backend]):
            if like.dtype == torch.float64 and op == "moe_mlp":
                options[backend] = "its products have no float64"
            elif experts > 256 or top_k > 16:
                options[backend] = f"it has up to 256 experts and top_k 16, and this call {experts} and {top_k}"
    return options


def _check_mlp(x: Tensor, routing: Routing, w_in: Tensor, w_out: Tensor, activation: str) -> None:
    op = "moe_mlp"
    check_tensor(op, "x", x, ("tokens", "d"), (None, None), None)
    tokens, d = x.shape
    if not isinstance(routing, Routing):
        raise TypeError(f"{op}: routing: expected a Routing from moe_route, got {type(routing).__name__}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    check_tensor(op, "routing.weights", routing.weights, ("tokens", "top_k"), (tokens, None), x.device)
    check_tensor(op, "routing.probabilities", routing.probabilities, ("tokens", "experts"), (tokens, None), x.device)
    top_k, experts = routing.weights.shape[1], routing.probabilities.shape[1]
    sizes = {"experts": (tokens, top_k), "order": (tokens * top_k,), "offsets": (experts + 1,)}
    for name, size in sizes.items():
        index = getattr(routing, name)
        if not isinstance(index, Tensor) or index.dtype != torch.int32:
            raise TypeError(
                f"{op}: routing.{name}: expected an int32 tensor, got {getattr(index, 'dtype', type(index))}"
            )
        if tuple(index.shape) != size or index.device != x.device:
            raise ValueError(
                f"{op}: routing.{name}: expected shape {size} on {x.device}, got {tuple(index.shape)} on {index.device}"
            )
    check_tensor(op, "w_out", w_out, ("experts", "d_out", "hidden"), (experts, None, None), x.device)
    rows = (2 if activation == "swiglu" else 1) * w_out.shape[2]
    axis = "2 * hidden" if activation == "swiglu" else "hidden"
    check_tensor(op, "w_in", w_in, ("experts", axis, "d"), (experts, rows, d), x.device)
    if not torch.is_autocast_enabled(x.device.type):
        for name, weight in (("w_in", w_in), ("w_out", w_out)):
            if weight.dtype != x.dtype:
                raise TypeError(f"{op}: {name}: expected the dtype of x ({x.dtype}), got {weight.dtype}")


class _MoERoute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, top_k, renormalize, backend):
        weights, experts, probabilities, order, offsets, sums = _ROUTE[backend](logits, top_k, renormalize)
        ctx.save_for_backward(logits, weights, experts, probabilities)
        ctx.renormalize, ctx.backend = renormalize, backend
        ctx.mark_non_differentiable(experts, order, offsets)
        ctx.set_materialize_grads(False)
        return weights, experts, probabilities, order, offsets, sums

    @staticmethod
    def backward(ctx, grad_weights, _experts, grad_probabilities, _order, _offsets, grad_sums):
        gradient = first_derivative(
            "moe_route", _ROUTE_BACKWARD[ctx.backend], grad_weights, grad_probabilities, grad_sums,
            *ctx.saved_tensors, ctx.renormalize,
        )  # fmt: skip
        return gradient, None, None, None


class _MoEMLP(torch.autograd.Function):
    """Saved: the inputs and the preactivations."""

    @staticmethod
    def forward(ctx, x, weights, experts, order, offsets, w_in, w_out, activation, backend):
        y, preactivation = _MLP[backend](x, weights, experts, order, offsets, w_in, w_out, activation, True)
        ctx.save_for_backward(x, weights, experts, order, offsets, w_in, w_out, preactivation)
        ctx.activation, ctx.backend = activation, backend
        return y

    @staticmethod
    def backward(ctx, grad_y):
        *saved, preactivation = ctx.saved_tensors
        if ctx.backend == "triton" and not torch.compiler.is_compiling():
            # The largest tensor, and read first: handed over, so that it goes then, unless the graph is to be kept.
            ctx.maybe_clear_saved_tensors()
            preactivation = [preactivation]
        dx, dweights, dw_in, dw_out = first_derivative(
            "moe_mlp", _MLP_BACKWARD[ctx.backend], grad_y, *saved, preactivation, ctx.activation
        )
        return dx, dweights, None, None, None, dw_in, dw_out, None, None


def _fake_route(logits, top_k, renormalize):
    tokens, experts = logits.shape
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32

    def indices(*sizes):
        return logits.new_empty(sizes, dtype=torch.int32)

    return (
        logits.new_empty((tokens, top_k), dtype=dtype),
        indices(tokens, top_k),
        logits.new_empty((tokens, experts), dtype=dtype),
        indices(tokens * top_k),
        indices(experts + 1),
        logits.new_empty((experts,), dtype=dtype),
    )


def _fake_route_backward(
    grad_weights, grad_probabilities, grad_probability_sums, logits, weights, experts, probabilities, renormalize
):
    return logits.new_empty(logits.shape)


def _fake_mlp(x, weights, experts, order, offsets, w_in, w_out, activation, save):
    preactivation = (order.shape[0], w_in.shape[1]) if save else (0,)
    return x.new_empty((x.shape[0], w_out.shape[1])), x.new_empty(preactivation)


def _fake_mlp_backward(grad_y, x, weights, experts, order, offsets, w_in, w_out, preactivation, activation):
    return tuple(tensor.new_empty(tensor.shape) for tensor in (x, weights, w_in, w_out))


# The schemas of csrc/schemas.h, for the ops that Triton's launchers become; a test compares the two.
SCHEMAS = (
    "moe_route(Tensor logits, int top_k, bool renormalize) "
    "-> (Tensor weights, Tensor experts, Tensor probabilities, Tensor order, Tensor offsets, Tensor probability_sums)",
    "moe_route_backward(Tensor? grad_weights, Tensor? grad_probabilities, Tensor? grad_probability_sums, "
    "Tensor logits, Tensor weights, Tensor experts, Tensor probabilities, bool renormalize) -> Tensor",
    "moe_mlp(Tensor x, Tensor weights, Tensor experts, Tensor order, Tensor offsets, Tensor w_in, Tensor w_out, "
    "str activation, bool save) -> (Tensor y, Tensor preactivation)",
    "moe_mlp_backward(Tensor grad_y, Tensor x, Tensor weights, Tensor experts, Tensor order, Tensor offsets, "
    "Tensor w_in, Tensor w_out, Tensor preactivation, str activation) "
    "-> (Tensor dx, Tensor dweights, Tensor dw_in, Tensor dw_out)",
)
_ROUTER, _PRODUCTS = "jambatalk_kernels.moe.triton_route", "jambatalk_kernels.moe.triton_mlp"

_ROUTE: Kernels = {"triton": TritonOp(SCHEMAS[0], _ROUTER, "route_forward", _fake_route)}
_ROUTE_BACKWARD: Kernels = {"triton": TritonOp(SCHEMAS[1], _ROUTER, "route_backward", _fake_route_backward)}
_MLP: Kernels = {"triton": TritonOp(SCHEMAS[2], _PRODUCTS, "mlp_forward", _fake_mlp)}
_MLP_BACKWARD: Kernels = {"triton": TritonOp(SCHEMAS[3], _PRODUCTS, "mlp_backward", _fake_mlp_backward)}
if native_library()[0]:
    torch.library.register_fake("jambatalk::moe_route", _fake_route)
    torch.library.register_fake("jambatalk::moe_route_backward", _fake_route_backward)
    torch.library.register_fake("jambatalk::moe_mlp", _fake_mlp)
    torch.library.register_fake("jambatalk::moe_mlp_backward", _fake_mlp_backward)
    _ROUTE["cpu"] = _ROUTE["cuda"] = torch.ops.jambatalk.moe_route.default
    _ROUTE_BACKWARD["cpu"] = _ROUTE_BACKWARD["cuda"] = torch.ops.jambatalk.moe_route_backward.default
    _MLP["cpu"] = torch.ops.jambatalk.moe_mlp.default
    _MLP_BACKWARD["cpu"] = torch.ops.jambatalk.moe_mlp_backward.default
