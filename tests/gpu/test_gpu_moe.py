"""moe_route and moe_mlp on a GPU: against the float64 reference, and the contract of an op."""

import pytest
import torch
from accuracy import assert_accurate, rms_ratio

from jambatalk_kernels import backends, load_balancing_loss, moe_mlp, moe_route

# Error of a result, root mean square: at most this, and at most twice PyTorch's at the same precision.
BARS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
# tokens, d, hidden, experts, top_k: matrix-vector, every expert, odd sizes, one expert, a clip, many experts
SIZES = [
    (1, 64, 32, 8, 2), (7, 97, 47, 7, 7), (40, 33, 31, 5, 2), (300, 130, 70, 1, 1), (600, 512, 1024, 8, 2),
    (1200, 64, 96, 4, 4), (90, 40, 24, 256, 16),
]  # fmt: skip


@pytest.fixture(params=["triton", "cuda"])
def backend(request, device):
    """Who routes; the products are Triton's on every GPU. The CPU's kernels where this is a rehearsal."""
    if device.type == "cpu":
        if request.param == "cuda":
            pytest.skip("a rehearsal, with the CPU's kernels")
        return "cpu"
    options = backends.candidates("moe_route", torch.empty(0, device=device))
    for name in {request.param, "triton"}:
        if options[name] is not None:
            pytest.skip(f"backend {name}: {options[name]}")
    return request.param


def products(backend):
    return "triton" if backend == "cuda" else backend


def inputs(device, dtype, tokens, d, hidden, experts, activation="swiglu", seed=0):
    g = torch.Generator().manual_seed(seed)
    rows = 2 * hidden if activation == "swiglu" else hidden
    shapes = {
        "logits": (tokens, experts), "x": (tokens, d), "w_in": (experts, rows, d), "w_out": (experts, d + 1, hidden)
    }  # fmt: skip
    scales = {"w_in": d**-0.5, "w_out": hidden**-0.5}
    return {
        name: (torch.randn(*shape, generator=g, dtype=torch.float64) * scales.get(name, 1)).to(dtype).to(device)
        for name, shape in shapes.items()
    }


def run(named, top_k, backend, activation="swiglu", renormalize=False, order=None):
    """y, the routing and the gradient of every input under random gradients of all that has one."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in named.items()}
    routing = moe_route(leaves["logits"], top_k, renormalize=renormalize, backend=backend)
    y = moe_mlp(leaves["x"], routing, leaves["w_in"], leaves["w_out"], activation=activation, backend=products(backend))
    g = torch.Generator().manual_seed(1)
    outputs = [y, routing.probabilities, routing.probability_sums]
    grads = [torch.randn(t.shape, generator=g, dtype=torch.float64).to(t) for t in outputs]
    if order is not None:
        grads[:2] = [grad[order] for grad in grads[:2]]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), grads)
    results = {"y": y, **routing._asdict()}
    results |= {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return {name: tensor.detach() for name, tensor in results.items()}


def check(named, top_k, backend, **options):
    dtype = named["x"].dtype
    exact = run({name: tensor.double() for name, tensor in named.items()}, top_k, "reference", **options)
    peer = run(named, top_k, "reference", **options)
    ours = run(named, top_k, backend, **options)
    for name, want in exact.items():
        assert ours[name].dtype == peer[name].dtype, name
        if not want.is_floating_point():
            assert torch.equal(ours[name], want), name
            continue
        assert_accurate(ours[name], want, peer[name], BARS[dtype], name)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", BARS, ids=str)
def test_accuracy(backend, device, dtype, size):
    check(inputs(device, dtype, *size[:4]), size[4], backend, renormalize=size[0] % 2 == 0)


@pytest.mark.parametrize("tokens", [5, 150])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_other_activations(backend, device, activation, tokens):
    named = inputs(device, torch.float32, tokens, 48, 40, 6, activation)
    check(named, 2, backend, activation=activation)


def test_experts_without_tokens(backend, device):
    named = inputs(device, torch.float32, 200, 64, 48, 8)
    named["logits"][:, 2:7] = -30.0
    check(named, 2, backend)
    assert run(named, 2, backend)["dw_in"][2:7].abs().max() == 0


def test_any_strides(backend, device):
    named = inputs(device, torch.float32, 120, 48, 40, 4)
    want = run(named, 2, backend)
    for layout in (
        lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
        lambda t: torch.stack([t, t], -1)[..., 0],
        lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    ):
        got = run({name: layout(tensor) for name, tensor in named.items()}, 2, backend)
        for name in want:
            assert rms_ratio(got[name], want[name]) <= 1e-5, name


def test_no_tokens(backend, device):
    results = run(inputs(device, torch.float32, 0, 16, 8, 4), 2, backend)
    assert results["y"].shape == (0, 17) and results["offsets"].tolist() == [0] * 5
    assert all(not results[name].any() for name in ("dw_in", "dw_out"))


def test_logits_without_a_softmax(backend, device):
    """Experts 0 .. top_k - 1 with weights NaN, and the other tokens do not notice."""
    named = inputs(device, torch.float32, 300, 32, 24, 8)
    clean = run(named, 3, backend)
    named["logits"][0, 5], named["logits"][1, 3] = torch.nan, torch.inf
    named["logits"][2] = -torch.inf
    got = run(named, 3, backend)
    assert got["experts"][:3].tolist() == [[0, 1, 2]] * 3
    assert got["weights"][:3].isnan().all() and got["y"][:3].isnan().all()
    assert rms_ratio(got["y"][3:], clean["y"][3:]) <= 1e-6
    assert got["offsets"][-1] == 900 and torch.equal(got["order"].sort().values.cpu(), torch.arange(900).int())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("top_k", [2, 8])
def test_equal_bytes_over_runs_and_orders_of_the_tokens(backend, device, top_k, dtype):
    named = inputs(device, dtype, 700, 128, 192, 8)
    first = run(named, top_k, backend)
    for _ in range(3):
        again = run(named, top_k, backend)
        assert all(torch.equal(again[name], first[name]) for name in first)
    mixed = torch.randperm(700, generator=torch.Generator().manual_seed(2)).to(device)
    moved = run(named | {name: named[name][mixed] for name in ("logits", "x")}, top_k, backend, order=mixed)
    for name in ("y", "weights", "experts", "probabilities", "dx", "dlogits"):
        assert torch.equal(moved[name], first[name][mixed]), name
    # Sums over the tokens, in their order, which has changed: equal up to the rounding of the sums.
    for name in ("probability_sums", "dw_in", "dw_out"):
        assert rms_ratio(moved[name], first[name]) <= BARS[moved[name].dtype], name


@pytest.mark.parametrize("tokens", [1, 300])
def test_in_a_cuda_graph(backend, device, tokens):
    """Forward and backward, captured once and replayed on other values: nothing is read on the host."""
    if device.type == "cpu":
        pytest.skip("a rehearsal: there are no CUDA graphs")
    static = inputs(device, torch.float32, tokens, 96, 64, 8)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        capturable(static, backend)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = capturable(static, backend)
    fresh = inputs(device, torch.float32, tokens, 96, 64, 8, seed=5)
    for name, tensor in static.items():
        tensor.copy_(fresh[name])
    graph.replay()
    torch.cuda.synchronize()
    for got, want in zip([t.clone() for t in outputs], capturable(static, backend), strict=True):
        assert torch.equal(got, want)


def capturable(named, backend):
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in named.items()}
    routing = moe_route(leaves["logits"], 2, backend=backend)
    y = moe_mlp(leaves["x"], routing, leaves["w_in"], leaves["w_out"], backend=products(backend))
    loss = y.square().sum() + load_balancing_loss(routing)
    return y.detach(), *(t.detach() for t in routing), *torch.autograd.grad(loss, list(leaves.values()))


def test_does_not_synchronise(backend, device):
    if device.type == "cpu":
        pytest.skip("a rehearsal: nothing to synchronise with")
    named = inputs(device, torch.float32, 300, 96, 64, 8)
    capturable(named, backend)  # compiled and warm
    torch.cuda.set_sync_debug_mode("error")
    try:
        capturable(named, backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compiles_without_a_graph_break(backend, device):
    named = inputs(device, torch.float32, 100, 48, 40, 4)

    def loss(leaves):
        routing = moe_route(leaves["logits"], 2, backend=backend)
        y = moe_mlp(leaves["x"], routing, leaves["w_in"], leaves["w_out"], backend=products(backend))
        return y.square().sum() + load_balancing_loss(routing)

    results = []
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager" if device.type == "cpu" else "inductor")
    for function in (loss, compiled):
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in named.items()}
        value = function(leaves)
        results.append([value.detach(), *torch.autograd.grad(value, list(leaves.values()))])
    for got, want in zip(results[1], results[0], strict=True):
        assert rms_ratio(got, want) <= 1e-5


def test_wild_indices_read_nothing_out_of_range(backend, device):
    """A routing that is not from moe_route: the numbers are anything, the memory is the caller's."""
    named = inputs(device, torch.float32, 100, 32, 24, 4)
    named["x"].requires_grad_()
    routing = moe_route(named["logits"], 2, backend=backend)
    g = torch.Generator().manual_seed(0)
    for _ in range(5):
        order, offsets = (
            torch.randint(-(2**31), 2**31 - 1, t.shape, generator=g).int().to(device)
            for t in (routing.order, routing.offsets)
        )
        wild = routing._replace(order=order, offsets=offsets)
        y = moe_mlp(named["x"], wild, named["w_in"], named["w_out"], backend=products(backend))
        assert torch.autograd.grad(y.sum(), named["x"])[0].shape == (100, 32)
