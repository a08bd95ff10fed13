"""The VOCASET layout is read where it lies, with its gaps, and nothing but arrays comes out of its pickles."""

import json
import pickle
from fractions import Fraction

import numpy as np
import pytest

from jambatalk.data.vocaset import Corpus, CorpusError, load_plain_pickle


def write_corpus(folder, *, vertices=7, sentences=2, splits=True):
    """A corpus of four identities with sentences of half a second; vertex 0 of row r stands at x = r."""
    folder.mkdir(parents=True, exist_ok=True)
    subjects = [f"id{i}" for i in range(4)]
    rng = np.random.default_rng(0)
    rows, index, audio, row = [], {}, {}, 0
    for subject in subjects:
        index[subject], audio[subject] = {}, {}
        for s in range(1, sentences + 1):
            index[subject][f"sentence{s:02d}"] = {i: row + i for i in range(30)}
            rows.append(rng.normal(size=(30, vertices, 3)) * 1e-3)
            audio[subject][f"sentence{s:02d}"] = {
                "audio": (rng.normal(size=11000) * 3000).astype(np.int16),
                "sample_rate": 22000,
            }
            row += 30
    data = np.concatenate(rows).astype(np.float32)
    data[:, 0, 0] = np.arange(len(data))
    np.save(folder / "data_verts.npy", data)
    templates = {subject: np.full((vertices, 3), i, dtype=np.float32) for i, subject in enumerate(subjects)}
    for name, value in (("subj_seq_to_idx", index), ("raw_audio_fixed", audio), ("templates", templates)):
        with open(folder / f"{name}.pkl", "wb") as file:
            pickle.dump(value, file, protocol=2)
    if splits:
        names = [f"sentence{s:02d}" for s in range(1, sentences + 1)]
        split = {"train": subjects[:2], "val": subjects[2:3], "test": subjects[3:]}
        split["sentences"] = {"train": names, "val": names, "test": names}
        (folder / "splits.json").write_text(json.dumps(split))
    return folder


def rewrite(path, change):
    with open(path, "rb") as file:
        value = pickle.load(file)
    change(value)
    with open(path, "wb") as file:
        pickle.dump(value, file)


def test_clips_have_their_audio_and_motion(tmp_path):
    corpus = Corpus(write_corpus(tmp_path))
    clips = corpus.clips("train")
    assert [clip.name for clip in clips] == ["id0_sentence01", "id0_sentence02", "id1_sentence01", "id1_sentence02"]
    assert clips[0].duration == Fraction(1, 2)
    assert clips[0].audio().shape == (8000,) and clips[0].audio().dtype == np.float32
    motion = corpus.displacement(clips[2], step=2)
    assert motion.shape == (15, 7, 3)
    np.testing.assert_allclose(motion[:, 0, 0], np.arange(60, 90, 2) - 1)  # rows 60, 62, ... less the template of id1
    assert corpus.missing == []


def test_missing_sequences_are_counted_and_holes_filled(tmp_path):
    folder = write_corpus(tmp_path)
    rewrite(folder / "subj_seq_to_idx.pkl", lambda v: (v["id0"].pop("sentence02"), v["id1"]["sentence01"].pop(3)))
    rewrite(folder / "raw_audio_fixed.pkl", lambda v: v["id1"].pop("sentence02"))
    corpus = Corpus(folder)
    clips = corpus.clips("train")
    assert [clip.name for clip in clips] == ["id0_sentence01", "id1_sentence01"]
    assert corpus.missing == ["id0/sentence02", "id1/sentence02"]
    assert list(clips[1].rows[:5]) == [60, 61, 62, 62, 64]


def test_voca_names_without_splits(tmp_path):
    corpus = Corpus(write_corpus(tmp_path, splits=False))
    with pytest.raises(CorpusError, match="train split has no clip"):
        corpus.clips("train")
    assert len(corpus.missing) == 8 * 40


def test_a_pickle_that_builds_anything_else_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("run",))

    (tmp_path / "templates.pkl").write_bytes(pickle.dumps({"a": Evil()}))
    with pytest.raises(CorpusError, match=r"refused to load builtins\.print"):
        load_plain_pickle(tmp_path / "templates.pkl")


@pytest.mark.parametrize("name", ["data_verts.npy", "subj_seq_to_idx.pkl", "raw_audio_fixed.pkl", "templates.pkl"])
@pytest.mark.parametrize("how", ["missing", "garbage"])
def test_a_broken_corpus_is_one_clear_line(tmp_path, name, how):
    folder = write_corpus(tmp_path)
    if how == "missing":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(b"not what it should be")
    with pytest.raises(CorpusError, match=name) as error:
        Corpus(folder)
    assert "\n" not in str(error.value)


def test_a_template_of_another_mesh_is_refused(tmp_path):
    folder = write_corpus(tmp_path)
    rewrite(folder / "templates.pkl", lambda v: v.update(id1=np.zeros((8, 3))))
    with pytest.raises(CorpusError, match=r"template of id1 is \(8, 3\).*\(7, 3\)"):
        Corpus(folder)
    with pytest.raises(CorpusError, match="no such folder"):
        Corpus(folder / "nowhere")


def test_phones_of_frames(tmp_path):
    folder = write_corpus(tmp_path)
    spans = [["SIL", 0.0, 0.1], ["M", 0.1, 0.2], ["??", 0.2, 0.3]]
    (folder / "phones.json").write_text(json.dumps({"id0": {"sentence01": spans}}))
    corpus = Corpus(folder)
    clips = corpus.clips("train")
    times = np.array([0.0, 0.1, 0.199, 0.25, 0.4])
    np.testing.assert_array_equal(corpus.frame_phones(clips[0], times, {"SIL": 0, "M": 1}), [0, 1, 1, -100, 0])
    assert corpus.frame_phones(clips[1], times, {"SIL": 0}) is None
