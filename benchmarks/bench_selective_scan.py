"""selective_scan: throughput, its gradient, steps; against plain PyTorch, mambapy and mamba_ssm.

Per channel and position of N states, forward: N exponentials, 4 N float32 operations (delta A, decay, drive, output)
and about 20 around them (softplus, silu, D). Bytes: u, delta, z read, y written, B and C once per position. On a CPU
the exponential is 11 operations, arithmetic binds; on a GPU memory or the special-function unit does (cards.py).
Inputs as everywhere: D, z, softplus. Time alone says nothing of correctness: the tests do.
"""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F

from benchmarks import cards, peers, predict
from benchmarks.results import Case
from benchmarks.timing import copy_bandwidth, peak_matmul_flops, rotation
from jambatalk_kernels import selective_scan, selective_scan_step

STATES = 16


def scan_inputs(batch, length, channels, dtype=torch.float32, device="cpu", seed=0, grad=False):
    g = torch.Generator(device).manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, device=device)

    named = {
        "u": normal(batch, length, channels).to(dtype),
        "delta": (normal(batch, length, channels) * 0.5 - 1).to(dtype),
        "A": -torch.exp(normal(channels, STATES) * 0.5),
        "B": normal(batch, length, STATES).to(dtype),
        "C": normal(batch, length, STATES).to(dtype),
        "D": normal(channels),
        "z": normal(batch, length, channels).to(dtype),
    }
    return {name: tensor.requires_grad_(grad) for name, tensor in named.items()}


def scan_case(what, shape, dtype, device, **facts):
    batch, length, channels = shape
    positions, elements = batch * length, batch * length * channels
    size = getattr(torch, dtype).itemsize
    passes = {"forward": 1, "backward": 2, "forward and backward": 3}[what]
    # forward u, delta, z, y; backward reads those inputs and grad_y and writes three gradients
    arrays = {"forward": 4, "backward": 7, "forward and backward": 11}[what]
    where = f"{facts['threads']} thread{'s' if facts['threads'] > 1 else ''}, {facts['isa']}" if device == "cpu" else ""
    return Case(
        f"selective_scan {what} {shape} N {STATES} {dtype}, {where or facts['backend']}",
        "selective_scan", device,
        bytes=arrays * elements * size + 2 * positions * STATES * size * passes,
        operations={
            "exp": passes * elements * (STATES + 3),
            "float32": passes * elements * (4 * STATES + 20) * (2 if what == "backward" else 1),
        },
        limit="float32 arithmetic" if device == "cpu" else "memory, or special functions where there is much of it",
        facts={"pass": what, "shape": list(shape), "states": STATES, "dtype": dtype, **facts},
    )  # fmt: skip


def forward(inputs, **keywords):
    with torch.no_grad():
        return selective_scan(**inputs, delta_softplus=True, **keywords)


def gradients(inputs, scan):
    """Forward and backward by ``scan`` of u, delta, A, B, C, D, z."""
    y = scan(**inputs)
    return torch.autograd.grad(y, list(inputs.values()), y.detach())


def plain_loop(u, delta, A, B, C, D, z):
    """The scan as one writes it in PyTorch, and as the reference codes of mamba_ssm and transformers have it."""
    delta = F.softplus(delta)
    decay = torch.exp(delta.unsqueeze(-1) * A)
    drive = (delta * u).unsqueeze(-1) * B.unsqueeze(2)
    h = torch.zeros_like(decay[:, 0])
    rows = []
    for t in range(u.shape[1]):
        h = decay[:, t] * h + drive[:, t]
        rows.append((h * C[:, t].unsqueeze(1)).sum(-1))
    return (torch.stack(rows, 1) + D * u) * F.silu(z)


# ---- CPU ------------------------------------------------------------------------------------------------------------


def test_forward(contest, isa):
    shape = (1, 600, 1024)
    case = scan_case("forward", shape, "float32", "cpu", threads=1, isa=isa)
    contest(case, forward, rotation(lambda seed: scan_inputs(*shape, seed=seed)))
    rate = 600 * 1024 / case.seconds["ours"]
    case.bar("channel-steps/s", rate, least={"avx512": 2.0e8, "avx2": 0.8e8}[isa])
    if isa == "avx512":
        # 16 states of 10 fused operations (7 of them the exponential), on as many lanes as a matrix product uses.
        case.note("share of the fused multiply-add rate", rate * 160 / (peak_matmul_flops() / 2))


def test_backward(contest, isa):
    shape = (1, 600, 1024)

    def make(seed):
        inputs = scan_inputs(*shape, seed=seed, grad=True)
        y = selective_scan(**inputs, delta_softplus=True)
        return {**inputs, "y": y, "grad": torch.randn_like(y)}

    def backward(inputs):
        leaves = [tensor for tensor in inputs.values() if tensor.is_leaf and tensor.requires_grad]
        return torch.autograd.grad(inputs["y"], leaves, inputs["grad"], retain_graph=True)

    def forward_alone(inputs):
        return forward({name: tensor for name, tensor in inputs.items() if name not in ("y", "grad")})

    case = scan_case("backward", shape, "float32", "cpu", threads=1, isa=isa)
    contest(case, backward, rotation(make), {"forward": forward_alone})
    case.bar("backward / forward", case.seconds["ours"] / case.seconds["forward"], most=3.0)


@pytest.mark.parametrize("dtype", ["bfloat16"])
def test_forward_half_precision(contest, native, dtype):
    shape = (1, 600, 1024)
    case = scan_case("forward", shape, dtype, "cpu", threads=1, isa=native.cpu_isa())
    single = rotation(lambda seed: scan_inputs(*shape, seed=seed))
    half = rotation(lambda seed: scan_inputs(*shape, dtype=getattr(torch, dtype), seed=seed))
    contest(case, forward, half, {"float32": forward}, peer_inputs={"float32": single})
    case.note(f"{dtype} / float32", case.seconds["ours"] / case.seconds["float32"])


def test_forward_against_peers(contest, native):
    shape = (4, 300, 1024)
    calls, absent = peers.scan("cpu")
    case = scan_case("forward", shape, "float32", "cpu", threads=1, isa=native.cpu_isa())
    with torch.no_grad():
        others = {"plain loop": lambda i: plain_loop(**i), "reference": lambda i: forward(i, backend="reference")}
        others |= {name: lambda i, call=call: call(**i) for name, call in calls.items()}
        contest(
            case,
            forward,
            rotation(lambda seed: scan_inputs(*shape, seed=seed), most=3),
            others,
            absent=absent,
            rounds=3,
        )
    for name in others:
        if name in case.seconds:
            case.note(f"faster than {name} by", case.seconds[name] / case.seconds["ours"])


def test_training_against_peers(contest, native):
    shape = (4, 300, 1024)
    calls, absent = peers.scan("cpu")
    scans = {
        "plain loop": plain_loop,
        "reference": lambda **i: selective_scan(**i, delta_softplus=True, backend="reference"),
        **calls,
    }
    case = scan_case("forward and backward", shape, "float32", "cpu", threads=1, isa=native.cpu_isa())
    contest(
        case,
        lambda i: gradients(i, lambda **named: selective_scan(**named, delta_softplus=True)),
        rotation(lambda seed: scan_inputs(*shape, seed=seed, grad=True), most=3),
        {name: lambda i, scan=scan: gradients(i, scan) for name, scan in scans.items()},
        absent=absent,
        rounds=1,
    )
    for name in scans:
        if name in case.seconds:
            ratio = case.seconds[name] / case.seconds["ours"]
            case.bar(f"faster than {name} by", ratio, least=40) if name == "plain loop" else case.note(
                f"faster than {name} by", ratio
            )


@pytest.mark.parametrize("what", ["forward", "forward and backward"])
def test_two_threads(contest, native, what):
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("this process may use one core: two threads have nothing to run on")
    shape = (1, 600, 1024)
    grad = what != "forward"
    case = scan_case(what, shape, "float32", "cpu", threads=2, isa=native.cpu_isa())
    call = (lambda i: gradients(i, lambda **n: selective_scan(**n, delta_softplus=True))) if grad else forward
    inputs = rotation(lambda seed: scan_inputs(*shape, seed=seed, grad=grad))
    contest(case, call, inputs, {"one thread": call}, threads={"ours": 2}, rounds=25)
    case.bar("faster than one thread by", case.seconds["one thread"] / case.seconds["ours"], least=1.7)


def step_row(inputs):
    return {name: t[:, 0].contiguous() if t.dim() == 3 else t for name, t in inputs.items()}


def step_case(shape, dtype, device, size, facts, cached=""):
    batch, channels = shape
    return Case(
        f"selective_scan_step {shape} N {STATES} {dtype}{cached}, {facts.get('isa') or facts['backend']}",
        "selective_scan_step", device,
        bytes=batch * channels * (2 * 4 * STATES + 4 * size) + channels * STATES * 4,
        operations={"exp": batch * channels * (STATES + 3), "float32": batch * channels * (4 * STATES + 20)},
        limit="latency of one call",
        facts={"pass": "step", "shape": list(shape), "states": STATES, "dtype": dtype, **facts},
    )  # fmt: skip


def test_step(contest, native):
    """Cached, as in decoding: the state was written by the step before."""
    case = step_case((1, 1024), "float32", "cpu", 4, {"threads": 1, "isa": native.cpu_isa()}, " cached")
    row = step_row(scan_inputs(1, 1, 1024)) | {"state": torch.zeros(1, 1024, STATES)}
    with torch.no_grad():
        contest(
            case,
            lambda i: selective_scan_step(**i, delta_softplus=True),
            [row],
            {"reference": lambda i: selective_scan_step(**i, delta_softplus=True, backend="reference")},
            calls=20,
        )
    case.note("faster than reference by", case.seconds["reference"] / case.seconds["ours"])


# ---- GPU ------------------------------------------------------------------------------------------------------------


def roof(case, bandwidth):
    """Seconds under which no kernel goes on this card: its own copy bandwidth, or its special-function rate."""
    seconds = case.record["bytes"] / bandwidth
    card = cards.find(torch.cuda.get_device_name())
    return max(seconds, predict.special_seconds(case.record["operations"]["exp"], card)) if card else seconds


def cuda_peers(shape, dtype, grad):
    """mamba_ssm with its inputs in the layout that it is fast in."""
    calls, absent = peers.scan("cuda")
    calls.pop("mambapy", None)
    absent["mambapy"] = "PyTorch code for any device; timed on the CPU"

    def make(seed):
        inputs = peers.channel_first(scan_inputs(*shape, dtype=getattr(torch, dtype), device="cuda", seed=seed))
        return {name: tensor.detach().requires_grad_(grad) for name, tensor in inputs.items()}

    return calls, absent, {name: rotation(make, "cuda") for name in calls}


LARGE, SMALL = (4, 4096, 4096), (1, 600, 1024)


@pytest.mark.parametrize("shape", [LARGE, SMALL], ids=["large", "small"])
def test_cuda_forward(contest, gpu, shape):
    dtype = "bfloat16"
    calls, absent, theirs = cuda_peers(shape, dtype, grad=False)
    case = scan_case("forward", shape, dtype, "cuda", backend=gpu)
    with torch.no_grad():
        contest(
            case,
            lambda i: forward(i, backend=gpu),
            rotation(lambda seed: scan_inputs(*shape, dtype=getattr(torch, dtype), device="cuda", seed=seed), "cuda"),
            {name: lambda i, call=call: call(**i) for name, call in calls.items()},
            absent=absent, peer_inputs=theirs, rounds=50,
        )  # fmt: skip
    bandwidth = copy_bandwidth()
    case.note("bytes/s", case.record["bytes"] / case.seconds["ours"])
    case.note("of the copy bandwidth measured here", case.record["bytes"] / case.seconds["ours"] / bandwidth)
    if shape == SMALL:
        case.bar("microseconds", case.seconds["ours"] * 1e6, most=12)
    else:
        case.bar("of the roof", roof(case, bandwidth) / case.seconds["ours"], least=0.75)
        if "H200" in torch.cuda.get_device_name():
            case.bar("TB/s", case.record["bytes"] / case.seconds["ours"] / 1e12, least=1.6)


@pytest.mark.parametrize("shape", [LARGE, SMALL], ids=["large", "small"])
def test_cuda_backward(contest, gpu, shape):
    """Backward is what forward and backward take beyond forward: only whole calls go into a CUDA graph."""
    dtype = "bfloat16"
    calls, absent, theirs = cuda_peers(shape, dtype, grad=True)

    def ours(**named):
        return selective_scan(**named, delta_softplus=True, backend=gpu)

    case = scan_case("forward and backward", shape, dtype, "cuda", backend=gpu)
    contest(
        case,
        lambda i: gradients(i, ours),
        rotation(lambda s: scan_inputs(*shape, dtype=getattr(torch, dtype), device="cuda", seed=s, grad=True), "cuda"),
        {"forward": lambda i: ours(**i).detach()}
        | {name: lambda i, call=call: gradients(i, call) for name, call in calls.items()}
        | {f"{name} forward": lambda i, call=call: call(**i).detach() for name, call in calls.items()},
        absent=absent, peer_inputs=theirs | {f"{name} forward": inputs for name, inputs in theirs.items()}, rounds=30,
    )  # fmt: skip
    backward = case.seconds["ours"] - case.seconds["forward"]
    case.bar("backward / forward", backward / case.seconds["forward"], most=2.5)
    for name in calls:
        if name in case.seconds and f"{name} forward" in case.seconds:
            theirs_backward = case.seconds[name] - case.seconds[f"{name} forward"]
            case.bar(f"backward faster than {name}'s by", theirs_backward / backward, least=1.5)


def test_cuda_step(contest, gpu):
    """In a graph of 48 steps, state of each in memory of its own."""

    def make(seed):
        row = step_row(scan_inputs(1, 1, 1024, dtype=torch.bfloat16, device="cuda", seed=seed))
        return row | {"state": torch.zeros(1, 1024, STATES, device="cuda")}

    case = step_case((1, 1024), "bfloat16", "cuda", 2, {"backend": gpu})
    with torch.no_grad():
        contest(
            case,
            lambda i: selective_scan_step(**i, delta_softplus=True, backend=gpu),
            rotation(make, "cuda"),
            rounds=50,
        )
    case.bar("microseconds", case.seconds["ours"] * 1e6, most=3)
