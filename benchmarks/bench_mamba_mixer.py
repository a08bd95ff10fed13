"""transformers' MambaMixer with compat.install(), against the same mixer on its own PyTorch path, two threads.

Work: the four matrix products, 16 states of scan and 4 taps of convolution per channel and position. The ceiling: the
products alone. transformers' own path makes tensors of 80 MB, which the system hands out page by page: how long that
takes depends on whether freed memory is kept, as this suite does, or not, as a process does that nobody told. The bars
are of the latter, what a user sees, measured in a process of its own; the former is on record beside it. transformers'
own backward takes half a minute and runs once.

A mixer in training mode, as it is made, hands everything behind its first product to `mamba_inner_fn`: the bar's case.
One in evaluation mode calls the convolution and the scan, a tenth of its time, and multiplies by itself: a figure
without a bar, since the nine tenths are PyTorch's in both.

python -m benchmarks.bench_mamba_mixer forward|evaluation|training      that process: seconds of each, as JSON
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import json
import math
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks.results import Case
from benchmarks.timing import rotation
from jambatalk_kernels import compat

WIDTH, LENGTH, BATCH, THREADS = 512, 300, 4, 2
MODEL_FILE = "transformers.models.mamba.modeling_mamba"


def make_mixers() -> tuple[torch.nn.Module, torch.nn.Module]:
    """(ours, transformers' own): one mixer with the same weights, from the model file imported after and before."""
    own = importlib.import_module(MODEL_FILE)
    del sys.modules[MODEL_FILE]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other model files may be loaded already; they are not used here
            compat.install(allow_late=True)
        ours = importlib.import_module(MODEL_FILE)
    finally:
        compat.uninstall()
        sys.modules[MODEL_FILE] = sys.modules["transformers.models.mamba"].modeling_mamba = own
    torch.manual_seed(0)
    config = own.MambaConfig(hidden_size=WIDTH, state_size=16, num_hidden_layers=1)
    mixers = ours.MambaMixer(config, 0), own.MambaMixer(config, 0)
    mixers[0].load_state_dict(mixers[1].state_dict())
    return mixers


@pytest.fixture(scope="module")
def mixers():
    pytest.importorskip("transformers")
    for package in ("mamba_ssm", "causal_conv1d"):
        if importlib.util.find_spec(package):
            pytest.skip(f"{package} is installed: transformers does not run on its own path")
    return make_mixers()


def make_inputs(seed):
    g = torch.Generator().manual_seed(seed)
    sizes = {"x": WIDTH, "u": 2 * WIDTH, "grad": WIDTH}
    return {name: torch.randn(BATCH, LENGTH, size, generator=g) for name, size in sizes.items()}


def forward(mixer, mode=True):
    def call(i):
        with torch.no_grad():
            return mixer.train(mode)(i["x"])

    return call


def evaluation(mixer):
    return forward(mixer, mode=False)


def training(mixer):
    parameters = list(mixer.parameters())

    def call(i):
        x = i["x"].detach().requires_grad_()
        return torch.autograd.grad(mixer.train()(x), [x, *parameters], i["grad"])

    return call


PASSES = {"forward": forward, "evaluation": evaluation, "training": training}


def projections(mixer):
    """in_proj and out_proj, the two large products."""
    return lambda i: (F.linear(i["x"], mixer.in_proj.weight), F.linear(i["u"], mixer.out_proj.weight))


def in_a_fresh_process(what: str) -> dict[str, float]:
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "benchmarks.bench_mamba_mixer", what]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {f"{name}, memory not kept": seconds for name, seconds in json.loads(done.stdout).items()}


def mixer_case(what, native, mixer):
    weights = sum(m.weight.numel() for m in mixer.modules() if isinstance(m, torch.nn.Linear))
    positions, passes = BATCH * LENGTH, 3 if what.endswith("backward") else 1
    steps = positions * 2 * WIDTH
    return Case(
        f"transformers MambaMixer {what} d {WIDTH} ({BATCH}, {LENGTH}) float32, {THREADS} threads, {native.cpu_isa()}",
        "compat", "cpu", bytes=4 * (weights + 2 * positions * WIDTH) * passes,
        operations={"float32": passes * (weights * positions + steps * (16 * 3 + 4)), "exp": passes * steps * 16},
        limit="matrix products",
        facts={"pass": what, "threads": THREADS, "isa": native.cpu_isa(), "shape": [BATCH, LENGTH, WIDTH]},
    )  # fmt: skip


@pytest.mark.parametrize("what", ["forward", "evaluation"])
def test_forward(contest, native, mixers, what):
    ours, own = (PASSES[what](mixer) for mixer in mixers)
    inputs = rotation(make_inputs)
    torch.testing.assert_close(ours(inputs[0]), own(inputs[0]))
    case = mixer_case({"evaluation": "forward, evaluation mode"}.get(what, what), native, mixers[0])
    with torch.no_grad():
        contest(
            case, ours, inputs, {"transformers": own, "two projections": projections(mixers[0])},
            threads=dict.fromkeys(("ours", "transformers", "two projections"), THREADS),
        )  # fmt: skip
    case.seconds.update(in_a_fresh_process(what))
    seconds = case.seconds
    case.bar(
        "faster than transformers by, memory not kept",
        seconds["transformers, memory not kept"] / seconds["ours, memory not kept"],
        least=6 if what == "forward" else None,
    )
    case.note("faster than transformers by", seconds["transformers"] / seconds["ours"])
    case.note("time of the two projections alone", seconds["ours"] / seconds["two projections"])


def test_training(contest, native, mixers):
    case = mixer_case("forward and backward", native, mixers[0])
    contest(case, training(mixers[0]), rotation(make_inputs), threads={"ours": THREADS})
    case.seconds.update(in_a_fresh_process("training"))
    case.bar(
        "faster than transformers by, memory not kept",
        case.seconds["transformers, memory not kept"] / case.seconds["ours, memory not kept"], least=100,
    )  # fmt: skip


def main(what: str) -> None:
    torch.set_num_threads(THREADS)
    call = PASSES[what]
    calls = {name: call(mixer) for name, mixer in zip(("ours", "transformers"), make_mixers(), strict=True)}
    best, inputs = dict.fromkeys(calls, math.inf), itertools.cycle(rotation(make_inputs))
    for turn in range(15):
        for name, run in calls.items():
            if turn and (what, name) == ("training", "transformers"):
                continue
            each = next(inputs)
            start = time.perf_counter()
            run(each)
            best[name] = min(best[name], time.perf_counter() - start)
    print(json.dumps(best))


if __name__ == "__main__":
    main(sys.argv[1])
