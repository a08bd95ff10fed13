"""Mixture of experts: the routing rule, the sum over experts, gradients, and errors."""

import pytest
import torch
from torch.nn.functional import linear, silu

from jambatalk_kernels.backends import BackendUnavailable, native_library
from jambatalk_kernels.moe import op, reference
from jambatalk_kernels.moe.op import load_balancing_loss, moe_mlp, moe_route


def weights(experts=4, d=6, hidden=5, rows=2, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    w_in = torch.randn(experts, rows * hidden, d, generator=generator, dtype=dtype)
    w_out = torch.randn(experts, d, hidden, generator=generator, dtype=dtype)
    return w_in, w_out


def test_gpu_backends_and_their_limits(monkeypatch):
    monkeypatch.setattr(op, "candidates", lambda *_: {"triton": None, "reference": None, "cuda": None, "cpu": "no"})

    def why(name, like, experts, top_k):
        return {backend: reason for backend, reason in op._options(name, like, experts, top_k).items() if reason}

    single, double = torch.empty(0), torch.empty(0).double()
    for like in (single, double):
        assert why("moe_route", like, 256, 16) == {"cpu": "no"}
        for experts, top_k in ((257, 1), (64, 17)):
            reasons = why("moe_route", like, experts, top_k)
            assert "256 experts and top_k 16" in reasons["triton"] and reasons["triton"] == reasons["cuda"]
    assert why("moe_mlp", single, 256, 16).keys() == {"cuda", "cpu"}
    assert "Triton's" in why("moe_mlp", single, 8, 2)["cuda"]
    assert "float64" in why("moe_mlp", double, 8, 2)["triton"]


def test_route_is_softmax_then_top_k_not_renormalised():
    logits = torch.tensor([[0.0, 2.0, 1.0], [5.0, -1.0, 0.0]])
    routing = moe_route(logits, 2)
    probabilities = logits.softmax(-1)
    assert routing.experts.tolist() == [[1, 2], [0, 2]]
    assert routing.experts.dtype == torch.int32 and routing.weights.dtype == torch.float32
    torch.testing.assert_close(routing.weights[0], probabilities[0, [1, 2]])
    assert routing.weights.sum(-1).max() < 1
    torch.testing.assert_close(moe_route(logits, 2, renormalize=True).weights.sum(-1), torch.ones(2))


def test_ties_go_to_the_lowest_index():
    assert moe_route(torch.zeros(3, 7), 3).experts.tolist() == [[0, 1, 2]] * 3
    assert moe_route(torch.tensor([[1.0, 3.0, 3.0, 3.0]]), 2).experts.tolist() == [[1, 2]]


def test_order_and_offsets_are_a_stable_sort_by_expert():
    logits = torch.randn(50, 5, generator=torch.Generator().manual_seed(1))
    routing = moe_route(logits, 2)
    flat = routing.experts.flatten()
    assert routing.offsets[0] == 0 and routing.offsets[-1] == 100
    for expert in range(5):
        block = routing.order[routing.offsets[expert] : routing.offsets[expert + 1]]
        assert block.tolist() == (flat == expert).nonzero()[:, 0].tolist()


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("activation", ["swiglu", "gelu", "relu"])
def test_mlp_is_the_weighted_sum_over_the_chosen_experts(top_k, activation):
    w_in, w_out = weights(rows=2 if activation == "swiglu" else 1)
    x = torch.randn(9, 6, dtype=torch.float64)
    routing = moe_route(torch.randn(9, 4, dtype=torch.float64), top_k)
    expected = torch.zeros_like(x)
    for t in range(9):
        for slot in range(top_k):
            e = int(routing.experts[t, slot])
            hidden = linear(x[t], w_in[e])
            hidden = (
                silu(hidden[:5]) * hidden[5:]
                if activation == "swiglu"
                else {"gelu": torch.nn.functional.gelu, "relu": torch.relu}[activation](hidden)
            )
            expected[t] += routing.weights[t, slot] * linear(hidden, w_out[e])
    torch.testing.assert_close(moe_mlp(x, routing, w_in, w_out, activation=activation), expected)
    for variant in (reference.moe_mlp_dense, reference.moe_mlp_grouped):
        torch.testing.assert_close(variant(x, routing, w_in, w_out, activation), expected)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_gradients(top_k):
    w_in, w_out = weights(d=3, hidden=2)
    x = torch.randn(5, 3, dtype=torch.float64)
    logits = 4 * torch.randn(5, 4, dtype=torch.float64)  # far from ties: the choice must not flip under gradcheck

    def run(x, logits, w_in, w_out):
        routing = moe_route(logits, top_k)
        return moe_mlp(x, routing, w_in, w_out), load_balancing_loss(routing)

    assert torch.autograd.gradcheck(run, [t.requires_grad_() for t in (x, logits, w_in, w_out)])


def test_an_expert_that_overflows_does_not_reach_tokens_that_did_not_choose_it():
    w_in, w_out = weights(dtype=torch.float32)
    w_in[3] = torch.inf
    x = torch.randn(4, 6)
    routing = moe_route(torch.tensor([[9.0, 8.0, 0.0, -9.0]] * 4), 2)
    assert moe_mlp(x, routing, w_in, w_out).isfinite().all()
    assert reference.moe_mlp_dense(x, routing, w_in, w_out).isfinite().all()


def test_no_tokens():
    w_in, w_out = weights(dtype=torch.float32)
    x = torch.zeros(0, 6, requires_grad=True)
    routing = moe_route(torch.zeros(0, 4), 2)
    y = moe_mlp(x, routing, w_in, w_out)
    assert y.shape == (0, 6)
    y.sum().backward()
    assert load_balancing_loss(routing) == 0


def test_load_balancing_loss_is_least_when_even_and_pools_layers():
    even = moe_route(torch.eye(4).repeat(8, 1) * 3, 1)
    skewed = moe_route(torch.tensor([[9.0, 0, 0, 0]]).repeat(32, 1), 1)
    torch.testing.assert_close(load_balancing_loss(even), torch.tensor(1.0))
    assert load_balancing_loss(skewed) > 3.9
    both = moe_route(torch.cat([torch.eye(4).repeat(8, 1) * 3, torch.tensor([[9.0, 0, 0, 0]]).repeat(32, 1)]), 1)
    torch.testing.assert_close(load_balancing_loss([even, skewed]), load_balancing_loss(both))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_load_balancing_loss_is_its_definition_and_reads_no_tokens(backend):
    if backend == "cpu" and not native_library()[0]:
        pytest.skip("the native library is not installed")
    logits = 2 * torch.randn(37, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    logits.requires_grad_()
    routing = moe_route(logits, 3, backend=backend)
    one_hot = torch.nn.functional.one_hot(routing.experts.long(), 5).double()
    want = 5 * (one_hot.mean(0).sum(0) * logits.softmax(-1).mean(0)).sum()  # Switch Transformer, Eq. 4; all picks
    unread = {name: torch.full_like(getattr(routing, name), 99) for name in ("experts", "probabilities", "order")}
    got = load_balancing_loss(routing._replace(**unread))
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (got, want)))


def test_bfloat16_is_close_to_float64():
    w_in, w_out = weights(d=32, hidden=16)
    x, logits = torch.randn(64, 32, dtype=torch.float64), torch.randn(64, 4, dtype=torch.float64)
    exact = moe_mlp(x, moe_route(logits, 2), w_in, w_out)
    low = moe_mlp(x.bfloat16(), moe_route(logits, 2), w_in.bfloat16(), w_out.bfloat16())
    assert low.dtype == torch.bfloat16
    assert (low.double() - exact).square().mean().sqrt() <= 1e-2 * exact.square().mean().sqrt()


@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda: moe_route(torch.zeros(3), 1), ValueError, "logits"),
        (lambda: moe_route(torch.zeros(3, 4).long(), 1), TypeError, "logits"),
        (lambda: moe_route(torch.zeros(3, 4), 5), ValueError, "top_k"),
        (lambda: moe_route(torch.zeros(3, 4), 0), ValueError, "top_k"),
        (lambda: moe_route(torch.zeros(3, 4), 1.0), TypeError, "top_k"),
        (lambda: load_balancing_loss([]), ValueError, "routing"),
        (lambda: load_balancing_loss([torch.zeros(3)]), TypeError, "routing: expected a Routing"),
    ],
)
def test_route_errors_name_the_argument(call, error, text):
    with pytest.raises(error, match=text):
        call()


@pytest.mark.parametrize(
    "change, error, text",
    [
        (dict(x=torch.zeros(2, 6)), ValueError, r"routing.weights: expected shape \(tokens=2, top_k\), got \(3, 2\)"),
        (dict(x=torch.zeros(3, 7)), ValueError, "w_in"),
        (dict(x=torch.zeros(3, 6).half()), TypeError, "w_in"),
        (dict(routing=1), TypeError, "routing"),
        (dict(w_in=torch.zeros(3, 10, 6)), ValueError, "w_in"),
        (dict(w_in=torch.zeros(4, 9, 6)), ValueError, "w_in"),
        (dict(w_out=torch.zeros(4, 6)), ValueError, "w_out"),
        (dict(activation="tanh"), ValueError, "activation"),
        (dict(backend="cuda"), BackendUnavailable, "moe_mlp"),
        (dict(backend="nonsense"), ValueError, "nonsense"),
    ],
)
def test_mlp_errors_name_the_argument(change, error, text):
    w_in, w_out = weights(dtype=torch.float32)
    arguments = dict(x=torch.zeros(3, 6), routing=moe_route(torch.zeros(3, 4), 2), w_in=w_in, w_out=w_out)
    with pytest.raises(error, match=text):
        moe_mlp(**(arguments | change))
