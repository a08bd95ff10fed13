"""selective_scan and causal_conv1d on a GPU: each backend against the float64 reference, and the contract of an op."""

import pytest
import torch
from accuracy import assert_accurate, rms_ratio

from jambatalk_kernels import causal_conv1d, causal_conv1d_step, selective_scan, selective_scan_step

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Op:
    """One op as these tests see it: its inputs by name, its call, and the precision that its contract promises."""

    def __init__(self, function, step, shapes, options, float32_bar):
        self.function, self.step, self.shapes, self.options = function, step, shapes, options
        self.bars = {
            torch.float64: 1e-13, torch.float32: float32_bar, torch.bfloat16: 5e-3, torch.float16: 5e-3
        }  # fmt: skip

    def inputs(self, device, dtype, size, sequences=None, seed=0):
        """``size``: batch, length, channels and states or width. Values as of a trained layer; states in float32."""
        g = torch.Generator().manual_seed(seed)
        named = {}
        for name, shape in self.shapes(*size, size[0] if sequences is None else sequences).items():
            value = torch.randn(*shape, generator=g, dtype=torch.float64)
            if name == "A":
                value = -torch.exp(value * 0.5)
            elif name == "delta":
                value = value * 0.5 - 1
            named[name] = value.to(dtype).to(device)
        return named

    def run(self, named, backend, cu_seqlens=None):
        """y, final state and the gradient of every input under random gradients of both."""
        named = {name: tensor.detach().requires_grad_() for name, tensor in named.items()}
        y, final = self.function(
            **named, **self.options, return_final_state=True, cu_seqlens=cu_seqlens, backend=backend
        )
        g = torch.Generator().manual_seed(1)
        weights = [torch.randn(t.shape, generator=g, dtype=torch.float64).to(t) for t in (y, final)]
        grads = torch.autograd.grad([y, final], list(named.values()), weights, materialize_grads=True)
        return {"y": y.detach(), "final": final.detach(), **dict(zip(named, grads, strict=True))}


def scan_shapes(batch, length, channels, states, sequences):
    rows = (batch, length, channels)
    return {
        "u": rows, "delta": rows, "A": (channels, states), "B": (batch, length, states), "C": (batch, length, states),
        "D": (channels,), "z": rows, "delta_bias": (channels,), "initial_state": (sequences, channels, states),
    }  # fmt: skip


def conv_shapes(batch, length, channels, width, sequences):
    return {
        "x": (batch, length, channels), "weight": (channels, width), "bias": (channels,),
        "initial_state": (sequences, width - 1, channels),
    }  # fmt: skip


OPS = {
    "scan": Op(selective_scan, selective_scan_step, scan_shapes, {"delta_softplus": True}, 1e-5),
    "conv": Op(causal_conv1d, causal_conv1d_step, conv_shapes, {"activation": "silu"}, 1e-6),
}
# batch, length, channels, states (of the scan) or width (of the convolution, which has at most 16)
SIZES = [(2, 5, 3, 4), (1, 130, 70, 16), (3, 257, 33, 5), (1, 1, 64, 1), (2, 64, 256, 16), (1, 1200, 40, 16)]


@pytest.fixture(params=list(OPS))
def op(request):
    return OPS[request.param]


def check(op, backend, dtype, named, cu_seqlens=None):
    """The accuracy rule: at most twice the error of PyTorch at the same precision, and the bars of the contract."""
    exact = op.run({name: tensor.double() for name, tensor in named.items()}, "reference", cu_seqlens)
    peer = op.run(named, "reference", cu_seqlens)
    ours = op.run(named, backend, cu_seqlens)
    for name, want in exact.items():
        assert ours[name].dtype == peer[name].dtype, name
        assert_accurate(ours[name], want, peer[name], op.bars[dtype], name)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accuracy(op, backend, device, dtype, size):
    check(op, backend, dtype, op.inputs(device, dtype, size))


@pytest.mark.parametrize("bounds", [[0, 3, 3, 70, 200], [5, 60, 64, 190], [0, 0, 200], [-7, 90, 30, 999]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed(op, backend, device, dtype, bounds):
    """Empty sequences, positions outside of all, and bounds out of range, which are clamped."""
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device)
    check(op, backend, dtype, op.inputs(device, dtype, (1, 200, 40, 4), sequences=len(bounds) - 1), cu_seqlens)


@pytest.mark.parametrize("states", [1, 7, 64, 256])
def test_any_number_of_states(backend, device, states):
    check(OPS["scan"], backend, torch.float32, OPS["scan"].inputs(device, torch.float32, (2, 70, 20, states)))


@pytest.mark.parametrize("width", [1, 2, 3, 8, 11, 16])
def test_any_width(backend, device, width):
    check(OPS["conv"], backend, torch.float32, OPS["conv"].inputs(device, torch.float32, (2, 70, 20, width)))


def test_any_strides(op, backend, device):
    named = op.inputs(device, torch.float32, (2, 100, 48, 4))
    want = op.run(named, backend)
    for layout in (
        lambda t: t.transpose(1, 2).contiguous().transpose(1, 2) if t.dim() == 3 else t,
        lambda t: torch.stack([t, t], -1)[..., 0],
        lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    ):
        got = op.run({name: layout(tensor) for name, tensor in named.items()}, backend)
        for name in want:
            assert rms_ratio(got[name], want[name].double()) <= op.bars[torch.float32], name


def test_empty_inputs(op, backend, device):
    for size in ((0, 5, 8, 4), (2, 0, 8, 4), (2, 5, 0, 4)):
        for name, tensor in op.run(op.inputs(device, torch.float32, size), backend).items():
            assert torch.isfinite(tensor).all(), name


def test_two_runs_give_equal_bytes(op, backend, device):
    named = op.inputs(device, torch.bfloat16, (4, 1000, 192, 16))
    first = op.run(named, backend)
    for _ in range(3):
        again = op.run(named, backend)
        assert all(torch.equal(again[name], first[name]) for name in first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_steps_are_the_whole(op, backend, device, dtype):
    named = op.inputs(device, dtype, (2, 6, 70, 4))
    with torch.no_grad():
        y, final = op.function(**named, **op.options, return_final_state=True, backend=backend)
        state = named.pop("initial_state").to(final.dtype)
        along_time = {name for name, tensor in named.items() if tensor.dim() == 3}
        for t in range(6):
            row = {name: tensor[:, t] if name in along_time else tensor for name, tensor in named.items()}
            step = op.step(state, **row, **op.options, backend=backend)
            assert rms_ratio(step, y[:, t]) <= op.bars[dtype]
    assert rms_ratio(state, final) <= op.bars[torch.float32]


def test_large_offsets(backend, device):
    """More elements than 32 bits count, cut so that only the far end is computed."""
    if device.type == "cpu" or torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs a GPU with 16 GiB free")
    x = torch.zeros(3, 1 << 20, 1024, dtype=torch.bfloat16, device=device)[:, -64:]
    x.normal_()
    weight = torch.randn(1024, 4, device=device)
    with torch.no_grad():
        got = causal_conv1d(x, weight, backend=backend)
        want = causal_conv1d(x.contiguous(), weight, backend="reference")
    assert rms_ratio(got, want) <= 5e-3


def test_in_a_cuda_graph(op, backend, device):
    """Forward and backward, captured once and replayed on other values: nothing is read on the host."""
    if device.type == "cpu":
        pytest.skip("a rehearsal: there are no CUDA graphs")
    static = {n: t.requires_grad_() for n, t in op.inputs(device, torch.float32, (2, 300, 96, 4)).items()}

    def run():
        y, final = op.function(**static, **op.options, return_final_state=True, backend=backend)
        return y, final, *torch.autograd.grad([y.sum() + final.sum()], list(static.values()))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    fresh = op.inputs(device, torch.float32, (2, 300, 96, 4), seed=5)
    with torch.no_grad():
        for name, tensor in static.items():
            tensor.copy_(fresh[name])
    graph.replay()
    torch.cuda.synchronize()
    for got, want in zip([t.detach().clone() for t in outputs], run(), strict=True):
        assert torch.equal(got, want)


def test_packed_call_does_not_synchronise(op, backend, device):
    if device.type == "cpu":
        pytest.skip("a rehearsal: nothing to synchronise with")
    named = op.inputs(device, torch.float32, (1, 200, 40, 4), sequences=2)
    cu_seqlens = torch.tensor([0, 90, 200], dtype=torch.int32, device=device)
    op.run(named, backend, cu_seqlens)  # compiled and warm
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad():
            op.function(**named, **op.options, cu_seqlens=cu_seqlens, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compiles_without_a_graph_break(op, backend, device):
    named = op.inputs(device, torch.float32, (2, 100, 48, 4))

    def loss(named):
        y, final = op.function(**named, **op.options, return_final_state=True, backend=backend)
        return y.square().sum() + final.sum()

    results = []
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager" if device.type == "cpu" else "inductor")
    for function in (loss, compiled):
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in named.items()}
        value = function(leaves)
        results.append([value.detach(), *torch.autograd.grad(value, list(leaves.values()))])
    for got, want in zip(results[1], results[0], strict=True):
        assert rms_ratio(got, want.double()) <= 1e-5
