"""The Triton kernels of the mixture of experts against the definition, in the interpreter or, with a card, on it."""

import gpu_code
import pytest
import torch

from jambatalk_kernels.moe import heuristics, reference

triton = pytest.importorskip("triton", reason="triton is not installed")
tl = triton.language

from jambatalk_kernels.moe import triton_route  # noqa: E402
from jambatalk_kernels.moe.interpreter import rounded  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_compiler = pytest.mark.skipif(gpu_code.missing_tools() is not None, reason=str(gpu_code.missing_tools()))


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)


def rms_ratio(got, want):
    got, want = got.double(), want.double()
    return ((got - want).square().mean().sqrt() / want.square().mean().sqrt()).item()


# ---- routing --------------------------------------------------------------------------------------------------------

ROUTES = [
    (1, 8, 2),  # one step of a rollout
    (7, 7, 1),
    (7, 7, 7),
    (5, 1, 1),
    (300, 8, 2),  # two launches
    (300, 3, 2),
    (70, 33, 16),
    (9, 256, 16),
]


def assert_routes_equal(got, want):
    for name, a, b in zip(reference.Routing._fields, got, want, strict=True):
        assert a.shape == b.shape, name
        if a.is_floating_point():
            assert a.dtype == b.dtype, name
            torch.testing.assert_close(
                a, b, rtol=1e-12 if a.dtype == torch.float64 else 2e-6, atol=1e-30, equal_nan=True
            )
        else:
            assert a.dtype == torch.int32 and torch.equal(a.long(), b.long()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("renormalize", [False, True], ids=["plain", "renormalized"])
@pytest.mark.parametrize("shape", ROUTES, ids=str)
def test_route_is_the_reference(shape, renormalize, dtype):
    tokens, experts, top_k = shape
    logits = 3 * normal(tokens, experts, dtype=dtype)
    assert_routes_equal(
        triton_route.route_forward(logits, top_k, renormalize), reference.moe_route(logits, top_k, renormalize)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_route_of_half_precision_is_that_of_the_same_numbers_in_float32(dtype):
    logits = normal(40, 9, dtype=dtype)
    for a, b in zip(
        triton_route.route_forward(logits, 3, True), triton_route.route_forward(logits.float(), 3, True), strict=True
    ):
        assert torch.equal(a, b)


def test_route_takes_any_strides_and_no_tokens():
    wide = normal(6, 40, dtype=torch.float32)
    assert_routes_equal(triton_route.route_forward(wide.t(), 2, False), reference.moe_route(wide.t(), 2))
    sliced = wide[:, ::3]
    assert_routes_equal(triton_route.route_forward(sliced, 2, False), reference.moe_route(sliced, 2))
    weights, experts, probabilities, order, offsets = triton_route.route_forward(wide[:0], 2, False)
    assert weights.shape == experts.shape == (0, 2) and probabilities.shape == (0, 40) and order.shape == (0,)
    assert offsets.tolist() == [0] * 41
    assert triton_route.route_backward(weights, None, wide[:0], weights, experts, probabilities, False).shape == (0, 40)


def test_ties_go_to_the_lowest_index():
    logits = torch.tensor([[0.0] * 7, [1.0, 3.0, 3.0, 3.0, 0.0, 0.0, 0.0], [-200.0] * 6 + [9.0]], device=DEVICE)
    _, experts, *_ = triton_route.route_forward(logits, 3, False)
    # In the last row all but one probability underflow to zero: ties too.
    assert experts.tolist() == [[0, 1, 2], [1, 2, 3], [6, 0, 1]]


@pytest.mark.filterwarnings("ignore:invalid value|All-NaN:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("renormalize", [False, True], ids=["plain", "renormalized"])
@pytest.mark.parametrize("tokens", [6, 300])
def test_nan_and_infinite_logits(tokens, renormalize):
    """NaN, +inf or nothing but -inf: experts 0 .. top_k - 1 with NaN weights, and the other tokens do not notice."""
    clean = normal(tokens, 8, dtype=torch.float32)
    logits = clean.clone()
    nan, inf = torch.nan, torch.inf
    logits[0, 5] = nan
    logits[1, 3] = inf
    logits[2] = -inf
    logits[3] = nan
    logits[4, :6] = -inf  # well-defined: two experts are left
    got = triton_route.route_forward(logits, 3, renormalize)
    assert_routes_equal(got, reference.moe_route(logits, 3, renormalize))
    weights, experts, probabilities, order, offsets = got
    assert experts[:4].tolist() == [[0, 1, 2]] * 4 and weights[:4].isnan().all() and probabilities[:4].isnan().all()
    assert set(experts[4, :2].tolist()) == {6, 7} and experts[4, 2] == 0 and weights[4, 2] == 0
    for a, b in zip(got[:3], triton_route.route_forward(clean, 3, renormalize)[:3], strict=True):
        assert torch.equal(a[5:], b[5:])
    assert order.sort().values.tolist() == list(range(3 * tokens)) and offsets[-1] == 3 * tokens
    gradient = triton_route.route_backward(
        torch.ones_like(weights), None, logits, weights, experts, probabilities, renormalize
    )
    assert gradient[:4].isnan().all() and gradient[4:].isfinite().all()


def test_order_does_not_depend_on_the_grid(monkeypatch):
    logits = normal(150, 5, dtype=torch.float32)
    want = triton_route.route_forward(logits, 2, False)
    for block, programs, each, counts in ((16, 10, 1, 4), (16, 4, 3, 4), (8, 2, 10, 1), (256, 1, 1, 1)):
        plan = heuristics.RoutePlan(block, programs, each, counts, 4)
        monkeypatch.setattr(triton_route, "route_plan", lambda *_, plan=plan: plan)
        for a, b in zip(triton_route.route_forward(logits, 2, False), want, strict=True):
            assert torch.equal(a, b)


def test_route_of_permuted_tokens_is_permuted():
    logits = normal(200, 8, dtype=torch.float32)
    shuffle = torch.randperm(200, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    for a, b in zip(
        triton_route.route_forward(logits, 2, True)[:3],
        triton_route.route_forward(logits[shuffle], 2, True)[:3],
        strict=True,
    ):
        assert torch.equal(a[shuffle], b)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("renormalize", [False, True], ids=["plain", "renormalized"])
@pytest.mark.parametrize("shape", [(1, 8, 2), (7, 7, 7), (40, 33, 5)], ids=str)
def test_route_backward(shape, renormalize, dtype):
    tokens, experts, top_k = shape
    logits = normal(tokens, experts, dtype=dtype)
    exact = logits.double().requires_grad_()
    want = reference.moe_route(exact, top_k, renormalize)
    weights, chosen, probabilities, *_ = triton_route.route_forward(logits, top_k, renormalize)
    assert torch.equal(chosen, want.experts)
    dw, dp = normal(tokens, top_k, seed=1), normal(experts, tokens, seed=2).t()
    for grad_weights, grad_probabilities in ((dw, dp), (dw, None), (None, dp), (dw[:, :1].expand(-1, top_k), None)):
        outputs, gradients = [], []
        for output, gradient in ((want.weights, grad_weights), (want.probabilities, grad_probabilities)):
            if gradient is not None:
                outputs.append(output)
                gradients.append(gradient)
        (expected,) = torch.autograd.grad(outputs, exact, gradients, retain_graph=True)
        low = [None if g is None else g.to(weights.dtype) for g in (grad_weights, grad_probabilities)]
        got = triton_route.route_backward(*low, logits, weights, chosen, probabilities, renormalize)
        assert got.dtype == dtype and got.shape == logits.shape
        bar = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2.0**-9}[dtype]
        assert (got.double() - expected).square().mean().sqrt() <= bar * (1e-2 + expected.square().mean().sqrt())


def test_route_refuses_what_it_cannot_index():
    with pytest.raises(ValueError, match="256 experts"):
        triton_route.route_forward(torch.zeros(1, 257, device=DEVICE), 1, False)
    with pytest.raises(ValueError, match="top_k"):
        triton_route.route_forward(torch.zeros(1, 64, device=DEVICE), 17, False)
    with pytest.raises(ValueError, match="2\\*\\*31"):
        triton_route.route_forward(torch.zeros(1, 1, device=DEVICE).expand(2**28, 64), 8, False)


@triton.jit
def _round_kernel(x, y, size, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(y + i, rounded(tl.load(x + i, mask=i < size, other=0.0), tl.bfloat16), mask=i < size)


def test_rounding_to_bfloat16_is_that_of_torch():
    halfway = torch.arange(0x3F80_0000, 0x3F90_0000, 0x8000, dtype=torch.int32).view(torch.float32)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 3.3895e38, 3.4e38, 1e-30, torch.nan])
    x = torch.cat([normal(2000, dtype=torch.float32).cpu(), halfway, -halfway, special]).to(DEVICE)
    got = torch.empty_like(x, dtype=torch.bfloat16)
    _round_kernel[(1,)](x, got, x.numel(), SIZE=4096)
    torch.testing.assert_close(got, x.bfloat16(), rtol=0, atol=0, equal_nan=True)


# ---- block sizes ----------------------------------------------------------------------------------------------------


def test_route_plan_covers_every_token():
    for experts in (1, 2, 7, 8, 64, 256):
        for tokens in (1, 2, 63, 64, 65, 600, 8192, 100_000, 10**7):
            plan = heuristics.route_plan(tokens, experts)
            held = plan.block_tokens * plan.blocks_per_program
            assert held * (plan.programs - 1) < tokens <= held * plan.programs
            assert plan.programs <= 512 and plan.block_tokens * experts <= 2048 * 2
            assert plan.block_tokens & (plan.block_tokens - 1) == 0 == plan.block_counts & (plan.block_counts - 1)
    assert heuristics.route_plan(128, 8).programs == 1 < heuristics.route_plan(600, 8).programs


# ---- machine code ---------------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 89, 90])
def test_routing_code_has_no_spills(capability):
    codes = gpu_code.compile_triton("jambatalk_kernels.moe.triton_route", capability)
    assert len(codes) == 11
    for name, code in codes.items():
        assert code.local_memory == 0 and code.stack_bytes == 0 and code.registers <= 128, name
