"""The result files: one per machine, results/<machine>.json."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Iterable
from pathlib import Path

import torch

from benchmarks.timing import CUDA_CAP
from jambatalk_kernels import doctor

FOLDER = Path(__file__).parent / "results"


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


class Case:
    """One benchmark: what it must move and compute, who took how long, and the bars that it must meet.

    Args:
        name: unique among the results. op: the function of jambatalk_kernels. device: "cpu" or "cuda".
        bytes: read once and written once. operations: by unit, as counted in the formula. limit: which of the
            machine's limits binds. facts: shape, dtype, threads, instruction set, backend: whatever identifies it.
    """

    def __init__(self, name: str, op: str, device: str, bytes: int, operations: dict, limit: str, facts: dict) -> None:
        self.record = {
            "name": name, "op": op, "device": device, "facts": facts, "bytes": int(bytes), "operations": operations,
            "limit": limit, "seconds": {}, "absent": {}, "bars": [], "taken": now(),
        }  # fmt: skip

    @property
    def seconds(self) -> dict[str, float]:
        return self.record["seconds"]

    def bar(self, what: str, value: float, *, least: float | None = None, most: float | None = None) -> None:
        """State a figure and its bar, checked when the test ends, so that all figures are on record."""
        bounds = {name: bound for name, bound in (("least", least), ("most", most)) if bound is not None}
        holds = (least is None or value >= least) and (most is None or value <= most)
        self.record["bars"].append({"what": what, "value": value, **bounds, **({"holds": holds} if bounds else {})})

    def note(self, what: str, value: float) -> None:
        """A figure without a bar."""
        self.bar(what, value)


def machine(device: str) -> dict:
    """What the figures depend on besides the code."""
    facts = doctor.examine()
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "transformers"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        return {
            "device": properties.name,
            "architecture": f"sm_{properties.major}{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_cap_bytes": CUDA_CAP,
            "cuda": torch.version.cuda,
            "versions": versions,
        }
    return {
        "device": facts["machine"]["processor"],
        "architecture": platform.machine(),
        "instruction_set": facts["native"].get("instruction_set"),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "compiler": facts["native"].get("compiler"),
        "versions": versions,
    }


def slug(facts: dict) -> str:
    """nvidia-h200; cpu-amd-epyc-avx512"""
    isa = facts.get("instruction_set")
    text = facts["device"] if "memory_cap_bytes" in facts else f"cpu {facts['device']} {isa or ''}"
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def save(folder: Path, cases: Iterable[Case], outcomes: dict[str, str | None], replace: bool) -> None:
    """Write one file per device.

    Unless ``replace``, what did not run this time stays, if the machine and its versions are the same.
    outcomes: test -> why it was skipped, which goes into every file; None if it ran.
    """
    folder.mkdir(parents=True, exist_ok=True)
    records = [case.record for case in cases]
    for device in sorted({record["device"] for record in records}):
        facts = machine(device)
        path = folder / f"{slug(facts)}.json"
        kept, without = {}, {}
        if path.exists() and not replace:
            before = json.loads(path.read_text())
            if before["machine"] == facts:
                kept, without = {each["name"]: each for each in before["cases"]}, before.get("skipped", {})
        fresh = {record["name"]: record for record in records if record["device"] == device}
        ordered = [rounded(kept[name] if name not in fresh else fresh[name]) for name in {**kept, **fresh}]
        skipped = {test: reason for test, reason in {**without, **outcomes}.items() if reason is not None}
        written = {"machine": facts, "cases": ordered, "skipped": skipped}
        path.write_text(json.dumps(written, indent=2) + "\n")


def rounded(value):
    """Four significant digits: more would be noise."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, list) else value


def load() -> list[dict]:
    return [json.loads(path.read_text()) | {"file": path.name} for path in sorted(FOLDER.glob("*.json"))]


def time_text(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * scale >= 1 or unit == "us":
            return f"{seconds * scale:.3g} {unit}"
    raise AssertionError


def bar_text(bar: dict) -> str:
    value = f"{bar['value']:.3g}"
    bounds = [f"{sign} {bar[key]:.3g}" for key, sign in (("least", ">="), ("most", "<=")) if key in bar]
    missed = "" if bar.get("holds", True) else ", MISSED"
    return f"{bar['what']} {value}" + (f" (bar {' and '.join(bounds)}{missed})" if bounds else "")


def summary(cases: Iterable[Case]) -> list[str]:
    lines = []
    for case in cases:
        record = case.record
        times = ", ".join(f"{name} {time_text(value)}" for name, value in record["seconds"].items())
        lines.append(f"{record['name']}: {times}")
        lines += [f"    {bar_text(bar)}" for bar in record["bars"]]
        lines += [f"    without {name}: {why}" for name, why in record["absent"].items()]
    return lines
