"""Forced alignment: on a LibriVox recording where Debian's pocketsphinx-testdata is installed."""

import builtins
from pathlib import Path

import numpy as np
import pytest

from jambatalk import speech

RECORDINGS = Path("/usr/share/pocketsphinx/test/data/librivox")
CLIP = RECORDINGS / "sense_and_sensibility_01_austen_64kb-0880.wav"
TEXT = "He was not an ill-disposed young man."
PHONES = "HH IY W AH Z N AA T AH N IH L D IH S P OW Z D Y AH NG M AE N".split()


@pytest.fixture(scope="module")
def recording() -> np.ndarray:
    pytest.importorskip("pocketsphinx", reason="needs the package pocketsphinx (extra `speech`)")
    soundfile = pytest.importorskip("soundfile")
    if not CLIP.is_file():
        pytest.skip("needs Debian's pocketsphinx-testdata")
    return soundfile.read(CLIP, dtype="float32")[0]


def test_words_as_the_dictionary_spells_them():
    assert speech.normalise(
        "\u201cDon\u2019t,\u201d said the ill-disposed Caf\u00e9-owner\u2019s \u2018friend\u2019 -- 'twas; a_b"
    ) == ("don't said the ill disposed cafe owner's friend twas a b".split())
    assert speech.normalise(" ... ' - ") == []


def test_phones_of_a_recording(recording):
    phones = speech.align(recording, TEXT)
    assert [name for name, _, _ in phones if name != "SIL"] == PHONES
    starts, ends = [start for _, start, _ in phones], [end for _, _, end in phones]
    assert starts[0] == 0 and starts[1:] == ends[:-1]
    assert all(start < end for start, end in zip(starts, ends, strict=False))
    assert abs(ends[-1] - len(recording) / 16000) <= 0.05
    # Read off the waveform: the stop of p in "disposed" is the 25 dB drop at 1.67 to 1.74 s, the m of "man" the
    # nasal that ends at 2.42 s, and the last nasal has faded by 2.75 s.
    lips = {name: (start + end) / 2 for name, start, end in phones if name in "PM"}
    assert lips["P"] == pytest.approx(1.71, abs=0.05) and lips["M"] == pytest.approx(2.38, abs=0.05)
    assert phones[-1][0] == "SIL" and phones[-1][1] == pytest.approx(2.75, abs=0.06)


def test_alignment_follows_a_shift_and_repeats_exactly(recording):
    here = speech.align(recording, TEXT)
    assert speech.align(recording, TEXT) == here
    later = speech.align(np.concatenate([np.zeros(8000, np.float32) + recording[:1], recording]), TEXT)
    shifts = [b[1] - a[1] for a, b in zip(here[1:], later[-len(here) + 1 :], strict=False) if a[0] in "PBM"]
    assert shifts and all(shift == pytest.approx(0.5, abs=0.03) for shift in shifts)


def test_bad_text_and_bad_audio_are_named(recording):
    with pytest.raises(speech.UnknownWords, match="dictionary: 42, jambatalk$") as caught:
        speech.align(recording, "He was not JambaTalk 42")
    assert caught.value.words == ["42", "jambatalk"]
    with pytest.raises(speech.AlignmentError, match="no words"):
        speech.align(recording, "...")
    with pytest.raises(speech.AlignmentError, match="too short"):
        speech.align(recording[:1000], TEXT)
    with pytest.raises(speech.AlignmentError, match="does not match"):
        speech.align(recording[:8000], TEXT * 4)  # no way to say it in half a second
    with pytest.raises(ValueError, match="int16"):
        speech.align((recording * 32767).astype(np.int16), TEXT)


def test_possessives_follow_their_nouns():
    pytest.importorskip("pocketsphinx", reason="needs the package pocketsphinx (extra `speech`)")
    assert speech.pronunciation("beauty's") == "B Y UW T IY Z"
    assert speech.pronunciation("aardvark's").endswith("K S")
    assert speech.pronunciation("jambatalk's") is None
    assert speech.pronunciation("man") == "M AE N"


def test_an_added_possessive_is_aligned(recording):
    phones = [
        name for name, _, _ in speech.align(recording, "He was not an ill-disposed young aardvark's") if name != "SIL"
    ]
    assert phones[-8:] == "AA R D V AA R K S".split()


def test_a_missing_package_is_named(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "pocketsphinx":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(speech.SpeechPackageMissing, match=r"pip install 'jambatalk\[speech\]'"):
        speech.align(np.zeros(16000, np.float32), "hello")
