"""moe_route and moe_mlp: a whole layer of experts against its matrix products alone, transformers' layer and others.

A layer: router, softmax and top-k, then swiglu experts. Work: 2 * tokens * top_k * hidden * 3 d operations forward and
twice as many backward. The measure on a CPU: those products by PyTorch, one per expert on rows that already lie in
segments, their results newly allocated; nothing else. (Ours makes its own products, which can be faster.) One token
reads each chosen expert's weights once: its ceiling is reading them. Contestants start in different places of the
rotation, so that nobody finds the weights of the one before it in a cache. Time alone says nothing of correctness: the
tests do.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from benchmarks import peers
from benchmarks.results import Case
from benchmarks.timing import rotation
from jambatalk_kernels import moe_mlp, moe_route

EXPERTS, TOP_K, THREADS = 8, 2, 2
CLIP = (600, 512, 1024)  # tokens, d, hidden: one clip in the model
LARGE, WIDE = (4096, 1024, 1024), (8192, 1024, 1024)
LEARNED = ("x", "router", "w_in", "w_out")


def layer_inputs(tokens, d, hidden, dtype=torch.float32, device="cpu", seed=0, grad=False):
    g = torch.Generator(device).manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, generator=g, device=device) * scale).to(dtype).requires_grad_(grad)

    return {
        "x": normal(tokens, d), "router": normal(EXPERTS, d, scale=d**-0.5),
        "w_in": normal(EXPERTS, 2 * hidden, d, scale=d**-0.5),
        "w_out": normal(EXPERTS, d, hidden, scale=hidden**-0.5),
        "grad": torch.randn(tokens, d, generator=g, device=device).to(dtype),
    }  # fmt: skip


def layer(i, backend=None):
    routing = moe_route(F.linear(i["x"], i["router"]), TOP_K, backend=backend)
    return moe_mlp(i["x"], routing, i["w_in"], i["w_out"], backend=backend)


def torch_route(logits):
    return logits.softmax(-1, dtype=torch.float32).topk(TOP_K)


def layer_of(experts):
    """A peer's experts behind PyTorch's routing."""

    def call(i):
        weights, chosen = torch_route(F.linear(i["x"], i["router"]))
        return experts(i["x"], weights, chosen.int(), i["w_in"], i["w_out"])

    return call


def training(call):
    """Forward and backward; the gradients are new tensors each time."""
    return lambda i: torch.autograd.grad(call(i), [i[name] for name in LEARNED], i["grad"])


def layer_case(what, shape, dtype, device, **facts):
    tokens, d, hidden = shape
    passes = {"forward": 1, "forward and backward": 3}[what]
    weights = min(EXPERTS, tokens * TOP_K) * 3 * d * hidden
    where = f"{THREADS} threads, {facts['isa']}" if device == "cpu" else facts["backend"]
    return Case(
        f"moe {what} {shape} {EXPERTS} experts top {TOP_K} {dtype}, {where}",
        "moe_mlp", device,
        bytes=passes * (weights + 2 * tokens * d) * getattr(torch, dtype).itemsize,
        operations={"products": passes * 6 * tokens * TOP_K * d * hidden},
        limit="matrix products" if tokens > 16 else "memory: the chosen experts' weights",
        facts={"pass": what, "shape": list(shape), "experts": EXPERTS, "top_k": TOP_K, "dtype": dtype, **facts},
    )  # fmt: skip


# ---- CPU ------------------------------------------------------------------------------------------------------------


def products(backward):
    """The layer's matrix products in segments, of rows that nobody had to gather or activate."""

    def call(i):
        rows, hidden, grad, grad_hidden, w_in, w_out = (
            i[name].detach() for name in ("rows", "hidden", "grad_rows", "grad_hidden", "w_in", "w_out")
        )
        results = [hidden.new_empty(len(rows), w_in.shape[1]), rows.new_empty(len(rows), w_out.shape[1])]
        if backward:
            results += [torch.empty_like(t) for t in (hidden, rows, w_in, w_out)]
        for expert, (begin, end) in enumerate(itertools.pairwise(i["bounds"])):
            part = slice(begin, end)
            torch.mm(rows[part], w_in[expert].t(), out=results[0][part])
            torch.mm(hidden[part], w_out[expert].t(), out=results[1][part])
            if backward:
                torch.mm(grad[part], w_out[expert], out=results[2][part])
                torch.mm(grad_hidden[part], w_in[expert], out=results[3][part])
                torch.mm(grad_hidden[part].t(), rows[part], out=results[4][expert])
                torch.mm(grad[part].t(), hidden[part], out=results[5][expert])
        return results

    return call


def with_rows(i):
    """What ``products`` needs: the rows of every product, as the layer would have made them."""
    with torch.no_grad():
        routing = moe_route(F.linear(i["x"], i["router"]), TOP_K)
        rows = i["x"][routing.order // TOP_K].contiguous()
        pre = torch.randn(len(rows), i["w_in"].shape[1])
    hidden = torch.randn(len(rows), i["w_out"].shape[2])
    grads = {"grad_rows": i["grad"].repeat(TOP_K, 1), "grad_hidden": pre}
    return {**i, "rows": rows, "hidden": hidden, **grads, "bounds": routing.offsets.tolist()}


def transformers_layers(inputs, names):
    """name -> (call, inputs with a JambaSparseMoeBlock that holds their weights), or nothing and why."""
    reason = peers.why_absent("transformers")
    if reason:
        return {}, {}, {f"transformers {name}": reason for name in names}
    from transformers.models.jamba.modeling_jamba import JambaConfig, JambaSparseMoeBlock

    def call(i):
        return i["block"](i["x"][None])[0]

    calls, blocks = {}, {}
    for name in names:
        blocks[f"transformers {name}"] = held = []
        calls[f"transformers {name}"] = call
        for i in inputs:
            experts, double, d = i["w_in"].shape
            config = JambaConfig(
                hidden_size=d, intermediate_size=double // 2, num_experts=experts, num_experts_per_tok=TOP_K
            )
            config._experts_implementation = name
            with torch.device("meta"):
                block = JambaSparseMoeBlock(config)
            block.router.weight, block.experts.gate_up_proj, block.experts.down_proj = (
                torch.nn.Parameter(i[key].detach(), i[key].requires_grad) for key in ("router", "w_in", "w_out")
            )
            experts = block.experts
            held.append(
                {**i, "block": block, "router": block.router.weight, "w_in": experts.gate_up_proj,
                 "w_out": experts.down_proj}
            )  # fmt: skip
    return calls, blocks, {}


def shifted(inputs, by):
    """The same inputs, from another place on."""
    return [*inputs[by % len(inputs) :], *inputs[: by % len(inputs)]]


def compare(contest, case, ours, inputs, others, held, absent, rounds, calls=1):
    everyone = ("ours", *others)
    contest(
        case, ours, inputs, others, absent=absent,
        peer_inputs={name: shifted(held.get(name, inputs), 1 + turn) for turn, name in enumerate(others)},
        threads=dict.fromkeys(everyone, THREADS), rounds=rounds, calls=calls,
    )  # fmt: skip
    for name in others:
        if name in case.seconds and not name.startswith(("transformers", "reading", "products")):
            case.note(f"faster than {name} by", case.seconds[name] / case.seconds["ours"])


@pytest.mark.parametrize("what, most", [("forward", 1.3), ("forward and backward", 1.4)])
def test_clip(contest, native, what, most):
    backward = what != "forward"
    case = layer_case(what, CLIP, "float32", "cpu", threads=THREADS, isa=native.cpu_isa())
    inputs = rotation(lambda seed: with_rows(layer_inputs(*CLIP, seed=seed, grad=backward)), most=4)
    others, held, absent = transformers_layers(inputs, ("eager", "grouped_mm"))
    composed, reasons = peers.experts("cpu")
    others |= {name: layer_of(experts) for name, experts in composed.items()}
    wrap = training if backward else lambda call: call
    others = {name: wrap(call) for name, call in others.items()}
    with torch.set_grad_enabled(backward):
        everyone = {"products alone": products(backward), **others}
        compare(contest, case, wrap(layer), inputs, everyone, held, absent | reasons, rounds=15)
    seconds = case.seconds
    case.bar("time of the products alone", seconds["ours"] / seconds["products alone"], most=most)
    for name, least in (("transformers grouped_mm", 1.1), ("transformers eager", 1.5)):
        if name in seconds:
            case.bar(f"faster than {name} by", seconds[name] / seconds["ours"], least=least)
    case.note("products, operations/s", case.record["operations"]["products"] / seconds["ours"])


def test_one_token(contest, native):
    """Every call has other experts than the one before, and their weights are in no cache."""
    tokens, d, hidden = shape = (1, *CLIP[1:])
    case = layer_case("forward", shape, "float32", "cpu", threads=THREADS, isa=native.cpu_isa())
    inputs = []
    for layer_weights in rotation(lambda seed: layer_inputs(*shape, seed=seed)):
        for first in range(0, EXPERTS, TOP_K):
            # A router that sends this token to these experts.
            router = torch.zeros(EXPERTS, d)
            router[first : first + TOP_K] = layer_weights["x"]
            inputs.append({**layer_weights, "router": router, "chosen": range(first, first + TOP_K)})

    def reading(i):
        return [i[name][expert].sum() for expert in i["chosen"] for name in ("w_in", "w_out")]

    def multiplying(i):
        return [i["w_in"][expert] @ i["x"][0] for expert in i["chosen"]], [
            i["w_out"][expert] @ i["w_in"][expert, :hidden, 0] for expert in i["chosen"]
        ]

    others, held, absent = transformers_layers(inputs, ("eager", "batched_mm"))
    everyone = {"reading by sum": reading, "reading by mv": multiplying, **others}
    with torch.no_grad():
        compare(contest, case, layer, inputs, everyone, held, absent, rounds=41)
    seconds = case.seconds
    streamed = min(seconds["reading by sum"], seconds["reading by mv"])
    case.bar("time of reading the chosen experts once", seconds["ours"] / streamed, most=1.5)
    case.note("bytes/s", case.record["bytes"] / seconds["ours"])
    for name in others:
        if name in seconds:
            case.note(f"faster than {name} by", seconds[name] / seconds["ours"])


# ---- GPU ------------------------------------------------------------------------------------------------------------

only_triton = pytest.mark.parametrize("gpu", ["triton"], indirect=True)
# TFLOP/s forward and backward that issue 4 asks for at LARGE, by the name of the card.
SPEEDS = {"RTX 4090": (115, 100), "H200": (450, 400)}


def flops(case, seconds):
    return case.record["operations"]["products"] / seconds


def card_bars(which):
    name = torch.cuda.get_device_name()
    return next((speeds[which] for card, speeds in SPEEDS.items() if card in name), None)


def peak_memory(call, i):
    """Bytes allocated beyond what was there before the call."""
    call(i)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call(i)
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def peak_bar(case, ours, others, i, most):
    """What one call allocates at most, against PyTorch's grouped product composed: in eager mode, without a graph."""
    case.bar("peak memory, of grouped_mm's", peak_memory(ours, i) / peak_memory(others["grouped_mm"], i), most=most)


def cuda_layers(shape, grad):
    """-> peers by name, what one of them takes instead of the inputs, why others are absent, and the inputs."""
    composed, absent = peers.experts("cuda")
    inputs = rotation(lambda s: layer_inputs(*shape, torch.bfloat16, "cuda", s, grad), "cuda", most=8)
    others, held, reasons = transformers_layers(inputs, ("grouped_mm",))
    return others | {name: layer_of(experts) for name, experts in composed.items()}, held, absent | reasons, inputs


def against_peers(case, names):
    for name in names:
        if name in case.seconds:
            least = 1.0 if name == "grouped_mm" else 0.75
            case.bar(f"faster than {name} by", case.seconds[name] / case.seconds["ours"], least=least)


@only_triton
@pytest.mark.parametrize("shape", [CLIP, LARGE, WIDE], ids=["clip", "large", "wide"])
def test_cuda_forward(contest, gpu, shape):
    others, held, absent, inputs = cuda_layers(shape, grad=False)
    case = layer_case("forward", shape, "bfloat16", "cuda", backend=gpu)
    with torch.no_grad():
        contest(case, lambda i: layer(i, gpu), inputs, others, absent=absent, peer_inputs=held, rounds=50)
        peak_bar(case, lambda i: layer(i, gpu), others, inputs[0], most=0.7)
    against_peers(case, others)
    least = card_bars(0) if shape != CLIP else None
    case.bar("TFLOP/s", flops(case, case.seconds["ours"]) / 1e12, least=least)


@only_triton
@pytest.mark.parametrize("shape", [CLIP, LARGE], ids=["clip", "large"])
def test_cuda_backward(contest, gpu, shape):
    """Backward is what forward and backward take beyond forward: only whole calls go into a CUDA graph."""
    others, held, absent, inputs = cuda_layers(shape, grad=True)
    absent["vllm"] = absent.get("vllm", "has no backward")
    others.pop("vllm", None)
    case = layer_case("forward and backward", shape, "bfloat16", "cuda", backend=gpu)

    def ours(i):
        return layer(i, gpu)

    contest(
        case, training(ours), inputs,
        {"forward": lambda i: ours(i).detach(), **{name: training(call) for name, call in others.items()}},
        absent=absent, peer_inputs=held, rounds=30,
    )  # fmt: skip
    against_peers(case, others)
    seconds = case.seconds["ours"] - case.seconds["forward"]
    case.bar("TFLOP/s backward", flops(case, seconds) * 2 / 3 / 1e12, least=card_bars(1) if shape == LARGE else None)
    # Of a clip's peak the weights' gradients, which both allocate, are three quarters: there the ratio is a figure.
    wrapped = {name: training(call) for name, call in others.items()}
    peak_bar(case, training(ours), wrapped, inputs[0], most=0.7 if shape == LARGE else None)


@only_triton
def test_cuda_one_token(contest, gpu):
    shape = (1, *CLIP[1:])
    others, held, absent, inputs = cuda_layers(shape, grad=False)
    case = layer_case("forward", shape, "bfloat16", "cuda", backend=gpu)
    with torch.no_grad():
        contest(case, lambda i: layer(i, gpu), inputs, others, absent=absent, peer_inputs=held, rounds=50)
    against_peers(case, others)
    case.note("microseconds", case.seconds["ours"] * 1e6)


@pytest.mark.parametrize("tokens", [600, 8192])
def test_cuda_route(contest, gpu, tokens):
    """Up to 16k assignments in 8 us, by Triton and by CUDA C++."""
    case = Case(
        f"moe_route ({tokens}, {EXPERTS}) top {TOP_K} float32, {gpu}",
        "moe_route", "cuda", bytes=tokens * (8 * EXPERTS + 12 * TOP_K), operations={"exp": tokens * EXPERTS},
        limit="latency of two launches",
        facts={"pass": "forward", "shape": [tokens, EXPERTS], "top_k": TOP_K, "dtype": "float32", "backend": gpu},
    )  # fmt: skip

    def composed(i):
        weights, chosen = torch_route(i["logits"])
        experts, order = chosen.flatten().sort(stable=True)
        return weights, order, (experts[:, None] <= torch.arange(EXPERTS, device="cuda")).sum(0)

    inputs = [{"logits": torch.randn(tokens, EXPERTS, device="cuda")} for _ in range(8)]
    with torch.no_grad():
        contest(case, lambda i: moe_route(i["logits"], TOP_K, backend=gpu), inputs, {"torch": composed}, rounds=50)
    case.bar("microseconds", case.seconds["ours"] * 1e6, most=8)
    case.bar("faster than torch by", case.seconds["torch"] / case.seconds["ours"], least=1.0)
