"""The benchmark suite's own arithmetic: bars, result files, the prediction model. No timing, no compiler."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from gpu_code import Code, Instruction  # noqa: E402

from benchmarks import cards, headline, peers, predict, report, results, roofline  # noqa: E402
from benchmarks.timing import CpuContestant, rotation  # noqa: E402


def loop(*lines):
    instructions = tuple(Instruction(16 * i, line.split()[0], line) for i, line in enumerate(lines))
    return Code("loop", instructions)


def case(name="a case", device="cpu"):
    return results.Case(name, "an op", device, bytes=8, operations={"exp": 1}, limit="memory", facts={})


def card(name):
    found = cards.find(name)
    assert found is not None
    return found


def test_bars():
    it = case()
    it.bar("speed", 3.0, least=2)
    it.bar("time", 3.0, most=2)
    it.note("aside", 1.0)
    assert [bar.get("holds") for bar in it.record["bars"]] == [True, False, None]
    assert results.bar_text(it.record["bars"][1]) == "time 3 (bar <= 2, MISSED)"


def test_result_files_keep_what_did_not_run(tmp_path):
    first, second = case("one"), case("two")
    first.seconds["ours"], second.seconds["ours"] = 1.23456789, 2.0
    results.save(tmp_path, [first], {"test_one": None, "test_two": "no GPU", "test_three": "no GPU"}, replace=False)
    results.save(tmp_path, [second], {"test_two": None}, replace=False)
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("cpu-")
    written = json.loads(path.read_text())
    assert [each["name"] for each in written["cases"]] == ["one", "two"]
    assert written["cases"][0]["seconds"]["ours"] == 1.235
    assert written["machine"]["versions"]["torch"]
    assert written["skipped"] == {"test_three": "no GPU"}
    results.save(tmp_path, [second], {}, replace=True)
    assert [each["name"] for each in json.loads(path.read_text())["cases"]] == ["two"]
    assert any("| two | 2&nbsp;s |" in line for line in report.measured({**written, "file": path.name}))


def machine_with(*cases):
    machine = {"device": "a processor", "architecture": "x86_64", "instruction_set": "avx2", "versions": {"torch": "2"}}
    return {"machine": machine, "file": "a.json", "cases": list(cases)}


def test_the_readme_says_what_was_measured():
    """Nobody edits a figure there: `python -m benchmarks.report` writes them."""
    readme = headline.README.read_text()
    files = [result for result in results.load() if f"`{result['file']}`" in readme]  # not a user's own machine's
    assert files and headline.written(readme, files) == readme


def test_headline_figures():
    loop = case("rollout vocaset without rotation, 2 threads").record
    loop["seconds"] = {"ours": 0.02, "transformers": 0.1}
    speech = case("inference vocaset float32 10 s, 2 threads").record
    speech["seconds"], speech["facts"] = {"ours": 1.5}, {"audio_seconds": 10}
    table = headline.table([machine_with(loop, speech), {"machine": {"memory_cap_bytes": 1}, "cases": []}])
    assert "| 20 ms | transformers' layers: 100 ms | 5.0 |" in table
    assert "| 1.5 s | the speech: 10 s | 6.7 |" in table
    assert "| not measured | FaceFormer's loop | |" in table
    with pytest.raises(ValueError, match="README.md"):
        headline.written("a page without marks", [])


def test_roofline_plot():
    ceilings = case("machine 1 thread").record
    figures = {roofline.COPY: 1e10, roofline.MATRIX: 1e11}
    ceilings.update(op="machine", bars=[{"what": what, "value": value} for what, value in figures.items()])
    dot = case("selective_scan forward <1>").record
    dot.update(op="selective_scan", bytes=100, operations={"float32": 1000, "exp": 7}, seconds={"ours": 1e-6})
    drawing = roofline.draw(machine_with(ceilings, dot), "a processor")
    assert "selective_scan forward &lt;1&gt;: 1 Gop/s" in drawing and "10 GB/s, 100 Gop/s" in drawing
    assert roofline.points([dot])[0][:3] == ("selective_scan", 10.0, 1e9)
    assert roofline.draw(machine_with(dot), "a processor") is None  # no roof: no plot
    for op in ("selective_scan_step", "moe_mlp", "training"):
        assert roofline.family(op) in roofline.FAMILIES


def test_the_report_names_what_was_missed_and_what_did_not_run():
    slow = case("a slow case")
    slow.seconds["ours"] = 1.0
    slow.bar("seconds", 1.0, most=0.5)
    lines = report.measured(machine_with(slow.record))
    assert "1 cases, 1 bars, 1 missed:" in lines and "- a slow case: seconds 1 (bar <= 0.5, MISSED)" in lines
    result = {**machine_with(), "skipped": {"bench_moe.py::test_cuda": "no GPU", "bench_moe.py::test_b": "no GPU"}}
    assert "- no GPU: `bench_moe.py::test_cuda`, `bench_moe.py::test_b`" in report.measured(result)


def test_machine_names():
    assert results.slug({"device": "NVIDIA H200", "memory_cap_bytes": 1}) == "nvidia-h200"
    assert results.slug({"device": "AMD EPYC", "instruction_set": "avx512"}) == "cpu-amd-epyc-avx512"


def test_absent_peers_say_why():
    assert peers.why_absent("no_such_peer") == "not installed"
    assert peers.why_absent("torch") is None
    _, absent = peers.scan("cpu")
    assert "mamba_ssm" in absent and all(absent.values())


def test_rotation_and_rounds():
    import torch

    inputs = rotation(lambda seed: {"x": torch.full((4 << 20,), float(seed))}, most=3)
    assert [int(each["x"][0]) for each in inputs] == list(range(len(inputs)))
    seen = []
    contestant = CpuContestant(lambda each: seen.append(int(each["x"][0])), inputs, calls=2)
    contestant.run()
    contestant.run()
    assert seen == [0, 0, 0, 1, 1] and contestant.best < 1


def test_one_warp_waits_for_its_operands():
    # A chain of three dependent operations of 4 clocks; then one special function and what needs it.
    assert predict.pace(loop("FFMA R1, R1, R2, R3", "FADD R1, R1, R4", "FMUL R1, R1, R5")) == 12
    assert predict.pace(loop("MUFU.EX2 R1, R1", "FMUL R1, R1, R2")) == predict.LATENCY["MUFU"] + 4
    # Independent ones issue one after the other.
    assert predict.pace(loop("FADD R1, R9, R8", "FADD R2, R9, R8", "FADD R3, R9, R8")) == 3
    # The halves of a wide load, and a shuffle's second operand, are results; a store has none.
    wide = loop("LDG.E.64 R2, desc[UR4][R8.64]", "FADD R4, R3, R3", "STG.E desc[UR4][R8.64], R4")
    assert predict.pace(wide, once=True) == predict.LATENCY["LDG"] + 1 + 4
    assert predict._operands(wide.instructions[2]) == (set(), {"UR4", "R8", "R9", "R4"})
    shuffle = loop("SHFL.BFLY PT, R33, R30, 0x2, 0x1f").instructions[0]
    assert predict._operands(shuffle) == ({"R33"}, {"R30"})
    assert predict._operands(loop("@P0 IADD3 R5, P1, R6, R7, RZ").instructions[0]) == ({"R5", "P1"}, {"P0", "R6", "R7"})


def test_the_slowest_unit_binds():
    h200, ada = card("NVIDIA H200"), card("NVIDIA GeForce RTX 4090")
    exponentials = loop(*["MUFU.EX2 R1, R2"] * 16, *["FFMA R3, R4, R5, R6"] * 16)
    assert predict.clocks(exponentials, h200)["special functions"] == 32
    assert predict.clocks(exponentials, h200)["instruction issue"] == 8
    assert (
        predict.clocks(loop("LDS.128 R4, [R1]", "SHFL.BFLY PT, R3, R4, 0x1, 0x1f"), ada)["shared memory and shuffles"]
        == 5
    )
    busy = predict.Work(exponentials, warps=132 * 1000, iterations=100, bytes=1.0, registers=32)
    assert predict.predict(busy, h200).limit == "special functions"
    # 132000 warps x 100 passes x 16 special functions x 32 lanes, 16 a clock on each of 132 multiprocessors
    expected = 1000 * 100 * 32 / h200.clock
    assert predict.predict(busy, h200).seconds == pytest.approx(expected + predict.LAUNCH + predict.RAMP)
    moving = predict.Work(exponentials, warps=128, iterations=1, bytes=1e9)
    assert predict.predict(moving, ada).limit == "memory"
    assert predict.predict(moving, ada).seconds == pytest.approx(1e9 / (1008e9 * 0.92), rel=0.01)
    alone = predict.Work(loop("LDG.E R1, desc[UR4][R1.64]"), warps=1, iterations=1000, bytes=1.0)
    assert predict.predict(alone, ada).limit == "latency of one warp"


def test_cards():
    assert cards.find("NVIDIA GeForce RTX 4090").capability == 89 and cards.find("a card of tomorrow") is None
    assert card("NVIDIA H200").special_rate == pytest.approx(4.2e12, rel=0.01)  # kernels.md 1.0
    assert card("NVIDIA GeForce RTX 4090").special_rate == pytest.approx(5.2e12, rel=0.01)


def test_the_loop_predictions_count_what_the_presets_have():
    """Their own arithmetic of weights, launches and meetings; the presets' programs are the measure."""
    from benchmarks.bench_rollout import make_program
    from jambatalk_kernels.rollout.packing import frame_bytes

    for preset, arrangement in (("vocaset", "moe-moe"), ("vocaset", "m-m"), ("demo", "moe-moe")):
        program, _ = make_program(preset, arrangement=arrangement)
        assert predict.active_weights(preset, arrangement) == frame_bytes(program, 1)
    assert predict._events(predict.MEETINGS, "moe-moe") == 6 * 4 + 3 + 7 * 2 + 1
    h200 = cards.find("H200")
    one, two = (predict._loop_persistent("vocaset", kind, h200).seconds for kind in ("m-m", "moe-moe"))
    assert one < two < predict._loop_graph("vocaset", "moe-moe", h200).seconds
