"""`evaluate --speech` with a face of two lips, moved by a rule, so that every figure is known."""

import json
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from jambatalk import audio, evaluate, metrics
from jambatalk.animation import Animation

soundfile = pytest.importorskip("soundfile")

RECORDINGS = Path("/usr/share/pocketsphinx/test/data/librivox")
LIP = 0.01  # metres of opening that count as 1


class TwoLips:
    """Stands in for a model. The mesh is an upper lip, a lower lip and a chin; `rule(samples, fps, frames)` is how far
    the mouth opens, and only the lower lip moves."""

    def __init__(self, rule, fps=30, regions=("inner_lip_upper", "inner_lip_lower"), extra_frames=0):
        self.rule, self.fps, self.regions, self.extra_frames = rule, Fraction(fps), regions, extra_frames
        self.asked = []

    def animate(self, source, sampling_rate=16000, subject=None, fps=None, progress=None):
        self.asked.append(subject)
        sound = audio.load(source)
        frames = audio.frames_for(sound.duration, self.fps) + self.extra_frames
        opening = np.asarray(self.rule(sound.samples, self.fps, frames), np.float32)
        basis = np.zeros((9, 1), np.float32)
        basis[4] = -LIP
        template = np.array([[0, 0.001, 0], [0, 0, 0], [0, -0.02, 0]], np.float32)  # a gap at rest
        places = {"inner_lip_upper": np.array([0]), "inner_lip_lower": np.array([1])}
        return Animation(
            coefficients=opening[:, None], basis=basis, template=template, faces=np.array([[0, 1, 2]], np.int32),
            fps=self.fps, regions={name: places[name] for name in self.regions}, opening_scale=LIP,
        )  # fmt: skip


def loudness(samples, fps, frames):
    return 3 * metrics.speech_envelope(samples, 16000, fps, frames)


def wide_open(samples, fps, frames):
    return np.ones(frames)


def bursts(path: Path, seconds: float = 2.0, rate: int = 16000) -> Path:
    """A tone that comes and goes twice a second."""
    t = np.arange(int(seconds * rate)) / rate
    soundfile.write(path, 0.3 * np.sin(2 * np.pi * 220 * t) * (np.sin(2 * np.pi * 2 * t) > 0), rate)
    return path


def test_finds_recordings_their_texts_and_their_speakers(tmp_path):
    for name in (
        "b-2.wav",
        "b-1.flac",
        "notes.wav",
        "ann/x.wav",
        "ann/deep/y.OGG",
        "1089-134686-0007.wav",
        "ignored.mp3",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "b-1.txt").write_text("its own\ntext\n")
    (tmp_path / "transcription").write_text("<s> two  words </s> (b-2)\nnot this one (b-1)\nby path (ann/x)\nno id\n\n")
    (tmp_path / "ann" / "deep" / "deep.transcription").write_text("beside it (y)\n")
    clips = evaluate.find_clips(tmp_path)
    assert [(clip.name, clip.speaker, clip.text) for clip in clips] == [
        ("1089-134686-0007.wav", "1089", None),
        ("ann/deep/y.OGG", "ann", "beside it"),
        ("ann/x.wav", "ann", "by path"),
        ("b-1.flac", "b", "its own text"),
        ("b-2.wav", "b", "two words"),
        ("notes.wav", "", None),
    ]


@pytest.mark.parametrize(
    ("path", "speaker"),
    [
        ("sense_and_sensibility_01_austen_64kb-0870.wav", "sense_and_sensibility_01_austen_64kb"),
        ("001.wav", ""),
        ("reader_03-0870.wav", "reader_03"),
        ("Jos\u00e9 Mar\u00eda 12.wav", "Jos\u00e9 Mar\u00eda"),
        ("hello.wav", ""),
        ("84/121123/84-121123-0001.flac", "84"),
    ],
)
def test_speaker_by_name(path, speaker):
    assert evaluate.speaker_of(Path(path)) == speaker


def test_a_mouth_that_follows_the_loudness(tmp_path):
    bursts(tmp_path / "one-1.wav", 2.0)
    bursts(tmp_path / "two-1.flac", 3.3, rate=22050)
    model = TwoLips(loudness)
    report = evaluate.speech_report(model, evaluate.find_clips(tmp_path), subject="ann")
    assert model.asked == ["ann", "ann"]
    assert report["clips"] == 2 and report["speakers"] == 2 and report["aligned_clips"] == 0
    assert report["audio_seconds"] == pytest.approx(5.3, abs=1e-3)
    assert report["opening_rms_correlation"] == pytest.approx(1, abs=1e-4)
    assert report["opening_lag_ms"] == 0
    assert report["silence_opening"] == pytest.approx(0, abs=1e-3)
    assert report["frames_exact"] is True and report["finite"] is True
    assert report["bilabial_closure_20"] is None and report["bilabial_count"] == 0
    assert [row["frames"] for row in report["clip_rows"]] == [60, 99]
    assert report["clip_rows"][0]["not_aligned"] == "no transcript"
    json.dumps(report, allow_nan=False)


def test_a_late_mouth_is_called_late(tmp_path):
    bursts(tmp_path / "a.wav", 4.0)
    late = TwoLips(lambda *arguments: np.concatenate([np.zeros(2), loudness(*arguments)[:-2]]))
    report = evaluate.speech_report(late, evaluate.find_clips(tmp_path))
    assert report["opening_lag_ms"] == pytest.approx(1000 * 2 / 30)


def test_a_mouth_left_open(tmp_path):
    bursts(tmp_path / "a.wav")
    report = evaluate.speech_report(TwoLips(wide_open), evaluate.find_clips(tmp_path))
    assert report["opening_rms_correlation"] is None and report["opening_lag_ms"] is None
    assert report["silence_opening"] == pytest.approx(1, abs=1e-5)
    assert report["opening_p95"] == pytest.approx(1, abs=1e-5)


def test_wrong_frames_and_nan_are_reported(tmp_path):
    bursts(tmp_path / "a.wav")
    report = evaluate.speech_report(TwoLips(loudness, extra_frames=1), evaluate.find_clips(tmp_path))
    assert report["frames_exact"] is False
    broken = TwoLips(lambda samples, fps, frames: np.where(np.arange(frames) == frames - 1, np.nan, 0.1))
    assert evaluate.speech_report(broken, evaluate.find_clips(tmp_path))["finite"] is False


def test_a_mesh_without_lips_is_refused(tmp_path):
    bursts(tmp_path / "a.wav")
    with pytest.raises(evaluate.EvaluationError, match="inner_lip_lower"):
        evaluate.speech_report(TwoLips(loudness, regions=("inner_lip_upper",)), evaluate.find_clips(tmp_path))


@pytest.fixture(scope="module")
def librivox(tmp_path_factory) -> Path:
    """Two of the LibriVox recordings: one with its transcript, one with a word that no dictionary has."""
    pytest.importorskip("pocketsphinx", reason="needs the package pocketsphinx (extra `speech`)")
    if not RECORDINGS.is_dir():
        pytest.skip("needs Debian's pocketsphinx-testdata")
    folder = tmp_path_factory.mktemp("librivox")
    for number in ("0880", "0930"):
        shutil.copy(RECORDINGS / f"sense_and_sensibility_01_austen_64kb-{number}.wav", folder)
    shutil.copy(RECORDINGS / "transcription", folder)
    (folder / "sense_and_sensibility_01_austen_64kb-0930.txt").write_text("he might even have been jambatalkative")
    return folder


def test_closures_are_counted_where_the_text_can_be_aligned(librivox, capsys):
    def open_but_for_p(samples, fps, frames):
        """Shut only in the stop of "disposed" (1.70 s); the m of "man" stays open."""
        return np.where(np.abs(np.arange(frames) / float(fps) - 1.70) < 0.02, 0.1, 0.8)

    report = evaluate.speech_report(TwoLips(open_but_for_p), evaluate.find_clips(librivox))
    assert report["speakers"] == 1 and report["aligned_clips"] == 1
    assert report["bilabial_count"] == 2 and report["bilabial_closure_20"] == 0.5
    assert 0 < report["other_closure_20"] < 0.2  # the neighbours of p, and nobody else
    assert "jambatalkative" in report["clip_rows"][1]["not_aligned"]
    assert "jambatalkative" in capsys.readouterr().err
    shut = evaluate.speech_report(TwoLips(lambda s, f, frames: np.zeros(frames)), evaluate.find_clips(librivox))
    assert shut["bilabial_closure_20"] == 1 and shut["other_closure_20"] == 1
    without = evaluate.speech_report(TwoLips(wide_open), evaluate.find_clips(librivox), alignment=False)
    assert without["aligned_clips"] == 0 and without["bilabial_closure_20"] is None


def test_the_table_says_it_all(tmp_path):
    bursts(tmp_path / "a clip.wav")
    report = evaluate.speech_report(TwoLips(loudness), evaluate.find_clips(tmp_path))
    table = evaluate._table(report)
    assert "a clip.wav" in table
    for key in report.keys() - {"clip_rows"}:
        assert key in table


def command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "jambatalk.evaluate", *arguments],
        capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=300,
    )  # fmt: skip


def test_bad_folders_are_refused_in_one_line(tmp_path):
    missing = command("--speech", str(tmp_path / "nowhere"))
    assert (missing.returncode, missing.stdout) == (2, "")
    assert missing.stderr.count("\n") == 1 and "nowhere is not a folder" in missing.stderr
    empty = command("--speech", str(tmp_path))
    assert empty.returncode == 2 and empty.stderr.count("\n") == 1 and "no .wav, .flac, .ogg file" in empty.stderr


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A saved model of the real kind, tiny and untrained: its head is zero, so its mouth stays shut."""
    model_module = pytest.importorskip("jambatalk.model")
    from jambatalk.config import JambaTalkConfig

    encoder = dict(
        context="windowed", conv_norm="layer", pre_norm=True, conv_dim=[8] * 7, hidden=16, layers=1, heads=2, ffn=16,
        pos_conv_kernel=3, pos_conv_groups=2, attention_back=4, attention_ahead=2,
    )  # fmt: skip
    config = JambaTalkConfig(
        preset="demo", vertices=3, d_model=16, heads=2, hidden=16, states=4, motion_rank=2, attention_window=30,
        subjects=["ann"], encoder=encoder,
    )  # fmt: skip
    model = model_module.JambaTalk(config)
    template = np.array([[[0, 0.001, 0], [0, 0, 0], [0, -0.02, 0]]], np.float32)
    model.set_head(template, np.array([[0, 1, 2]]), {"inner_lip_upper": [0], "inner_lip_lower": [1]}, LIP)
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    return folder


def test_the_command_prints_json_and_a_table(checkpoint, tmp_path, capsys):
    bursts(tmp_path / "ann\u00e9e 1.wav", 0.7, rate=8000)
    arguments = ["--speech", str(tmp_path), "--model", str(checkpoint), "--subject", "ann"]
    assert evaluate.main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["clips"] == 1 and report["frames_exact"] and report["finite"]
    assert report["clip_rows"][0]["frames"] == 21 and report["clip_rows"][0]["speaker"] == "ann\u00e9e"
    assert report["silence_opening"] == pytest.approx(0, abs=1e-6) and report["opening_rms_correlation"] is None
    assert evaluate.main(arguments) == 0
    assert "opening_rms_correlation" in capsys.readouterr().out


def test_bad_input_is_refused_in_one_line(checkpoint, tmp_path, capsys):
    bursts(tmp_path / "a.wav", 0.5)
    arguments = ["--speech", str(tmp_path), "--model", str(checkpoint)]
    for more, word in (
        (["--subject", "nobody"], "nobody"),
        (["--device", "abacus"], "abacus"),
        (["--model", str(tmp_path / "gone")], "gone"),
        (["--model", str(tmp_path)], "missing"),
    ):
        assert evaluate.main([*arguments, *more]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and word in err, err
    (tmp_path / "b.wav").write_bytes((tmp_path / "a.wav").read_bytes()[:3000])
    assert evaluate.main(arguments) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "b.wav" in err and "truncated" in err
    (tmp_path / "b.wav").unlink()
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    assert evaluate.main(arguments) == 2
    assert "a.txt cannot be read as text" in capsys.readouterr().err


def test_without_the_aligner_the_command_says_what_to_do(checkpoint, tmp_path, capsys, monkeypatch):
    bursts(tmp_path / "a.wav", 0.5)
    (tmp_path / "a.txt").write_text("hello")
    monkeypatch.setitem(sys.modules, "pocketsphinx", None)
    arguments = ["--speech", str(tmp_path), "--model", str(checkpoint)]
    assert evaluate.main(arguments) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "pip install 'jambatalk[speech]'" in err and "--no-align" in err
    assert evaluate.main([*arguments, "--no-align"]) == 0


def test_help_does_not_wait_for_torch():
    heavy = (
        "import sys, jambatalk.evaluate as e; e.find_clips; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
    assert command("--help").returncode == 0
