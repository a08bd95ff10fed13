"""The CUDA C++ kernels of moe_route, run on the host (tests/cuda_on_cpu), against the definition."""

import gpu_code
import pytest
import torch
from accuracy import assert_accurate
from cuda_on_cpu import build

from jambatalk_kernels.moe import reference
from jambatalk_kernels.moe.reference import Routing

# tokens, experts, top_k: 1, 2, 8 and 32 lanes per token; experts in fours and not; one launch and two, several chunks.
SHAPES = [
    (1, 1, 1), (1, 8, 2), (7, 7, 7), (40, 2, 1), (129, 4, 2), (1000, 8, 8), (33, 16, 2), (600, 13, 5), (64, 64, 6),
    (65, 33, 16), (100, 40, 3), (16, 256, 16), (19, 255, 16), (90, 128, 1), (2500, 4, 2), (1030, 16, 4), (3000, 3, 3),
]  # fmt: skip


@pytest.fixture(scope="module")
def ops():
    return build.load()


@pytest.fixture(autouse=True)
def _poisoned_outputs(monkeypatch):
    monkeypatch.setenv("JAMBATALK_KERNELS_CHECK", "1")  # new memory is full of NaN: what is not written shows


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def route(ops, logits, top_k, renormalize=False):
    """In the order of Routing's fields, which is the schema's."""
    return Routing(*ops.moe_route(logits, top_k, renormalize))


def cotangents(routing, seed=1):
    floats = (routing.weights, routing.probabilities, routing.probability_sums)
    return [normal(*t.shape, seed=seed + i, dtype=t.dtype) for i, t in enumerate(floats)]


def assert_same_routing(got, want, bar):
    for name, mine, theirs in zip(Routing._fields, got, want, strict=True):
        assert mine.shape == theirs.shape and mine.dtype == theirs.dtype and mine.is_contiguous(), name
        if mine.is_floating_point():
            torch.testing.assert_close(mine, theirs, rtol=bar, atol=1e-30, equal_nan=True, msg=f"{name}")
        else:
            assert torch.equal(mine, theirs), name


@pytest.mark.parametrize("renormalize", [False, True], ids=["plain", "renormalized"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_route_is_the_reference_in_float64(ops, shape, renormalize):
    tokens, experts, top_k = shape
    logits = 3 * normal(tokens, experts)
    leaf = logits.clone().requires_grad_()
    want, got = reference.moe_route(leaf, top_k, renormalize), route(ops, logits, top_k, renormalize)
    assert_same_routing(got, [t.detach() for t in want], 1e-12)
    grads = cotangents(want)
    outputs = [want.weights, want.probabilities, want.probability_sums]
    for given in (grads, [grads[0], None, grads[2]], [grads[0], None, None], [None, grads[1], None]):
        used = [(output, grad) for output, grad in zip(outputs, given, strict=True) if grad is not None]
        (expected,) = torch.autograd.grad(
            [output for output, _ in used], leaf, [grad for _, grad in used], retain_graph=True
        )
        gradient = ops.moe_route_backward(*given, logits, *got[:3], renormalize)
        assert gradient.shape == logits.shape and gradient.dtype == logits.dtype
        torch.testing.assert_close(gradient, expected, rtol=1e-11, atol=1e-13)
    assert not ops.moe_route_backward(None, None, None, logits, *got[:3], renormalize).any()


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(500, 8, 2), (1100, 7, 3), (70, 64, 16), (40, 256, 4)], ids=str)
def test_accuracy_rule(ops, shape, dtype):
    """At most twice the error of PyTorch in float32 of the same logits, and the absolute bars of the contract."""
    tokens, experts, top_k = shape
    logits = normal(tokens, experts).to(dtype)

    def of_reference(at):
        leaf = logits.to(at, copy=True).requires_grad_()
        routing = reference.moe_route(leaf, top_k, True)
        outputs = [routing.weights, routing.probabilities, routing.probability_sums]
        grads = [grad.to(at) for grad in cotangents(routing)]
        (gradient,) = torch.autograd.grad(outputs, leaf, grads)
        return {**routing._asdict(), "gradient": gradient}

    exact, peer = of_reference(torch.float64), of_reference(torch.float32)
    routing = route(ops, logits, top_k, True)
    grads = cotangents(Routing(**{name: exact[name] for name in Routing._fields}))
    grads = [grad.float() for grad in grads]
    ours = routing._asdict() | {"gradient": ops.moe_route_backward(*grads, logits, *routing[:3], True)}
    assert torch.equal(ours["experts"], exact["experts"]) and torch.equal(ours["order"], exact["order"])
    for name in ("weights", "probabilities", "probability_sums", "gradient"):
        want = exact[name].detach()
        assert_accurate(ours[name], want, peer[name], 5e-3 if ours[name].dtype != torch.float32 else 1e-5, name)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_half_precision_is_that_of_the_same_numbers_in_float32(ops, dtype):
    logits = normal(40, 12, dtype=dtype)
    for name, got, want in zip(Routing._fields, route(ops, logits, 3), route(ops, logits.float(), 3), strict=True):
        assert torch.equal(got, want), name


def test_ties_go_to_the_lowest_index(ops):
    rows = [[0.0] * 7, [1.0, 3.0, 3.0, 3.0, 0.0, 0.0, 0.0], [-200.0] * 6 + [9.0]]
    # In the last row all but one probability underflow to zero: ties too.
    assert route(ops, torch.tensor(rows), 3).experts.tolist() == [[0, 1, 2], [1, 2, 3], [6, 0, 1]]
    for experts in (12, 40, 250):  # over several lanes
        assert route(ops, torch.zeros(5, experts), 11).experts.tolist() == [list(range(11))] * 5


@pytest.mark.parametrize("renormalize", [False, True], ids=["plain", "renormalized"])
@pytest.mark.parametrize("tokens, experts", [(6, 8), (1300, 8), (20, 20), (100, 200)])
def test_nan_and_infinite_logits(ops, tokens, experts, renormalize):
    """NaN, +inf or nothing but -inf: experts 0 .. top_k - 1 with NaN weights, and the other tokens do not notice."""
    clean = normal(tokens, experts, dtype=torch.float32)
    logits = clean.clone()
    nan, inf = torch.nan, torch.inf
    logits[0, 5], logits[1, experts - 1], logits[2], logits[3] = nan, inf, -inf, nan
    logits[4, :-2] = -inf  # well-defined: two experts are left
    got = route(ops, logits, 3, renormalize)
    want = reference.moe_route(logits, 3, renormalize)
    assert torch.equal(got.experts, want.experts) and got.experts[:4].tolist() == [[0, 1, 2]] * 4
    assert torch.equal(got.order, want.order) and torch.equal(got.offsets, want.offsets)
    assert got.weights[:4].isnan().all() and got.probabilities[:4].isnan().all() and got.probability_sums.isnan().all()
    assert set(got.experts[4, :2].tolist()) == {experts - 2, experts - 1} and got.weights[4, 2] == 0
    for a, b in zip(got[:3], route(ops, clean, 3, renormalize)[:3], strict=True):
        assert torch.equal(a[5:], b[5:])
    gradient = ops.moe_route_backward(torch.ones_like(got.weights), None, None, logits, *got[:3], renormalize)
    assert gradient[:4].isnan().all() and gradient[4:].isfinite().all()


@pytest.mark.parametrize("shape", [(1200, 8, 2), (70, 30, 4)], ids=str)
def test_permuted_tokens_have_the_same_bytes(ops, shape):
    tokens, experts, top_k = shape
    logits = normal(tokens, experts, dtype=torch.float32)
    shuffle = torch.randperm(tokens, generator=torch.Generator().manual_seed(1))
    first, moved = route(ops, logits, top_k, True), route(ops, logits[shuffle], top_k, True)
    for a, b in zip(first[:3], moved[:3], strict=True):
        assert torch.equal(a[shuffle], b)
    grads = [g.float() for g in cotangents(first)]
    gradients = [
        ops.moe_route_backward(grads[0][order], None, grads[2], logits[order], *(t[order] for t in first[:3]), True)
        for order in (slice(None), shuffle)
    ]
    assert torch.equal(gradients[0][shuffle], gradients[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_bytes_do_not_depend_on_the_order_of_threads(ops, dtype):
    """Blocks, warps and lanes the other way round, and again: nothing races, nothing is left to chance."""
    for tokens, experts, top_k in ((300, 8, 2), (2500, 6, 2), (50, 50, 16), (40, 256, 8)):
        logits = normal(tokens, experts, dtype=dtype)
        results = []
        for backwards in (False, True):
            ops.order(backwards)
            try:
                routing = route(ops, logits, top_k, True)
                gradient = ops.moe_route_backward(*cotangents(routing), logits, *routing[:3], True)
                results.append([*routing, gradient])
            finally:
                ops.order(False)
        for first, second in zip(*results, strict=True):
            assert torch.equal(first.view(torch.uint8), second.view(torch.uint8))


def test_any_strides(ops):
    wide = normal(6, 40, dtype=torch.float32)
    for logits in (wide.t(), wide[:, ::3], wide[:, 1:37], wide[:1].expand(50, 40), wide.flip(0)[:, 4:]):
        plain = logits.contiguous()
        got, want = route(ops, logits, 2), route(ops, plain, 2)
        assert_same_routing(got, want, 0)
        grads = cotangents(got)
        moved = [torch.stack([g, torch.full_like(g, torch.nan)], -1)[..., 0] for g in grads]
        a = ops.moe_route_backward(*grads, plain, *want[:3], True)
        assert a.is_contiguous() and torch.equal(a, ops.moe_route_backward(*moved, logits, *got[:3], True))
        expanded = ops.moe_route_backward(moved[0][:, :1].expand(-1, 2), None, None, logits, *got[:3], False)
        assert torch.equal(
            expanded, ops.moe_route_backward(grads[0][:, :1].repeat(1, 2), None, None, plain, *want[:3], False)
        )


def test_no_tokens(ops):
    for dtype in (torch.float32, torch.float64):
        got = route(ops, torch.zeros(0, 5, dtype=dtype), 2)
        assert_same_routing(got, reference.moe_route(torch.zeros(0, 5, dtype=dtype), 2), 0)
        assert got.offsets.tolist() == [0] * 6 and got.probability_sums.tolist() == [0] * 5
        assert ops.moe_route_backward(None, None, got.probability_sums, got[2], *got[:3], False).shape == (0, 5)


def test_wild_experts_in_backward_read_nothing_out_of_range(ops):
    logits = normal(30, 9, dtype=torch.float32)
    routing = route(ops, logits, 3)
    wild = torch.randint(-(2**31), 2**31 - 1, (30, 3), generator=torch.Generator().manual_seed(0)).int()
    grads = torch.ones(30, 3)
    assert ops.moe_route_backward(grads, None, None, logits, routing[0], wild, routing[2], True).shape == (30, 9)


def test_wrong_calls_are_refused_by_name(ops):
    for arguments, message in (
        ((torch.zeros(2, 257), 2, False), "moe_route: expected up to 256 experts"),
        ((torch.zeros(2, 64), 17, False), "moe_route: .*top_k of 1 to 16"),
        ((torch.zeros(2, 3), 4, False), "moe_route: .*no more than experts"),
        ((torch.zeros(2, 3), 0, False), "moe_route: .*top_k of 1 to 16"),
        ((torch.zeros(1, 1).expand(2**28, 64), 8, False), "moe_route: .*below 2.31"),
        ((torch.zeros(2, 3, dtype=torch.int32), 1, False), "moe_route: logits: expected a float dtype"),
        ((torch.zeros(3), 1, False), "moe_route: logits: expected"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.moe_route(*arguments)
    logits = torch.zeros(4, 5)
    weights, experts, probabilities, *_ = route(ops, logits, 2)
    for saved in ((weights.double(), experts, probabilities), (weights, experts.long(), probabilities),
                  (weights, experts, probabilities.t()), (weights[:3], experts, probabilities)):  # fmt: skip
        with pytest.raises(RuntimeError, match="moe_route_backward: .*expected what forward gave"):
            ops.moe_route_backward(weights, None, None, logits, *saved, False)


@pytest.mark.slow
def test_machine_code():
    """Rows of logits and probabilities move 16 bytes at a time; one exponential per expert; no local memory."""
    if gpu_code.nvcc() is None or gpu_code.missing_tools() is not None:
        pytest.skip("no nvcc, or no disassembler, on this machine")
    codes = gpu_code.compile_cuda("csrc/cuda/moe_route.cu", "sm_90a")
    for dtype, bits in (("float", 128), ("__nv_bfloat16", 64), ("__half", 64)):
        for lanes in (1, 2, 8, 32):
            code = codes[f"route_kernel<{dtype}, float, {lanes}>"]
            assert code.count(rf"LDG.*\.{bits}") == 2, "eight logits"
            assert code.count(r"STG.*\.128") >= 2, "eight probabilities"
            assert code.count(r"MUFU\.EX2") == 8 and code.count("ATOM|RED") == 0
            assert code.count("VOTE") >= 8, "ranks within a warp by votes"
            assert code.local_memory == 0
