"""causal_conv1d: how close to a copy of its input it comes; against F.conv1d (transformers' path), causal_conv1d, fla.

Per element: width multiplications and additions, and silu (an exponential, a division). Bytes: x read, y written. A
copy moves the same bytes and computes nothing: it is the ceiling. ``cached`` cases repeat one input.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks import peers
from benchmarks.results import Case
from benchmarks.timing import copy_bandwidth, rotation
from jambatalk_kernels import causal_conv1d, causal_conv1d_step

LARGE, SMALL = (4, 4096, 4096), (1, 600, 1024)


def conv_inputs(batch, length, channels, width, dtype=torch.float32, device="cpu", seed=0, grad=False):
    g = torch.Generator(device).manual_seed(seed)
    named = {
        "x": torch.randn(batch, length, channels, generator=g, device=device).to(dtype),
        "weight": torch.randn(channels, width, generator=g, device=device).to(dtype),
        "bias": torch.randn(channels, generator=g, device=device).to(dtype),
    }
    return {name: tensor.requires_grad_(grad) for name, tensor in named.items()}


def conv_case(what, shape, width, dtype, device, note="", **facts):
    batch, length, channels = shape
    elements = batch * length * channels
    arrays = {"forward": 2, "forward and backward": 5}[what]  # backward reads x and grad_y, writes dx
    return Case(
        f"causal_conv1d {what} {shape} width {width} {dtype}{note}, {facts.get('isa') or facts['backend']}",
        "causal_conv1d", device,
        bytes=arrays * elements * getattr(torch, dtype).itemsize,
        operations={"exp": elements * arrays // 2, "float32": elements * (width + 4) * arrays // 2},
        limit="memory",
        facts={"pass": what, "shape": list(shape), "width": width, "dtype": dtype, **facts},
    )  # fmt: skip


def forward(inputs, **keywords):
    with torch.no_grad():
        return causal_conv1d(**inputs, activation="silu", **keywords)


def gradients(inputs, conv):
    y = conv(**inputs)
    return torch.autograd.grad(y, list(inputs.values()), y.detach())


def peer_calls(device):
    calls, absent = peers.conv(device)
    return {name: lambda i, call=call: call(**i) for name, call in calls.items()}, absent


# ---- CPU ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [4, 16])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("cached", [False, True], ids=["rotating", "cached"])
def test_forward(contest, native, cached, activation, width):
    shape = (1, 600, 1024)
    note = f" {activation or 'no activation'}{' cached' if cached else ''}"
    case = conv_case("forward", shape, width, "float32", "cpu", note, threads=1, isa=native.cpu_isa())
    inputs = rotation(lambda seed: conv_inputs(*shape, width, seed=seed), most=1 if cached else 48)
    calls, absent = peer_calls("cpu")
    with torch.no_grad():
        contest(
            case, lambda i: causal_conv1d(**i, activation=activation), inputs,
            {"copy": lambda i: i["x"].clone(), **calls}, absent=absent, rounds=30,
        )  # fmt: skip
    most = 1.5 if width == 4 and not cached else None  # the bar; the others are for the record
    case.bar("time of a copy", case.seconds["ours"] / case.seconds["copy"], most=most)
    case.note("faster than transformers by", case.seconds["transformers"] / case.seconds["ours"])


def test_training(contest, native):
    shape = (1, 600, 1024)
    case = conv_case("forward and backward", shape, 4, "float32", "cpu", threads=1, isa=native.cpu_isa())
    calls, absent = peers.conv("cpu")
    contest(
        case,
        lambda i: gradients(i, lambda **named: causal_conv1d(**named, activation="silu")),
        rotation(lambda seed: conv_inputs(*shape, 4, seed=seed, grad=True)),
        {name: lambda i, call=call: gradients(i, call) for name, call in calls.items()},
        absent=absent,
    )
    case.note("faster than transformers by", case.seconds["transformers"] / case.seconds["ours"])


def step_case(shape, width, dtype, device, facts):
    batch, channels = shape
    size = getattr(torch, dtype).itemsize
    return Case(
        f"causal_conv1d_step {shape} width {width} {dtype} cached, {facts.get('isa') or facts['backend']}",
        "causal_conv1d_step", device,
        bytes=batch * channels * (2 * (width - 1) * 4 + 2 * size) + channels * width * size,
        operations={"exp": batch * channels, "float32": batch * channels * (width + 4)},
        limit="latency of one call",
        facts={"pass": "step", "shape": list(shape), "width": width, "dtype": dtype, **facts},
    )  # fmt: skip


def step_inputs(dtype=torch.float32, device="cpu", seed=0):
    named = conv_inputs(1, 1, 1024, 4, dtype, device, seed)
    return {**named, "x": named["x"][:, 0], "state": torch.zeros(1, 3, 1024, device=device)}


def test_step(contest, native):
    case = step_case((1, 1024), 4, "float32", "cpu", {"threads": 1, "isa": native.cpu_isa()})
    with torch.no_grad():
        contest(
            case,
            lambda i: causal_conv1d_step(**i, activation="silu"),
            [step_inputs()],
            {"reference": lambda i: causal_conv1d_step(**i, activation="silu", backend="reference")},
            calls=50,
        )
    case.note("faster than reference by", case.seconds["reference"] / case.seconds["ours"])


# ---- GPU ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [4, 16])
def test_cuda_forward(contest, gpu, width):
    case = conv_case("forward", LARGE, width, "bfloat16", "cuda", backend=gpu)
    calls, absent = peer_calls("cuda")
    with torch.no_grad():
        contest(
            case,
            lambda i: forward(i, backend=gpu),
            rotation(lambda seed: conv_inputs(*LARGE, width, torch.bfloat16, "cuda", seed), "cuda"),
            {"copy": lambda i: i["x"].clone(), **calls},
            absent=absent, rounds=50,
        )  # fmt: skip
    case.bar("of the copy bandwidth measured here", case.seconds["copy"] / case.seconds["ours"], least=0.85)
    case.note("bytes/s", case.record["bytes"] / case.seconds["ours"])


def test_cuda_small(contest, gpu):
    case = conv_case("forward", SMALL, 4, "bfloat16", "cuda", backend=gpu)
    calls, absent = peer_calls("cuda")
    with torch.no_grad():
        contest(
            case,
            lambda i: forward(i, backend=gpu),
            rotation(lambda seed: conv_inputs(*SMALL, 4, torch.bfloat16, "cuda", seed), "cuda"),
            {"copy": lambda i: i["x"].clone(), **calls},
            absent=absent, rounds=50,
        )  # fmt: skip
    case.note("time of a copy", case.seconds["ours"] / case.seconds["copy"])


def test_cuda_training(contest, gpu):
    case = conv_case("forward and backward", LARGE, 4, "bfloat16", "cuda", backend=gpu)
    calls, absent = peers.conv("cuda")
    contest(
        case,
        lambda i: gradients(i, lambda **named: causal_conv1d(**named, activation="silu", backend=gpu)),
        rotation(lambda seed: conv_inputs(*LARGE, 4, torch.bfloat16, "cuda", seed, grad=True), "cuda"),
        {name: lambda i, call=call: gradients(i, call) for name, call in calls.items()},
        absent=absent, rounds=30,
    )  # fmt: skip
    case.note("of the copy bandwidth measured here", case.record["bytes"] / case.seconds["ours"] / copy_bandwidth())


def test_cuda_step(contest, gpu):
    case = step_case((1, 1024), 4, "bfloat16", "cuda", {"backend": gpu})
    inputs = rotation(lambda seed: step_inputs(torch.bfloat16, "cuda", seed), "cuda")
    with torch.no_grad():
        contest(case, lambda i: causal_conv1d_step(**i, activation="silu", backend=gpu), inputs, rounds=50)
    case.bar("microseconds", case.seconds["ours"] * 1e6, most=3)
