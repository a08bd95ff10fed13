"""A run trains, learns, keeps its promises about padding, history and processes, and goes on after an interruption."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from test_vocaset import put_nan, rewrite, write_corpus, write_processed

from jambatalk import train
from jambatalk.config import JambaTalkConfig
from jambatalk.data import vocaset
from jambatalk.data.vocaset import Corpus, CorpusError
from jambatalk.losses import balance_loss
from jambatalk.model import CheckpointError, JambaTalk
from jambatalk.training import (
    Example,
    Trainer,
    TrainingError,
    TrainingOptions,
    collate,
    motion_basis,
    newest_checkpoint,
    shift,
)

if importlib.util.find_spec("accelerate") is None:
    pytest.skip("training needs the package `accelerate` (extra `train`)", allow_module_level=True)

TINY_ENCODER = dict(conv_dim=[8, 8, 8, 8, 8, 8, 8], hidden=16, layers=1, heads=2, ffn=16)
TINY = dict(vertices=7, d_model=16, heads=2, hidden=16, motion_rank=5)


def tiny_config(**overrides):
    config = JambaTalkConfig.from_preset("demo", **{**TINY, **overrides})
    for name, value in TINY_ENCODER.items():
        assert hasattr(config.encoder, name), name
        setattr(config.encoder, name, value)
    return config


def options(**overrides):
    quick = dict(steps=4, batch=2, save_every=2, validate_every=100, warmup=1, history_ramp=1)
    return TrainingOptions.for_preset("demo", **{**quick, **overrides})


def make_corpus(folder):
    write_corpus(folder)
    np.savez(
        folder / "regions.npz", lips=np.array([1, 2, 3]), inner_lip_upper=np.array([2]), inner_lip_lower=np.array([3])
    )
    np.save(folder / "faces.npy", np.array([[0, 1, 2], [2, 3, 4]], dtype=np.int32))
    phones = {f"id{i}": {"sentence01": [["SIL", 0, 0.2], ["M", 0.2, 0.3], ["AA", 0.3, 0.5]]} for i in range(4)}
    (folder / "phones.json").write_text(json.dumps(phones))
    return folder


@pytest.fixture
def corpus(tmp_path):
    return Corpus(make_corpus(tmp_path / "corpus"))


def command_line(corpus, out, tmp_path, *more):
    """Arguments of jambatalk.train for the tiny model."""
    config = tmp_path / "tiny.json"
    config.write_text(json.dumps({**TINY, "encoder": asdict(tiny_config().encoder)}))
    command = [
        "--preset",
        "demo",
        "--config",
        config,
        "--out",
        out,
        "--device",
        "cpu",
        "--threads",
        "1",
        "--batch",
        "2",
    ]
    return [str(part) for part in (corpus, *command, *more)]


def awake(trainer):
    """The head starts at zero; a head that moves shows what the history does."""
    torch.nn.init.normal_(trainer.model.head.weight, std=0.1)
    return trainer


# ------------------------------------------------------------------------------------------------------------- the run


def test_defaults_are_the_papers(corpus, tmp_path):
    o = TrainingOptions.for_preset("vocaset")
    assert (o.epochs, o.steps, o.learning_rate, o.weight_decay, o.schedule) == (200, None, 1e-4, 0, "constant")
    assert JambaTalkConfig.from_preset("vocaset").encoder.freeze_front_end
    trainer = Trainer(tiny_config(), TrainingOptions(batch=3), corpus, tmp_path / "run")
    assert trainer.options.steps == 200 * 2, "four clips, three a step"
    assert trainer.optimizer.defaults["betas"] == (0.9, 0.999)
    frozen = tiny_config()
    frozen.encoder.freeze_front_end = True
    trainer = Trainer(frozen, options(), corpus, tmp_path / "run")
    front_end = list(trainer.model.encoder.feature_extractor.parameters())
    before = [p.clone() for p in front_end]
    trainer.train_step()
    assert front_end and all(torch.equal(a, b) for a, b in zip(before, front_end, strict=True))


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
    out = Trainer(tiny_config(), options(steps=8, keep=2), corpus, tmp_path / "run").run()
    model = JambaTalk.from_pretrained(out)
    assert model.config.subjects == ["id0", "id1"]
    np.testing.assert_array_equal(model.templates.numpy(), np.stack([corpus.templates["id0"], corpus.templates["id1"]]))
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert {"vertex", "velocity", "router", "phones", "gradient", "learning_rate", "seconds"} <= set(lines[0])
    assert "error_mm" in lines[-1]
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step-00000006", "step-00000008"]


def test_tensorboard_reads_what_a_run_wrote(corpus, tmp_path):
    pytest.importorskip("tensorboard", reason="needs the package `tensorboard` (extra `train`)")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = Trainer(tiny_config(), options(), corpus, tmp_path / "run").run()
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    written = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    shown = [(event.step, event.value) for event in events.Scalars("training/vertex")]
    assert shown == [(line["step"], pytest.approx(line["vertex"])) for line in written[:-1]]
    assert events.Scalars("validation/error_mm")[0].value == pytest.approx(written[-1]["error_mm"])


def test_overfitting_one_batch_lowers_the_loss(corpus, tmp_path):
    trainer = Trainer(
        tiny_config(),
        options(steps=60, overfit_one_batch=True, phone_weight=0.0, history_generated=0.0),
        corpus,
        tmp_path / "run",
    )  # fmt: skip
    first, second = trainer.draw(0), trainer.draw(7)
    torch.testing.assert_close(first.samples, second.samples)
    losses = [trainer.train_step()["vertex"] for _ in range(60)]
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])


def test_gradients_are_clipped_and_weights_averaged(corpus, tmp_path):
    trainer = Trainer(tiny_config(), options(clip_norm=1e-3, ema=0.5), corpus, tmp_path / "run")
    name, parameter = next((n, p) for n, p in trainer.model.named_parameters() if n == "decoder.layers.0.mixer.D")
    values = []
    for _ in range(2):
        assert trainer.train_step()["gradient"] > 1e-3
        assert torch.stack([p.grad.norm() for p in trainer.parameters]).norm() <= 1e-3 * (1 + 1e-6)
        values.append(parameter.detach().clone())
    average = dict(trainer.average.module.named_parameters())[name]
    torch.testing.assert_close(average, (values[0] + values[1]) / 2)  # the first step's weights start the average


def test_a_run_can_start_from_another(corpus, tmp_path):
    first = Trainer(tiny_config(), options(), corpus, tmp_path / "first").run()
    second = Trainer(tiny_config(), options(), corpus, tmp_path / "second", init=first)
    before, after = JambaTalk.from_pretrained(first).state_dict(), second.model.state_dict()
    assert before.keys() == after.keys()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=0, msg=name)
    with pytest.raises(CheckpointError, match="another architecture than the demo preset"):
        Trainer(tiny_config(arrangement="m-m"), options(), corpus, tmp_path / "third", init=first)


def test_bfloat16_autocast_stays_close_and_repeats(corpus, tmp_path):
    quick = dict(history_generated=1.0, history_ramp=0, history_noise=0.0)
    values = {}
    for precision in ("float32", "bf16", "bf16"):
        trainer = awake(Trainer(tiny_config(), options(precision=precision, **quick), corpus, tmp_path / "run"))
        losses = trainer.losses(trainer.draw(3))
        sum(losses.values()).backward()
        gradient = torch.cat([p.grad.flatten() for p in trainer.parameters])
        assert gradient.dtype == torch.float32 and all(loss.dtype == torch.float32 for loss in losses.values())
        values.setdefault(precision, []).append((losses["vertex"].item(), gradient))
    (exact, reference), (first, gradient), again = values["float32"][0], *values["bf16"]
    assert first != exact and abs(first / exact - 1) < 0.05, "bfloat16 has 8 bits"
    assert torch.nn.functional.cosine_similarity(gradient, reference, dim=0) > 0.99
    assert first == again[0] and torch.equal(gradient, again[1])
    with pytest.raises(TrainingError, match="precision must be one of float32, bf16"):
        options(precision="fp8")


# ----------------------------------------------------------------------------------------- padding, history, processes


def losses_and_gradients(trainer, batch):
    losses = trainer.losses(batch)
    for parameter in trainer.parameters:
        parameter.grad = None
    sum(losses.values()).backward()
    return losses, torch.cat([p.grad.flatten() for p in trainer.parameters])


def test_neither_loss_nor_gradient_depends_on_the_padding(corpus, tmp_path):
    trainer = awake(Trainer(tiny_config(), options(), corpus, tmp_path / "run"))
    trainer.model.eval()
    samples, motion, phones = trainer.train_set.example(0)
    own = np.arange(8) % 3 == 1
    short = Example(samples[:4000], motion[:8], phones[:8], 0, own)
    batch = collate([short, Example(*trainer.train_set.example(1), 1)])
    padding = ~batch.valid[0]
    assert padding.sum() == 7
    alone = losses_and_gradients(trainer, collate([short]))
    batch.valid[1], batch.generated[1] = False, False  # the second clip only makes the padding
    padded = losses_and_gradients(trainer, batch)
    batch.motion[0, 8:], batch.samples[0, 4000:], batch.phones[0, 8:] = 1e3, 1e3, 5
    poisoned = losses_and_gradients(trainer, batch)
    for other in (padded, poisoned):
        assert alone[0].keys() == other[0].keys() == {"vertex", "velocity", "router", "phones"}
        for name, loss in alone[0].items():
            assert loss > 0
            torch.testing.assert_close(other[0][name], loss, rtol=1e-6, atol=1e-6, msg=name)
        assert (other[1] - alone[1]).norm() <= 1e-5 * alone[1].norm()


def test_the_loss_of_a_batch_is_the_mean_over_its_frames(corpus, tmp_path):
    trainer = awake(Trainer(tiny_config(), options(history_noise=0.0), corpus, tmp_path / "run"))
    trainer.model.eval()
    clips = [trainer.train_set.example(0), trainer.train_set.example(1, Fraction(5, 4))]
    each = [trainer.losses(collate([Example(*clip, 0)]))["vertex"] for clip in clips]
    both = trainer.losses(collate([Example(*clip, 0) for clip in clips]))["vertex"]
    torch.testing.assert_close(both, (15 * each[0] + 12 * each[1]) / 27, rtol=1e-6, atol=0)


def test_generated_history_is_the_models_own_rollout(corpus, tmp_path):
    trainer = awake(Trainer(tiny_config(), options(history_generated=1.0, history_noise=0.0), corpus, tmp_path / "run"))
    objective, model, programs = trainer.objective, trainer.model, []
    truth = trainer.draw(0)  # the share starts at nothing
    assert not truth.generated.any()
    features = model.encode(truth.samples, truth.lengths, frames=truth.motion.shape[1])
    torch.testing.assert_close(objective.history(features, truth), shift(truth.motion))
    for _ in range(3):  # the weights move, and the rollouts with them
        first = max(trainer.step, 10)
        drawn = map(trainer.draw, range(first, first + 90))
        batch = next(b for b in drawn if (b.generated == b.valid).all(1).any() and not (b.generated == b.valid).all())
        model.eval()
        features = model.encode(batch.samples, batch.lengths, frames=batch.motion.shape[1])
        history = objective.history(features, batch)
        programs.append(objective._program)
        row = int((batch.generated == batch.valid).all(1).nonzero()[0])
        frames = int(batch.valid[row].sum())
        own, _ = model.generate(features[row : row + 1, :frames], batch.style[row : row + 1])  # a program of its own
        torch.testing.assert_close(history[row : row + 1, :frames], shift(own), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(history[row], shift(batch.motion)[row])
        true = ~batch.generated & batch.valid
        torch.testing.assert_close(history[true], shift(batch.motion)[true])
        torch.testing.assert_close(history[:, 0], torch.zeros_like(history[:, 0]))
        trainer.step = first
        trainer.train_step()
    assert programs[0] is programs[1] is programs[2], "one program for the run"


def test_a_clip_is_drawn_the_same_whoever_draws_it(corpus, tmp_path):
    whole = Trainer(tiny_config(), options(batch=4), corpus, tmp_path / "run")
    part = Trainer(tiny_config(), options(batch=4), corpus, tmp_path / "run")
    part.rank, part.processes = 1, 2
    batch, share = whole.draw(5), part.draw(5)
    for name in ("motion", "noise", "generated", "style", "lengths", "valid"):
        torch.testing.assert_close(getattr(share, name), getattr(batch, name)[1::2, : share.motion.shape[1]]
                                   if getattr(batch, name).dim() > 1 else getattr(batch, name)[1::2])  # fmt: skip
    seen = [whole.draw_example(0, i).samples[:100].tolist() for i in range(4)]
    assert len({tuple(s) for s in seen}) == 4, "an epoch visits every clip once"


def test_balance_loss_is_the_kernels(corpus):
    from jambatalk_kernels import load_balancing_loss, moe_route

    routings = [moe_route(torch.randn(9, 4), 2), moe_route(torch.randn(9, 4), 2)]
    torch.testing.assert_close(balance_loss(routings), load_balancing_loss(routings))


TWO_PROCESSES = """
import sys, torch
sys.path[:0] = [{tests!r}]
import test_training as t
torch.set_num_threads(1)
options = t.options(batch=4, history_ramp=0)
trainer = t.awake(t.Trainer(t.tiny_config(), options, t.Corpus({corpus!r}), {out!r}, device="cpu"))
trainer.model.eval()
batch = trainer.draw(3)
losses = trainer.losses(batch)
trainer.accelerator.backward(sum(losses.values()))
gradient = torch.cat([p.grad.flatten() for p in trainer.parameters])
mean = trainer.accelerator.reduce(torch.stack(list(losses.values())).detach(), "mean")
if trainer.rank == 0:
    torch.save((trainer.processes, mean, gradient), {result!r})
trainer.close()
"""


@pytest.mark.slow
def test_two_processes_have_the_gradient_of_one(corpus, tmp_path):
    results = {}
    for processes in (1, 2):
        script = tmp_path / f"script{processes}.py"
        places = dict(tests=str(Path(__file__).parent), corpus=str(corpus.directory), out=str(tmp_path / "run"))
        script.write_text(TWO_PROCESSES.format(**places, result=str(tmp_path / f"{processes}.pt")))
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if processes == 2 else []
        command, one_thread = [sys.executable, *launch, str(script)], {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=one_thread, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]
        results[processes] = torch.load(tmp_path / f"{processes}.pt")
    (one, loss, gradient), (two, loss2, gradient2) = results[1], results[2]
    assert (one, two) == (1, 2) and gradient.norm() > 0
    torch.testing.assert_close(loss2, loss, rtol=1e-5, atol=0)
    assert (gradient2 - gradient).norm() <= 1e-5 * gradient.norm()
    torch.testing.assert_close(gradient2, gradient, rtol=1e-5, atol=1e-5 * gradient.abs().max().item())


@pytest.mark.slow
def test_the_command_on_two_processes_trains_as_on_one(corpus, tmp_path):
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    vertex = []
    for name, more in (("one", []), ("two", launch)):
        arguments = command_line(corpus.directory, tmp_path / name, tmp_path, "--steps", "6", "--save-every", "2")
        command = [sys.executable, "-m", *more, "jambatalk.train", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.strip() == str(tmp_path / name / "model.safetensors")
        lines = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        vertex.append([line["vertex"] for line in lines if "vertex" in line])
    assert len(vertex[0]) == 6
    np.testing.assert_allclose(vertex[1], vertex[0], rtol=1e-3)  # each process has its own dropout


def test_a_batch_must_have_a_clip_for_every_process(corpus, tmp_path, monkeypatch):
    from accelerate import Accelerator

    monkeypatch.setattr(Accelerator, "num_processes", 3)
    with pytest.raises(TrainingError, match="a batch of 2 clips cannot be shared by 3 processes"):
        Trainer(tiny_config(), options(), corpus, tmp_path / "run")


# ------------------------------------------------------------------------------------------------------------ going on


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_interrupted_and_resumed_equals_uninterrupted(corpus, tmp_path, precision):
    o = dict(steps=5, precision=precision)
    whole = Trainer(tiny_config(), options(**o), corpus, tmp_path / "whole").run()
    first = Trainer(tiny_config(), options(**o), corpus, tmp_path / "parts")
    for _ in range(3):  # the checkpoint is of step 2; step 3 is lost, as when killed
        first.train_step()
        if first.step == 2:
            first.save()
    checkpoint = newest_checkpoint(tmp_path / "parts")
    second = Trainer(
        tiny_config(), TrainingOptions.of_checkpoint(checkpoint), corpus, tmp_path / "parts", checkpoint=checkpoint
    )
    assert second.step == 2 and second.options == options(**o)
    parts = second.run()
    assert (parts / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_a_run_from_another_goes_on_in_its_basis(corpus, tmp_path):
    first = Trainer(tiny_config(), options(), corpus, tmp_path / "first").run()
    again = make_corpus(tmp_path / "again")
    np.save(again / "data_verts.npy", np.load(again / "data_verts.npy") * np.float32(1.001))  # a basis of its own
    other = Corpus(again)
    whole = Trainer(tiny_config(), options(), other, tmp_path / "whole", init=first).run()
    checkpoint = whole / "checkpoints" / "step-00000002"
    parts = Trainer(
        tiny_config(), TrainingOptions.of_checkpoint(checkpoint), other, tmp_path / "parts", checkpoint=checkpoint
    ).run()
    assert (parts / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(corpus, tmp_path):
    """kill -9 in the midst of two of 24 steps, with a checkpoint every 2 steps."""

    def command(out, *more):
        return [sys.executable, "-m", "jambatalk.train", *command_line(corpus.directory, out, tmp_path, *more)]

    steps = ["--steps", "24", "--save-every", "2", "--validate-every", "9"]
    subprocess.run(command(tmp_path / "whole", *steps), check=True, capture_output=True, timeout=200)
    out, log = tmp_path / "parts", tmp_path / "parts" / "log.jsonl"
    for moment, more in ((5, steps), (13, ["--resume"])):
        killed = subprocess.Popen(command(out, *more), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        patience = time.monotonic() + 150
        while not (log.exists() and f'"step": {moment},' in log.read_text()):
            assert killed.poll() is None and time.monotonic() < patience
            time.sleep(0.002)
        killed.send_signal(signal.SIGKILL)
        assert killed.wait() == -signal.SIGKILL
        assert moment - 2 < int(newest_checkpoint(out).name[5:]) < 20
        assert not (out / "model.safetensors").exists()
    subprocess.run(command(out, "--resume"), check=True, capture_output=True, timeout=200)
    assert (tmp_path / "whole" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    trained = [line for line in map(json.loads, log.read_text().splitlines()) if "vertex" in line]
    assert [line["step"] for line in trained] == list(range(1, 25)), "no step twice, none left out"


def test_only_whole_checkpoints_count(corpus, tmp_path):
    out = tmp_path / "run"
    assert newest_checkpoint(out) is None
    trainer = Trainer(tiny_config(), options(), corpus, out)
    trainer.train_step()
    saved = trainer.save()
    (out / "checkpoints" / "step-00000009.partial").mkdir()
    assert newest_checkpoint(out) == saved
    (saved / "training.safetensors").write_bytes(b"cut off")
    with pytest.raises(CheckpointError, match=r"training\.safetensors: the run cannot go on from it"):
        Trainer(tiny_config(), options(), corpus, out, checkpoint=saved)
    (saved / "training.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"training\.json: cannot be read"):
        TrainingOptions.of_checkpoint(saved)


def test_a_run_does_not_go_on_with_other_people(corpus, tmp_path):
    trainer = Trainer(tiny_config(), options(), corpus, tmp_path / "run")
    saved = trainer.save()
    splits = json.loads((corpus.directory / "splits.json").read_text())
    (corpus.directory / "splits.json").write_text(json.dumps({**splits, "train": ["id0", "id3"]}))
    with pytest.raises(CorpusError, match="not the subjects that .*step-00000000 was trained on"):
        Trainer(tiny_config(), options(), Corpus(corpus.directory), tmp_path / "run", checkpoint=saved)


# -------------------------------------------------------------------------------------------------------- the data set


def test_speed_warps_sound_and_motion_together(corpus, tmp_path):
    trainer = Trainer(tiny_config(), options(), corpus, tmp_path / "run")
    samples, motion, phones = trainer.train_set.example(0, Fraction(5, 4))
    assert len(samples) == 6400 and len(motion) == len(phones) == 12
    slow = trainer.train_set.example(0)[1]
    assert len(slow) == 15


@pytest.mark.parametrize("seconds", [0.3, 0.7])
def test_the_longer_of_sound_and_motion_is_cut(tmp_path, seconds):
    folder = make_corpus(tmp_path / "corpus")
    rewrite(
        folder / "raw_audio_fixed.pkl",
        lambda v: v["id0"]["sentence01"].update(audio=np.ones(round(22000 * seconds), np.int16)),
    )
    trainer = Trainer(tiny_config(), options(), Corpus(folder), tmp_path / "run")
    samples, motion, phones = trainer.train_set.example(0)
    expected = min(seconds, 0.5)
    assert (len(samples), len(motion), len(phones)) == (round(16000 * expected), *[round(30 * expected)] * 2)


def test_60_frames_a_second_become_30_by_leaving_out_every_other(corpus, tmp_path):
    trainer = Trainer(tiny_config(motion_rank=None), options(history_noise=0.0), corpus, tmp_path / "run")
    motion = trainer.train_set.example(0)[1]
    clip = corpus.clips("train")[0]
    np.testing.assert_array_equal(motion, corpus.displacement(clip)[::2].reshape(15, -1))
    assert np.isfinite(list(trainer.train_step().values())).all()


def test_biwi_trains_at_25_frames_a_second(tmp_path):
    names = [(s, f"e{i:02d}") for s in vocaset.BIWI_SPLITS["train"] for i in (1, 33)]
    folder = write_processed(tmp_path / "biwi", names, fps=25, scale=5.0, seconds=0.4)
    trainer = Trainer(
        tiny_config(fps=25, motion_rank=None), options(history_noise=0.0), Corpus(folder), tmp_path / "run"
    )
    motion = trainer.train_set.example(0)[1]
    assert motion.shape == (10, 21)
    np.testing.assert_array_equal(motion, trainer.corpus.displacement(trainer.corpus.clips("train")[0]).reshape(10, 21))
    trainer.train_step()
    assert trainer.validate()["error_mm"] > 0


# --------------------------------------------------------------------------------------------------------- the command


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


def test_one_bad_clip_stops_the_command_or_is_skipped_and_counted(tmp_path, capsys):
    folder = make_corpus(tmp_path / "corpus")
    put_nan(folder)
    arguments = command_line(folder, tmp_path / "run", tmp_path, "--steps", "2")
    assert train.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "data_verts.npy: NaN or Inf vertices in id0/sentence02" in error
    assert train.main([*arguments, "--skip-bad"]) == 0
    assert "1 bad clips or subjects are left out" in capsys.readouterr().err
    assert (tmp_path / "run" / "model.safetensors").exists()
    assert train.main(arguments) == 2
    assert "holds a run already: --resume" in capsys.readouterr().err


def test_going_on_keeps_the_options_and_can_replace_them(corpus, tmp_path, capsys):
    out = tmp_path / "run"
    assert train.main(command_line(corpus.directory, out, tmp_path, "--steps", "2", "--seed", "7")) == 0
    assert train.main([str(corpus.directory), "--out", str(out), "--resume", "--steps", "3", "--device", "cpu"]) == 0
    assert "resumed at step 2" in capsys.readouterr().err
    saved = TrainingOptions.of_checkpoint(newest_checkpoint(out))
    assert (saved.steps, saved.seed, saved.batch, saved.ema) == (3, 7, 2, 0.995)


@pytest.mark.parametrize("able, precision", [(True, "bf16"), (False, "float32")])
def test_bf16_where_nothing_multiplies_it_is_float32(corpus, tmp_path, capsys, monkeypatch, able, precision):
    monkeypatch.setattr("jambatalk.training.multiplies_bfloat16", lambda device: able)
    arguments = command_line(corpus.directory, tmp_path / "run", tmp_path, "--steps", "1", "--precision", "bf16")
    assert train.main(arguments) == 0
    assert ("no bfloat16 products for this device: training in float32" in capsys.readouterr().err) is not able
    assert TrainingOptions.of_checkpoint(newest_checkpoint(tmp_path / "run")).precision == precision


@pytest.mark.slow
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("anny", "hibari")) or shutil.which("flite") is None,
    reason="a synthetic corpus needs `anny`, `hibari-tts` (extra `synthetic`) and Debian's `flite`",
)
def test_the_experiment_on_a_synthetic_corpus(tmp_path):
    """synthesize, train, infer, as the README has it, at the smallest size."""

    def run(*command):
        done = subprocess.run([sys.executable, "-m", *map(str, command)], capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    corpus, out = tmp_path / "corpus", tmp_path / "run"
    run("jambatalk.synthesize", corpus, "--identities", "3", "--sentences", "2")
    assert "train      1 of 1 subjects, 2 sequences" in run("jambatalk.data.vocaset", corpus)
    train = ["jambatalk.train", corpus, "--preset", "demo", "--steps", "3", "--batch", "2", "--out", out]
    assert run(*train, "--precision", "bf16").strip() == str(out / "model.safetensors")
    run("jambatalk.infer", "--model", out, "-o", tmp_path / "face.npz")
    face = np.load(tmp_path / "face.npz")
    assert face["vertices"].shape[1:] == (5085, 3) and np.isfinite(face["vertices"]).all()


def test_the_readme_says_what_the_experiment_gave():
    root = Path(__file__).parents[2]
    protocol = json.loads((root / "docs" / "experiment.json").read_text())["evaluation"]["protocols"][0]
    trained, still, neighbour = (
        protocol["predictors"][name]["scores"]["LVE"] for name in ("demo", "mean face", "nearest neighbour")
    )
    readme = " ".join((root / "README.md").read_text().split())
    assert f"the result's lips are off by {trained:.2f} mm" in readme
    assert f"a still face's by {still:.2f} mm, those of a nearest neighbour by sound by {neighbour:.2f} mm" in readme
    assert trained <= 0.7 * min(still, neighbour)


def test_without_accelerate_one_line_says_what_to_install(corpus, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(TrainingError, match=r"pip install 'jambatalk\[train\]'"):
        Trainer(tiny_config(), options(), corpus, tmp_path / "run")
