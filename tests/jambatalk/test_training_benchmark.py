"""The benchmark of training, rehearsed on a small model: what it would time runs and is what it says."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import bench_training as bench  # noqa: E402

ENCODER = dict(context="full", conv_dim=[8] * 7, hidden=16, layers=1, heads=2, ffn=16)
SIZES = dict(vertices=9, d_model=16, heads=2, hidden=24, encoder=ENCODER)


def weights(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("generated", [0.0, 0.5])
def test_an_epoch_changes_every_weight_that_trains(generated):
    objective = bench.make_objective("vocaset", sizes=SIZES, precision="bf16")
    batches = [bench.make_batch(objective.model.config, 2, generated, seed) for seed in range(2)]
    assert [bool(batch.generated.any()) for batch in batches] == [generated > 0] * 2
    assert 90 <= batches[0].valid.sum(1).min() < batches[0].valid.sum(1).max() <= 150
    before = {name: p.detach().clone() for name, p in objective.named_parameters()}
    assert bench.epoch(objective, batches, "cpu") > 0
    for name, parameter in objective.named_parameters():
        frozen = name.startswith("model.encoder.feature_extractor.")
        assert torch.equal(before[name], parameter) == (frozen or not parameter.grad.any()), name


def test_their_layers_have_our_weights_and_train():
    ours, theirs = (bench.make_objective("demo", flag, {**SIZES, "motion_rank": 5}) for flag in (False, True))
    assert weights(ours) == weights(theirs)
    assert all(p.abs().max() <= 10 for p in theirs.model.decoder.layers.parameters())  # none left as it was allocated
    kinds = [type(layer.layer.feed_forward).__name__ for layer in theirs.model.decoder.layers]
    assert [("Moe" in kind) for kind in kinds] == [kind == "E" for kind in ours.model.config.layers]
    batch = bench.make_batch(theirs.model.config, 2)
    assert bench.epoch(theirs, [batch], "cpu") > 0
    layers = theirs.model.decoder.layers
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layers.parameters())
    assert bench.operations(ours, batch) > 6 * int(batch.valid.sum()) * 4 * 2 * 3 * 16 * 24
