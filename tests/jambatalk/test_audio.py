"""Any audio becomes 16 kHz mono float32 with its exact duration, or one line says why not."""

import os
import struct
from fractions import Fraction

import numpy as np
import pytest
import soundfile

from jambatalk import audio
from jambatalk.audio import AudioError

SECONDS = 0.73


def tone(rate, seconds=SECONDS, hertz=440.0, level=0.4):
    return (level * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)).astype(np.float32)


def assert_is_tone(samples, tolerance):
    """Away from the ends, where a resampler rings."""
    assert np.abs(samples - tone(16000, len(samples) / 16000 + 0.01)[: len(samples)])[400:-400].max() < tolerance


def refusal(source, **options):
    with pytest.raises(AudioError) as caught:
        audio.load(source, **options)
    message = str(caught.value)
    assert "\n" not in message and len(message) > 10
    return message


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 24000, 44100, 48000, 96000, 192000])
def test_any_rate(tmp_path, rate):
    soundfile.write(tmp_path / "a.wav", tone(rate), rate, subtype="FLOAT")
    loaded = audio.load(tmp_path / "a.wav")
    assert loaded.duration == Fraction(round(rate * SECONDS), rate) and loaded.original_rate == rate
    assert loaded.samples.dtype == np.float32 and loaded.samples.shape == (round(loaded.duration * 16000),)
    assert_is_tone(loaded.samples, 1e-4)


@pytest.mark.parametrize("kind", ["wav", "flac", "ogg"])
@pytest.mark.parametrize("channels", [1, 2, 6, 8])
def test_any_channels(tmp_path, kind, channels):
    """Channels of different loudness: the mix is their mean, 0.4 times the mean of the loudnesses."""
    loudness = np.linspace(0.5, 1.5, channels) if channels > 1 else np.ones(1)
    path = tmp_path / f"a.{kind}"
    soundfile.write(path, tone(44100)[:, None] * loudness, 44100)
    loaded = audio.load(path)
    assert loaded.channels == channels
    # Vorbis takes the sixth of six channels for the subwoofer and drops all but its bass: 0.4 * 1.5 / 6.
    assert_is_tone(loaded.samples, {1: 0.02, 6: 0.11}.get(channels, 0.06) if kind == "ogg" else 2e-4)


@pytest.mark.parametrize(
    "kind, subtype, tolerance",
    [
        ("wav", "PCM_U8", 8e-3),
        ("wav", "PCM_16", 1e-4),
        ("wav", "PCM_24", 1e-5),
        ("wav", "PCM_32", 1e-5),
        ("wav", "FLOAT", 1e-5),
        ("wav", "DOUBLE", 1e-5),
        ("wav", "ULAW", 2e-2),
        ("flac", "PCM_16", 1e-4),
        ("flac", "PCM_24", 1e-5),
        ("ogg", "OPUS", 9e-2),
    ],
)
def test_any_sample_type(tmp_path, kind, subtype, tolerance):
    soundfile.write(tmp_path / f"a.{kind}", tone(16000), 16000, subtype=subtype)
    assert_is_tone(audio.load(tmp_path / f"a.{kind}").samples, tolerance)


def test_sixteen_kilohertz_is_left_alone(tmp_path):
    samples = np.random.default_rng(0).uniform(-1, 1, 200_000).astype(np.float32)  # several blocks
    soundfile.write(tmp_path / "a.wav", samples, 16000, subtype="FLOAT")
    assert np.array_equal(audio.load(tmp_path / "a.wav").samples, samples)


def test_silence_and_odd_names(tmp_path):
    path = tmp_path / "ein stilles Stück – 静か.wav"
    soundfile.write(path, np.zeros(16000), 16000)
    assert not audio.load(path).samples.any()
    assert not audio.load(str(path)).samples.any()


def test_the_extension_does_not_matter(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(16000), 16000)
    for name in ("a.raw", "a.txt", "a"):
        (tmp_path / name).write_bytes((tmp_path / "a.wav").read_bytes())
        assert_is_tone(audio.load(tmp_path / name).samples, 1e-4)


def test_wav_written_into_a_pipe(tmp_path):
    """ffmpeg, which cannot seek back, leaves 0xFFFFFFFF for the sizes; sox leaves 0x7FFFF000."""
    soundfile.write(tmp_path / "a.wav", tone(16000), 16000)
    for size in (0xFFFFFFFF, 0x7FFFF000):
        data = bytearray((tmp_path / "a.wav").read_bytes())
        data[4:8] = data[40:44] = struct.pack("<I", size)
        (tmp_path / "b.wav").write_bytes(data)
        assert_is_tone(audio.load(tmp_path / "b.wav").samples, 1e-4)


def test_wav_with_other_chunks_and_odd_sizes(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(16000), 16000, subtype="PCM_U8")
    data = (tmp_path / "a.wav").read_bytes()
    size = struct.unpack("<I", data[40:44])[0]
    extra = b"LIST" + struct.pack("<I", 5) + b"hello\0"
    body = (
        data[8:36] + extra + b"data" + struct.pack("<I", size - 1) + data[44 : 44 + size - 1]
    )  # odd, and no padding byte
    (tmp_path / "b.wav").write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)
    assert audio.load(tmp_path / "b.wav").duration == Fraction(size - 1, 16000)


@pytest.mark.parametrize("form", ["RIFX", "RF64", "AIFF", "AU", "W64", "CAF"])
def test_other_containers(tmp_path, form):
    options = {"format": "WAV", "endian": "BIG"} if form == "RIFX" else {"format": form}
    soundfile.write(tmp_path / "a", tone(16000), 16000, subtype="PCM_16", **options)
    data = (tmp_path / "a").read_bytes()
    assert_is_tone(audio.load(tmp_path / "a").samples, 1e-4)
    if form in ("RIFX", "RF64"):
        (tmp_path / "b").write_bytes(data[:-2000])
        assert "truncated" in refusal(tmp_path / "b")


# Arrays


def test_arrays_of_every_type():
    wave = tone(16000)
    assert np.array_equal(audio.load(wave).samples, wave)
    for dtype in (np.float16, np.float64):
        assert_is_tone(audio.load(wave.astype(dtype)).samples, 1e-3)
    for dtype in (np.int8, np.int16, np.int32):
        assert_is_tone(
            audio.load(np.round(wave * 2.0 ** (8 * np.dtype(dtype).itemsize - 1)).astype(dtype)).samples, 1e-2
        )
    assert_is_tone(audio.load(np.round(wave * 128 + 128).astype(np.uint8)).samples, 1e-2)
    for both in (np.stack([wave, wave]), np.stack([wave, wave], 1)):
        loaded = audio.load(both)
        assert loaded.channels == 2
        assert_is_tone(loaded.samples, 1e-6)
    assert_is_tone(audio.load(tone(44100), 44100).samples, 1e-4)
    assert audio.load(audio.load(wave)).samples.shape == wave.shape
    assert_is_tone(audio.load(list(map(float, wave))).samples, 1e-6)


def test_tensors():
    torch = pytest.importorskip("torch")
    wave = torch.from_numpy(tone(16000)).requires_grad_()
    assert_is_tone(audio.load(wave).samples, 1e-6)
    assert_is_tone(audio.load(wave.to(torch.bfloat16)).samples, 1e-2)
    assert_is_tone(audio.load((wave * 32768).to(torch.int16)).samples, 1e-3)


@pytest.mark.parametrize(
    "source, rate, words",
    [
        (np.zeros(0, np.float32), 16000, "no samples"),
        (np.zeros((2, 3, 4)), 16000, "shape"),
        (np.array(["a"]), 16000, "numbers"),
        (np.array([1j]), 16000, "numbers"),
        (np.array([0.0, np.nan, 0.0]), 16000, "NaN"),
        (np.array([0.0, np.inf]), 16000, "NaN or Inf"),
        (np.zeros(10), 16000.5, "whole number"),
        (np.zeros(10), float("nan"), "whole number"),
        (np.zeros(10), 0, "sampling rate"),
        (np.zeros(10), -16000, "sampling rate"),
        ([[0.0], [0.0, 1.0]], 16000, "array"),
    ],
)
def test_bad_arrays(source, rate, words):
    assert words in refusal(source, sampling_rate=rate)


# Files that must be refused


@pytest.fixture
def files(tmp_path):
    """A whole file of each kind, two seconds of noise, which no codec can make small."""
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 32000)
    for kind in ("wav", "flac", "ogg"):
        soundfile.write(tmp_path / f"whole.{kind}", noise, 16000)
    return tmp_path


@pytest.mark.parametrize("kind", ["wav", "flac", "ogg"])
@pytest.mark.parametrize("share", [0.001, 0.3, 0.9, 0.999])
def test_truncated(files, kind, share):
    data = (files / f"whole.{kind}").read_bytes()
    cut = files / f"cut.{kind}"
    cut.write_bytes(data[: int(len(data) * share)])
    assert str(cut) in refusal(cut)


def test_truncated_between_ogg_pages(files):
    data = (files / "whole.ogg").read_bytes()
    (files / "cut.ogg").write_bytes(data[: data.rindex(b"OggS")])
    assert "truncated" in refusal(files / "cut.ogg")


def test_missing_ogg_page(files):
    data = (files / "whole.ogg").read_bytes()
    starts = [i for i in range(len(data)) if data[i : i + 4] == b"OggS"]
    assert len(starts) > 4
    (files / "cut.ogg").write_bytes(data[: starts[3]] + data[starts[4] :])
    assert "missing" in refusal(files / "cut.ogg")


@pytest.mark.parametrize("kind", ["flac", "ogg"])
def test_damaged_inside(files, kind):
    data = bytearray((files / f"whole.{kind}").read_bytes())
    for i in range(20):
        data[len(data) // 2 + i] ^= 0x5A
    (files / f"damaged.{kind}").write_bytes(data)
    assert "corrupt" in refusal(files / f"damaged.{kind}")


@pytest.mark.parametrize(
    "content", [b"this is not sound", os.urandom(5000), b"RIFF\x00\x00\x00\x00WAVE", b"fLaC", b"OggS", b"\0" * 4096]
)
def test_not_sound(tmp_path, content):
    (tmp_path / "a.wav").write_bytes(content)
    assert str(tmp_path / "a.wav") in refusal(tmp_path / "a.wav")


def test_missing_empty_folder(tmp_path):
    assert "no such file" in refusal(tmp_path / "nothing.wav")
    (tmp_path / "empty.wav").touch()
    assert "empty" in refusal(tmp_path / "empty.wav")
    assert "folder" in refusal(tmp_path)
    soundfile.write(tmp_path / "none.wav", np.zeros(0), 16000)
    assert "no samples" in refusal(tmp_path / "none.wav")
    assert refusal("a\0b.wav")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_unreadable(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(16000), 16000)
    (tmp_path / "a.wav").chmod(0)
    assert "ermission" in refusal(tmp_path / "a.wav")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers(tmp_path, value):
    samples = np.zeros((100_000, 2))
    samples[80_000, 1] = value
    soundfile.write(tmp_path / "a.wav", samples, 16000, subtype="FLOAT")
    assert "5.000 s" in refusal(tmp_path / "a.wav")


# Time


def test_frames_are_exact():
    assert audio.frames_for(Fraction(160000, 16000), 30) == 300
    assert audio.frames_for(Fraction(7275, 1000), 30) == 218
    assert audio.frames_for(Fraction(3, 60), 30) == 2  # 1.5, to even
    assert audio.frames_for(Fraction(5, 60), 30) == 2  # 2.5, to even
    assert audio.frames_for(Fraction(3600), "30000/1001") == 107892
    assert audio.frames_for(Fraction(100), 29.97) == 2997
    with pytest.raises(AudioError, match="too short for one frame"):
        audio.frames_for(Fraction(1, 100), 30)


@pytest.mark.parametrize("fps", [0, -1, "x", "1/0", float("nan"), float("inf"), 1001, None, "nan"])
def test_frame_rates_that_cannot_be(fps):
    with pytest.raises(AudioError, match="fps"):
        audio.exact_fps(fps)


@pytest.mark.parametrize("rate", [16000, 48000])
def test_a_clip_of_many_segments(rate, monkeypatch):
    sound = tone(rate, 3.0)
    whole = audio.load(sound, sampling_rate=rate).samples
    monkeypatch.setattr(audio, "_SEGMENT", 1000)
    np.testing.assert_array_equal(audio.load(sound, sampling_rate=rate).samples, whole)
