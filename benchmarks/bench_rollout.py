"""rollout: the whole autoregressive loop of both presets, against reading their weights and against a loop in Python.

A frame reads every active weight once; so does one matrix-vector product of that size, the yardstick. "stepped" is the
interpreter of reference.py: a loop in Python over the native step ops, one frame at a time. Random weights.
"""

from __future__ import annotations

import os

import pytest
import torch

from benchmarks import peers
from benchmarks.results import Case
from jambatalk_kernels import rollout
from jambatalk_kernels.rollout.packing import frame_bytes
from jambatalk_kernels.rollout.program import AttentionMixer, RolloutState

try:
    from jambatalk.config import JambaTalkConfig
    from jambatalk.decoder import Decoder
except ModuleNotFoundError as error:  # a machine that has what the kernels need and no more
    pytest.skip(f"the model cannot be imported: {error}", allow_module_level=True)

FRAMES = {"vocaset": 4, "demo": 50}  # of one call: short, so that a quiet moment is enough on a busy machine
STEPPED = {"vocaset": 1.2, "demo": 2.5}


def make_program(preset, **changes):
    torch.manual_seed(0)
    config = JambaTalkConfig.from_preset(preset, **changes)
    size = config.d_model
    with torch.no_grad():
        decoder = Decoder(config).eval()
        return decoder.program(0.5 * size**-0.5 * torch.randn(size, size), 0.1 * torch.randn(size)), config


def rollout_case(preset, what, program, config, frames, native, threads=1, itemsize=4, batch=1):
    read, d = frame_bytes(program, itemsize), config.d_model
    layers = len(program.layers)
    exponentials = sum(getattr(layer.mixer, "A", torch.empty(0)).numel() for layer in program.layers)
    return Case(
        f"rollout {preset} {what}, {threads} thread{'s' if threads > 1 else ''}, {native.cpu_isa()}", "rollout", "cpu",
        bytes=frames * (read + 8 * batch * d),
        operations={
            "float32": frames * batch * (2 * read // itemsize + 4 * exponentials),
            "exp": frames * batch * exponentials,
        },
        limit="reading the weights",
        facts={"preset": preset, "d": d, "layers": layers, "frames": frames, "batch": batch, "threads": threads,
               "active_weights": read // itemsize, "window": config.attention_window, "isa": native.cpu_isa()},
    )  # fmt: skip


def make_inputs(config, frames, batch=1):
    return [{"x": torch.randn(batch, frames, config.d_model, generator=torch.Generator().manual_seed(1))}]


@pytest.mark.parametrize("preset", ["vocaset", "demo"])
def test_against_its_weights_and_the_stepped_loop(contest, native, preset):
    program, config = make_program(preset)
    frames = FRAMES[preset]
    case = rollout_case(preset, "float32", program, config, frames, native)
    weights = torch.randn(case.record["facts"]["active_weights"] // config.d_model, config.d_model)
    vector = torch.randn(config.d_model)
    others = {
        "weights read": lambda i: [torch.mv(weights, vector) for _ in range(frames)],
        "stepped": lambda i: rollout(program, i["x"], backend="reference"),
        "bfloat16": lambda i: rollout(program, i["x"], weights_dtype=torch.bfloat16),
    }
    contest(case, lambda i: rollout(program, i["x"]), make_inputs(config, frames), others, rounds=60)
    seconds = case.seconds
    case.note("ms per frame", 1e3 * seconds["ours"] / frames)
    case.note("bytes/s", case.record["bytes"] / seconds["ours"])
    case.bar("time of reading the weights", seconds["ours"] / seconds["weights read"], most=1.4)
    case.bar("faster than the stepped loop by", seconds["stepped"] / seconds["ours"], least=STEPPED[preset])
    gain = seconds["ours"] / seconds["bfloat16"]
    case.bar("bfloat16 faster by", gain, least=1.6) if preset == "vocaset" else case.note("bfloat16 faster by", gain)


@pytest.mark.parametrize("preset", ["vocaset", "demo"])
def test_two_threads(contest, native, preset):
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("this process may use one core: two threads have nothing to run on")
    program, config = make_program(preset)
    case = rollout_case(preset, "float32", program, config, FRAMES[preset], native, threads=2)

    def call(i):
        return rollout(program, i["x"])

    weights = torch.randn(case.record["facts"]["active_weights"])

    def read(i):
        return [weights.sum() for _ in range(FRAMES[preset])]

    inputs = make_inputs(config, FRAMES[preset])
    others = {"one thread": call, "one thread reading": read, "two threads reading": read}
    contest(case, call, inputs, others, threads={"ours": 2, "two threads reading": 2}, rounds=60)
    seconds = case.seconds
    gain = seconds["one thread"] / seconds["ours"]
    case.note("two threads read faster than one by", seconds["one thread reading"] / seconds["two threads reading"])
    case.note("time of two threads reading", seconds["ours"] / seconds["two threads reading"])
    if preset == "vocaset":
        case.bar("faster than one thread by", gain, least=1.5)
    else:
        case.note("faster than one thread by", gain)


def test_against_transformers(contest, native):
    """Their Jamba layers with their cache, the same weights; theirs have no rotation, so ours has none here."""
    if reason := peers.why_absent("transformers"):
        pytest.skip(f"transformers: {reason}")
    program, config = make_program("vocaset", rope_base=None)
    frames = 6
    case = rollout_case("vocaset", "without rotation", program, config, frames, native, threads=2)
    inputs, loop = make_inputs(config, frames), peers.jamba_loop(program)
    mine, theirs = rollout(program, inputs[0]["x"])[0], loop(inputs[0]["x"])
    assert (mine - theirs).norm() <= 2e-5 * theirs.norm()  # the same model: 1e-5, the contract, on either side
    contest(
        case, lambda i: rollout(program, i["x"]), inputs, {"transformers": lambda i: loop(i["x"])},
        threads={"ours": 2, "transformers": 2}, rounds=10,
    )  # fmt: skip
    case.note("transformers, ms per frame", 1e3 * case.seconds["transformers"] / frames)
    case.bar("faster than transformers by", case.seconds["transformers"] / case.seconds["ours"], least=2.5)


def test_against_faceformer(contest, native):
    """600 frames, vertices included on both sides."""
    program, config = make_program("demo")
    frames = 600
    case = rollout_case("demo", f"{frames} frames to vertices", program, config, frames, native, threads=2)
    to_basis = torch.randn(config.motion_rank, config.d_model)
    basis = torch.randn(3 * config.vertices, config.motion_rank)
    torch.manual_seed(0)
    theirs = peers.FaceFormerLoop(config.vertices).eval()
    audio = torch.randn(1, frames, 64)
    name = "FaceFormer's loop"
    contest(
        case, lambda i: rollout(program, i["x"])[0] @ to_basis.T @ basis.T, make_inputs(config, frames),
        {name: lambda i: theirs(audio)}, threads={"ours": 2, name: 2}, rounds=2,
    )  # fmt: skip
    case.note(f"{name}, ms per frame", 1e3 * case.seconds[name] / frames)
    case.bar(f"faster than {name} by", case.seconds[name] / case.seconds["ours"], least=25)


def test_a_long_clip_costs_what_its_frames_cost(contest, native):
    """`demo` looks back over a window: 6000 frames whole."""
    program, config = make_program("demo")
    short, long = 600, 6000
    case = rollout_case("demo", f"{long} frames", program, config, long, native)
    inputs = make_inputs(config, long)
    contest(
        case, lambda i: rollout(program, i["x"]), inputs,
        {f"{short} frames": lambda i: rollout(program, i["x"][:, :short])}, rounds=3,
    )  # fmt: skip
    case.bar(f"time of {short} frames", case.seconds["ours"] / case.seconds[f"{short} frames"], most=10.5)


def test_a_long_clip_without_a_window(contest, native):
    """`vocaset` looks back over the whole clip: a frame's cost is a constant and a share that grows with its position,
    so that a clip costs its frames times the frame in its middle, which is what is timed."""
    program, config = make_program("vocaset")
    frames, (short, long) = 16, (600, 6000)  # of one call: few would be lost in the copy of the cache

    def middle(length):
        state = RolloutState.empty(program.layers, config.d_model, 1, frames=length)
        for tensor in state.tensors():
            tensor.fill_(length // 2) if tensor.dtype == torch.int64 else tensor.normal_()
        return state

    states = {length: middle(length) for length in (short, long)}
    case = rollout_case("vocaset", f"middle of {long} frames", program, config, frames, native)
    case.record["bytes"] += frames * sum(  # keys and values
        8 * layer.mixer.kv_heads * layer.mixer.head_dim * long // 2
        for layer in program.layers if isinstance(layer.mixer, AttentionMixer)
    )  # fmt: skip
    inputs = make_inputs(config, frames)
    contest(
        case, lambda i: rollout(program, i["x"], states[long]), inputs,
        {f"middle of {short} frames": lambda i: rollout(program, i["x"], states[short])}, rounds=30,
    )  # fmt: skip
    ratio = long / short * case.seconds["ours"] / case.seconds[f"middle of {short} frames"]
    case.bar(f"time of {short} frames", ratio, most=10.5)


@pytest.mark.parametrize("preset", ["vocaset", "demo"])
def test_batch(contest, native, preset):
    program, config = make_program(preset)
    frames = FRAMES[preset]
    case = rollout_case(preset, "float32 batch 8", program, config, frames, native, batch=8)
    inputs = make_inputs(config, frames, batch=8)
    contest(
        case, lambda i: rollout(program, i["x"]), inputs,
        {"one sequence": lambda i: rollout(program, i["x"][:1])}, rounds=20,
    )  # fmt: skip
    case.note("frames/s of all sequences", 8 * frames / case.seconds["ours"])
    case.note("sequences at the price of one", 8 * case.seconds["one sequence"] / case.seconds["ours"])


@pytest.mark.parametrize("preset", ["vocaset", "demo"])
def test_one_frame_a_call(contest, native, preset):
    """Streaming: each call copies the state and gives it back."""
    program, config = make_program(preset, attention_window=300)
    inputs = make_inputs(config, 50)
    _, state = rollout(program, inputs[0]["x"])
    case = rollout_case(preset, "one frame a call", program, config, 1, native)
    contest(
        case, lambda i: rollout(program, i["x"][:, :1], state), inputs,
        {"50 frames a call": lambda i: rollout(program, i["x"], state)}, rounds=40,
    )  # fmt: skip
    alone = case.seconds["50 frames a call"] / 50
    case.note("ms per frame", 1e3 * case.seconds["ours"])
    case.note("microseconds a call beyond its frame", 1e6 * (case.seconds["ours"] - alone))


# ---- on a card ------------------------------------------------------------------------------------------------------

# preset, arrangement -> most microseconds a frame of one sequence, by the graph and by the persistent kernel
STEPS = {
    ("vocaset", "moe-moe"): {"triton": 200, "cuda": 90},
    ("vocaset", "m-m"): {"triton": None, "cuda": 60},
    ("demo", "moe-moe"): {"triton": None, "cuda": 20},
}
GPU_FRAMES, AVATARS = 200, 256


def cuda_case(preset, what, program, config, frames, backend, batch=1):
    read = frame_bytes(program, 2)
    return Case(
        f"rollout {preset} {what}, {backend}", "rollout", "cuda",
        bytes=frames * (read + 8 * batch * config.d_model),
        operations={"float32": frames * batch * read},
        limit="reading the weights",
        facts={"preset": preset, "d": config.d_model, "layers": len(program.layers), "frames": frames, "batch": batch,
               "active_weights": read // 2, "weights": "bfloat16", "backend": backend},
    )  # fmt: skip


def cuda_program(preset, **changes):
    program, config = make_program(preset, **changes)
    return program.map(torch.Tensor.cuda), config


@pytest.mark.parametrize("preset, arrangement", STEPS)
def test_cuda_step(contest, gpu, preset, arrangement):
    """One sequence, float32 with bfloat16 weights: time per frame. The graph is the peer of the persistent kernel."""
    program, config = cuda_program(preset, arrangement=arrangement)
    case = cuda_case(preset, f"{arrangement} step bfloat16", program, config, GPU_FRAMES, gpu)
    inputs = [{"x": torch.randn(1, GPU_FRAMES, config.d_model, device="cuda")}]

    def call(backend):
        return lambda i: rollout(program, i["x"], weights_dtype=torch.bfloat16, backend=backend)

    others = {} if gpu == "triton" else {"graph": call("triton")}
    contest(case, call(gpu), inputs, others, rounds=20)
    microseconds = 1e6 * case.seconds["ours"] / GPU_FRAMES
    most = STEPS[preset, arrangement][gpu]
    if most is None:
        case.note("microseconds a frame", microseconds)
    else:
        case.bar("microseconds a frame", microseconds, most=most)


def test_cuda_avatars(contest, gpu):
    """Many sequences of the demo's size side by side: frames per second of each."""
    program, config = cuda_program("demo")
    case = cuda_case("demo", f"{AVATARS} sequences bfloat16", program, config, 60, gpu, batch=AVATARS)
    inputs = [{"x": torch.randn(AVATARS, 60, config.d_model, device="cuda")}]
    contest(
        case, lambda i: rollout(program, i["x"], weights_dtype=torch.bfloat16, backend=gpu), inputs, {}, rounds=10
    )  # fmt: skip
    case.bar("frames/s of each sequence", 60 / case.seconds["ours"], least=30)
