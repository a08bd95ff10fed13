"""The bundled checkpoint does what its card says: on a real person, in silence, and for as long as one likes."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from jambatalk import evaluate
from jambatalk.face.mouth import inner_lip_gap
from jambatalk.model import BUNDLED, JambaTalk

# Debian's pocketsphinx-testdata: LibriVox, a real person, never seen in training.
LIBRIVOX = Path("/usr/share/pocketsphinx/test/data/librivox")


@pytest.fixture(scope="module")
def model():
    return JambaTalk.from_pretrained()


def openings(face):
    pair = face.regions["inner_lip_upper"], face.regions["inner_lip_lower"]
    return (inner_lip_gap(face.vertices, *pair) - inner_lip_gap(face.template, *pair)) / face.opening_scale


def test_the_files_are_small_and_hold_only_tensors():
    assert sum(path.stat().st_size for path in BUNDLED.iterdir()) <= 16e6
    with safe_open(BUNDLED / "model.safetensors", "pt") as file:
        types = {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118, it is no dict
    assert types["templates"] == torch.float32
    assert types["encoder.layers.0.attention.q_proj.weight"] == torch.float16
    card = (BUNDLED / "README.md").read_text()
    for word in ("synthetic", "no pretrained weights", "CC-BY-SA-3.0", "python -m jambatalk.train", "seed"):
        assert word in card


def test_it_meets_the_bars_on_a_real_person(capsys):
    if not LIBRIVOX.is_dir():
        pytest.skip("needs Debian's pocketsphinx-testdata")
    pytest.importorskip("pocketsphinx", reason="needs pocketsphinx: pip install 'jambatalk[speech]'")
    assert evaluate.main(["--speech", str(LIBRIVOX), "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)
    summary = measured.get("summary", measured)
    assert summary["clips"] == 5 and summary["frames_exact"] and summary["finite"]
    assert summary["opening_rms_correlation"] >= 0.45
    assert summary["silence_opening"] <= 0.15
    assert summary["bilabial_count"] == 29
    assert summary["bilabial_closure_20"] >= 0.7
    # A mouth that hardly opens would close, too: this one opens, and more sounds than p, b and m leave it open.
    assert summary["opening_p95"] >= 0.6
    assert summary["bilabial_closure_20"] - summary["other_closure_20"] >= 0.15


def test_silence_is_a_still_and_closed_mouth(model):
    face = model.animate(np.zeros(48000, dtype=np.float32))
    opening = openings(face)
    assert np.abs(opening).max() <= 0.15
    assert np.ptp(opening[15:]) <= 0.1  # after half a second, in which the state settles


@pytest.mark.parametrize("gain", [0.05, 0.3, 1.0])
def test_loudness_of_the_recording_matters_little(model, gain):
    import soundfile

    samples, rate = soundfile.read(BUNDLED.parent / "demo.wav", dtype="float32")
    reference, other = (openings(model.animate(samples * g, sampling_rate=rate)) for g in (0.5, gain))
    assert np.corrcoef(reference, other)[0, 1] >= 0.85


@pytest.mark.slow
def test_ten_minutes(model):
    import soundfile

    samples, rate = soundfile.read(BUNDLED.parent / "demo.wav", dtype="float32")
    long = np.tile(samples, 600 * rate // len(samples) + 1)[: 600 * rate]
    began = time.process_time()
    face = model.animate(long, sampling_rate=rate)
    assert face.frames == 18000
    assert np.isfinite(face.coefficients).all()
    assert time.process_time() - began < 600
    # It goes on as it began: no drift, no collapse.
    first, last = face.coefficients[:3000].std(0), face.coefficients[-3000:].std(0)
    assert np.abs(last - first).max() <= 0.15 * first.max()
