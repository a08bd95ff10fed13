"""python benchmarks/mamba_mixer.py [--save NAME]: a whole Mamba mixer against its matrix products alone, one thread.

d_model 512, length 300, as in the `vocaset` preset. The ceiling is 1.0: nothing but the four products.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from timing import interleaved_seconds, save  # noqa: E402

from jambatalk.config import JambaTalkConfig  # noqa: E402
from jambatalk.decoder import MambaMixer  # noqa: E402

LENGTH = 300


@torch.inference_mode()
def measure() -> dict:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    mixer = MambaMixer(JambaTalkConfig.from_preset("vocaset")).eval()
    products = [module for module in mixer.modules() if isinstance(module, torch.nn.Linear)]
    rows = [torch.randn(1, LENGTH, module.in_features) for module in products]
    x = torch.randn(1, LENGTH, 512)
    seconds = interleaved_seconds(
        {
            "mixer": lambda: mixer(x),
            "products": lambda: [torch.nn.functional.linear(r, m.weight) for r, m in zip(rows, products, strict=False)],
        }
    )
    return {
        "d_model": 512,
        "length": LENGTH,
        "products": len(products),
        "milliseconds": {name: round(value * 1e3, 4) for name, value in seconds.items()},
        "mixer_over_products": seconds["mixer"] / seconds["products"],
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save", default="mamba_mixer_cpu", help="results/NAME.json")
    save(parser.parse_args().save, measure())
