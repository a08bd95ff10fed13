"""Training: teacher forcing in one parallel pass on a mixture of true and generated history.

A step depends on nothing but (seed, step): the clips drawn, their augmentation and every dropout. A run that resumes
from a checkpoint therefore goes on as if it had never stopped.

What is trained on what: audio is augmented (`data.augment`) and played faster or slower with its motion; the motion fed
back is the true one, the model's own from parallel passes, or a mixture, with noise; a linear head on the encoder's
output guesses the phone of each frame where the corpus labels them (it is not kept: it only teaches the encoder).
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import soxr
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from jambatalk.audio_encoder import wav2vec2_architecture
from jambatalk.config import JambaTalkConfig
from jambatalk.data.augment import augment
from jambatalk.data.vocaset import CORPUS_FPS, SAMPLING_RATE, Clip, Corpus, CorpusError
from jambatalk.face.mouth import inner_lip_gap
from jambatalk.losses import MotionLoss, motion_metric
from jambatalk.model import CheckpointError, JambaTalk
from jambatalk_kernels import load_balancing_loss

PHONES = (
    "SIL AA AE AH AO AW AY B CH D DH EH ER EY F G HH IH IY JH K L M N NG OW OY P R S SH T TH UH UW V W Y Z ZH".split()
)
PHONE_INDEX = {phone: i for i, phone in enumerate(PHONES)}
BILABIALS = torch.tensor([PHONE_INDEX[phone] for phone in "PBM"])


@dataclass
class TrainingOptions:
    """How a run trains. Defaults are the paper's (Adam, 1e-4); `for_preset` has what the demo was trained with."""

    steps: int = 60_000
    batch: int = 4
    learning_rate: float = 1e-4
    schedule: str = "constant"  # or "cosine", to zero
    warmup: int = 0
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    ema: float = 0.0
    seed: int = 0
    augment: bool = False
    speed: float = 0.0  # played at 1 - speed .. 1 + speed
    history_noise: float = 0.0  # of each coefficient's spread
    history_generated: float = 0.5  # share of clips fed with generated history, reached after `history_ramp` steps
    history_ramp: int = 2000
    phone_weight: float = 0.0
    # Factor on the frames of p, b and m, where the corpus labels phones. A squared error makes a model that is not sure
    # leave the mouth half open; that lips meet is what people watch for.
    closure_weight: float = 1.0
    save_every: int = 500
    validate_every: int = 500
    overfit_one_batch: bool = False

    @classmethod
    def for_preset(cls, preset: str, **overrides) -> TrainingOptions:
        demo = dict(
            steps=2400, batch=8, learning_rate=1.5e-3, schedule="cosine", warmup=100, weight_decay=0.01, ema=0.995,
            augment=True, speed=0.15, history_noise=0.1, history_generated=0.9, history_ramp=600, phone_weight=10.0,
            closure_weight=6.0,
        )  # fmt: skip
        return cls(**{**(demo if preset == "demo" else {}), **overrides})


def motion_basis(corpus: Corpus, clips: list[Clip], rank: int, frames: int = 3000) -> tuple[Tensor, float]:
    """The principal directions of the training motion, not centred: a face at rest has all coefficients zero.

    Returns basis (3V, rank) float32, orthonormal columns times one scale (metres per unit, so that the largest
    coefficient has unit spread), and the share of the motion's energy that lies outside of it.
    """
    stride = max(1, sum(len(clip.rows) for clip in clips) // frames)
    sample = np.concatenate(
        [corpus.displacement(clip, stride).reshape(-1, corpus.vertices.shape[1] * 3) for clip in clips]
    )
    gram = sample.astype(np.float64) @ sample.T.astype(np.float64)
    values, vectors = np.linalg.eigh(gram)
    values, vectors = values[::-1][:rank], vectors[:, ::-1][:, :rank]
    usable = values > values[0] * 1e-9
    basis = sample.T @ (vectors[:, usable] / np.sqrt(values[usable]))
    if basis.shape[1] < rank:  # the corpus moves in fewer directions than asked: any orthonormal completion will do
        random = np.random.default_rng(0).standard_normal((basis.shape[0], rank - basis.shape[1]))
        basis = np.concatenate([basis, random], axis=1)
    basis, triangular = np.linalg.qr(basis)
    basis *= np.sign(np.diag(triangular))
    scale = float(np.sqrt(values[0] / len(sample)))
    return torch.from_numpy((basis * scale).astype(np.float32)), float(1 - values.sum() / np.trace(gram))


class MotionSet:
    """The clips of one split with their audio and motion, at any speed and frame rate.

    With a basis, motion is kept as coefficients in memory; without, it is read from the corpus when asked for.
    """

    def __init__(self, corpus: Corpus, clips: list[Clip], fps: Fraction, basis: Tensor | None):
        self.corpus, self.clips, self.fps, self.basis = corpus, clips, fps, basis
        self.audio = [clip.audio() for clip in clips]
        self.coefficients: list[np.ndarray] | None = None
        if basis is not None:
            project = (basis / basis.square().sum(0)).numpy()
            self.coefficients = [corpus.displacement(clip).reshape(len(clip.rows), -1) @ project for clip in clips]

    def __len__(self) -> int:
        return len(self.clips)

    def gaps(self, upper: np.ndarray, lower: np.ndarray) -> np.ndarray:
        """(frames of all clips,) metres that the inner lips are further apart than on the template.

        The gap is a height and so linear in the vertices: a displacement's gap is what it adds."""
        if self.coefficients is None:
            return np.concatenate(
                [inner_lip_gap(self.corpus.displacement(clip, 4), upper, lower) for clip in self.clips]
            )
        shapes = self.basis.T.reshape(self.basis.shape[1], -1, 3).numpy()
        return np.concatenate(self.coefficients) @ inner_lip_gap(shapes, upper, lower)

    def example(self, index: int, speed: Fraction = Fraction(1)) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """samples (n,), motion (frames, d), phones (frames,), the clip played `speed` times as fast."""
        clip, samples = self.clips[index], self.audio[index]
        if speed != 1:
            samples = soxr.resample(samples, SAMPLING_RATE * speed.numerator, SAMPLING_RATE * speed.denominator)
        frames = max(1, round(Fraction(len(samples), SAMPLING_RATE) * self.fps))
        times = np.arange(frames) / float(self.fps) * float(speed)
        position = np.clip(times * CORPUS_FPS, 0, len(clip.rows) - 1)
        first = np.floor(position).astype(np.int64)
        second = np.minimum(first + 1, len(clip.rows) - 1)
        share = (position - first).astype(np.float32)[:, None]
        if self.coefficients is not None:
            motion = self.coefficients[index][first] * (1 - share) + self.coefficients[index][second] * share
        else:
            vertices = self.corpus.vertices
            motion = (
                vertices[clip.rows[first]] * (1 - share[..., None]) + vertices[clip.rows[second]] * share[..., None]
            )
            motion = (motion - self.corpus.templates[clip.subject]).reshape(frames, -1)
        phones = self.corpus.frame_phones(clip, times, PHONE_INDEX)
        if phones is None:
            phones = np.full(frames, -100)
        return samples.astype(np.float32), motion.astype(np.float32), phones


@dataclass
class Batch:
    samples: Tensor  # (batch, n) float32, zero beyond each clip's length
    lengths: Tensor  # (batch,) int64 samples
    motion: Tensor  # (batch, frames, d)
    phones: Tensor  # (batch, frames) int64, -100 unknown
    valid: Tensor  # (batch, frames) bool
    style: Tensor  # (batch,) int64


def collate(examples: list[tuple[np.ndarray, np.ndarray, np.ndarray]], style: list[int]) -> Batch:
    frames = max(len(motion) for _, motion, _ in examples)
    batch = Batch(
        torch.zeros(len(examples), max(len(samples) for samples, _, _ in examples)),
        torch.tensor([len(samples) for samples, _, _ in examples]),
        torch.zeros(len(examples), frames, examples[0][1].shape[1]),
        torch.full((len(examples), frames), -100),
        torch.zeros(len(examples), frames, dtype=torch.bool),
        torch.tensor(style),
    )
    for i, (samples, motion, phones) in enumerate(examples):
        batch.samples[i, : len(samples)] = torch.from_numpy(samples)
        batch.motion[i, : len(motion)] = torch.from_numpy(motion)
        batch.phones[i, : len(phones)] = torch.from_numpy(phones)
        batch.valid[i, : len(motion)] = True
    return batch


def shift(motion: Tensor) -> Tensor:
    """(batch, frames, d) -> what each frame is fed with: the motion of the frame before, zero at first."""
    return torch.cat([torch.zeros_like(motion[:, :1]), motion[:, :-1]], dim=1)


class Trainer:
    """One run: `Trainer(config, options, corpus, out).run()`; `resume()` before it goes on from the last checkpoint."""

    def __init__(
        self,
        config: JambaTalkConfig,
        options: TrainingOptions,
        corpus: Corpus,
        out: Path,
        pretrained: str | None = None,
        init: str | Path | None = None,
    ):
        """pretrained: a Wav2Vec 2.0 checkpoint for the encoder. init: a JambaTalk checkpoint to start from; its motion
        basis is kept, since its weights are written in it, and so are the styles of the identities that it knows."""
        self.options, self.corpus, self.out = options, corpus, Path(out)
        clips = corpus.clips("train")
        subjects = list(dict.fromkeys(clip.subject for clip in clips))
        if corpus.vertices.shape[1] != config.vertices:
            raise CorpusError(
                f"{corpus.directory}: faces of {corpus.vertices.shape[1]} vertices, the {config.preset} preset has "
                f"{config.vertices}"
            )
        config.subjects = subjects
        torch.manual_seed(options.seed)
        if pretrained is not None:  # base, large, ...: the checkpoint says which
            config.encoder = replace(config.encoder, **wav2vec2_architecture(pretrained))
        self.model = JambaTalk(config)
        if pretrained is not None:
            self.model.encoder.load_wav2vec2(pretrained)
        self.outside = None
        basis = None
        if config.motion_rank and init is None:
            basis, self.outside = motion_basis(corpus, clips, config.motion_rank)
            self.model.motion_basis.copy_(basis)
        if init is not None:
            self._start_from(init)
            basis = self.model.motion_basis
        fps = Fraction(config.fps)
        self.train_set = MotionSet(corpus, clips, fps, basis)
        self.val_set = MotionSet(corpus, corpus.clips("val"), fps, basis)
        self.style_index = {subject: i for i, subject in enumerate(subjects)}
        self._fill_buffers(subjects)
        regions = {name: torch.from_numpy(np.asarray(index)) for name, index in corpus.regions.items()}
        pairs = None
        if "inner_lip_upper" in regions:
            pairs = (regions["inner_lip_upper"], regions["inner_lip_lower"])
        self.loss = MotionLoss(
            motion_metric(
                config.vertices, basis=basis, lips=regions.get("lips"), lip_weight=config.lip_weight,
                pairs=pairs, opening_weight=config.opening_weight,
            ),
            config.vertex_weight, config.velocity_weight,
        )  # fmt: skip
        self.phone_head = nn.Linear(config.d_model, len(PHONES)) if options.phone_weight else None
        self.spread = None
        if self.train_set.coefficients is not None:
            self.spread = torch.from_numpy(np.concatenate(self.train_set.coefficients).std(0))
        modules = [self.model] + ([self.phone_head] if self.phone_head else [])
        self.parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        decay = [p for p in self.parameters if p.dim() >= 2]
        plain = [p for p in self.parameters if p.dim() < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": decay, "weight_decay": options.weight_decay}, {"params": plain, "weight_decay": 0.0}],
            lr=options.learning_rate, betas=(0.9, 0.98),
        )  # fmt: skip
        self.average = None
        if options.ema:
            self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(options.ema))
        self.step = 0

    def _start_from(self, folder: str | Path) -> None:
        model, old = self.model, JambaTalk.from_pretrained(folder)
        styles = model.style.weight.detach().clone()
        for name in set(model.config.subjects) & set(old.config.subjects):
            styles[model.subject_index(name)] = old.style.weight[old.subject_index(name)].detach()
        styles[model.unknown_style] = old.style.weight[old.unknown_style].detach()
        trained = {name for name, _ in model.named_parameters()} | {"motion_basis"}
        state = {name: value for name, value in old.state_dict().items() if name in trained} | {"style.weight": styles}
        shapes = {name: value.shape for name, value in state.items()}
        wrong = [
            name for name, value in model.state_dict().items() if name in trained and value.shape != shapes.get(name)
        ]
        if wrong:
            raise CheckpointError(
                f"{folder}: another architecture than the {model.config.preset} preset: {wrong[0]} differs"
            )
        model.load_state_dict(state, strict=False)

    def _fill_buffers(self, subjects: list[str]) -> None:
        """What inference needs of the corpus: templates, faces, regions and the scale of the mouth's opening."""
        corpus, model = self.corpus, self.model
        templates = torch.stack([torch.from_numpy(corpus.templates[subject]) for subject in subjects])
        opening_scale = 1.0
        if "inner_lip_upper" in corpus.regions:
            upper, lower = corpus.regions["inner_lip_upper"], corpus.regions["inner_lip_lower"]
            opening_scale = float(np.percentile(self.train_set.gaps(upper, lower), 95))
        model.set_head(templates, corpus.faces, corpus.regions, opening_scale)

    # One step

    def draw(self, step: int) -> Batch:
        """The batch of a step. Every epoch visits every clip once, in an order of its own."""
        options = self.options
        rng = np.random.default_rng([options.seed, 0 if options.overfit_one_batch else step])
        picks = []
        for i in (
            range(step * options.batch, (step + 1) * options.batch)
            if not options.overfit_one_batch
            else range(options.batch)
        ):
            epoch, position = divmod(i, len(self.train_set))
            picks.append(
                int(np.random.default_rng([options.seed, 1_000_003, epoch]).permutation(len(self.train_set))[position])
            )
        examples, style = [], []
        for index in picks:
            speed = Fraction(1)
            if options.speed and not options.overfit_one_batch:
                speed = Fraction(round(rng.uniform(1 - options.speed, 1 + options.speed) * 40), 40)
            samples, motion, phones = self.train_set.example(index, speed)
            if options.augment and not options.overfit_one_batch:
                samples = augment(samples, rng)
            examples.append((samples, motion, phones))
            known = self.style_index[self.train_set.clips[index].subject]
            unknown = rng.random() < self.model.config.unknown_style_probability
            style.append(len(self.style_index) if unknown else known)
        return collate(examples, style)

    def history(self, features: Tensor, batch: Batch, step: int, generator: torch.Generator) -> Tensor:
        """What the decoder is fed back: the true motion, or its own after passes over generated history.

        The passes are parallel: each feeds the output of the one before, shifted, so that after k of them the first k
        frames are an exact rollout and later ones are close to it.
        """
        options, truth = self.options, batch.motion
        share = options.history_generated * min(1.0, step / max(1, options.history_ramp))
        history = shift(truth)
        if share > 0:
            with torch.no_grad():
                own = truth
                for _ in range(2):
                    own, _ = self.model.decode(features.detach(), shift(own), batch.style, batch.valid)
            kind = torch.rand(truth.shape[0], 1, 1, generator=generator)
            frame = torch.rand(*truth.shape[:2], 1, generator=generator)
            # Half of the chosen clips are fed with generated motion throughout, half with a mixture by frame.
            use = (kind < share / 2) | ((kind < share) & (frame < 0.5))
            history = torch.where(use, shift(own), history)
        if options.history_noise and self.spread is not None:
            noise = torch.randn(history.shape, generator=generator) * self.spread
            amount = torch.rand(history.shape[0], 1, 1, generator=generator) * options.history_noise
            history = history + noise * amount
            history[:, 0] = 0
        return history

    def losses(self, batch: Batch, step: int) -> dict[str, Tensor]:
        config = self.model.config
        generator = torch.Generator().manual_seed(self.options.seed * 1_000_003 + step)
        features = self.model.encode(batch.samples, batch.lengths, frames=batch.motion.shape[1])
        history = self.history(features, batch, step, generator)
        motion, routings = self.model.decode(features, history, batch.style, batch.valid)
        closed = torch.isin(batch.phones, BILABIALS)
        emphasis = torch.where(closed, self.options.closure_weight, 1.0)
        position, velocity = self.loss(motion, batch.motion, batch.valid, emphasis)
        losses = {"vertex": position, "velocity": velocity}
        if routings:
            losses["router"] = config.router_loss_weight * load_balancing_loss(routings)
        if self.phone_head is not None and (batch.phones >= 0).any():
            logits = self.phone_head(features).flatten(0, 1)
            labels = torch.where(batch.valid, batch.phones, -100).flatten()
            losses["phones"] = self.options.phone_weight * nn.functional.cross_entropy(
                logits, labels, ignore_index=-100
            )
        return losses

    def learning_rate(self, step: int) -> float:
        o = self.options
        rate = o.learning_rate * min(1.0, (step + 1) / max(1, o.warmup))
        if o.schedule == "cosine":
            rate *= 0.5 * (1 + math.cos(math.pi * min(1.0, step / o.steps)))
        return rate

    def train_step(self) -> dict[str, float]:
        torch.manual_seed(self.options.seed * 7_919 + self.step)  # dropout
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step)
        losses = self.losses(self.draw(self.step), self.step)
        total = sum(losses.values())
        if not torch.isfinite(total):
            raise FloatingPointError(
                f"step {self.step}: the loss is {total.item()}; lower --learning-rate or check the data"
            )
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.options.clip_norm)
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.model)
        self.step += 1
        return {name: loss.item() for name, loss in losses.items()}

    # Validation

    @property
    def best(self) -> JambaTalk:
        """The model to use: the moving average where there is one."""
        return self.average.module if self.average is not None else self.model

    @torch.no_grad()
    def validate(self, limit: int = 12) -> dict[str, float]:
        """Autoregressive generation on held-out identities (style: unknown) against the truth.

        `error_mm` is the mean over frames of the root mean square lip vertex error, `still_mm` that of a still face;
        `opening_error` the mean absolute error of the mouth's opening (DESIGN 5, 1 = the corpus' 95th percentile).
        """
        model = self.best.eval()
        lips = self.corpus.regions.get("lips", np.arange(self.corpus.vertices.shape[1]))
        chosen = np.unique(np.linspace(0, len(self.val_set) - 1, min(limit, len(self.val_set))).astype(int))
        error, still, opening = [], [], []
        for index in chosen:
            samples, motion, _ = self.val_set.example(int(index))
            features = model.encode(torch.from_numpy(samples)[None], frames=len(motion))
            generated, _ = model.generate(features, torch.tensor([len(self.style_index)]))
            template = self.corpus.templates[self.val_set.clips[index].subject]
            truth, made = (self._vertices(m) for m in (torch.from_numpy(motion), generated[0]))
            error.append(_rms(made[:, lips] - truth[:, lips]))
            still.append(_rms(truth[:, lips]))
            if "inner_lip_upper" in self.corpus.regions:
                pair = (self.corpus.regions["inner_lip_upper"], self.corpus.regions["inner_lip_lower"])
                gaps = [inner_lip_gap(template + v, *pair) for v in (truth, made)]
                opening.append(np.abs(gaps[0] - gaps[1]) / float(model.opening_scale))
        result = {"error_mm": float(np.concatenate(error).mean()), "still_mm": float(np.concatenate(still).mean())}
        if opening:
            result["opening_error"] = float(np.concatenate(opening).mean())
        return result

    def _vertices(self, motion: Tensor) -> np.ndarray:
        """(frames, d) -> (frames, V, 3) displacement in metres."""
        if self.model.config.motion_rank:
            motion = motion @ self.model.motion_basis.T
        return motion.reshape(len(motion), -1, 3).numpy()

    # Checkpoints

    def save(self) -> Path:
        """Write checkpoints/step-NNNNNNNN by an atomic rename: a checkpoint is there whole or not at all."""
        target = self.out / "checkpoints" / f"step-{self.step:08d}"
        scratch = target.with_name(target.name + ".partial")
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        self.model.save_pretrained(scratch)
        state = {f"head.{k}": v for k, v in self.phone_head.state_dict().items()} if self.phone_head else {}
        for i, values in self.optimizer.state_dict()["state"].items():
            state |= {f"adam.{i}.{k}": torch.as_tensor(v).contiguous() for k, v in values.items()}
        if self.average is not None:
            state |= {f"ema.{k}": v for k, v in self.average.state_dict().items()}
        save_file({k: v.clone().contiguous() for k, v in state.items()}, scratch / "training.safetensors")
        (scratch / "training.json").write_text(
            json.dumps({"step": self.step, "options": asdict(self.options)}, indent=1)
        )
        shutil.rmtree(target, ignore_errors=True)
        os.rename(scratch, target)
        return target

    def resume(self) -> bool:
        """Load the newest checkpoint of the run folder; False where there is none."""
        found = sorted((self.out / "checkpoints").glob("step-" + "[0-9]" * 8))
        if not found:
            return False
        folder = found[-1]
        loaded = JambaTalk.from_pretrained(folder)
        self.model.load_state_dict(loaded.state_dict())
        # Cloned: load_file maps the file, and the optimiser would keep reading it.
        state = {name: value.clone() for name, value in load_file(folder / "training.safetensors").items()}
        groups = self.optimizer.state_dict()["param_groups"]
        adam: dict[int, dict[str, Tensor]] = {}
        for name, value in state.items():
            if name.startswith("adam."):
                _, i, key = name.split(".", 2)
                adam.setdefault(int(i), {})[key] = value
        self.optimizer.load_state_dict({"state": adam, "param_groups": groups})
        if self.phone_head is not None:
            self.phone_head.load_state_dict({k[5:]: v for k, v in state.items() if k.startswith("head.")})
        if self.average is not None:
            self.average.load_state_dict({k[4:]: v for k, v in state.items() if k.startswith("ema.")})
        self.step = json.loads((folder / "training.json").read_text())["step"]
        return True

    def run(self, report: Callable[[int, dict[str, float]], None] = lambda step, values: None) -> Path:
        """Train to the last step; leaves `model.safetensors` and `config.json` in the run folder and returns it."""
        o = self.options
        self.out.mkdir(parents=True, exist_ok=True)
        with open(self.out / "log.jsonl", "a") as log:

            def write(values: dict) -> None:
                log.write(json.dumps({"step": self.step, "time": round(time.time(), 1), **values}) + "\n")
                log.flush()
                report(self.step, values)

            while self.step < o.steps:
                write(self.train_step())
                if self.step % o.save_every == 0 or self.step == o.steps:
                    self.save()
                if self.step % o.validate_every == 0 or self.step == o.steps:
                    write(self.validate())
        self.best.save_pretrained(self.out)
        return self.out


def _rms(displacement: np.ndarray) -> np.ndarray:
    """(frames, vertices, 3) metres -> (frames,) root mean square over vertices, millimetres."""
    return 1000 * np.sqrt((displacement**2).sum(-1).mean(-1))
