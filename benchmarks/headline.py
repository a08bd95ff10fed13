"""The figures of the project's README, out of the result files. `python -m benchmarks.report` writes them there."""

from __future__ import annotations

from pathlib import Path

from benchmarks.results import time_text

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- figures: written by python -m benchmarks.report -->", "<!-- end of the figures -->"

# What is said; how the case's name begins; who is beside it, as the case names them (None: the duration of the audio).
ROWS = (
    ("10 s of speech to vertices, the paper's size, two cores", "inference vocaset float32", None),
    ("the same, weights of the loop in bfloat16", "inference vocaset bfloat16", None),
    ("an hour of speech to vertices, the demo, two cores", "inference demo 60 min", None),
    ("6 frames of the loop, the paper's size", "rollout vocaset without rotation", "transformers"),
    ("600 frames of the loop to vertices, the demo's size", "rollout demo 600 frames to", "FaceFormer's loop"),
    ("a training step of the demo, batch 8", "training step demo float32, batch 8, 0%", "transformers"),
    ("Mamba mixer of transformers on `compat`, forward", "transformers MambaMixer forward d", "transformers"),
    ("selective scan, forward and backward", "selective_scan forward and backward (4,", "plain loop"),
    ("causal conv1d, forward and backward", "causal_conv1d forward and backward", "transformers"),
    ("mixture of experts, forward", "moe forward (600", "transformers grouped_mm"),
    ("attention with rotation, forward and backward", "rope_attention forward and backward", "sdpa"),
)
CALLED = {
    None: "the speech",
    "transformers": "transformers' layers",
    "transformers grouped_mm": "transformers, grouped_mm",
    "plain loop": "a loop in PyTorch",
    "sdpa": "PyTorch's SDPA",
}  # fmt: skip


def table(files: list[dict]) -> str:
    """Of the machines without a GPU that were measured: what took how long, beside whom."""
    lines = []
    for result in files:
        if "memory_cap_bytes" in result["machine"]:
            continue
        machine = result["machine"]
        source = f"[`{result['file']}`](benchmarks/results/{result['file']})"
        machine_name = f"{machine['device']} ({machine['instruction_set']}), torch {machine['versions']['torch']}"
        lines += [f"Measured on {machine_name}, in float32 where nothing else is said; from {source}.", ""]
        lines += ["| | ours | beside it | times faster |", "|---|---|---|---|"]
        lines += [_row(result["cases"], *row) for row in ROWS]
        lines.append("")
    return "\n".join(lines).strip()


def _row(cases: list[dict], text: str, name: str, peer: str | None) -> str:
    called = CALLED.get(peer, peer)
    case = next((case for case in cases if case["name"].startswith(name)), None)
    if case is None or (peer is not None and peer not in case["seconds"]):
        return f"| {text} | not measured | {called} | |"
    ours = case["seconds"]["ours"]
    theirs = case["facts"]["audio_seconds"] if peer is None else case["seconds"][peer]
    beside = f"{theirs:,.0f} s" if peer is None else time_text(theirs)
    digits = 0 if theirs > 10 * ours else 1
    return f"| {text} | {time_text(ours)} | {called}: {beside} | {theirs / ours:.{digits}f} |"


def written(readme: str, files: list[dict]) -> str:
    """The README with the figures of ``files`` between its marks."""
    before, _, rest = readme.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError(f"{README.name} has no {BEGIN} ... {END}")
    return f"{before}{BEGIN}\n{table(files)}\n{END}{after}"
