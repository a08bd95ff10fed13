"""Saving and loading a model: what comes back, and one clear line for everything that can be wrong."""

import json
import os

import numpy as np
import pytest
import torch
from safetensors.torch import load, save_file

from jambatalk.config import JambaTalkConfig
from jambatalk.model import CheckpointError, JambaTalk

ENCODER = dict(
    context="windowed",
    conv_dim=[8] * 7,
    conv_bias=True,
    conv_norm="layer",
    pre_norm=True,
    hidden=16,
    heads=2,
    ffn=24,
    layers=1,
    pos_conv_kernel=3,
    pos_conv_groups=2,
    attention_back=4,
    attention_ahead=1,
)
CONFIG = dict(vertices=6, d_model=16, heads=4, hidden=12, states=4, subjects=["ann", "bob"], encoder=ENCODER)


def make(rank=5):
    torch.manual_seed(0)
    model = JambaTalk(JambaTalkConfig(**CONFIG, motion_rank=rank))
    torch.nn.init.normal_(model.head.weight, std=0.3)
    regions = {"lips": np.array([1, 2]), "part": np.array([0, 0, 0, 1, 1, 6])}
    model.set_head(torch.randn(2, 6, 3), [[0, 1, 2], [3, 4, 5]], regions, 0.0123)
    return model.eval()


@pytest.fixture
def folder(tmp_path):
    make().save_pretrained(tmp_path / "model é 1")
    return tmp_path / "model é 1"


@pytest.mark.parametrize("rank", [None, 5])
def test_round_trip(rank, tmp_path):
    model = make(rank)
    model.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]  # nothing half-written is left
    loaded = JambaTalk.from_pretrained(tmp_path)
    assert loaded.config == model.config and not loaded.training
    mine, theirs = model.state_dict(), loaded.state_dict()
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    regions = {name: value.tolist() for name, value in loaded.regions.items()}
    assert regions == {"lips": [1, 2], "part": [0, 0, 0, 1, 1, 6]}
    samples = 0.1 * np.random.default_rng(0).standard_normal(8000).astype(np.float32)
    np.testing.assert_array_equal(loaded.animate(samples).vertices, model.animate(samples).vertices)


def test_half_precision_keeps_the_templates_and_loads_as_float32(tmp_path):
    model = make()
    model.save_pretrained(tmp_path, dtype=torch.float16)
    stored = load((tmp_path / "model.safetensors").read_bytes())
    assert stored["head.weight"].dtype == torch.float16 and stored["templates"].dtype == torch.float32
    assert stored["faces"].dtype == torch.int32
    loaded = JambaTalk.from_pretrained(tmp_path)
    assert loaded.head.weight.dtype == torch.float32
    assert torch.equal(loaded.templates, model.templates)
    torch.testing.assert_close(loaded.head.weight, model.head.weight, rtol=1e-3, atol=1e-4)


def test_weight_norm_survives(folder):
    before, after = make().encoder.pos_conv_embed.conv, JambaTalk.from_pretrained(folder).encoder.pos_conv_embed.conv
    assert torch.equal(before.weight, after.weight)
    names = [name for name, _ in after.named_parameters()]
    assert "parametrizations.weight.original0" in names  # still two parameters, so that training goes on as before


def refused(folder, *words):
    with pytest.raises(CheckpointError) as caught:
        JambaTalk.from_pretrained(folder)
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text


def test_missing_folder_or_file(folder, tmp_path):
    refused(tmp_path / "nowhere", "nowhere", "no such folder")
    refused(folder / "config.json", "folder")
    (folder / "config.json").rename(folder / "else.json")
    refused(folder, "config.json", "missing")
    (folder / "else.json").rename(folder / "config.json")
    (folder / "model.safetensors").unlink()
    refused(folder, "model.safetensors", "missing")


def test_missing_tensor_surplus_tensor_wrong_shape(folder):
    path = folder / "model.safetensors"
    tensors = load(path.read_bytes())
    save_file({name: value for name, value in tensors.items() if name != "head.weight"}, path)
    refused(folder, "1 tensor missing", "head.weight")
    save_file(tensors | {"head.extra": torch.zeros(2)}, path)
    refused(folder, "head.extra")
    save_file(tensors | {"head.weight": torch.zeros(5, 17)}, path)
    refused(folder, "head.weight", "(5, 17)", "(5, 16)")
    save_file(tensors | {"head.weight": torch.zeros(5, 16, dtype=torch.int32)}, path)
    refused(folder, "head.weight", "int32")
    save_file(tensors | {"faces": torch.tensor([[0, 1, 6]], dtype=torch.int32)}, path)
    refused(folder, "faces")


def test_a_pickle_is_never_opened(folder):
    path = folder / "model.safetensors"
    tensors = load(path.read_bytes())
    torch.save(tensors, path)
    refused(folder, "pickle")
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    refused(folder, "pickle")
    path.rename(folder / "pytorch_model.bin")
    refused(folder, "missing", "pytorch_model.bin is a pickle")


def test_truncated_or_garbled_weights(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for broken in (whole[: len(whole) // 2], b"", b"hello", os.urandom(4000), whole[:4]):
        path.write_bytes(broken)
        refused(folder, "model.safetensors")


def test_a_bad_config(folder):
    path = folder / "config.json"
    values = json.loads(path.read_text())
    for change, word in ((dict(depth=3), "depth"), (dict(heads=3), "heads"), (dict(encoder=dict(x=1)), "encoder.x")):
        path.write_text(json.dumps(values | change))
        refused(folder, "config.json", word)
    path.write_text("{")
    refused(folder, "not JSON")
    path.write_text("[1]")
    refused(folder, "object")
    path.write_bytes(b"\xff\xfe")
    refused(folder, "config.json")


def test_a_failed_save_leaves_the_old_checkpoint(folder, monkeypatch):
    before = (folder / "model.safetensors").read_bytes()

    def fail(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError):
        make().save_pretrained(folder)
    assert (folder / "model.safetensors").read_bytes() == before
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
