"""python -m benchmarks.report: writes benchmarks/README.md, its plots and the README's figures from results/*.json.

A GPU case that no result file has is shown as not measured, with what is predicted of it, if anything.
``--no-predictions`` leaves the compilers alone (predictions take minutes of theirs).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks import cards, headline, results, roofline
from benchmarks.results import bar_text, time_text

README = Path(__file__).parent / "README.md"
HEAD = """# Benchmarks

`pytest benchmarks` runs what this machine can run and writes `results/<machine>.json`; `python -m benchmarks.report`
makes this page of them; `python -m benchmarks.predict` predicts GPU times from machine code; `python
benchmarks/on_card.py` is all that a lent GPU needs.

A time is the best of many rounds. All contestants of a case take turns within a round; inputs rotate among more memory
than the last cache holds, except in cases named cached. Freed memory stays with the process, for all alike. GPU times
are per call in a CUDA graph, outputs in memory of their own, under a cap of 24 GiB.
"""


def machine_line(facts: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version)
    isa = f", {facts['instruction_set']}" if facts.get("instruction_set") else ""
    return f"{facts['device']} ({facts['architecture']}{isa}); {versions}"


def measured(result: dict) -> list[str]:
    lines = [f"## {machine_line(result['machine'])}", "", f"From `results/{result['file']}`.", ""]
    lines += plot(result)
    bars = [(case["name"], bar) for case in result["cases"] for bar in case["bars"] if "holds" in bar]
    missed = [f"- {name}: {bar_text(bar)}" for name, bar in bars if not bar["holds"]]
    lines += [f"{len(result['cases'])} cases, {len(bars)} bars, {len(missed)} missed{':' if missed else '.'}", ""]
    lines += [*missed, ""] if missed else []
    groups: dict[str, list[dict]] = {}
    for case in result["cases"]:
        groups.setdefault(case["op"].removesuffix("_step"), []).append(case)
    for op, cases in groups.items():
        lines += [f"### {op}", "", "| case | ours | others | figures and bars |", "|---|---|---|---|"]
        lines += [*map(row, cases), ""]
    absent = {f"{name}: {why}" for case in result["cases"] for name, why in case["absent"].items()}
    if absent:
        lines += [f"Absent peers: {'; '.join(sorted(absent))}.", ""]
    reasons: dict[str, list[str]] = {}
    for test, reason in result.get("skipped", {}).items():
        reasons.setdefault(reason, []).append(test)
    if reasons:
        lines += ["Not run on this machine:", ""]
        lines += [f"- {reason}: {', '.join(f'`{test}`' for test in tests)}" for reason, tests in reasons.items()]
    return [*lines, ""]


def row(case: dict) -> str:
    seconds = {name: time_text(value).replace(" ", "&nbsp;") for name, value in case["seconds"].items()}
    ours = seconds.pop("ours")
    others = "<br>".join(f"{name} {value}" for name, value in seconds.items())
    figures = "<br>".join(bar_text(bar) for bar in case["bars"])
    return f"| {case['name']} | {ours} | {others} | {figures} |"


def plot(result: dict) -> list[str]:
    """Draws the roofline beside this page. Nothing where the machine's ceilings were not measured."""
    drawing = roofline.draw(result, f"{result['machine']['device']}, {result['machine'].get('instruction_set', 'GPU')}")
    if drawing is None:
        return []
    path = README.with_name(f"roofline-{result['file'].removesuffix('.json')}.svg")
    path.write_text(drawing)
    return [
        f"![Operations per byte against operations per second]({path.name})",
        "",
        "Each mark is a case; the lines are what this machine's memory and its matrix products reach. Bytes and "
        "operations are those of the formula, every tensor once: what is read out of a cache lies above the slope.",
        "",
    ]


def on_gpus(files: list[dict], predictions: bool) -> list[str]:
    """Measured where there is a result, else predicted, and said so, per card."""
    from benchmarks import predict

    names = list(predict.CASES)
    times: dict[str, dict[str, str]] = {card.name: {} for card in cards.CARDS}
    for result in files:
        card = cards.find(result["machine"]["device"])
        if card is not None:
            for case in result["cases"]:
                times[card.name][case["name"]] = f"**{time_text(case['seconds']['ours'])}** measured"
                names += [case["name"]] if case["name"] not in names else []
    for card in cards.CARDS if predictions else ():
        for name, prediction in predict.cases(card).items():
            before = times[card.name].get(name)
            text = f"predicted {time_text(prediction.seconds)} ({prediction.limit})"
            times[card.name][name] = f"{before or 'not measured'}; {text}"
    shown = [card.name for card in cards.CARDS]
    lines = ["## GPUs", ""]
    if not any("measured" in text for row in times.values() for text in row.values()):
        lines += ["No figure in this table was measured: all are predictions from machine code (`predict.py`).", ""]
    lines += [f"| case | {' | '.join(shown)} |", f"|---|{'---|' * len(shown)}"]
    lines += [f"| {name} | {' | '.join(times[card].get(name, 'not measured') for card in shown)} |" for name in names]
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-predictions", action="store_true")
    predictions = not parser.parse_args().no_predictions
    files = results.load()
    parts = [HEAD, *(line for result in files for line in measured(result)), *on_gpus(files, predictions)]
    README.write_text("\n".join(parts).rstrip() + "\n")
    headline.README.write_text(headline.written(headline.README.read_text(), files))


if __name__ == "__main__":
    main()
