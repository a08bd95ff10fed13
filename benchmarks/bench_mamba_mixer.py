"""transformers' MambaMixer with compat.install(), against the same mixer on its own PyTorch path, two threads.

Work: the four matrix products, 16 states of scan and 4 taps of convolution per channel and position. The ceiling: the
products alone. transformers' own backward takes half a minute and does not vary much, so it runs once.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import time
import warnings

import pytest
import torch
import torch.nn.functional as F

from benchmarks.results import Case
from benchmarks.timing import rotation
from jambatalk_kernels import compat

WIDTH, LENGTH, BATCH, THREADS = 512, 300, 4, 2
MODEL_FILE = "transformers.models.mamba.modeling_mamba"


@pytest.fixture(scope="module")
def mixers():
    """(ours, transformers' own): one mixer with the same weights, from the model file imported after and before."""
    pytest.importorskip("transformers")
    for package in ("mamba_ssm", "causal_conv1d"):
        if importlib.util.find_spec(package):
            pytest.skip(f"{package} is installed: transformers does not run on its own path")
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
    mixer = {"ours": ours.MambaMixer(config, 0), "own": own.MambaMixer(config, 0)}
    mixer["ours"].load_state_dict(mixer["own"].state_dict())
    return mixer["ours"], mixer["own"]


@pytest.fixture
def inputs():
    def make(seed):
        g = torch.Generator().manual_seed(seed)
        return {
            "x": torch.randn(BATCH, LENGTH, WIDTH, generator=g),
            "u": torch.randn(BATCH, LENGTH, 2 * WIDTH, generator=g),
            "grad": torch.randn(BATCH, LENGTH, WIDTH, generator=g),
        }

    return rotation(make)


def mixer_case(what, native, mixer):
    weights = sum(m.weight.numel() for m in mixer.modules() if isinstance(m, torch.nn.Linear))
    positions, passes = BATCH * LENGTH, {"forward": 1, "forward and backward": 3}[what]
    steps = positions * 2 * WIDTH
    return Case(
        f"transformers MambaMixer {what} d {WIDTH} ({BATCH}, {LENGTH}) float32, {THREADS} threads, {native.cpu_isa()}",
        "compat", "cpu", bytes=4 * (weights + 2 * positions * WIDTH) * passes,
        operations={"float32": passes * (weights * positions + steps * (16 * 3 + 4)), "exp": passes * steps * 16},
        limit="matrix products",
        facts={"pass": what, "threads": THREADS, "isa": native.cpu_isa(), "shape": [BATCH, LENGTH, WIDTH]},
    )  # fmt: skip


def projections(mixer):
    """in_proj and out_proj, the two large products."""
    return lambda i: (F.linear(i["x"], mixer.in_proj.weight), F.linear(i["u"], mixer.out_proj.weight))


def gradients(mixer):
    parameters = list(mixer.parameters())

    def call(i):
        x = i["x"].detach().requires_grad_()
        return torch.autograd.grad(mixer(x), [x, *parameters], i["grad"])

    return call


@torch.no_grad()
def test_forward(contest, native, mixers, inputs):
    ours, own = (mixer.eval() for mixer in mixers)
    torch.testing.assert_close(ours(inputs[0]["x"]), own(inputs[0]["x"]))
    case = mixer_case("forward", native, ours)
    contest(
        case, lambda i: ours(i["x"]), inputs,
        {"transformers": lambda i: own(i["x"]), "two projections": projections(ours)},
        threads=dict.fromkeys(("ours", "transformers", "two projections"), THREADS),
    )  # fmt: skip
    case.bar("faster than transformers by", case.seconds["transformers"] / case.seconds["ours"], least=6)
    case.note("time of the two projections alone", case.seconds["ours"] / case.seconds["two projections"])


def test_training(contest, native, mixers, inputs):
    ours, own = (mixer.train() for mixer in mixers)
    case = mixer_case("forward and backward", native, ours)
    contest(case, gradients(ours), inputs, threads={"ours": THREADS})
    torch.set_num_threads(THREADS)
    start = time.perf_counter()
    want = gradients(own)(inputs[0])
    case.seconds["transformers"] = time.perf_counter() - start
    for got, expected in zip(gradients(ours)(inputs[0]), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
    case.bar("faster than transformers by", case.seconds["transformers"] / case.seconds["ours"], least=100)
