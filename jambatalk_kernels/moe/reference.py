"""The definition of the mixture-of-experts ops, in plain PyTorch. Shapes and errors: see `op.py`.

For a token x with router logits l (one per expert):

    p = softmax(l)                                (over all experts, float32 or better)
    y = sum over the top_k largest p_e of  p_e * expert_e(x)

as Eq. 4-5 of JambaTalk and as Jamba does: the chosen probabilities are not renormalised unless asked, no expert has a
capacity, no token is dropped, nothing is random.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, relu, silu


class Routing(NamedTuple):
    """Where each token goes. Tensors only, so that it can pass through compiled graphs.

    An *assignment* a = token * top_k + slot is one (token, expert) pair.
    """

    weights: Tensor  # (tokens, top_k) float32 (float64 for float64 logits): the factor of each chosen expert's output
    experts: Tensor  # (tokens, top_k) int32: the chosen experts, the most probable first
    probabilities: Tensor  # (tokens, experts), dtype of weights: the softmax over all experts
    order: Tensor  # (tokens * top_k,) int32: assignments sorted by expert, stable
    offsets: Tensor  # (experts + 1,) int32: the assignments of expert e are order[offsets[e]:offsets[e + 1]]
    probability_sums: Tensor  # (experts,), dtype of weights: probabilities summed over the tokens, differentiable


def moe_route(logits: Tensor, top_k: int, renormalize: bool = False) -> Routing:
    experts = logits.shape[-1]
    probabilities = logits.softmax(-1, dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32)
    # A stable descending sort, not topk: among equal probabilities the lowest index must win on every backend.
    weights, chosen = probabilities.sort(dim=-1, descending=True, stable=True)
    weights, chosen = weights[:, :top_k], chosen[:, :top_k]
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    flat = chosen.reshape(-1)
    order = flat.argsort(stable=True)
    per_expert = (flat[:, None] == torch.arange(experts, device=flat.device)).sum(0)
    offsets = torch.cat([per_expert.new_zeros(1), per_expert.cumsum(0)])
    return Routing(weights, chosen.int(), probabilities, order.int(), offsets.int(), probabilities.sum(0))


def load_balancing_loss(routings: Sequence[Routing]) -> Tensor:
    """Over the tokens of all routings. What it reads is (experts,) each: routing has counted and summed already."""
    tokens = max(sum(routing.weights.shape[0] for routing in routings), 1)  # no tokens: the loss is zero, not NaN
    probability_sums = torch.stack([routing.probability_sums for routing in routings]).sum(0)
    picks = torch.stack([routing.offsets for routing in routings]).sum(0).diff()
    # f_e: how many picks per token fall on expert e, all top_k of them counted (so the f_e sum to top_k).
    share = picks.to(probability_sums.dtype) / tokens
    return probability_sums.shape[0] * (share * probability_sums / tokens).sum()


def activate(hidden: Tensor, activation: str) -> Tensor:
    """hidden (tokens, 2 * h) for swiglu, gate half first, else (tokens, h); returns (tokens, h)."""
    if activation == "swiglu":
        gate, up = hidden.chunk(2, dim=-1)
        return silu(gate) * up
    plain: dict[str, Callable[[Tensor], Tensor]] = {"gelu": gelu, "relu": relu}
    return plain[activation](hidden)


def moe_mlp_dense(x: Tensor, routing: Routing, w_in: Tensor, w_out: Tensor, activation: str = "swiglu") -> Tensor:
    """The definition: every expert sees every token. Static shapes and no value is read on the host."""
    one_hot = routing.experts[..., None] == torch.arange(w_in.shape[0], device=x.device)
    gates = (routing.weights[..., None] * one_hot).sum(1)  # (tokens, experts); zero where an expert was not chosen
    total = x.new_zeros(x.shape[0], w_out.shape[1], dtype=gates.dtype)
    for expert in range(w_in.shape[0]):
        out = linear(activate(linear(x, w_in[expert]), activation), w_out[expert])
        # where, not a plain product: an expert that a token did not choose must not reach it, not even as 0 * inf
        total = total + torch.where(one_hot[:, :, expert].any(1, keepdim=True), gates[:, expert, None] * out, 0)
    return total.to(x.dtype)


def moe_mlp_grouped(x: Tensor, routing: Routing, w_in: Tensor, w_out: Tensor, activation: str = "swiglu") -> Tensor:
    """The same sum with top_k / experts of the work: each expert runs on one contiguous block of its own tokens.

    Reads `offsets` on the host, so it is for the CPU.
    """
    tokens, top_k = routing.weights.shape
    gathered = x.index_select(0, routing.order // top_k)
    bounds = routing.offsets.tolist()
    blocks = []
    for expert in range(w_in.shape[0]):
        if bounds[expert] < bounds[expert + 1]:
            block = gathered[bounds[expert] : bounds[expert + 1]]
            blocks.append(linear(activate(linear(block, w_in[expert]), activation), w_out[expert]))
    if not blocks:
        return moe_mlp_dense(x, routing, w_in, w_out, activation)  # no tokens; keeps the graph connected
    # Back to assignment order, then the top_k terms of a token are added in a fixed order: deterministic.
    position = routing.order.argsort()
    per_assignment = torch.cat(blocks).index_select(0, position).view(tokens, top_k, -1)
    return (per_assignment * routing.weights[..., None]).sum(1).to(x.dtype)


def moe_mlp(x: Tensor, routing: Routing, w_in: Tensor, w_out: Tensor, activation: str = "swiglu") -> Tensor:
    every_expert = routing.weights.shape[-1] == w_in.shape[0]  # K == E: nothing to sort, nothing to gather
    if every_expert or x.device.type != "cpu" or torch.compiler.is_compiling():
        return moe_mlp_dense(x, routing, w_in, w_out, activation)
    return moe_mlp_grouped(x, routing, w_in, w_out, activation)
