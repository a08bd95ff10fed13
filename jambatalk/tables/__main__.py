"""python -m jambatalk.tables --data DIR: train and score every method on one corpus, and write the tables.

Without `--budget` every run has as many steps; with it, as many as fill its share of the time (`jambatalk.tables.runs`
says how, and why the result repeats all the same). The same command goes on where it was stopped: a finished run is
read, an unfinished one goes on from its checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jambatalk.data.vocaset import add_arguments

if TYPE_CHECKING:
    from jambatalk.tables.runs import Method, Settings


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m jambatalk.tables",
        description="Trains and scores JambaTalk in its four arrangements and the baselines on the same data, and "
        "writes tables.md, tables.json and a picture of quality against speed. The same command goes on where it was "
        "stopped.",
    )
    p.add_argument("--data", type=Path, required=True, metavar="DIR", help="corpus, as for jambatalk.train")
    p.add_argument("--out", type=Path, default=Path("runs/tables"), metavar="DIR", help="default: runs/tables")
    p.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each method (default: 3)")
    length = p.add_mutually_exclusive_group()
    length.add_argument("--budget", type=float, metavar="MINUTES", help="training time of all runs together, the same "
                        "for each; reading the data and scoring come on top (default: equal steps)")  # fmt: skip
    length.add_argument("--steps", type=int, metavar="N", help="steps of each run (default: the preset's)")
    p.add_argument("--methods", nargs="+", metavar="NAME", help="only these rows (default: all; --methods list)")
    p.add_argument("--preset", choices=("vocaset", "biwi", "demo"), default="demo", help="default: demo")
    p.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="JSON with values that replace the preset's, of the methods that have them",
    )
    p.add_argument("--batch", type=int, metavar="N", help="clips a step (default: the preset's)")
    p.add_argument("--encoder", metavar="PATH_OR_ID", help="a Wav2Vec 2.0 checkpoint to start every encoder from")
    p.add_argument("--protocol", default="codetalker", metavar="NAME",
                   help="to score by beside the paper's (default: codetalker)")  # fmt: skip
    p.add_argument("--split", default="test", help="to score on (default: test)")
    p.add_argument("--regions", metavar="FILE", type=Path, help="as for jambatalk.evaluate")
    p.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (default: 1)")
    p.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads of each run (default: 1)")
    p.add_argument("--device", choices=("auto", "cpu"), default="auto", help="auto: a GPU where there is one")
    add_arguments(p)
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    for name in ("seeds", "budget", "steps", "batch", "jobs", "threads"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            return _fail(f"--{name} must be positive, not {value}")

    from jambatalk.audio import AudioError
    from jambatalk.comparison import ComparisonError
    from jambatalk.protocols import PROTOCOLS, ProtocolError
    from jambatalk.tables import page
    from jambatalk.tables.runs import METHODS, Settings, TablesError
    from jambatalk.train import read_overrides

    known = {method.name: method for method in METHODS}
    if args.methods == ["list"]:
        print("\n".join(known))
        return 0
    try:
        for name in args.methods or ():
            if name not in known:
                raise TablesError(f"--methods {name}: known are {', '.join(known)}")
        if args.protocol not in PROTOCOLS:
            raise TablesError(f"--protocol {args.protocol}: known are {', '.join(PROTOCOLS)}")
        settings = Settings(
            data=args.data, out=args.out, preset=args.preset, protocol=args.protocol, split=args.split,
            encoder=args.encoder, overrides=read_overrides(args.config),
            options={} if args.batch is None else {"batch": args.batch}, regions=args.regions,
            corpus=dict(units=args.units, fps=args.data_fps, skip_bad=args.skip_bad), threads=args.threads,
            device=args.device,
        )  # fmt: skip
        methods = [known[name] for name in dict.fromkeys(args.methods or known)]
        written = make(settings, methods, args.seeds, args.budget, args.steps, args.jobs)
    except (ValueError, OSError, AudioError, ComparisonError, ProtocolError, FloatingPointError) as error:
        return _fail(str(error).splitlines()[0])
    except KeyboardInterrupt:
        print("stopped: the same command goes on", file=sys.stderr)
        return 130
    print(page.write(written, args.out))
    return 0


def make(
    settings: Settings, methods: list[Method], seeds: int, budget: float | None, steps: int | None, jobs: int
) -> dict:
    """Does what is not done yet, and returns what the page shows. Errors: ValueError and its kind, one line."""
    from tqdm import tqdm

    from jambatalk.tables import runs
    from jambatalk.tables.processes import Processes

    corpus = settings.open()  # a bad one is said to be before anything starts
    for split in ("train", "val", settings.split):
        corpus.clips(split)
    settings.check(methods)
    _check_regions(settings, corpus)
    synthetic = _is_synthetic(settings.data)
    del corpus
    settings.out.mkdir(parents=True, exist_ok=True)
    plan_file = settings.out / "plan.json"
    plan = runs.read_json(plan_file) if plan_file.exists() else {}
    asked = {**settings.asked(), "budget": budget, "steps": steps}
    if plan and plan["asked"] != asked:
        other = next(key for key in asked if plan["asked"].get(key) != asked[key])
        raise runs.TablesError(
            f"{settings.out}: holds tables with another {other} ({plan['asked'].get(other)}, not {asked[other]}): "
            "choose another --out"
        )
    # More methods and seeds may come later; what a run gets stays.
    seconds = None if budget is None else 60 * budget / (len(methods) * seeds)
    plan = {"asked": asked, "seconds_per_run": seconds, "methods": {}} | plan
    with Processes(jobs) as processes:
        print("the predictors that do not train ...", file=sys.stderr)
        baselines = processes.start(runs.prepare, settings).result()
        untimed = [method for method in methods if method.name not in plan["methods"]]
        for method in untimed:  # one after the other, so that none slows another
            found = processes.start(runs.cost, settings, method).result()
            if budget is None:
                length = steps or settings.usual_steps()
            else:
                length = max(1, round(plan["seconds_per_run"] / found["seconds_per_step"]))
            plan["methods"][method.name] = {**found, "steps": length}
            runs.write_json(plan_file, plan)
            print(f"{method.name}: {found['seconds_per_step']:.3g} s a step, {length} steps", file=sys.stderr)
        planned = {method.name: plan["methods"][method.name]["steps"] for method in methods}
        with tqdm(total=seeds * sum(planned.values()), unit="step", smoothing=0.02) as bar:
            started = {
                (method.name, seed): processes.start(
                    runs.run, settings, method, seed, planned[method.name],
                    report=_Bar(bar, f"{method.name} seed {seed}", planned[method.name]),
                )
                for seed in range(seeds)
                for method in methods
            }  # fmt: skip
            results = {
                method.name: [started[method.name, seed].result() for seed in range(seeds)] for method in methods
            }
        print("speed of generation ...", file=sys.stderr)
        speeds = {method.name: processes.start(runs.speeds, settings, method, seeds).result() for method in methods}
    return {
        "synthetic": synthetic,
        "data": settings.data.name,
        "preset": settings.preset,
        "split": settings.split,
        "seeds": seeds,
        "protocols": [protocol.name for protocol in settings.protocols()],
        "seconds_per_run": plan["seconds_per_run"],
        "batch": settings.training_options(0, 1).batch,
        "machine": _machine(settings, jobs),
        "baselines": baselines,
        "methods": {
            name: {**plan["methods"][name], "runs": found, "frames_per_second": speeds[name]}
            for name, found in results.items()
        },
    }


class _Bar:
    """One run's part of the progress bar; called with the steps that it has done."""

    def __init__(self, bar: Any, name: str, steps: int):
        self.bar, self.name, self.steps, self.done = bar, name, steps, 0

    def __call__(self, step: int) -> None:
        self.bar.update(step - self.done)
        self.bar.set_postfix_str(f"{self.name}: {step} of {self.steps}")
        self.done = step


def _check_regions(settings: Settings, corpus: Any) -> None:
    """Raises where a protocol asks for a region that the mesh does not have: before anything has been trained."""
    from jambatalk import comparison
    from jambatalk.protocols import Pair

    rest = next(iter(corpus.templates.values()))[None]
    regions = comparison.find_regions(settings.regions, corpus, corpus.vertex_count)
    for protocol in settings.protocols():
        protocol.score([Pair("template", rest, rest, rest[0], 30.0, regions)])


def _is_synthetic(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / "manifest.json").read_text("utf-8")).get("synthetic"))
    except (OSError, ValueError, AttributeError):
        return False


def _machine(settings: Settings, jobs: int) -> str:
    import torch

    name = platform.processor() or platform.machine()
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    if settings.device != "cpu" and torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    return (
        f"{name}, {os.cpu_count()} CPUs; {jobs} run{'s' * (jobs > 1)} at a time of {settings.threads} "
        f"thread{'s' * (settings.threads > 1)}; torch {torch.__version__}"
    )


def _fail(message: str) -> int:
    print(f"jambatalk: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
