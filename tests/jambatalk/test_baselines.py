"""What every baseline owes: it learns one clip, goes on where it was stopped, and its checkpoints speak."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import soundfile
import torch
from test_training import TINY_ENCODER, make_corpus, options
from test_vocaset import rewrite

from jambatalk import comparison, infer, train
from jambatalk.baselines.naive import MeanFace
from jambatalk.config import MODELS, ConfigError
from jambatalk.data.vocaset import Corpus
from jambatalk.model import JambaTalk
from jambatalk.protocols import PROTOCOLS
from jambatalk.talking_face import CheckpointError, TalkingFace, model_class
from jambatalk.training import Example, Trainer, TrainingOptions, collate, newest_checkpoint

BASELINES = sorted(set(MODELS) - {"jambatalk"})
TINY = {
    "codetalker": dict(
        d_model=16, heads=2, hidden=16, layers=1, codes=12, code_size=4, components=3,
        prior_width=24, prior_heads=2, prior_hidden=16, prior_layers=1,
    ),
    "facediffuser": dict(d_model=16, hidden=16, diffusion_steps=20, sampling_steps=4),
    "faceformer": dict(d_model=16, heads=2, hidden=16),
}  # fmt: skip


def tiny_config(name, **overrides):
    values = dict(vertices=7, motion_rank=5, encoder={**asdict(demo(name).encoder), **TINY_ENCODER})
    return model_class(name).config_class.from_preset("demo", **{**values, **TINY[name], **overrides})


def demo(name):
    return model_class(name).config_class.from_preset("demo")


@pytest.fixture
def corpus(tmp_path):
    return Corpus(make_corpus(tmp_path / "corpus"))


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("rank", [5, None])
def test_interrupted_and_resumed_equals_uninterrupted(name, rank, corpus, tmp_path):
    config, o = tiny_config(name, motion_rank=rank), dict(steps=5, history_noise=0.0)
    whole = Trainer(config, options(**o), corpus, tmp_path / "whole", device="cpu").run()
    first = Trainer(tiny_config(name, motion_rank=rank), options(**o), corpus, tmp_path / "parts", device="cpu")
    for _ in range(3):  # the checkpoint is of step 2; step 3 is lost, as when killed
        first.train_step()
        if first.step == 2:
            first.save()
    checkpoint = newest_checkpoint(tmp_path / "parts")
    again = TrainingOptions.of_checkpoint(checkpoint)
    parts = Trainer(config, again, corpus, tmp_path / "parts", checkpoint=checkpoint, device="cpu").run()
    assert (parts / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", BASELINES)
def test_a_clip_does_not_depend_on_the_others_of_its_batch(name, corpus, tmp_path):
    trainer = Trainer(tiny_config(name), options(), corpus, tmp_path / "run", device="cpu")
    model = trainer.model.double().eval()
    torch.nn.init.normal_(model.head.weight, std=0.1)
    samples, motion, phones = trainer.train_set.example(0)
    short = Example(samples[:4000], motion[:8], phones[:8], 0)
    batch = collate([short, Example(*trainer.train_set.example(1), 1)])
    lengths = batch.valid.sum(1)
    features = model.encode(batch.samples.double(), batch.lengths, frames=batch.motion.shape[1])
    together, _ = model.generate(features, batch.style, lengths=lengths)
    alone, _ = model.generate(features[:1, :8], batch.style[:1])
    torch.testing.assert_close(together[:1, :8], alone)


@pytest.mark.parametrize("name", BASELINES)
def test_the_command_trains_it_and_its_checkpoint_speaks(name, corpus, tmp_path, capsys):
    config, out = tmp_path / "tiny.json", tmp_path / "run"
    config.write_text(json.dumps({"vertices": 7, "motion_rank": 5, **TINY[name],
                                  "encoder": asdict(tiny_config(name).encoder)}))  # fmt: skip
    command = [corpus.directory, "--model", name, "--preset", "demo", "--config", config, "--out", out, "--steps", 4,
               "--batch", 2, "--device", "cpu"]  # fmt: skip
    assert train.main([*map(str, command)]) == 0
    assert json.loads((out / "config.json").read_text())["model"] == name
    model = TalkingFace.from_pretrained(out)
    assert isinstance(model, model_class(name)) and model.config.subjects == ["id0", "id1"]
    sound = corpus.clips("test")[0].samples
    wav = tmp_path / "sound.wav"
    soundfile.write(wav, sound, 16000, subtype="FLOAT")
    assert infer.main([str(wav), "--model", str(out), "-o", str(tmp_path / "face.npy"), "--subject", "id1"]) == 0
    assert infer.main([str(wav), "--model", str(out), "-o", str(tmp_path / "x.npy"), "--weights", "bfloat16"]) == 2
    assert f"is a {name}" in capsys.readouterr().err
    made = model.animate(sound, subject="id1").vertices
    assert made.shape == (15, 7, 3) and np.ptp(made, axis=0).max() > 0
    np.testing.assert_array_equal(np.load(tmp_path / "face.npy"), made)
    setting = comparison.find(out, corpus.directory)
    assert comparison.report(setting, [PROTOCOLS["unitalker"]])["protocols"][0]["predictors"]["run"]["clips"] == 2
    with pytest.raises(CheckpointError, match=f"a checkpoint of {type(model).__name__}, not of JambaTalk"):
        JambaTalk.from_pretrained(out)
    assert train.main([str(corpus.directory), "--model", name, "--arrangement", "m-m", "--out", str(tmp_path)]) == 2
    assert "--arrangement is of jambatalk" in capsys.readouterr().err


def test_a_model_that_there_is_not(tmp_path):
    (tmp_path / "config.json").write_text('{"model": "voca"}')
    with pytest.raises(CheckpointError, match=r"config\.json: model must be one of jambatalk, .*, got 'voca'"):
        TalkingFace.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="model must be 'jambatalk', got 'faceformer'"):
        model_class("jambatalk").config_class(model="faceformer")


def one_clip(folder):
    """A corpus of one clip: a mouth that opens and closes to a tone that swells and fades."""
    make_corpus(folder)
    splits = json.loads((folder / "splits.json").read_text())
    splits["sentences"] = dict.fromkeys(("train", "val", "test"), ["sentence01"])
    (folder / "splits.json").write_text(json.dumps({**splits, "train": ["id0"]}))
    time = np.arange(30) / 60
    templates = np.load(folder / "templates.pkl", allow_pickle=True)
    vertices = np.load(folder / "data_verts.npy")
    swell = np.sin(2 * np.pi * 4 * time) ** 2
    vertices[:30] = templates["id0"]
    vertices[:30, 1:4, 1] += (swell[:, None] * np.array([0.003, 0.004, -0.01])).astype(np.float32)
    vertices[:30, 1:4, 2] += 0.002 * np.cos(2 * np.pi * 3 * time)[:, None].astype(np.float32)
    np.save(folder / "data_verts.npy", vertices)
    at = np.arange(11000) / 22000
    sound = np.sin(2 * np.pi * 4 * at) ** 2 * np.sin(2 * np.pi * 300 * at) * 8000
    rewrite(folder / "raw_audio_fixed.pkl", lambda v: v["id0"]["sentence01"].update(audio=sound.astype(np.int16)))
    return Corpus(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", BASELINES)
def test_one_clip_can_be_learnt_by_heart(name, tmp_path):
    """LVE below 5 % of the mean face's."""
    corpus = one_clip(tmp_path / "corpus")
    o = options(steps=STEPS[name], batch=1, save_every=10**6, validate_every=10**6, augment=False, speed=0.0,
                phone_weight=0.0, closure_weight=1.0, ema=0.0, learning_rate=3e-3, warmup=20)  # fmt: skip
    config = tiny_config(name, d_model=32, unknown_style_probability=0.0, dropout=0.0)
    out = Trainer(config, o, corpus, tmp_path / "run", device="cpu").run()
    setting = comparison.find(out, corpus.directory, split="train")
    setting.predictors["mean face"] = comparison.FromBaseline(MeanFace(corpus, config.frame_rate), config.frame_rate)
    found = comparison.report(setting, [PROTOCOLS["unitalker"]])["protocols"][0]["predictors"]
    learnt, mean = (found[who]["scores"]["LVE, distance"] for who in ("run", "mean face"))
    assert learnt < 0.05 * mean


STEPS = {"codetalker": 900, "facediffuser": 400, "faceformer": 400}
