"""The runs behind the tables: what each costs, how long it may train, what it scores.

Everything that a run leaves is in one folder, so that the same command goes on where it was stopped:

    plan.json                what was asked for; of each method its cost and the steps of its runs
    basis.safetensors        the motion basis, which all runs share
    baselines.json           the scores of the two predictors that do not train
    <method>-seed<n>/        a run folder of `jambatalk.train`, with `result.json` when it is scored, and `speed.json`

A budget is wall time, and wall time does not repeat. So each method is timed once, for `TIMED` steps spread over a
run, and gets the number of steps that fill its share of the budget at that pace; from then on only that number counts.
A run that was stopped goes on from its checkpoint to the last bit (`jambatalk.training`), and what is scored is what an
uninterrupted run would have scored. Times and memory are those of the timed steps, of one process alone with the
same number of threads for all, and are not part of what repeats.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from jambatalk import comparison
from jambatalk.baselines.naive import MeanFace, NearestNeighbour
from jambatalk.config import ARRANGEMENTS, MODELS, ConfigError, TalkingFaceConfig
from jambatalk.data.vocaset import Corpus
from jambatalk.protocols import PROTOCOLS
from jambatalk.talking_face import TalkingFace, model_class
from jambatalk.training import Trainer, TrainingOptions, motion_basis, newest_checkpoint

TIMED = 12  # steps that the cost of a method is measured on
SPAN = 1000  # steps of the run that they are spread over
SPOKEN = 6  # clips that the speed of generation is measured on


class TablesError(ValueError):
    """Tables that cannot be made: one clear line."""


@dataclass(frozen=True)
class Method:
    """One row: a model, and of JambaTalk an arrangement."""

    model: str
    arrangement: str | None = None

    @property
    def name(self) -> str:
        return self.model if self.arrangement is None else f"{self.model}-{self.arrangement}"


METHODS = tuple(Method("jambatalk", arrangement) for arrangement in ARRANGEMENTS) + tuple(
    Method(model) for model in MODELS if model != "jambatalk"
)


@dataclass(frozen=True)
class Settings:
    """What all runs of the tables have in common."""

    data: Path
    out: Path
    preset: str = "demo"
    protocol: str = "codetalker"  # beside the paper's
    split: str = "test"
    encoder: str | None = None  # a Wav2Vec 2.0 checkpoint to start from
    overrides: dict = field(default_factory=dict)  # of the preset's configuration
    options: dict = field(default_factory=dict)  # of the preset's training options
    regions: Path | None = None
    corpus: dict = field(default_factory=dict)  # options of `Corpus`
    threads: int = 1  # of each run
    device: str = "auto"

    def open(self) -> Corpus:
        return Corpus(self.data, **self.corpus)

    def config(self, method: Method) -> TalkingFaceConfig:
        """The preset's, with those of the overrides that this method has a place for."""
        kind = model_class(method.model).config_class
        own = {field.name for field in fields(kind)}
        values = {key: value for key, value in self.overrides.items() if key in own}
        return kind.from_preset(
            self.preset, **values, **({} if method.arrangement is None else {"arrangement": method.arrangement})
        )

    def check(self, methods: Sequence[Method]) -> None:
        """Raises ConfigError where an override is known to none of these, or a configuration cannot be."""
        known = {field.name for method in methods for field in fields(self.config(method))}
        unknown = sorted(set(self.overrides) - (known - {"model", "arrangement"}))
        if unknown:
            raise ConfigError(f"unknown configuration keys for all of the methods: {', '.join(unknown)}")

    def training_options(self, seed: int, steps: int | None) -> TrainingOptions:
        """Those of the preset, with every time constant in proportion to the length of the run."""
        usual = TrainingOptions.for_preset(self.preset, seed=seed, **self.options)
        steps = steps or self.usual_steps()
        share = steps / self.usual_steps()
        return replace(
            usual, steps=steps, warmup=round(usual.warmup * share), history_ramp=round(usual.history_ramp * share),
            ema=max(0.0, 1 - (1 - usual.ema) / share) if usual.ema else 0.0,
            save_every=max(1, steps // 20), keep=1, validate_every=steps,
        )  # fmt: skip

    def usual_steps(self) -> int:
        """Of a run by the preset."""
        usual = TrainingOptions.for_preset(self.preset, **self.options)
        return usual.steps or usual.epochs * -(-len(self.open().clips("train")) // usual.batch)

    def trainer(
        self, method: Method, corpus: Corpus, seed: int, steps: int | None, checkpoint: Path | None = None
    ) -> Trainer:
        return Trainer(
            self.config(method), self.training_options(seed, steps), corpus, self.run_folder(method, seed),
            self.encoder, checkpoint=checkpoint, device=self.device, basis=self.basis(),
        )  # fmt: skip

    def run_folder(self, method: Method, seed: int) -> Path:
        return self.out / f"{method.name}-seed{seed}"

    def trained(self, method: Method, seed: int) -> TalkingFace:
        model = TalkingFace.from_pretrained(self.run_folder(method, seed))
        return model.to("cuda" if self.device != "cpu" and torch.cuda.is_available() else "cpu")

    def basis(self) -> torch.Tensor | None:
        path = self.out / "basis.safetensors"
        return load_file(path)["basis"] if path.exists() else None

    def protocols(self) -> list:
        return [PROTOCOLS[name] for name in dict.fromkeys(("jambatalk", self.protocol))]

    def asked(self) -> dict:
        """What two commands must agree in to share a folder."""
        values = {key: value for key, value in asdict(self).items() if key not in ("out", "threads", "device")}
        return json.loads(json.dumps(values, default=lambda path: str(Path(path).resolve())))


# ---- what is done once


def prepare(settings: Settings) -> dict:
    """The motion basis, and the scores of the predictors that do not train: {name: {protocol: scores}}."""
    _be_alike(settings)
    done = settings.out / "baselines.json"
    if done.exists():
        return read_json(done)
    corpus = settings.open()
    regions = comparison.find_regions(settings.regions, corpus, corpus.vertex_count)
    rate = settings.config(METHODS[0]).frame_rate
    predictors = {
        name: comparison.FromBaseline(kind(corpus, rate), rate)
        for name, kind in (("mean face", MeanFace), ("nearest neighbour", NearestNeighbour))
    }
    scores = _score(settings, corpus, regions, predictors)
    rank = settings.config(METHODS[0]).motion_rank
    if rank:
        basis, _ = motion_basis(corpus, corpus.clips("train"), rank)
        partial = settings.out / "basis.partial"
        save_file({"basis": basis.contiguous()}, partial)
        os.replace(partial, settings.out / "basis.safetensors")
    write_json(done, scores)
    return scores


def cost(settings: Settings, method: Method) -> dict:
    """What a method costs: {"seconds_per_step", "seconds_per_epoch", "peak_memory" bytes, "parameters",
    "decoder_parameters"}. The steps that are timed see the same clips whatever the method."""
    _be_alike(settings)
    trainer = settings.trainer(method, settings.open(), 0, SPAN)
    on_gpu = trainer.device.type == "cuda"
    places = [0, *(int(SPAN * (i + 0.5) / TIMED) for i in range(TIMED))]  # the first is not counted
    seconds = []
    with peak_memory(on_gpu) as peak:
        for trainer.step in places:
            batch = trainer.draw(trainer.step)
            begun = time.perf_counter()
            trainer.train_step(batch)  # ends with the losses on the host: a GPU has nothing left to do
            seconds.append(time.perf_counter() - begun)
    counts = {name: p.numel() for name, p in trainer.model.named_parameters()}
    pace = float(np.mean(seconds[1:]))
    return {
        "seconds_per_step": pace,
        "seconds_per_epoch": pace * len(trainer.train_set) / trainer.options.batch,
        "peak_memory": peak(),
        "parameters": sum(counts.values()),
        "decoder_parameters": sum(n for name, n in counts.items() if not name.startswith("encoder.")),
    }


@contextlib.contextmanager
def peak_memory(on_gpu: bool) -> Iterator[Callable[[], int]]:
    """The most memory that this process held in the block, bytes: on a GPU what PyTorch allocated, else (Linux)
    resident memory that is no file's, looked at every 5 ms; elsewhere the most since the process started."""
    most, done = 0, threading.Event()

    def watch() -> None:
        nonlocal most
        page = os.sysconf("SC_PAGE_SIZE")
        with open("/proc/self/statm") as file:
            while not done.wait(0.005):
                file.seek(0)
                resident, shared = map(int, file.read().split()[1:3])
                most = max(most, (resident - shared) * page)

    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        yield torch.cuda.max_memory_allocated
    elif sys.platform == "linux":
        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield lambda: most
        finally:
            done.set()
            thread.join()
    else:
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        yield lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# ---- a run


def run(settings: Settings, method: Method, seed: int, steps: int, report: Callable[[int], None]) -> dict:
    """Trains, from the newest checkpoint where there is one, and scores: {"steps", "scores": {protocol: {measure:
    value}}}. Read from `result.json` where the run is finished. report: called with the steps done."""
    folder = settings.run_folder(method, seed)
    if (folder / "result.json").exists():
        return read_json(folder / "result.json")
    _be_alike(settings)
    corpus = settings.open()
    if not (folder / "config.json").exists():  # written last
        trainer = settings.trainer(method, corpus, seed, steps, newest_checkpoint(folder))
        report(trainer.step)
        trainer.run(lambda step, values: report(step))
        del trainer
    report(steps)
    model = settings.trained(method, seed)
    regions = comparison.find_regions(settings.regions, corpus, corpus.vertex_count)
    scores = _score(settings, corpus, regions, {method.name: comparison.FromModel(model)})[method.name]
    result = {"steps": steps, "scores": scores}
    write_json(folder / "result.json", result)
    return result


def speeds(settings: Settings, method: Method, seeds: int) -> list[float]:
    """Of each finished run, frames a second from samples to coefficients, each clip by itself; kept in `speed.json`.
    One method after the other, as `cost`."""
    _be_alike(settings)
    found, clips = [], None
    for seed in range(seeds):
        done = settings.run_folder(method, seed) / "speed.json"
        if not done.exists():
            clips = clips or [clip.samples for clip in settings.open().clips(settings.split)]
            write_json(done, {"frames_per_second": _speed(settings.trained(method, seed), clips)})
        found.append(read_json(done)["frames_per_second"])
    return found


def _score(settings: Settings, corpus: Corpus, regions: dict, predictors: dict) -> dict[str, dict[str, dict]]:
    setting = comparison.Setting(
        settings.data, lambda: comparison.ground_truth(settings.data, settings.split, None, corpus), predictors,
        regions, corpus.faces, corpus.bad,
    )  # fmt: skip
    found = comparison.report(setting, settings.protocols())["protocols"]
    return {name: {one["protocol"]: one["predictors"][name]["scores"] for one in found} for name in predictors}


def _speed(model: TalkingFace, clips: list[np.ndarray]) -> float:
    chosen = np.unique(np.linspace(0, len(clips) - 1, min(SPOKEN, len(clips))).astype(int))
    model.animate(clips[0])
    made = [model.animate(clips[i]) for i in chosen]
    seconds = sum(animation.seconds["encode"] + animation.seconds["decode"] for animation in made)
    return sum(animation.frames for animation in made) / seconds


def _be_alike(settings: Settings) -> None:
    torch.set_num_threads(settings.threads)


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise TablesError(f"{path}: cannot be read ({' '.join(str(error).split())})") from None


def write_json(path: Path, values: object) -> None:
    """By an atomic rename: the file is there whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(values, indent=1) + "\n", "utf-8")
    os.replace(partial, path)
