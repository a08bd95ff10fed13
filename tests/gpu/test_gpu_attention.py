"""rope_attention and its step on a GPU: against the float64 reference, and the contract of an op."""

import pytest
import torch
from accuracy import assert_accurate, rms_ratio

from jambatalk_kernels import KVCache, backends, rope_attention, rope_attention_step
from jambatalk_kernels.attention.reference import rotary_table

# Error of a result, root mean square: at most this (or PyTorch's own where that is more: it rounds the rotated queries
# and keys to half precision too), and at most twice PyTorch's at the same precision.
BARS = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}
# batch, length, heads, kv_heads, head_dim
SIZES = [
    (2, 5, 3, 3, 16), (1, 600, 8, 1, 64), (2, 130, 4, 2, 80), (1, 300, 4, 4, 128), (1, 200, 4, 2, 256),
    (3, 33, 2, 1, 6), (1, 1100, 2, 1, 64),
]  # fmt: skip
NAMES = ("q", "k", "v", "cos", "sin")


@pytest.fixture
def backend(device):
    """Triton's kernels; the reference where this is a rehearsal."""
    if device.type == "cpu":
        return "reference"
    reason = backends.candidates("rope_attention", torch.empty(0, device=device))["triton"]
    if reason is not None:
        pytest.skip(f"backend triton: {reason}")
    return "triton"


def inputs(device, dtype, batch, length, heads, kv_heads, head_dim, per_head=False, seed=0):
    """Tables in float32: true angles; learned ones, of any norm, with a head axis."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    q = normal(batch, length, heads, head_dim)
    k, v = (normal(batch, length, kv_heads, head_dim) for _ in range(2))
    cos, sin = rotary_table(torch.arange(length), head_dim, dtype=torch.float64)
    if per_head:
        cos, sin = (table[:, None] + 0.1 * normal(length, kv_heads, head_dim // 2) for table in (cos, sin))
    return [t.to(dtype).to(device) for t in (q, k, v)] + [t.float().to(device) for t in (cos, sin)]


def run(tensors, backend, **options):
    """y and the gradient of every input under a random gradient of y."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    y = rope_attention(*leaves, **options, backend=backend)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y)
    return {
        "y": y.detach(),
        **dict(zip(NAMES, torch.autograd.grad(y, leaves, grad, materialize_grads=True), strict=True)),
    }


def check(tensors, backend, cache=None, **options):
    """`cache`: makes one, of a dtype."""
    dtype = tensors[0].dtype
    results = []
    for kind, name in dict.fromkeys(((torch.float64, "reference"), (None, "reference"), (None, backend))):
        made = {} if cache is None else {"cache": cache(kind or dtype)}
        results.append(run([t.to(kind or t.dtype) for t in tensors], name, **options, **made))
    exact, peer, ours = results[0], results[1], results[-1]
    for name, want in exact.items():
        assert ours[name].dtype == peer[name].dtype, name
        bar = BARS[dtype] if name == "y" else max(BARS[dtype], rms_ratio(peer[name], want))
        assert_accurate(ours[name], want, peer[name], bar, name)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", BARS, ids=str)
def test_accuracy(backend, device, dtype, size):
    check(inputs(device, dtype, *size), backend)


OPTIONS = [
    dict(causal=False), dict(interleaved=True), dict(window=3), dict(window=70), dict(scale=0.3, window=250),
    dict(cu_seqlens=[0, 3, 3, 170, 300]), dict(cu_seqlens=[5, 60, 64, 290], window=20),
    dict(cu_seqlens=[-7, 90, 30, 999], causal=False, interleaved=True),
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_mask_and_table(backend, device, dtype, options):
    """Empty sequences, positions outside of all, and bounds out of range, which are clamped."""
    options = dict(options)
    if "cu_seqlens" in options:
        options["cu_seqlens"] = torch.tensor(options["cu_seqlens"], dtype=torch.int32, device=device)
    check(inputs(device, dtype, 1, 300, 4, 2, 64, per_head=True), backend, **options)


@pytest.mark.parametrize("window, capacity", [(None, 700), (100, 100), (100, 130)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_chunk_against_a_cache(backend, device, dtype, window, capacity):
    """Each sequence at its own position; the ring has wrapped around in one of them."""

    def cache(kind):
        g = torch.Generator().manual_seed(7)
        k, v = (torch.randn(3, capacity, 2, 64, generator=g).to(dtype).to(kind).to(device) for _ in range(2))
        return KVCache(k, v, torch.tensor([0, 60, 480], device=device))

    check(inputs(device, dtype, 3, 150, 4, 2, 64), backend, cache=cache, window=window)


@pytest.mark.parametrize("window, capacity", [(None, 300), (70, 70)], ids=str)
def test_any_chunks_are_the_whole(backend, device, window, capacity):
    tensors = inputs(device, torch.float32, 2, 300, 4, 1, 64)
    with torch.no_grad():
        whole = rope_attention(*tensors, window=window, backend=backend)
        cache = KVCache.empty(2, capacity, 1, 64, device=device)
        parts, start = [], 0
        for size in (1, 129, 3, 100, 67):
            at = slice(start, start + size)
            part = [t[:, at] for t in tensors[:3]] + [t[at] for t in tensors[3:]]
            parts.append(rope_attention(*part, window=window, cache=cache, backend=backend))
            start += size
    assert rms_ratio(torch.cat(parts, 1), whole) <= 1e-6
    assert cache.position.tolist() == [300, 300]


@pytest.mark.parametrize("heads, kv_heads", [(8, 8), (8, 1), (3, 1)], ids=str)
@pytest.mark.parametrize("dtype", BARS, ids=str)
def test_steps(backend, device, dtype, heads, kv_heads):
    """From an empty cache, from a full one, and around a ring."""
    for capacity, start, window in ((20, 0, None), (700, 600, None), (300, 299, 300), (40, 77, 30)):
        g = torch.Generator().manual_seed(capacity)
        k, v = (torch.randn(2, capacity, kv_heads, 64, generator=g).to(dtype).to(device) for _ in range(2))
        kinds = (torch.float64, dtype, dtype)
        position = torch.tensor([start, start // 2], device=device)
        caches = [KVCache(k.to(kind, copy=True), v.to(kind, copy=True), position.clone()) for kind in kinds]
        for t in range(3):
            q, k_new, v_new, _, _ = inputs(device, dtype, 2, 1, heads, kv_heads, 64, seed=t)
            tables = [table.float() for table in rotary_table(caches[0].position, 64)]
            exact, peer, ours = (
                rope_attention_step(
                    *(x[:, 0].to(kind) for x in (q, k_new, v_new)), *tables, cache, window=window, backend=name
                )
                for kind, cache, name in zip(kinds, caches, ("reference", "reference", backend), strict=True)
            )
            assert_accurate(ours, exact, peer, max(BARS[dtype], rms_ratio(peer, exact)), f"y, capacity {capacity}")
        assert torch.equal(caches[2].v, caches[1].v) and torch.equal(caches[2].position, caches[1].position)
        assert rms_ratio(caches[2].k, caches[1].k) <= BARS[dtype]


def test_any_strides(backend, device):
    tensors = inputs(device, torch.float32, 2, 100, 4, 2, 48, per_head=True)
    want = run(tensors, backend)
    for layout in (
        lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
        lambda t: torch.stack([t, t], -1)[..., 0],
        lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    ):
        got = run([layout(tensor) for tensor in tensors], backend)
        for name in want:
            assert rms_ratio(got[name], want[name]) <= 1e-6, name


def test_empty_inputs(backend, device):
    for size in ((0, 5, 2, 1, 8), (2, 0, 2, 1, 8)):
        results = run(inputs(device, torch.float32, *size), backend)
        assert results["y"].shape == (*size[:2], 2, 8) and not any(results[name].any() for name in NAMES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_runs_give_equal_bytes(backend, device, dtype):
    tensors = inputs(device, dtype, 2, 1100, 8, 2, 64)
    first = run(tensors, backend)
    for _ in range(3):
        again = run(tensors, backend)
        assert all(torch.equal(again[name], first[name]) for name in first)


def test_large_offsets(backend, device):
    """Keys more than 2**31 elements from the first, cut so that only the far end is computed."""
    if device.type == "cpu" or torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs a GPU with 24 GiB free")
    far = [torch.zeros(3, 1 << 20, 8, 128, dtype=torch.bfloat16, device=device)[:, -64:] for _ in range(2)]
    q, k, v, cos, sin = inputs(device, torch.bfloat16, 3, 64, 8, 8, 128)
    far[0].copy_(k), far[1].copy_(v)
    with torch.no_grad():
        got = rope_attention(q, *far, cos, sin, backend=backend)
        assert torch.equal(got, rope_attention(q, k, v, cos, sin, backend=backend))


def captured(function):
    """-> (the graph, what it writes)."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function()
    return graph, outputs


def test_in_a_cuda_graph(backend, device):
    """Forward and backward, captured once and replayed on other values: nothing is read on the host."""
    if device.type == "cpu":
        pytest.skip("a rehearsal: there are no CUDA graphs")
    static = [t.requires_grad_() for t in inputs(device, torch.float32, 1, 300, 4, 2, 64)]
    cu_seqlens = torch.tensor([0, 90, 300], dtype=torch.int32, device=device)

    def forward_and_backward():
        y = rope_attention(*static, cu_seqlens=cu_seqlens, backend=backend)
        return y, *torch.autograd.grad([y.square().sum()], static)

    graph, outputs = captured(forward_and_backward)
    with torch.no_grad():
        cu_seqlens[1] = 170
        for tensor, fresh in zip(static, inputs(device, torch.float32, 1, 300, 4, 2, 64, seed=5), strict=True):
            tensor.copy_(fresh)
    graph.replay()
    torch.cuda.synchronize()
    for got, want in zip([t.detach().clone() for t in outputs], forward_and_backward(), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("capacity", [64, 900], ids="one part or many: {}".format)
def test_steps_and_chunks_in_a_cuda_graph(backend, device, capacity):
    """The graph is replayed while positions move on: they are read on the device."""
    if device.type == "cpu":
        pytest.skip("a rehearsal: there are no CUDA graphs")
    window = capacity
    q, k, v, cos, sin = inputs(device, torch.bfloat16, 2, 4, 8, 2, 64)
    cache, eager = (KVCache.empty(2, capacity, 2, 64, dtype=torch.bfloat16, device=device) for _ in range(2))

    def advance(cache):
        with torch.no_grad():
            step = [t[:, 3] for t in (q, k, v)] + [t[3:].expand(2, -1) for t in (cos, sin)]
            chunk = [t[:, :3] for t in (q, k, v)] + [t[:3] for t in (cos, sin)]
            return (
                rope_attention(*chunk, window=window, cache=cache, backend=backend),
                rope_attention_step(*step, cache, window=window, backend=backend),
            )

    graph, outputs = captured(lambda: advance(cache))
    for tensor in (cache.k, cache.v, cache.position):
        tensor.zero_()
    for _ in range(30):
        graph.replay()
        want = advance(eager)
        assert all(torch.equal(a, b) for a, b in zip(outputs, want, strict=True))
    assert torch.equal(cache.k, eager.k) and cache.position.tolist() == [120, 120]


def test_does_not_synchronise(backend, device):
    if device.type == "cpu":
        pytest.skip("a rehearsal: nothing to synchronise with")
    tensors = inputs(device, torch.float32, 1, 200, 4, 2, 64)
    cu_seqlens = torch.tensor([0, 90, 200], dtype=torch.int32, device=device)
    cache = KVCache.empty(1, 4000, 2, 64, device=device)

    gradient = torch.ones(1, 200, 4, 64, device=device)

    def everything():
        leaves = [t.detach().requires_grad_() for t in tensors]
        for options in (dict(cu_seqlens=cu_seqlens), dict(cache=cache)):
            torch.autograd.grad(rope_attention(*leaves, **options, backend=backend), leaves, gradient)
        with torch.no_grad():
            step = [t[:, 0] for t in tensors[:3]] + [t[:1] for t in tensors[3:]]
            rope_attention_step(*step, cache, backend=backend)

    everything()  # compiled and warm
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compiles_without_a_graph_break(backend, device):
    tensors = inputs(device, torch.float32, 2, 100, 4, 2, 48)

    def loss(leaves, *cache):
        y = rope_attention(*leaves, window=40, backend=backend)
        chunk = rope_attention(*leaves, window=40, cache=KVCache(*cache), backend=backend)
        return y.square().sum() + chunk.sum()

    results = []
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager" if device.type == "cpu" else "inductor")
    for function in (loss, compiled):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        cache = KVCache.empty(2, 50, 2, 48, device=device)
        value = function(leaves, cache.k, cache.v, cache.position)
        results.append([value.detach(), *torch.autograd.grad(value, leaves), cache.k, cache.v, cache.position])
    for got, want in zip(results[1], results[0], strict=True):
        assert rms_ratio(got, want) <= 1e-5
