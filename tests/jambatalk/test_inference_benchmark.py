"""The benchmark of inference, rehearsed on a small model: its stages add up, and its figures are of what it says."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import bench_inference as bench  # noqa: E402
from jambatalk.config import JambaTalkConfig  # noqa: E402
from jambatalk.model import JambaTalk  # noqa: E402

ENCODER = dict(context="full", conv_dim=[8] * 7, hidden=16, layers=1, heads=2, ffn=16)


def small_model(preset):
    torch.manual_seed(0)
    config = JambaTalkConfig.from_preset("vocaset", vertices=9, d_model=16, heads=2, hidden=24, encoder=ENCODER)
    return JambaTalk(config).eval()


@pytest.fixture
def measured(monkeypatch, capsys):
    """`measure`, in this process and on the small model."""
    monkeypatch.setattr(bench, "load_model", small_model)
    threads = torch.get_num_threads()

    def measure(*arguments):
        monkeypatch.setattr(sys, "argv", ["bench_inference", *map(str, arguments), "--threads", str(threads)])
        bench.main()
        return json.loads(capsys.readouterr().out)

    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(bench, "two_cores", lambda: None)
    return measure


def test_stages_add_up(measured):
    result = measured("vocaset", "--seconds", 2, "--write", "--runs", 2)
    best = result["best"]
    stages = [best[name] for name in ("read", "encode", "decode", "vertices", "write")]
    assert min(stages) > 0 and 0.5 * best["total"] < sum(stages) <= best["total"] * (1 + 1e-9)
    assert best["kept"] == 4 * (2 * bench.RATE + 60 * 16)
    assert result["parameters"] == sum(p.numel() for p in small_model("").parameters()) and result["grown"] >= 0
    assert measured("vocaset", "--seconds", 1)["best"]["write"] == 0


def test_cases(measured):
    cases = []
    contest, native = SimpleNamespace(keep=cases.append), SimpleNamespace(cpu_isa=lambda: "plain")
    bench.test_ten_seconds_at_the_papers_size(contest, native, "bfloat16", 0.2)
    bench.test_long_audio_in_constant_memory(contest, native, 0.05)
    speech, long = (case.record for case in cases)
    assert speech["name"].startswith("inference vocaset bfloat16") and speech["facts"]["audio_seconds"] == 10
    figures = {bar["what"]: bar["value"] for bar in speech["bars"]}
    assert figures["real-time factor"] == speech["seconds"]["ours"] / 10
    assert 0 < figures["neither encoder nor loop, share"] < 1
    assert long["facts"]["audio_seconds"] == 3 and [bar.get("most") for bar in long["bars"]] == [0.05, None, 64]
