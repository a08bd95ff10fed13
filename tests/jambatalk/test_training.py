"""A run trains, learns, keeps its promises about padding and history, and goes on after an interruption."""

import json

import numpy as np
import pytest
import torch
from test_vocaset import write_corpus

from jambatalk import train
from jambatalk.config import JambaTalkConfig
from jambatalk.data.vocaset import Corpus, CorpusError
from jambatalk.model import CheckpointError, JambaTalk
from jambatalk.training import Trainer, TrainingOptions, collate, motion_basis, shift

TINY_ENCODER = dict(conv_dim=(8, 8, 8, 8, 8, 8, 8), hidden=16, layers=1, heads=2, ffn=16)


def tiny_config(**overrides):
    config = JambaTalkConfig.from_preset("demo", vertices=7, d_model=16, heads=2, hidden=16, motion_rank=5, **overrides)
    for name, value in TINY_ENCODER.items():
        assert hasattr(config.encoder, name), name
        setattr(config.encoder, name, value)
    return config


def options(**overrides):
    quick = dict(steps=4, batch=2, save_every=2, validate_every=100, warmup=1, history_ramp=1)
    return TrainingOptions.for_preset("demo", **{**quick, **overrides})


@pytest.fixture
def corpus(tmp_path):
    folder = write_corpus(tmp_path / "corpus")
    np.savez(
        folder / "regions.npz", lips=np.array([1, 2, 3]), inner_lip_upper=np.array([2]), inner_lip_lower=np.array([3])
    )
    np.save(folder / "faces.npy", np.array([[0, 1, 2], [2, 3, 4]], dtype=np.int32))
    phones = {f"id{i}": {"sentence01": [["SIL", 0, 0.2], ["M", 0.2, 0.3], ["AA", 0.3, 0.5]]} for i in range(4)}
    (folder / "phones.json").write_text(json.dumps(phones))
    return Corpus(folder)


def test_the_basis_spans_the_motion(corpus):
    clips = corpus.clips("train")
    basis, outside = motion_basis(corpus, clips, 21)
    gram = basis.T @ basis
    torch.testing.assert_close(gram, torch.eye(21) * gram[0, 0], rtol=0, atol=1e-4 * gram[0, 0].item())
    motion = torch.from_numpy(corpus.displacement(clips[0]).reshape(30, -1))
    coefficients = motion @ (basis / basis.square().sum(0))
    torch.testing.assert_close(coefficients @ basis.T, motion, rtol=1e-4, atol=1e-4 * motion.abs().max().item())
    assert abs(outside) < 1e-6
    assert motion_basis(corpus, clips, 3)[1] >= 0


def test_a_run_leaves_a_model_that_animates(corpus, tmp_path):
    out = Trainer(tiny_config(), options(), corpus, tmp_path / "run").run()
    model = JambaTalk.from_pretrained(out)
    assert model.config.subjects == ["id0", "id1"]
    np.testing.assert_array_equal(model.templates.numpy(), np.stack([corpus.templates["id0"], corpus.templates["id1"]]))
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert {"vertex", "velocity", "router", "phones"} <= set(lines[0])
    assert "error_mm" in lines[-1]
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]


def test_interrupted_and_resumed_equals_uninterrupted(corpus, tmp_path):
    whole = Trainer(tiny_config(), options(), corpus, tmp_path / "whole").run()
    first = Trainer(tiny_config(), options(), corpus, tmp_path / "parts")
    for _ in range(3):  # the checkpoint is of step 2; step 3 is lost, as when killed
        first.train_step()
        if first.step == 2:
            first.save()
    second = Trainer(tiny_config(), options(), corpus, tmp_path / "parts")
    assert second.resume() and second.step == 2
    parts = second.run()
    assert (parts / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_a_run_can_start_from_another(corpus, tmp_path):
    first = Trainer(tiny_config(), options(), corpus, tmp_path / "first").run()
    second = Trainer(tiny_config(), options(), corpus, tmp_path / "second", init=first)
    before, after = JambaTalk.from_pretrained(first).state_dict(), second.model.state_dict()
    assert before.keys() == after.keys()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=0, msg=name)
    with pytest.raises(CheckpointError, match="another architecture than the demo preset"):
        Trainer(tiny_config(arrangement="m-m"), options(), corpus, tmp_path / "third", init=first)


def test_overfitting_one_batch_lowers_the_loss(corpus, tmp_path):
    trainer = Trainer(
        tiny_config(),
        options(steps=60, overfit_one_batch=True, phone_weight=0.0, history_generated=0.0),
        corpus,
        tmp_path / "run",
    )  # fmt: skip
    losses = [trainer.train_step()["vertex"] for _ in range(60)]
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])


def test_the_loss_of_a_clip_does_not_depend_on_its_neighbours_padding(corpus, tmp_path):
    trainer = Trainer(tiny_config(), options(history_generated=0.0, history_noise=0.0), corpus, tmp_path / "run")
    torch.nn.init.normal_(trainer.model.head.weight, std=0.1)
    trainer.model.eval()
    short = trainer.train_set.example(0)
    short = (short[0][:4000], short[1][:8], short[2][:8])
    longer = trainer.train_set.example(1)
    alone = trainer.losses(collate([short], [0]), 0)
    both = collate([short, longer], [0, 1])
    both.valid[1] = False
    both.phones[1] = -100
    padded = trainer.losses(both, 0)
    for name in ("vertex", "velocity", "phones"):
        torch.testing.assert_close(alone[name], padded[name], rtol=1e-5, atol=1e-6)


def test_generated_history_reaches_the_decoder(corpus, tmp_path):
    trainer = Trainer(tiny_config(), options(history_generated=1.0, history_noise=0.0), corpus, tmp_path / "run")
    torch.nn.init.normal_(trainer.model.head.weight, std=0.1)
    batch = trainer.draw(0)
    features = trainer.model.encode(batch.samples, batch.lengths, frames=batch.motion.shape[1])
    history = trainer.history(features, batch, 10, torch.Generator().manual_seed(0))
    assert not torch.allclose(history, shift(batch.motion))
    torch.testing.assert_close(history[:, 0], torch.zeros_like(history[:, 0]))
    early = trainer.history(features, batch, 0, torch.Generator().manual_seed(0))
    torch.testing.assert_close(early, shift(batch.motion))


def test_speed_warps_sound_and_motion_together(corpus, tmp_path):
    from fractions import Fraction

    trainer = Trainer(tiny_config(), options(), corpus, tmp_path / "run")
    samples, motion, phones = trainer.train_set.example(0, Fraction(5, 4))
    assert len(samples) == 6400 and len(motion) == len(phones) == 12
    slow = trainer.train_set.example(0)[1]
    assert len(slow) == 15


def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys):
    assert train.main([str(tmp_path / "nowhere"), "--out", str(tmp_path / "run")]) == 2
    assert train.main([str(tmp_path), "--out", str(tmp_path / "run"), "--steps", "0"]) == 2
    folder = write_corpus(tmp_path / "corpus")
    assert train.main([str(folder), "--preset", "demo", "--out", str(tmp_path / "run")]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 3 and all(line.startswith("jambatalk: error: ") for line in lines)
    assert "no such folder" in lines[0] and "--steps" in lines[1] and "7 vertices" in lines[2]


def test_a_mesh_of_another_size_is_refused(corpus, tmp_path):
    config = tiny_config()
    config.vertices = 8
    with pytest.raises(CorpusError, match="faces of 7 vertices.*8"):
        Trainer(config, options(), corpus, tmp_path / "run")
