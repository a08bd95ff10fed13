"""The VOCASET layout is read where it lies, with its gaps, and nothing but arrays comes out of its pickles."""

import json
import pickle
from fractions import Fraction

import numpy as np
import pytest

from jambatalk.data import vocaset
from jambatalk.data.vocaset import Corpus, CorpusError, load_plain_pickle

STEP = 1e-5  # metres that vertex 0 moves from row to row


def make_head(vertices):
    return np.random.default_rng(1).uniform(-0.1, 0.1, size=(vertices, 3)).astype(np.float32)


def write_corpus(folder, *, vertices=7, sentences=2, splits=True):
    """A corpus in the layout of the release: four identities with sentences of half a second. Vertices tremble by a
    millimetre; vertex 0 of row r lies r * STEP beside that of the template."""
    folder.mkdir(parents=True, exist_ok=True)
    subjects = [f"id{i}" for i in range(4)]
    rng = np.random.default_rng(0)
    templates = {subject: make_head(vertices) + np.float32(0.01 * i) for i, subject in enumerate(subjects)}
    rows, index, audio, row = [], {}, {}, 0
    for subject in subjects:
        index[subject], audio[subject] = {}, {}
        for s in range(1, sentences + 1):
            index[subject][f"sentence{s:02d}"] = {i: row + i for i in range(30)}
            moved = rng.normal(size=(30, vertices, 3)) * 1e-3
            moved[:, 0, 0] = np.arange(row, row + 30) * STEP
            rows.append(templates[subject] + moved)
            audio[subject][f"sentence{s:02d}"] = {
                "audio": (rng.normal(size=11000) * 3000).astype(np.int16),
                "sample_rate": 22000,
            }
            row += 30
    np.save(folder / "data_verts.npy", np.concatenate(rows).astype(np.float32))
    for name, value in (("subj_seq_to_idx", index), ("raw_audio_fixed", audio), ("templates", templates)):
        with open(folder / f"{name}.pkl", "wb") as file:
            pickle.dump(value, file, protocol=2)
    if splits:
        names = [f"sentence{s:02d}" for s in range(1, sentences + 1)]
        split = {"train": subjects[:2], "val": subjects[2:3], "test": subjects[3:]}
        split["sentences"] = {"train": names, "val": names, "test": names}
        (folder / "splits.json").write_text(json.dumps(split))
    return folder


def write_processed(folder, names, *, fps=60, rate=22000, scale=1.0, vertices=7, seconds=0.5):
    """FaceFormer's layout: one .npy and one .wav of half a second for each (subject, sequence)."""
    import soundfile

    for sub in ("vertices_npy", "wav"):
        (folder / sub).mkdir(parents=True)
    rng = np.random.default_rng(0)
    templates = {subject: (make_head(vertices) * scale).reshape(-1) for subject, _ in names}
    for subject, sequence in names:
        frames = templates[subject] + rng.normal(size=(round(seconds * fps), vertices * 3)) * 1e-3 * scale
        np.save(folder / "vertices_npy" / f"{subject}_{sequence}.npy", frames.astype(np.float32))
        sound = (rng.normal(size=round(seconds * rate)) * 3000).astype(np.int16)
        soundfile.write(folder / "wav" / f"{subject}_{sequence}.wav", sound, rate)
    with open(folder / "templates.pkl", "wb") as file:
        pickle.dump(templates, file)
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
    assert clips[0].samples.shape == (8000,) and clips[0].samples.dtype == np.float32
    assert isinstance(corpus.clips("train")[0].vertices, np.memmap)
    motion = corpus.displacement(clips[2], step=2)
    assert motion.shape == (15, 7, 3)
    np.testing.assert_allclose(motion[:, 0, 0], np.arange(60, 90, 2) * STEP, atol=1e-8)  # rows 60, 62, ...
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
    assert [clip.holes for clip in clips] == [0, 1]
    corpus.clips("train")
    assert len(corpus.missing) == 2, "counted once"


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


# ------------------------------------------------------------------------------------------------------- other layouts

VOCA_TRAIN, VOCA_VAL, VOCA_TEST = (vocaset.VOCA_SPLITS[split][0] for split in ("train", "val", "test"))


def test_faceformers_layout_of_vocaset(tmp_path):
    names = [(subject, "sentence01") for subject in vocaset.VOCA_SPLITS["train"]]
    names += [(VOCA_TRAIN, "sentence40"), (VOCA_VAL, "sentence21"), (VOCA_TEST, "sentence21")]
    names += [(VOCA_VAL, "sentence01")]  # on the disk, and not in VOCA's split
    folder = write_processed(tmp_path / "a", names)
    corpus = Corpus(folder, skip_bad=True)
    assert corpus.layout == vocaset.PROCESSED and corpus.fps == 60 and corpus.units == "m"
    clips = corpus.clips("train")
    assert [clip.subject for clip in clips] == [VOCA_TRAIN, *vocaset.VOCA_SPLITS["train"]]
    assert [clip.sequence for clip in clips[:3]] == ["sentence01", "sentence40", "sentence01"]
    assert [clip.sequence for clip in corpus.clips("val")] == ["sentence21"]
    assert clips[0].samples.shape == (8000,) and clips[0].read().shape == (30, 7, 3)
    raw = np.load(folder / "vertices_npy" / f"{VOCA_TRAIN}_sentence01.npy").reshape(30, 7, 3)
    np.testing.assert_array_equal(clips[0].read(slice(None, None, 2)), raw[::2])
    assert len(corpus.missing) == (8 * 40 - 9) + (20 - 1), "of train and of the one person of val who is there"
    assert corpus.bad == [
        f"{folder / 'vertices_npy'}: no sequence of {vocaset.VOCA_SPLITS['val'][1]}, who is in the val split"
    ]


def test_biwi_at_25_frames_a_second_in_its_own_units(tmp_path):
    people = {subject for subjects in vocaset.BIWI_SPLITS.values() for subject in subjects}
    names = [(subject, f"e{i:02d}") for subject in sorted(people) for i in (1, 33, 37)]
    folder = write_processed(tmp_path / "a", names, fps=25, rate=44100, scale=5.0, seconds=0.4)
    corpus = Corpus(folder)
    assert corpus.layout == vocaset.BIWI and corpus.fps == 25 and corpus.units == "biwi"
    assert {split: len(corpus.clips(split)) for split in corpus.splits} == {
        "train": 6, "val": 6, "test": 6, "test-b": 8,
    }  # fmt: skip
    assert [clip.sequence for clip in corpus.clips("test-b")] == ["e37"] * 8
    clip = corpus.clips("train")[0]
    assert len(clip.rows) == 10 and clip.samples.shape == (6400,)
    np.testing.assert_allclose(corpus.templates["F2"], make_head(7), atol=1e-7)
    assert np.abs(corpus.displacement(clip)).max() < 6e-3, "metres"


def test_biwi_without_the_letter_of_the_emotional_half(tmp_path):
    names = [(subject, f"{i:02d}") for subject in vocaset.BIWI_SPLITS["train"] for i in (1, 33, 37)]
    corpus = Corpus(write_processed(tmp_path / "a", names, fps=25, scale=5.0, seconds=0.4))
    assert len(corpus.clips("train")) == 6


# ---------------------------------------------------------------------------------------------- scale and vertex order


@pytest.mark.parametrize("units, factor", [("mm", 1000), ("cm", 100)])
def test_wrong_units_are_named_and_can_be_said(tmp_path, units, factor):
    folder = write_corpus(tmp_path)
    metres = Corpus(folder).displacement(Corpus(folder).clips("train")[0])
    np.save(folder / "data_verts.npy", np.load(folder / "data_verts.npy") * factor)
    rewrite(folder / "templates.pkl", lambda v: v.update({name: value * factor for name, value in v.items()}))
    with pytest.raises(
        CorpusError, match=rf"templates\.pkl: faces are .* m across.*say --units {units}.*does not move"
    ):
        Corpus(folder)
    corpus = Corpus(folder, units=units)
    np.testing.assert_allclose(corpus.displacement(corpus.clips("train")[0]), metres, atol=1e-7)
    with pytest.raises(CorpusError, match="units must be one of"):
        Corpus(folder, units="inch")


def test_motion_of_another_scale_than_its_template_is_refused(tmp_path):
    folder = write_corpus(tmp_path)
    np.save(folder / "data_verts.npy", np.load(folder / "data_verts.npy") * 1000)
    with pytest.raises(CorpusError, match=r"data_verts\.npy: faces of id0/sentence01 are 997 times as large"):
        Corpus(folder).clips("train")


def test_another_vertex_order_is_refused(tmp_path):
    folder = write_corpus(tmp_path, vertices=50)
    data = np.load(folder / "data_verts.npy")
    np.save(folder / "data_verts.npy", data[:, np.random.default_rng(0).permutation(50)])
    with pytest.raises(CorpusError, match=r"data_verts\.npy: vertices of id0/sentence01 lie .* another vertex order"):
        Corpus(folder).clips("train")


def test_faces_of_another_mesh_are_refused(tmp_path):
    folder = write_corpus(tmp_path)
    np.save(folder / "faces.npy", np.array([[0, 1, 7]]))
    with pytest.raises(CorpusError, match=r"faces\.npy: triangles name vertices beyond the 7"):
        Corpus(folder)
    np.save(folder / "faces.npy", np.random.default_rng(0).integers(0, 7, (14, 3)))
    with pytest.raises(CorpusError, match=r"faces\.npy: does not fit templates\.pkl: its edges are .* another order"):
        Corpus(folder)


@pytest.mark.parametrize("name", ["FLAME_sample.ply", "templates/FLAME_sample.ply", "templates/BIWI_topology.obj"])
def test_triangles_of_the_mesh_that_data_sets_come_with(tmp_path, name):
    trimesh = pytest.importorskip("trimesh", reason="needs the package `trimesh` (extra `train`)")
    folder = write_corpus(tmp_path)
    assert Corpus(folder).faces is None
    faces = np.array([[0, 1, 2], [6, 3, 4]])
    (folder / name).parent.mkdir(exist_ok=True)
    mesh = trimesh.Trimesh(np.zeros((7, 3)), faces, process=False)  # vertices that a reader would merge
    mesh.export(folder / name)
    np.testing.assert_array_equal(Corpus(folder).faces, faces)
    (folder / name).write_bytes(b"ply")
    with pytest.raises(CorpusError, match=f"{name}: (cannot be read as a mesh|expected)"):
        Corpus(folder)


# -------------------------------------------------------------------------------------------------------- hostile data


def put_nan(folder):
    data = np.load(folder / "data_verts.npy")
    data[47, 3, 1] = np.nan
    np.save(folder / "data_verts.npy", data)


RELEASE_FAULTS = {
    "NaN vertices": (put_nan, r"data_verts\.npy: NaN or Inf vertices in id0/sentence02, first in frame 17"),
    "rows out of range": (
        lambda f: rewrite(f / "subj_seq_to_idx.pkl", lambda v: v["id0"]["sentence02"].update({3: 5000})),
        r"subj_seq_to_idx\.pkl: id0/sentence02 names rows that data_verts\.npy does not have \(240 rows\)",
    ),
    "endless frames": (
        lambda f: rewrite(f / "subj_seq_to_idx.pkl", lambda v: v["id0"]["sentence02"].update({10**15: 5})),
        r"subj_seq_to_idx\.pkl: id0/sentence02 must be rows by frame number",
    ),
    "sound too long": (
        lambda f: rewrite(
            f / "raw_audio_fixed.pkl", lambda v: v["id0"]["sentence02"].update(audio=np.zeros(33000, np.int16))
        ),
        r"raw_audio_fixed\.pkl: id0/sentence02 has 1\.50 s of sound and 0\.50 s of motion \(30 frames at 60/s\)",
    ),
    "sound that is none": (
        lambda f: rewrite(f / "raw_audio_fixed.pkl", lambda v: v["id0"]["sentence02"].pop("audio")),
        r"raw_audio_fixed\.pkl: sound of id0/sentence02 cannot be used",
    ),
}


@pytest.mark.parametrize("fault", RELEASE_FAULTS)
def test_one_bad_clip_of_the_release(tmp_path, fault):
    change, message = RELEASE_FAULTS[fault]
    change(write_corpus(tmp_path))
    with pytest.raises(CorpusError, match=message) as error:
        Corpus(tmp_path).clips("train")
    assert "--skip-bad" in str(error.value) and "\n" not in str(error.value)
    corpus = Corpus(tmp_path, skip_bad=True)
    assert len(corpus.clips("train")) == 3 and len(corpus.bad) == 1


def test_a_subject_without_a_template_or_sequences(tmp_path):
    write_corpus(tmp_path)
    rewrite(tmp_path / "templates.pkl", lambda v: v.pop("id1"))
    with pytest.raises(CorpusError, match=r"templates\.pkl: no template of id1, who is in the train split"):
        Corpus(tmp_path).clips("train")
    corpus = Corpus(tmp_path, skip_bad=True)
    assert len(corpus.clips("train")) == 2 and len(corpus.bad) == 1
    write_corpus(tmp_path)
    rewrite(tmp_path / "subj_seq_to_idx.pkl", lambda v: v.pop("id1"))
    with pytest.raises(CorpusError, match=r"subj_seq_to_idx\.pkl: no sequence of id1, who is in the train split"):
        Corpus(tmp_path).clips("train")


def test_vertices_that_are_not_floating_point_or_truncated(tmp_path):
    write_corpus(tmp_path)
    np.save(tmp_path / "data_verts.npy", np.zeros((240, 7, 3), np.int32))
    with pytest.raises(CorpusError, match=r"data_verts\.npy: vertices are int32, not floating point"):
        Corpus(tmp_path)
    write_corpus(tmp_path)
    whole = (tmp_path / "data_verts.npy").read_bytes()
    (tmp_path / "data_verts.npy").write_bytes(whole[:-100])
    with pytest.raises(CorpusError, match=r"data_verts\.npy: cannot be read"):
        Corpus(tmp_path)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-50])


PROCESSED_FAULTS = {
    "truncated npy": (lambda npy, wav: truncate(npy), r"F2_e01\.npy: cannot be read"),
    "object npy": (lambda npy, wav: np.save(npy, np.array([{}])), r"F2_e01\.npy: cannot be read"),
    "integer npy": (lambda npy, wav: np.save(npy, np.zeros((10, 21), np.int16)), r"F2_e01\.npy: vertices are int16"),
    "other mesh": (lambda npy, wav: np.save(npy, np.zeros((10, 24))), r"F2_e01\.npy: F2/e01 has 8 vertices, .* 7"),
    "no frame": (lambda npy, wav: np.save(npy, np.zeros((0, 21))), r"F2/e01 names rows that .* \(0 rows\)"),
    "shape": (lambda npy, wav: np.save(npy, np.zeros((10, 22))), r"F2_e01\.npy: expected \(frames, 3 V\)"),
    "truncated wav": (lambda npy, wav: truncate(wav), r"F2_e01\.wav: "),
    "garbage wav": (lambda npy, wav: wav.write_bytes(b"RIFF no"), r"F2_e01\.wav: "),
    "motion at another rate": (
        lambda npy, wav: np.save(npy, np.concatenate([np.load(npy)] * 4)),
        r"F2_e01\.wav: F2/e01 has 0\.40 s of sound and 1\.60 s of motion \(40 frames at 25/s\)",
    ),
}


@pytest.mark.parametrize("fault", PROCESSED_FAULTS)
def test_one_bad_clip_of_faceformers_layout(tmp_path, fault):
    names = [(subject, "e01") for subject in vocaset.BIWI_SPLITS["train"]]
    folder = write_processed(tmp_path / "a", names, fps=25, scale=5.0, seconds=0.4)
    change, message = PROCESSED_FAULTS[fault]
    change(folder / "vertices_npy" / "F2_e01.npy", folder / "wav" / "F2_e01.wav")
    with pytest.raises(CorpusError, match=message) as error:
        Corpus(folder).clips("train")
    assert "\n" not in str(error.value)
    corpus = Corpus(folder, skip_bad=True)
    assert len(corpus.clips("train")) == 5 and len(corpus.bad) == 1


def test_a_pickle_of_any_protocol_with_arrays_is_read(tmp_path):
    for protocol in range(6):
        with open(tmp_path / "a.pkl", "wb") as file:
            pickle.dump({"a": np.arange(3.0), "b": [np.float32(2), np.int64(3)]}, file, protocol=protocol)
        value = load_plain_pickle(tmp_path / "a.pkl")
        np.testing.assert_array_equal(value["a"], np.arange(3.0))
        assert value["b"] == [2, 3]


SPLITS = ["[]", "{", '{"train": "id0"}', '{"train": [1]}', '{"sentences": ["a"]}', '{"sentences": {"train": []}}']


@pytest.mark.parametrize("text", SPLITS)
def test_splits_that_are_none_are_one_clear_line(tmp_path, text):
    folder = write_corpus(tmp_path)
    (folder / "splits.json").write_text(text)
    with pytest.raises(CorpusError, match=r"splits\.json: (expected|not valid|no sentences)") as error:
        Corpus(folder)
    assert "\n" not in str(error.value)


def test_nothing_in_a_refused_pickle_runs(tmp_path):
    class Evil:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    folder = write_corpus(tmp_path / "corpus")
    for name in ("templates.pkl", "subj_seq_to_idx.pkl", "raw_audio_fixed.pkl"):
        good = (folder / name).read_bytes()
        for protocol in range(6):
            (folder / name).write_bytes(pickle.dumps({"id0": Evil()}, protocol=protocol))
            with pytest.raises(
                CorpusError, match=rf"{name}: cannot be read .*refused to load (builtins|__builtin__)\.exec"
            ):
                Corpus(folder)
        (folder / name).write_bytes(good)
    assert not (tmp_path / "ran").exists()


# --------------------------------------------------------------------------------------------------------- the command


def test_the_command_prints_what_a_folder_holds(tmp_path, capsys):
    folder = write_corpus(tmp_path / "corpus")
    rewrite(folder / "subj_seq_to_idx.pkl", lambda v: (v["id0"].pop("sentence02"), v["id1"]["sentence01"].pop(3)))
    assert vocaset.main([str(folder)]) == 0
    out = capsys.readouterr().out
    assert "VOCASET release" in out and "7 vertices" in out and "m (a head is" in out and "60 frames/s" in out
    assert "train      2 of 2 subjects, 3 sequences, 0.00 h, 90 frames, 1 of them missing" in out
    assert "missing    1 sequences: id0/sentence02" in out and "bad        0" in out


def test_the_command_lists_what_is_wrong(tmp_path, capsys):
    assert vocaset.main([str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err == f"jambatalk: error: {tmp_path / 'nowhere'}: no such folder\n"
    folder = write_corpus(tmp_path / "corpus")
    put_nan(folder)
    assert vocaset.main([str(folder)]) == 2
    captured = capsys.readouterr()
    assert "bad        1 clips or subjects" in captured.out
    assert captured.err.count("\n") == 1 and "NaN or Inf vertices in id0/sentence02" in captured.err
    assert vocaset.main([str(folder), "--skip-bad"]) == 0
