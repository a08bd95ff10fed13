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
        assert facts["ops"]["rope_attention"]["cpu_tensors"] == "cpu"
    assert facts["ops"]["load_balancing_loss"]["cpu_tensors"] == "reference"
    assert facts["ops"]["selective_scan"]["written_for"] == ["cpu", "triton", "cuda", "reference"]


def test_the_report_names_everything():
    text = doctor.report(doctor.examine())
    for word in ("native library", "selective_scan", "rollout", "JAMBATALK_CPU_ISA", "triton", "torch"):
        assert word in text


def test_what_gpu_tensors_run_on(monkeypatch):
    """Without a card: Triton where it is installed; CUDA C++ only where a card has shown it to be right, and forced."""
    monkeypatch.setattr(doctor.torch.cuda, "is_available", lambda: False)
    for version, expected in (("3.9.0", "triton"), (None, "reference")):
        monkeypatch.setattr(doctor, "_triton_version", lambda version=version: version)
        facts = doctor.examine()
        assert facts["ops"]["causal_conv1d"]["gpu_tensors"] == expected
        assert facts["ops"]["rollout"]["gpu_tensors"] == expected
        assert facts["ops"]["load_balancing_loss"]["gpu_tensors"] == "reference"
        assert facts["backends"]["triton"] == ("3.9.0, no GPU here" if version else "not installed")


def test_a_library_with_cuda_says_for_which_gpus(monkeypatch):
    monkeypatch.setattr(doctor, "_cuda_architectures", lambda: "8.0;9.0a")
    monkeypatch.setattr(doctor, "_capability", lambda: None)
    assert doctor.examine()["backends"]["cuda"] == "built for 8.0;9.0a, no GPU here"
    monkeypatch.setattr(doctor, "_capability", lambda: "sm_90")
    assert doctor.examine()["backends"]["cuda"].endswith("sm_90, validated there: nothing; chosen only when forced")
    monkeypatch.setitem(doctor.backends.VALIDATED, ("causal_conv1d", "cuda", "sm_90"), "results/some.json")
    facts = doctor.examine()
    assert facts["backends"]["cuda"].endswith("validated there: causal_conv1d")
    assert facts["ops"]["causal_conv1d"]["cuda_validated_on"] == ["sm_90"]
    assert facts["ops"]["selective_scan"]["cuda_validated_on"] == []
    assert "causal_conv1d" in doctor.report(facts)


def test_a_library_without_cuda_says_so(monkeypatch):
    if not native_library()[0]:
        return
    monkeypatch.setattr(doctor, "_cuda_architectures", lambda: "")
    assert doctor.examine()["backends"]["cuda"] == "the native library was built without CUDA"


def test_every_public_op_is_listed():
    functions = {
        name
        for name in jambatalk_kernels.__all__
        if name.islower() and name not in ("native_library", "use_backend", "rotary_table", "mean_pool_heads")
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
