"""The tables are what the runs scored, repeat after an interruption, and refuse what cannot be."""

import json
import subprocess
import sys
import time
from dataclasses import asdict

import numpy as np
import pytest
from test_training import TINY, make_corpus, tiny_config
from test_vocaset import put_nan

from jambatalk.tables import __main__ as command
from jambatalk.tables import page, runs
from jambatalk.tables.runs import METHODS, Method, Settings, TablesError

FACEFORMER, JAMBATALK = Method("faceformer"), Method("jambatalk", "moe-moe")
OVERRIDES = {**TINY, "encoder": asdict(tiny_config().encoder)}


@pytest.fixture
def data(tmp_path):
    folder = make_corpus(tmp_path / "corpus")
    regions = dict(np.load(folder / "regions.npz"))
    np.savez(folder / "regions.npz", **regions, upper_face=np.array([0, 4]))
    return folder


@pytest.fixture
def settings(data, tmp_path):
    (tmp_path / "out").mkdir()
    return Settings(data, tmp_path / "out", overrides=OVERRIDES, options={"batch": 2}, device="cpu")


def test_all_methods_of_the_paper_are_rows():
    names = [method.name for method in METHODS]
    assert names[:5] == [
        "jambatalk-moe-moe", "jambatalk-m-moe", "jambatalk-m-m", "jambatalk-moe-m", "faceformer"
    ]  # fmt: skip
    assert page.title("jambatalk-m-moe") == "JambaTalk, M-MoE" and page.title("faceformer") == "FaceFormer"


def test_time_constants_are_in_proportion_to_the_run(settings):
    """The demo's 2400 steps have 100 of warm-up, a history that ramps over 600, and an average over 200."""
    options = settings.training_options(3, 600)
    assert (options.steps, options.warmup, options.history_ramp, options.seed) == (600, 25, 150, 3)
    assert options.ema == pytest.approx(1 - 1 / 50) and options.batch == 2
    assert settings.training_options(0, None).ema == 0.995
    assert settings.training_options(0, 2).ema == 0


def test_a_run_that_was_stopped_scores_as_if_it_had_not_been(settings, monkeypatch):
    baselines = runs.prepare(settings)
    assert set(baselines) == {"mean face", "nearest neighbour"}
    monkeypatch.setattr(runs, "prepare", None)
    steps = []
    whole = runs.run(settings, FACEFORMER, 1, 5, steps.append)
    assert steps[0] == 0 and steps[-1] == 5
    folder = settings.run_folder(FACEFORMER, 1)
    weights = (folder / "model.safetensors").read_bytes()

    class Stopped(Exception):
        pass

    def stop(step):
        if step == 3:
            raise Stopped

    folder.rename(settings.out / "first")
    with pytest.raises(Stopped):
        runs.run(settings, FACEFORMER, 1, 5, stop)
    steps.clear()
    again = runs.run(settings, FACEFORMER, 1, 5, steps.append)
    assert steps[0] == 2, "goes on from the checkpoint"
    assert (folder / "model.safetensors").read_bytes() == weights
    assert again["scores"] == whole["scores"] and again["steps"] == 5
    steps.clear()
    assert runs.run(settings, FACEFORMER, 1, 5, steps.append) == again and not steps, "a finished run is read"


def test_what_a_method_costs(settings, monkeypatch):
    monkeypatch.setattr(runs, "TIMED", 2)
    found = runs.cost(settings, FACEFORMER)
    model = settings.trainer(FACEFORMER, settings.open(), 0, 1).model
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["decoder_parameters"] == found["parameters"] - sum(p.numel() for p in model.encoder.parameters())
    assert found["seconds_per_epoch"] == pytest.approx(found["seconds_per_step"] * 2), "four clips, two a step"
    assert found["seconds_per_step"] > 0 and 2**24 < found["peak_memory"] < 2**36


def tables(**more):
    measures = {"jambatalk": ("LVE", "FDD", "|FDD|"), "codetalker": ("LVE", "LVE, distance", "FDD")}

    def scores(x):
        values = {"LVE": 4e-6 * x, "LVE, distance": 2.0 * x, "FDD": 3e-6 * x}
        return {"jambatalk": dict.fromkeys(measures["jambatalk"], 1.0 * x), "codetalker": values}

    method = dict(seconds_per_step=0.5, seconds_per_epoch=20.0, peak_memory=3 * 2**29, parameters=5_250_000,
                  decoder_parameters=2_000_000, steps=100)  # fmt: skip
    made = dict(runs=[{"steps": 100, "scores": scores(x)} for x in (1.0, 3.0)], frames_per_second=[200.0, 600.0])
    return {
        "synthetic": True, "data": "corpus", "preset": "demo", "split": "test", "seeds": 2,
        "protocols": ["jambatalk", "codetalker"], "seconds_per_run": 90.0, "batch": 8, "machine": "here",
        "baselines": {"mean face": scores(5.0)},
        "methods": {name: {**method, **made} for name in ("jambatalk-moe-moe", "jambatalk-m-m", "faceformer")},
        **more,
    }  # fmt: skip


def test_the_page_has_mean_and_spread_in_millimetres(tmp_path):
    text = page.write(tables(), tmp_path).read_text("utf-8")
    methods, arrangements = text.split("## Arrangements")
    row = next(line for line in methods.splitlines() if line.startswith("| FaceFormer"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    # Two seeds of x and 3x: mean 2x, standard deviation sqrt(2) x. Square metres become square millimetres.
    assert cells[1:7] == ["2 ± 1.4", "2 ± 1.4", "2 ± 1.4", "8 ± 5.7", "4 ± 2.8", "6 ± 4.2"]
    assert cells[7:] == ["5.25 M (2.00 M)", "100", "20", "1.50 GiB", "400 ± 2.8e+02"]
    assert "| mean face | 5 | 5 | 5 | 20 | 10 | 15 |" in methods
    assert "JambaTalk, M-M |" in arrangements and "JambaTalk, M-M |" not in methods
    assert r"\|FDD\| (mm), `jambatalk`" in methods, "a bar would part the cell"
    assert "LVE, distance (mm), `codetalker`" in methods and "LVE (mm²), `codetalker`" in methods
    assert "synthetic corpus" in text and "trains for 1.5 min" in text
    assert "| JambaTalk | 1.7956 | 0.2167 |" in text and "(×1e-3 mm)" in text, "the paper's, as quoted"
    plot = (tmp_path / "quality_speed.svg").read_text("utf-8")
    assert plot.count("<circle") == 3 and "FaceFormer" in plot
    assert json.loads((tmp_path / "tables.json").read_text("utf-8")) == tables()
    other = page.markdown(tables(synthetic=False, seconds_per_run=None))
    assert "synthetic" not in other and "same number of steps" in other


def run(data, out, *more):
    return command.main(["--data", str(data), "--out", str(out), *map(str, more)])


def test_bad_input_is_one_line_and_exit_code_2(data, tmp_path, capsys):
    out = tmp_path / "tables"
    config = tmp_path / "tiny.json"
    config.write_text(json.dumps(OVERRIDES))
    other = tmp_path / "other.json"
    other.write_text(json.dumps({**OVERRIDES, "head": 3}))
    assert run(tmp_path / "nowhere", out) == 2
    assert run(data, out, "--seeds", 0) == 2
    assert run(data, out, "--budget", -1) == 2
    assert run(data, out, "--methods", "voca") == 2
    assert run(data, out, "--protocol", "best") == 2
    assert run(data, out, "--split", "nowhere", "--config", config) == 2
    assert run(data, out, "--config", other) == 2
    np.savez(data / "regions.npz", lips=np.array([1, 2]))
    assert run(data, out, "--config", config) == 2
    put_nan(data)
    assert run(data, out, "--config", config) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 9 and all(line.startswith("jambatalk: error: ") for line in lines)
    expected = ("no such folder", "--seeds", "--budget", "known are jambatalk-moe-moe",
                "known are jambatalk, codetalker", "nowhere", "the methods: head",
                "no region 'upper_face'", "NaN or Inf")  # fmt: skip
    for line, text in zip(lines, expected, strict=True):
        assert text in line
    assert not out.exists()


def test_a_folder_keeps_to_what_was_asked(data, settings):
    plan = {"asked": {**settings.asked(), "budget": None, "steps": 3}, "seconds_per_run": None, "methods": {}}
    (settings.out / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(TablesError, match=r"holds tables with another steps \(3, not 4\): choose another --out"):
        command.make(settings, [FACEFORMER], 1, None, 4, 1)


@pytest.mark.slow
def test_the_command_makes_tables_and_goes_on_after_a_kill(data, tmp_path):
    config = tmp_path / "tiny.json"
    config.write_text(json.dumps(OVERRIDES))

    def arguments(out):
        return [sys.executable, "-m", "jambatalk.tables", "--data", data, "--out", out, "--config", config, "--seeds",
                "1", "--steps", "30", "--batch", "2", "--methods", JAMBATALK.name, "faceformer", "--device", "cpu",
                "--jobs", "2"]  # fmt: skip

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    done = subprocess.run(arguments(whole), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0 and done.stdout.strip() == str(whole / "tables.md"), done.stderr
    killed = subprocess.Popen(arguments(parts), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    patience = time.monotonic() + 250
    while not list(parts.glob("faceformer-seed0/checkpoints/step-*[0-9]")):
        assert killed.poll() is None and time.monotonic() < patience
        time.sleep(0.02)
    killed.kill()
    killed.wait()
    assert subprocess.run(arguments(parts), capture_output=True, timeout=280).returncode == 0
    first, second = (json.loads((folder / "tables.json").read_text()) for folder in (whole, parts))
    for name in first["methods"]:
        for a, b in zip(first["methods"][name]["runs"], second["methods"][name]["runs"], strict=True):
            assert a["scores"] == b["scores"]
    assert first["baselines"] == second["baselines"]
