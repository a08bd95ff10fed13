"""Rotary attention in C++: accuracy on every instruction set, dtypes, strides, determinism, compilers, memory."""

import itertools
import os
import sys
from pathlib import Path

import pytest
import torch
from accuracy import assert_accurate, rms_ratio

from jambatalk_kernels import KVCache, native_library, rope_attention, rope_attention_step, rotary_table
from jambatalk_kernels.attention import reference

LOADED, WHY = native_library()
pytestmark = pytest.mark.skipif(
    not LOADED and os.environ.get("JAMBATALK_BUILD") == "none", reason="built with JAMBATALK_BUILD=none"
)
OPS = torch.ops.jambatalk
BAR = {torch.float64: 1e-14, torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}


def normal(*shape, seed, dtype):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make(batch, length, heads, kv_heads, head_dim, dtype=torch.float32, table="positions"):
    """Tables that are no rotation at all: nothing may assume a norm."""
    half = head_dim // 2
    shape = {
        "positions": (length, half),
        "heads": (length, kv_heads, half),
        "sequences": (batch, length, 1, half),
        "all": (batch, length, kv_heads, half),
    }[table]
    q = normal(batch, length, heads, head_dim, seed=1, dtype=dtype)
    k, v = (normal(batch, length, kv_heads, head_dim, seed=seed, dtype=dtype) for seed in (2, 3))
    cos, sin = (normal(*shape, seed=s, dtype=torch.promote_types(dtype, torch.float32)) for s in (4, 5))
    return q, k, v, cos, sin


def results(inputs, backend, cache=None, **options):
    leaves = [t.detach().requires_grad_() for t in inputs]
    y = rope_attention(*leaves, cache=cache, backend=backend, **options)
    grad = normal(*y.shape, seed=6, dtype=inputs[0].dtype).to(y.dtype)
    return dict(zip(("y", "dq", "dk", "dv", "dcos", "dsin"), (y, *torch.autograd.grad(y, leaves, grad)), strict=True))


def assert_rule(inputs, **options):
    """At most twice the error of the reference in the same dtype, and the bar of the contract."""
    exact = results([t.double() for t in inputs], "reference", **options)
    peer, ours = (results(inputs, backend, **options) for backend in ("reference", "cpu"))
    for name, want in exact.items():
        assert ours[name].dtype == peer[name].dtype, name
        assert_accurate(ours[name], want, peer[name], BAR[inputs[0].dtype], name)


def bounds(*values):
    return torch.tensor(values, dtype=torch.int32)


CASES = [  # (batch, length, heads, kv_heads, head_dim), table, options
    ((2, 11, 4, 2, 6), "positions", dict()),
    ((1, 150, 3, 1, 16), "heads", dict(interleaved=True)),
    ((2, 90, 2, 2, 20), "all", dict(causal=False)),
    ((2, 140, 6, 2, 64), "sequences", dict(window=70)),
    ((1, 200, 5, 1, 32), "positions", dict(window=33, interleaved=True)),
    ((1, 200, 2, 1, 8), "positions", dict(cu_seqlens=bounds(0, 5, 5, 130, 200))),
    ((1, 200, 2, 2, 8), "heads", dict(cu_seqlens=bounds(3, 99, 140), window=40)),
    ((1, 200, 2, 1, 8), "positions", dict(cu_seqlens=bounds(0, 66, 199), causal=False, interleaved=True)),
    ((1, 70, 2, 1, 256), "positions", dict(scale=0.01)),
    ((1, 40, 1, 1, 128), "positions", dict(window=100, scale=0.7)),
    ((1, 17, 70, 1, 2), "positions", dict()),
]


@pytest.mark.parametrize("shape, table, options", CASES, ids=str)
def test_accuracy(isa, shape, table, options):
    assert_rule(make(*shape, table=table), **options)


def test_one_position(isa):
    """It sees itself: y is v, and the weight cannot change."""
    inputs = make(1, 1, 8, 1, 64)
    got = results(inputs, "cpu")
    torch.testing.assert_close(got["y"], inputs[2].expand(1, 1, 8, 64))
    torch.testing.assert_close(got["dv"], normal(1, 1, 8, 64, seed=6, dtype=torch.float32).sum(2, keepdim=True))
    for name in ("dq", "dk", "dcos", "dsin"):
        # Zero but for the rounding of two sums of 64 products of about 1, some sqrt(64) eps of 8, through weights and
        # keys of about 1 (of which up to 8 heads add theirs).
        assert got[name].abs().max() < 8 * 8 * torch.finfo(torch.float32).eps, name


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 100, 4, 2, 32), (1, 9, 2, 1, 30)], ids=str)
def test_accuracy_of_other_dtypes(isa, shape, dtype):
    q, k, v, cos, sin = make(*shape, dtype=dtype, table="heads")
    norm = (cos.square() + sin.square()).sqrt()  # a rotation, for which the bar is: other tables make larger scores
    assert_rule((q, k, v, cos / norm, sin / norm), window=50)


@pytest.mark.parametrize("options", [dict(), dict(window=3), dict(causal=False), dict(cu_seqlens=bounds(1, 2, 5))])
@pytest.mark.parametrize("table", ["positions", "heads", "all"])
def test_float64_gradients(options, table):
    batch = 1 if "cu_seqlens" in options else 2
    inputs = [t.requires_grad_() for t in make(batch, 6, 4, 2, 4, dtype=torch.float64, table=table)]
    assert torch.autograd.gradcheck(lambda *a: rope_attention(*a, **options, backend="cpu"), inputs)


def filled(batch, capacity, kv_heads, head_dim, positions, dtype=torch.float32):
    cache = KVCache.empty(batch, capacity, kv_heads, head_dim, dtype=dtype)
    cache.k.copy_(normal(*cache.k.shape, seed=8, dtype=dtype))
    cache.v.copy_(normal(*cache.v.shape, seed=9, dtype=dtype))
    cache.position.copy_(torch.tensor(positions))
    return cache


@pytest.mark.parametrize("window, capacity", [(None, 300), (20, 20), (20, 33), (90, 90)])
def test_a_chunk_against_a_cache(isa, window, capacity):
    """Sequences at different positions, the ring gone round; gradients too."""
    inputs = make(3, 40, 6, 2, 16, table="all")
    caches = {name: filled(3, capacity, 2, 16, [0, 250, 7]) for name in ("exact", "reference", "cpu")}
    caches["exact"].k, caches["exact"].v = caches["exact"].k.double(), caches["exact"].v.double()
    exact = results([t.double() for t in inputs], "reference", caches["exact"], window=window)
    peer, ours = (results(inputs, name, caches[name], window=window) for name in ("reference", "cpu"))
    for name, want in exact.items():
        assert rms_ratio(ours[name], want) <= 2 * rms_ratio(peer[name], want) + 1e-7, name
    assert caches["cpu"].position.tolist() == caches["reference"].position.tolist() == [40, 290, 47]
    torch.testing.assert_close(caches["cpu"].k, caches["reference"].k, rtol=1e-6, atol=1e-6)
    assert torch.equal(caches["cpu"].v, caches["reference"].v)


def test_gradients_with_a_cache():
    inputs = [t.requires_grad_() for t in make(2, 3, 2, 1, 4, dtype=torch.float64)]
    cache = filled(2, 4, 1, 4, [6, 1], torch.float64)
    run = lambda *a: rope_attention(*a, cache=cache.clone(), window=4, backend="cpu")  # noqa: E731
    assert torch.autograd.gradcheck(run, inputs)


def step_inputs(batch, heads, kv_heads, head_dim, dtype, table="heads"):
    q, k, v, cos, sin = make(batch, 1, heads, kv_heads, head_dim, dtype, "all")
    cos, sin = (t[:, 0] if table == "heads" else t[:, 0, 0] for t in (cos, sin))
    return q[:, 0], k[:, 0], v[:, 0], cos, sin


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim, interleaved", [(64, False), (16, True), (6, True), (256, False)])
@pytest.mark.parametrize("heads, kv_heads", [(9, 1), (4, 2)])
def test_steps(isa, dtype, head_dim, interleaved, heads, kv_heads):
    """A cache half full, one full, one gone round."""
    inputs = step_inputs(3, heads, kv_heads, head_dim, dtype, "heads" if head_dim != 64 else "positions")
    how = dict(window=300, interleaved=interleaved)
    caches = {
        name: filled(3, 300, kv_heads, head_dim, [123, 299, 1000], dtype) for name in ("reference", "cpu", "exact")
    }
    caches["exact"].k, caches["exact"].v = caches["exact"].k.double(), caches["exact"].v.double()
    exact = rope_attention_step(*(t.double() for t in inputs), caches["exact"], **how, backend="reference")
    peer, ours = (rope_attention_step(*inputs, caches[n], **how, backend=n) for n in ("reference", "cpu"))
    assert ours.dtype == dtype
    assert_accurate(ours, exact, peer, BAR[dtype])
    assert caches["cpu"].position.tolist() == [124, 300, 1001]
    # The last place of a sum of two products of numbers up to 4, which may cancel; then of the cache's dtype.
    working, stored = (torch.finfo(torch.promote_types(dtype, torch.float32)).eps, torch.finfo(dtype).eps)
    torch.testing.assert_close(caches["cpu"].k, caches["reference"].k, rtol=stored, atol=4 * working)
    assert torch.equal(caches["cpu"].v, caches["reference"].v)


def elsewhere(t):
    """The same numbers with the last dimension first in memory, every other one of a wider tensor."""
    wide = torch.full((*t.movedim(-1, 0).shape, 2), torch.nan, dtype=t.dtype)
    wide[..., 1] = t.movedim(-1, 0)
    return wide[..., 1].movedim(0, -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_strides(isa, dtype):
    inputs = make(2, 70, 4, 2, 24, dtype, "all")
    plain, moved = results(inputs, "cpu"), results([elsewhere(t) for t in inputs], "cpu")
    for name, want in plain.items():
        assert torch.equal(moved[name], want), name
    q, k, v, cos, sin = inputs
    shared = (q, k[:1, :, :1].expand_as(k), v[:, :, :1].expand_as(v), cos, sin)
    copied = results([t.contiguous() for t in shared], "cpu")
    for name, got in results(shared, "cpu").items():
        assert torch.equal(got, copied[name]), name


def test_steps_take_any_strides(isa):
    inputs = step_inputs(2, 4, 2, 24, torch.float32)
    caches = [filled(2, 90, 2, 24, [50, 100]) for _ in range(2)]
    caches[1].k, caches[1].v = elsewhere(caches[1].k), elsewhere(caches[1].v)
    caches[1].position = caches[1].position.repeat_interleave(2)[::2]
    moved = [elsewhere(t) for t in inputs]
    want = rope_attention_step(*inputs, caches[0], window=60, backend="cpu")
    got = rope_attention_step(*moved, caches[1], window=60, backend="cpu")
    assert torch.equal(got, want) and torch.equal(caches[0].k, caches[1].k)
    assert caches[1].position.tolist() == [51, 101]


def test_a_cache_of_another_dtype_is_read_and_written():
    inputs = step_inputs(1, 4, 1, 32, torch.float32)
    cache = filled(1, 50, 1, 32, [20], torch.bfloat16)
    widened = KVCache(cache.k.float(), cache.v.float(), cache.position.clone())
    got = rope_attention_step(*inputs, cache, backend="cpu")
    want = rope_attention_step(*inputs, widened, backend="cpu")
    assert rms_ratio(got, want) < 5e-3  # the new key and value are rounded
    assert torch.equal(cache.k, widened.k.bfloat16()) and torch.equal(cache.v, widened.v.bfloat16())


def test_the_same_bytes_with_any_number_of_threads(isa):
    inputs = make(2, 300, 8, 2, 16)
    one = (step_inputs(1, 8, 1, 64, torch.float32), filled(1, 700, 1, 64, [600]))
    seen, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 8, 1):
            torch.set_num_threads(threads)
            tensors = results(inputs, "cpu", window=200)
            tensors["step"] = rope_attention_step(*one[0], one[1].clone(), backend="cpu")
            seen.append(tensors)
    finally:
        torch.set_num_threads(before)
    for other, name in itertools.product(seen[1:], seen[0]):
        assert torch.equal(other[name], seen[0][name]), name


def test_nothing_is_left_unwritten(monkeypatch):
    monkeypatch.setenv("JAMBATALK_KERNELS_CHECK", "1")  # new memory is full of NaN
    for shape, table, options in CASES:
        if "cu_seqlens" in options and options["cu_seqlens"][0] != 0:
            continue  # refused where values are checked
        options = options | ({"cu_seqlens": bounds(0, 66, shape[1])} if "cu_seqlens" in options else {})
        for name, tensor in results(make(*shape, table=table), "cpu", **options).items():
            assert tensor.isfinite().all(), (name, shape)


def test_opcheck():
    tensors = make(2, 70, 4, 2, 8)
    how = (True, 50, 0.3, False, None)
    cache = filled(2, 50, 2, 8, [3, 60])
    none, earlier = (None, None, None), (cache.k, cache.v, cache.position)
    wide, half = make(2, 70, 4, 2, 8, torch.float64, "all"), make(2, 70, 4, 2, 8, torch.bfloat16, "heads")
    for inputs, held in ((tensors, none), (wide, earlier), (half, none)):
        torch.library.opcheck(OPS.rope_attention.default, (*inputs, *how, *held, True))
        y, logsumexp = OPS.rope_attention(*inputs, *how, *held, True)
        torch.library.opcheck(OPS.rope_attention_backward.default, (y, *inputs, y, logsumexp, *how, *held))
    torch.library.opcheck(OPS.rope_attention.default, (*tensors, *how, None, None, None, False))
    torch.library.opcheck(OPS.rope_attention_append.default, (*tensors[1:], *earlier, False))
    torch.library.opcheck(
        OPS.rope_attention_step.default, (*step_inputs(2, 4, 2, 8, torch.float32), *earlier, 50, 0.3, True)
    )


def test_compiles_without_a_graph_break():
    def chunk_and_step(q, k, v, cos, sin, row, cache):
        y = rope_attention(q, k, v, cos, sin, window=9, cache=cache, backend="cpu")
        return y, rope_attention_step(*row, cache, window=9, backend="cpu")

    inputs, row = make(2, 5, 4, 2, 8), step_inputs(2, 4, 2, 8, torch.float32)
    caches = [filled(2, 9, 2, 8, [3, 20]) for _ in range(2)]
    with torch.no_grad():
        want = chunk_and_step(*inputs, row, caches[0])
        got = torch.compile(chunk_and_step, fullgraph=True, backend="aot_eager")(*inputs, row, caches[1])
    for ours, theirs in zip((*got, *vars(caches[1]).values()), (*want, *vars(caches[0]).values()), strict=True):
        assert torch.equal(ours, theirs)
    options = dict(cu_seqlens=bounds(0, 3, 7), interleaved=True)
    inputs = make(1, 7, 4, 2, 8)
    want = results(inputs, "cpu", **options)
    compiled = torch.compile(
        lambda *a: rope_attention(*a, backend="cpu", **options), fullgraph=True, backend="aot_eager"
    )
    leaves = [t.requires_grad_() for t in inputs]
    y = compiled(*leaves)
    grads = torch.autograd.grad(y, leaves, normal(*y.shape, seed=6, dtype=y.dtype))
    for got, theirs in zip((y, *grads), want.values(), strict=True):
        assert torch.equal(got, theirs)


def test_a_second_derivative_is_refused():
    inputs = [t.requires_grad_() for t in make(1, 5, 2, 1, 4)]
    (grad,) = torch.autograd.grad(rope_attention(*inputs, backend="cpu").sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        grad.sum().backward()


def test_a_full_cache_is_refused_and_not_touched():
    cache = filled(1, 4, 1, 8, [4])
    before = cache.clone()
    with pytest.raises(ValueError, match="capacity 4 is too small"):
        rope_attention_step(*step_inputs(1, 2, 1, 8, torch.float32), cache, backend="cpu")
    with pytest.raises(ValueError, match="capacity 4 is too small"):
        rope_attention(*make(1, 1, 2, 1, 8), cache=cache, backend="cpu")
    assert torch.equal(cache.k, before.k) and cache.position.tolist() == [4]


def test_a_wild_position_stays_inside_the_cache():
    for wild in (-5, -(2**63), 2**63 - 1):
        cache = filled(1, 8, 1, 8, [wild])
        rope_attention_step(*step_inputs(1, 2, 1, 8, torch.float32), cache, window=8, backend="cpu")
        rope_attention(*make(1, 3, 2, 1, 8), cache=filled(1, 8, 1, 8, [wild]), window=8, backend="cpu")


def test_a_step_that_needs_gradients_runs_on_the_reference():
    q, *others = step_inputs(1, 2, 1, 8, torch.float32)
    cache = filled(1, 8, 1, 8, [3])
    with pytest.warns(RuntimeWarning, match="steps have no gradients"):
        y = rope_attention_step(q.requires_grad_(), *others, cache)
    (grad,) = torch.autograd.grad(y.sum(), q)
    assert grad.shape == q.shape


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of the process's memory from Linux")
@pytest.mark.parametrize("options", [dict(), dict(window=500), dict(causal=False)], ids=str)
def test_memory_grows_with_the_length(options):
    """Forward and backward at 8,192 positions: 20 times the inputs at most. Scores would be 1,300 times."""
    inputs = [t.requires_grad_() for t in make(1, 8192, 2, 1, 16)]
    size = sum(t.numel() * t.element_size() for t in inputs)

    def peak():
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = peak()
    y = rope_attention(*inputs, **options, backend="cpu")
    torch.autograd.grad(y.sum(), inputs)
    assert peak() - before < 20 * size


def test_llama_attention_has_the_same_result():
    """transformers' rotation and SDPA, with the same weights."""
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama", reason="transformers is not installed")
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=64, num_attention_heads=8, num_key_value_heads=2, head_dim=16, attn_implementation="sdpa"
    )
    torch.manual_seed(0)
    layer = modeling.LlamaAttention(config, layer_idx=0).double()
    rotary = modeling.LlamaRotaryEmbedding(config)
    x = torch.randn(2, 75, 64, dtype=torch.float64, requires_grad=True)
    positions = torch.arange(75)
    theirs_cos, theirs_sin = rotary(x, positions[None])
    want, _ = layer(x, (theirs_cos, theirs_sin), attention_mask=None)

    cos, sin = reference.rotary_table(positions, 16, rotary.config.rope_parameters["rope_theta"], torch.float64)
    torch.testing.assert_close(torch.cat([cos, cos], -1)[None], theirs_cos, rtol=1e-5, atol=1e-5)  # theirs: float32
    cos, sin = theirs_cos[0, :, :8], theirs_sin[0, :, :8]
    q, k, v = (proj(x).unflatten(-1, (-1, 16)) for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
    got = layer.o_proj(rope_attention(q, k, v, cos, sin, backend="cpu").flatten(2))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    weight = normal(*got.shape, seed=0, dtype=torch.float64)
    parameters = [x, *layer.parameters()]
    for ours, theirs in zip(*(torch.autograd.grad(y, parameters, weight) for y in (got, want)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_many_rows_to_one_key_are_summed_as_accurately_as_torch_sums_them():
    """4800 queries share each key: one long chain of additions would round dk and dv several times as much."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 600, heads, 64) for heads in (8, 1, 1, 8)]
    q, k, v, grad = (torch.randn(shape, generator=generator) for shape in shapes)
    cos, sin = rotary_table(torch.arange(600), 64)

    def run(dtype, backend):
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        y = rope_attention(*inputs, cos.to(dtype), sin.to(dtype), backend=backend)
        y.backward(grad.to(dtype))
        return [y.detach(), *(x.grad for x in inputs)]

    exact = run(torch.float64, "reference")
    for ours, theirs, truth in zip(run(torch.float32, "cpu"), run(torch.float32, "reference"), exact, strict=True):
        rounding = truth.abs().max() * torch.finfo(torch.float32).eps
        assert (ours - truth).abs().max() <= 2 * (theirs - truth).abs().max() + rounding
        assert (ours - truth).norm() <= 1.5 * (theirs - truth).norm()
