"""The model's own parts: a whole Mamba mixer of the `vocaset` preset against its matrix products alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from benchmarks.results import Case

try:
    from jambatalk.config import JambaTalkConfig
    from jambatalk.decoder import MambaMixer
except ModuleNotFoundError as error:  # a machine that has what the kernels need and no more
    pytest.skip(f"the model cannot be imported: {error}", allow_module_level=True)

LENGTH = 300


def test_mixer_against_its_products(contest, native):
    torch.manual_seed(0)
    mixer = MambaMixer(JambaTalkConfig.from_preset("vocaset")).eval()
    products = [module for module in mixer.modules() if isinstance(module, torch.nn.Linear)]
    inputs = {"x": torch.randn(1, LENGTH, 512)}
    inputs |= {f"row{i}": torch.randn(1, LENGTH, module.in_features) for i, module in enumerate(products)}
    weights = sum(module.weight.numel() for module in products)
    case = Case(
        f"MambaMixer d 512 length {LENGTH} float32 cached, 1 thread, {native.cpu_isa()}", "mixer", "cpu",
        bytes=4 * weights, operations={"float32": weights * LENGTH}, limit="matrix products",
        facts={"threads": 1, "isa": native.cpu_isa(), "length": LENGTH, "products": len(products)},
    )  # fmt: skip
    with torch.inference_mode():
        contest(
            case, lambda i: mixer(i["x"]), [inputs],
            {"products": lambda i: [F.linear(i[f"row{n}"], m.weight) for n, m in enumerate(products)]},
        )  # fmt: skip
    case.note("time of the products alone", case.seconds["ours"] / case.seconds["products"])
