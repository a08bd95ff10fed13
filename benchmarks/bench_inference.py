"""Whole inference on the public path, from a sound file to vertices, by stage; memory over long audio; start-up.

Every measurement is a process of its own, with the memory allocator as a user has it: this file, run as a program.

    python -m benchmarks.bench_inference vocaset --seconds 10 --weights bfloat16 --write

`vocaset` has the base-size encoder, random weights, no basis: its vertices come from one product with 3V columns.
`demo` is the bundled checkpoint.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from benchmarks.results import Case
from benchmarks.timing import CUDA_CAP

ROOT = Path(__file__).resolve().parents[1]
THREADS = 2
RATE = 16000
SHORT = 60.0  # seconds: the clip whose memory a longer one's is compared with


# ---- the program: one model, a few runs, one line of JSON -----------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("preset", choices=("vocaset", "demo"))
    parser.add_argument("--seconds", type=float, default=10.0, help="of audio")
    parser.add_argument("--weights", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--runs", type=int, default=1, help="after one that lays out the weights")
    parser.add_argument("--first", type=float, help="seconds of audio of that first run (default: as the others)")
    parser.add_argument("--write", action="store_true", help="an .npz; otherwise all vertices, kept nowhere")
    options = parser.parse_args()

    import torch

    torch.set_num_threads(options.threads)
    if options.device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, CUDA_CAP / total))
    model = load_model(options.preset).to(options.device)
    model.weights_dtype = getattr(torch, options.weights)
    begun = time.perf_counter()
    program = model.program()
    folding = time.perf_counter() - begun
    with tempfile.TemporaryDirectory() as folder:
        audio = sound(Path(folder) / "first.wav", options.first or options.seconds)
        first = run(model, audio, program, folder if options.write else None)
        peak = peak_memory()
        audio = sound(Path(folder) / "a.wav", options.seconds)
        runs = [run(model, audio, program, folder if options.write else None) for _ in range(options.runs)]
    result = {"first": first, "best": min(runs, key=lambda stages: stages["total"]), "folding": folding}
    result |= {"grown": peak_memory() - peak, "parameters": sum(p.numel() for p in model.parameters())}
    if options.device == "cuda":
        result["gpu_memory"] = torch.cuda.max_memory_allocated()
    print(json.dumps(result))


def load_model(preset: str):
    import torch

    from jambatalk.config import JambaTalkConfig
    from jambatalk.model import JambaTalk

    if preset == "demo":
        return JambaTalk.from_pretrained()
    torch.manual_seed(0)
    model = JambaTalk(JambaTalkConfig.from_preset(preset)).eval()
    torch.nn.init.normal_(model.head.weight, std=1e-4)
    return model


def sound(path: Path, seconds: float):
    """Noise, as a wav file; as an array where nothing can read one. Made by the minute, so that it takes no memory."""
    import numpy as np

    random = np.random.default_rng(0)
    if importlib.util.find_spec("soundfile") is None:
        return random.uniform(-0.3, 0.3, round(seconds * RATE)).astype(np.float32)
    import soundfile

    with soundfile.SoundFile(path, "w", RATE, 1) as file:
        left = round(seconds * RATE)
        while left:
            block = random.uniform(-0.3, 0.3, min(left, 60 * RATE)).astype(np.float32)
            file.write(block)
            left -= len(block)
    return path


def run(model, audio, program, folder: str | None) -> dict[str, float]:
    """Seconds by stage and in all, and the bytes of what an animation keeps: the samples and the coefficients."""
    begun = time.perf_counter()
    animation = model.animate(audio, program=program)
    if folder is not None:
        animation.save(Path(folder) / "a.npz")
    else:
        for _ in animation.iter_vertices():
            pass
    total = time.perf_counter() - begun
    stages = dict(animation.seconds)
    stages["write"] = max(0.0, total - sum(stages.values())) if folder is not None else 0.0
    return {**stages, "total": total, "kept": animation.audio[0].nbytes + animation.coefficients.nbytes}


def peak_memory() -> int:
    """Bytes of this process's memory at its largest so far."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ---- the cases ------------------------------------------------------------------------------------------------------


def measure(*arguments: object) -> dict:
    command = [sys.executable, "-m", "benchmarks.bench_inference", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def inference_case(name: str, device: str, result: dict, seconds: float, **facts) -> Case:
    case = Case(
        f"inference {name}", "inference", device, bytes=0, operations={},
        limit="the encoder's products, and reading the loop's weights",
        facts={"audio_seconds": seconds, "parameters": result["parameters"], **facts},
    )  # fmt: skip
    best = result["best"]
    case.seconds["ours"] = best["total"]
    case.seconds.update({f"of it {stage}": best[stage] for stage in ("read", "encode", "decode", "vertices", "write")})
    return case


def two_cores() -> None:
    if len(os.sched_getaffinity(0)) < THREADS:
        pytest.skip("this process may use one core: the bar is for two")
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers, which the encoder is composed of, is not installed")


@pytest.mark.parametrize("weights, most", [("float32", 0.30), ("bfloat16", 0.20)])
def test_ten_seconds_at_the_papers_size(contest, native, weights, most):
    two_cores()
    seconds = 10.0
    result = measure("vocaset", "--seconds", seconds, "--weights", weights, "--runs", 5, "--write")
    name = f"vocaset {weights}, {seconds:g} s to an .npz, {THREADS} threads, {native.cpu_isa()}"
    case = inference_case(name, "cpu", result, seconds, weights=weights, threads=THREADS, isa=native.cpu_isa())
    contest.keep(case)
    best = result["best"]
    case.bar("real-time factor", best["total"] / seconds, most=most)
    case.note("of the encoder alone", best["encode"] / seconds)
    case.bar("neither encoder nor loop, share", 1 - (best["encode"] + best["decode"]) / best["total"], most=0.1)
    case.note("first run, weights folded and laid out in it", (result["first"]["total"] + result["folding"]) / seconds)


@pytest.mark.parametrize("minutes", [5, 10, 60])
def test_long_audio_in_constant_memory(contest, native, minutes):
    """Memory grows by the samples and the coefficients that the animation keeps, 72 kB for a second, and by no more
    than the segment of 64 MiB (`audio._SEGMENT`) that is there twice while the samples are put together."""
    two_cores()
    seconds = 60.0 * minutes
    result = measure("demo", "--seconds", seconds, "--first", SHORT)
    name = f"demo {minutes} min, {THREADS} threads, {native.cpu_isa()}"
    case = inference_case(name, "cpu", result, seconds, threads=THREADS, isa=native.cpu_isa())
    contest.keep(case)
    kept = result["best"]["kept"]
    case.bar("real-time factor", result["best"]["total"] / seconds, most=0.05)
    case.note("samples and coefficients, MB", kept / 1e6)
    case.bar("peak memory beyond that and a minute's, MB", (result["grown"] - kept) / 1e6, most=64)


def test_start_up(contest, native):
    """Fresh processes, their files in the page cache: the best of three."""
    two_cores()
    clip = ROOT / "jambatalk" / "assets" / "demo.wav"
    frame = (
        "import sys; from jambatalk.model import JambaTalk; face = JambaTalk.from_pretrained().animate(sys.argv[1]); "
        "next(face.iter_vertices(1)); print(face.frames, flush=True)"
    )
    commands = {
        "ours": ["-c", frame, clip],
        "of it torch": ["-c", "import torch; print(flush=True)"],
        "of it torch and transformers' encoder": [
            "-c", "import torch; from transformers.models.wav2vec2 import modeling_wav2vec2; print(flush=True)",
        ],
        "help": ["-m", "jambatalk.infer", "--help"],
    }  # fmt: skip
    case = Case(
        f"start-up of the demo, {native.cpu_isa()}", "inference", "cpu", bytes=0, operations={},
        limit="the imports of torch and transformers", facts={"cores": len(os.sched_getaffinity(0))},
    )  # fmt: skip
    for _ in range(3):
        for name, command in commands.items():
            case.seconds[name] = min(case.seconds.get(name, 1e9), until_first_line(command))
    contest.keep(case)
    case.bar("seconds to the first frame", case.seconds["ours"], most=6)
    case.bar("seconds of --help", case.seconds["help"], most=1)


def until_first_line(command: list) -> float:
    """Seconds from the start of a Python process until it prints."""
    begun = time.perf_counter()
    with subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        line = process.stdout.readline()
        seconds = time.perf_counter() - begun
        process.stdout.read()
    assert line and process.returncode == 0
    return seconds


@pytest.mark.parametrize("preset, weights, seconds", [("vocaset", "bfloat16", 10.0), ("demo", "bfloat16", 600.0)])
def test_cuda_inference(contest, preset, weights, seconds):
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    result = measure(preset, "--seconds", seconds, "--weights", weights, "--device", "cuda", "--runs", 3)
    case = inference_case(f"{preset} {weights}, {seconds:g} s", "cuda", result, seconds, weights=weights)
    contest.keep(case)
    case.note("real-time factor", result["best"]["total"] / seconds)
    case.note("peak memory in GB", result["gpu_memory"] / 1e9)


if __name__ == "__main__":
    main()
