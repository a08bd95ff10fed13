"""The doctor tells the truth about what is built and what runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jambatalk_kernels
from jambatalk_kernels import doctor, native_library

ROOT = Path(__file__).resolve().parents[2]


def _run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "jambatalk_kernels.doctor", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
        timeout=120,
    )


def test_json_from_the_command_line():
    done = _run("--json", JAMBATALK_KERNELS_BACKEND="cpu,reference")
    facts = json.loads(done.stdout)
    assert facts["environment"]["JAMBATALK_KERNELS_BACKEND"] == "cpu,reference"
    assert done.returncode == (0 if facts["native"]["loaded"] else 1)
    assert facts["package"]["runs_from"] == "clone" and facts["package"]["folder"] == str(ROOT)
    loaded, _ = native_library()
    assert facts["native"]["loaded"] == loaded
    if loaded:
        assert facts["native"]["instruction_set"] in ("avx512", "avx2", "plain")
        assert "GCC" in facts["native"]["compiler"] or "lang" in facts["native"]["compiler"]
        assert facts["ops"]["selective_scan"]["cpu_tensors"] == "cpu"
    assert facts["ops"]["moe_mlp"]["cpu_tensors"] == "reference"
    assert "yet" in facts["backends"]["cuda"] and "yet" in facts["backends"]["triton"]


def test_the_report_names_everything():
    text = doctor.report(doctor.examine())
    for word in ("native library", "selective_scan", "rollout", "JAMBATALK_CPU_ISA", "triton", "torch"):
        assert word in text


def test_every_public_op_is_listed():
    functions = {
        name
        for name in jambatalk_kernels.__all__
        if name.islower() and name not in ("native_library", "use_backend", "rotary_table")
    }
    assert functions == set(doctor.WRITTEN)


def test_without_the_library_it_says_what_to_do(monkeypatch):
    reason = "the native library is not installed (run `pip install .`)"
    monkeypatch.setattr(doctor.backends, "_NATIVE", (False, reason))
    facts = doctor.examine()
    assert facts["ops"]["selective_scan"]["cpu_tensors"] == "reference"
    text = doctor.report(facts)
    assert "NOT loaded" in text and "pip install ." in text
    assert doctor.main([]) == 1


def test_an_instruction_set_that_the_processor_lacks_is_reported():
    if not native_library()[0]:
        return
    done = _run("--json", JAMBATALK_CPU_ISA="avx9000")
    native = json.loads(done.stdout)["native"]
    assert native["instruction_set"] is None and "avx9000" in native["reason"]
