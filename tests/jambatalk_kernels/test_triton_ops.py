"""What torch.library and torch.compile see of the Triton launchers: schemas, shapes and strides, no shared outputs."""

import pytest
import torch

from jambatalk_kernels import KVCache, causal_conv1d, moe_route, rope_attention, rope_attention_step, selective_scan

pytest.importorskip("triton", reason="triton is not installed")
OPS = torch.ops.jambatalk_triton
UTILS = ("test_schema", "test_faketensor")


def check(op, *arguments):
    torch.library.opcheck(op, arguments, test_utils=UTILS)


LAYOUTS = {"channel-last": lambda: torch.randn(2, 9, 5), "channel-first": lambda: torch.randn(2, 5, 9).mT}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_conv_ops(layout):
    x, weight, bias, state = LAYOUTS[layout](), torch.randn(5, 4), torch.randn(5), torch.randn(2, 3, 5)
    check(OPS.causal_conv1d.default, x, weight, bias, state, None, True)
    y, final = OPS.causal_conv1d(x, weight, bias, state, None, True)
    check(OPS.causal_conv1d_backward.default, y, final, x, weight, bias, state, None, True)
    check(OPS.causal_conv1d_backward.default, y, None, x, weight, None, None, None, True)
    check(OPS.causal_conv1d_step.default, state, x[:, 0].clone(), weight, bias, True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scan_ops(layout):
    batch, length, channels, states = 2, 9, 5, 4
    u, per_position = LAYOUTS[layout](), (batch, length, states)
    needed = [
        u,
        torch.rand(u.shape),
        -torch.rand(channels, states),
        torch.randn(per_position),
        torch.randn(per_position),
    ]
    optional = [torch.randn(channels), torch.randn(u.shape), torch.randn(channels), torch.randn(2, channels, states)]
    for extra in (optional, [None] * 4):
        arguments = [*needed, *extra, None, True]
        check(OPS.selective_scan.default, *arguments, True)
        y, final, saved = OPS.selective_scan(*arguments, True)
        check(OPS.selective_scan_backward.default, y, final, *arguments[:-1], saved, True)
    row = [tensor[:, 0] for tensor in (u, needed[1], needed[3], needed[4])]
    check(OPS.selective_scan_step.default, final, *row[:2], needed[2], *row[2:], None, None, None, True)


def test_moe_ops():
    logits, x, w_in, w_out = torch.randn(20, 4), torch.randn(20, 8), torch.randn(4, 12, 8), torch.randn(4, 8, 6)
    routing = moe_route(logits, 2, backend="triton")
    check(OPS.moe_route.default, logits, 2, False)
    check(OPS.moe_route_backward.default, routing.weights, None, routing.probability_sums, logits, *routing[:3], False)
    arguments = (x, routing.weights, routing.experts, routing.order, routing.offsets, w_in, w_out)
    check(OPS.moe_mlp.default, *arguments, "swiglu", True)
    y, saved = OPS.moe_mlp(*arguments, "swiglu", True)
    check(OPS.moe_mlp_backward.default, y, *arguments, saved, "swiglu")


@pytest.mark.parametrize("table", [(9, 4), (9, 1, 4), (2, 9, 1, 4)], ids=str)
def test_attention_ops(table):
    q, k, v = torch.randn(2, 9, 2, 8), torch.randn(2, 9, 1, 8), torch.randn(2, 9, 1, 8)
    arguments = (q, k, v, torch.randn(table), torch.randn(table))
    cache = KVCache.empty(2, 5, 1, 8)
    for earlier in ((None, None, None), tuple(vars(cache).values())):
        how = (True, 5, 0.3, False, None, *earlier)
        check(OPS.rope_attention.default, *arguments, *how, True)
        y, softmax = OPS.rope_attention(*arguments, *how, True)
        check(OPS.rope_attention_backward.default, y, *arguments, y, softmax, *how)
    check(OPS.rope_attention_append.default, *arguments[1:], *earlier, False)
    leaves = [tensor.requires_grad_() for tensor in arguments]
    y = rope_attention(*leaves, window=5, scale=0.3, backend="triton")
    exact_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact_y = rope_attention(*exact_leaves, window=5, scale=0.3, backend="reference")
    got = torch.autograd.grad(y.square().sum(), leaves)
    for mine, exact in zip(got, torch.autograd.grad(exact_y.square().sum(), exact_leaves), strict=True):
        assert (mine - exact).norm() <= 1e-5 * exact.norm()  # the contract of every op in float32


def test_attention_steps_advance_the_cache():
    caches = {backend: KVCache.empty(2, 3, 1, 8) for backend in ("triton", "reference")}
    for _ in range(5):  # a ring of three
        arguments = (
            torch.randn(2, 2, 8),
            torch.randn(2, 1, 8),
            torch.randn(2, 1, 8),
            torch.randn(2, 4),
            torch.randn(2, 4),
        )
        ys = [rope_attention_step(*arguments, cache, window=3, backend=name) for name, cache in caches.items()]
        torch.testing.assert_close(*ys)
    check(OPS.rope_attention_step.default, *arguments, *vars(caches["triton"]).values(), 3, 0.3, False)
    for mine, theirs in zip(*(vars(cache).values() for cache in caches.values()), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_chunk_against_a_cache_compiles():
    q, k, v = torch.randn(2, 6, 2, 8), torch.randn(2, 6, 1, 8), torch.randn(2, 6, 1, 8)
    cos, sin = torch.randn(2, 6, 4)

    def run(q, *cache):
        cache = KVCache(*cache)
        y = [
            rope_attention(q[:, at], k[:, at], v[:, at], cos[at], sin[at], cache=cache, backend="triton")
            for at in (slice(4), slice(4, 6))
        ]
        return torch.cat(y, 1).square().sum()

    torch._dynamo.reset()
    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        leaf, cache = q.clone().requires_grad_(), KVCache.empty(2, 6, 1, 8)
        results.append((*torch.autograd.grad(function(leaf, *vars(cache).values()), leaf), *vars(cache).values()))
    torch.testing.assert_close(*results)
    assert results[1][-1].tolist() == [6, 6]


def test_compiles_without_a_graph_break():
    weight = torch.randn(5, 4)
    A, B, C = -torch.rand(5, 4), torch.randn(2, 9, 4), torch.randn(2, 9, 4)

    def run(x):
        u = causal_conv1d(x, weight, activation="silu", backend="triton")
        return selective_scan(u, x.sigmoid(), A, B, C, backend="triton").sum()

    x = LAYOUTS["channel-first"]().requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    got, want = torch.autograd.grad(compiled(x), x)[0], torch.autograd.grad(run(x), x)[0]
    torch.testing.assert_close(got, want)
