"""`evaluate PRED GT`: where predictions and truth come from, what is refused, and the pages."""

import json
import pickle
import shutil
from fractions import Fraction

import numpy as np
import pytest
import torch
from test_training import make_corpus, tiny_config

from jambatalk import comparison, evaluate, pictures
from jambatalk.baselines.naive import MeanFace, NearestNeighbour
from jambatalk.data.vocaset import Corpus
from jambatalk.model import JambaTalk


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    make_corpus(folder)
    regions = dict(np.load(folder / "regions.npz"))
    np.savez(folder / "regions.npz", **regions, upper_face=np.array([0, 4]))
    return folder


def predictions(corpus, folder, change=lambda vertices: vertices, name="{}", step=2):
    folder.mkdir()
    for clip in Corpus(corpus).clips("test"):
        np.save(folder / f"{name.format(clip.name)}.npy", change(clip.read(slice(None, None, step))))
    return folder


def run(capsys, *arguments):
    code = evaluate.main([str(argument) for argument in arguments])
    out = capsys.readouterr()
    return code, out.out, out.err


def scores(capsys, *arguments, protocol="jambatalk"):
    code, out, err = run(capsys, *arguments, "--protocol", protocol, "--json")
    assert code == 0, err
    report = json.loads(out)
    return report, next(iter(report["protocols"][0]["predictors"].values()))


def test_the_truth_as_prediction_has_no_error(corpus, tmp_path, capsys):
    report, row = scores(capsys, predictions(corpus, tmp_path / "p"), corpus)
    assert row["scores"]["LVE"] == row["scores"]["FDD"] == 0 and report["missing"] == []
    assert row["clips"] == len(Corpus(corpus).clips("test")) and row["frames"] > 0


def test_a_known_shift_is_the_error_in_millimetres(corpus, tmp_path, capsys):
    shifted = predictions(corpus, tmp_path / "p", lambda x: x + np.float32([0.003, 0, 0.004]))
    _, row = scores(capsys, shifted, corpus)
    assert row["scores"]["LVE"] == pytest.approx(5, rel=1e-5)
    flat = predictions(corpus, tmp_path / "flat", lambda x: x.reshape(len(x), -1))
    assert scores(capsys, flat, corpus)[1]["scores"]["LVE"] == 0  # (frames, 3 V), as FaceFormer writes


def test_conditions_of_unseen_speakers_are_all_scored(corpus, tmp_path, capsys):
    folder = predictions(corpus, tmp_path / "p", name="{}_condition_x")
    for path in list(folder.iterdir()):
        shutil.copy(path, path.with_name(path.name.replace("_condition_x", "_condition_y")))
    _, row = scores(capsys, folder, corpus, protocol="diffspeaker")
    assert {clip["condition"] for clip in row["clip_rows"]} == {"x", "y"}
    assert row["clips"] == 2 * len(Corpus(corpus).clips("test"))


def test_missing_predictions_are_listed_and_the_table_says_so(corpus, tmp_path, capsys):
    folder = predictions(corpus, tmp_path / "p")
    gone = sorted(folder.iterdir())[0]
    gone.unlink()
    code, out, _ = run(capsys, folder, corpus)
    assert code == 0 and f"1 clips have no prediction and are left out: {gone.stem}" in out
    assert "LVE" in out and "mm" in out and "jambatalk (version 1)" in out


@pytest.fixture
def checkpoint(corpus, tmp_path):
    torch.manual_seed(0)
    found = Corpus(corpus)
    config = tiny_config()
    config.subjects = ["ann", "bob"]
    model = JambaTalk(config)
    templates = np.stack([found.templates[name] for name in list(found.templates)[:2]])
    model.set_head(
        templates, found.faces if found.faces is not None else np.zeros((0, 3), np.int64), found.regions, 0.01
    )
    torch.nn.init.normal_(model.head.weight, std=0.1)
    torch.nn.init.orthogonal_(model.motion_basis)
    model.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_a_checkpoint_speaks_on_the_speakers_own_face(corpus, checkpoint, tmp_path, capsys):
    """Its files, written by the model alone on the true templates, score as the checkpoint does."""
    from dataclasses import replace

    model, found = JambaTalk.from_pretrained(checkpoint), Corpus(corpus)
    (tmp_path / "p").mkdir()
    for clip in found.clips("test"):
        spoken = replace(model.animate(clip.samples, subject="unknown"), template=found.templates[clip.subject])
        np.save(tmp_path / "p" / f"{clip.name}.npy", spoken.vertices)
    by_files, by_model = scores(capsys, tmp_path / "p", corpus)[1], scores(capsys, checkpoint, corpus)[1]
    assert by_model["scores"] == by_files["scores"] and by_model["scores"]["LVE"] > 0
    of_all = scores(capsys, checkpoint, corpus, "--subject", "all")[1]
    assert {row["condition"] for row in of_all["clip_rows"]} == {"ann", "bob"}


def test_baselines_stand_beside_the_prediction(corpus, tmp_path, capsys):
    report, _ = scores(capsys, predictions(corpus, tmp_path / "p"), corpus, "--baselines")
    assert list(report["protocols"][0]["predictors"]) == ["p", "mean face", "nearest neighbour"]


def test_mean_face_and_nearest_neighbour_are_what_they_say(corpus):
    found = Corpus(corpus)
    clips = found.clips("train")
    moved = np.concatenate([found.displacement(clip, 2) for clip in clips])
    still = MeanFace(found, Fraction(30)).predict(np.zeros(16000, np.float32), 5)
    np.testing.assert_allclose(still, np.broadcast_to(moved.mean(0), still.shape), atol=1e-7)
    # What it has heard before, it repeats.
    rng = np.random.default_rng(0)
    nearest = NearestNeighbour(found, Fraction(30))
    clip = clips[int(rng.integers(len(clips)))]
    truth = found.displacement(clip, 2)
    same = nearest.predict(clip.samples, len(truth))
    distances = np.abs(same - truth).max(axis=(1, 2))
    assert (distances == 0).mean() > 0.9  # a silent or repeated moment may have a twin


def test_a_single_file_against_a_single_file(tmp_path, capsys):
    x = np.random.default_rng(0).normal(size=(4, 7, 3)).astype(np.float32)
    np.savez(tmp_path / "a.npz", vertices=x, template=x[0], fps=np.array(30.0))
    np.savez(tmp_path / "masks.npz", lips=np.array([1, 2]), upper_face=np.array([0]))
    np.save(tmp_path / "b.npy", x + np.float32(0.001))
    _, row = scores(capsys, tmp_path / "b.npy", tmp_path / "a.npz", "--regions", tmp_path / "masks.npz")
    assert row["scores"]["LVE"] == pytest.approx(np.sqrt(3), rel=1e-4)  # float32 near 1: 6e-8 of 1e-3


def test_a_file_of_no_frames_per_second_does_not_say_its_rate(tmp_path, capsys):
    x = np.zeros((4, 7, 3), np.float32)
    np.savez(tmp_path / "a.npz", vertices=x, template=x[0], fps=np.array(0.0))
    np.savez(tmp_path / "masks.npz", lips=np.array([1, 2]), upper_face=np.array([0]))
    code, out, err = run(capsys, tmp_path / "a.npz", tmp_path / "a.npz", "--regions", tmp_path / "masks.npz")
    assert code == 2 and out == "" and err.count("\n") == 1 and "does not say its frames per second" in err


def test_flame_masks_and_codetalkers_index_files_are_regions(tmp_path):
    masks = {
        "lips": np.array([5, 1, 1]),
        "forehead": np.array([2]),
        "eye_region": np.array([2, 4]),
        "neck": np.array([6]),
    }
    (tmp_path / "FLAME_masks.pkl").write_bytes(pickle.dumps(masks))
    found = comparison.find_regions(tmp_path / "FLAME_masks.pkl", None, 7)
    assert found["lips"].tolist() == [1, 5] and found["upper_face"].tolist() == [2, 4]
    (tmp_path / "lve.txt").write_text("0, 1, 2")
    (tmp_path / "fdd.txt").write_text("3\n4")
    found = comparison.find_regions(tmp_path, None, 7)
    assert found["lips"].tolist() == [0, 1, 2] and found["upper_face"].tolist() == [3, 4]
    with pytest.raises(comparison.ComparisonError, match="region 'upper_face' must hold vertex numbers below 4"):
        comparison.find_regions(tmp_path, None, 4)


def truncated(folder):
    path = sorted(folder.iterdir())[0]
    path.write_bytes(path.read_bytes()[:40])


def integers(folder):
    np.save(sorted(folder.iterdir())[0], np.zeros((3, 7, 3), np.int64))


def nan(folder):
    path = sorted(folder.iterdir())[0]
    x = np.load(path)
    x[1, 1, 1] = np.nan
    np.save(path, x)


def too_long(folder):
    path = sorted(folder.iterdir())[0]
    np.save(path, np.repeat(np.load(path), 4, axis=0))


def other_mesh(folder):
    for path in folder.iterdir():
        np.save(path, np.load(path)[:, :5])


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (truncated, "cannot be read as vertices"),
        (integers, "expected floats (frames, V, 3), found int64"),
        (nan, "NaN or Inf in the predicted vertices"),
        (too_long, "another clip, or another frame rate"),
        (other_mesh, "vertices do not agree"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_bad_prediction_is_one_line_that_names_it(corpus, tmp_path, capsys, harm, message):
    folder = predictions(corpus, tmp_path / "p")
    harm(folder)
    code, out, err = run(capsys, folder, corpus)
    assert code == 2 and out == "" and err.count("\n") == 1 and message in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere", "CORPUS"), "there is no such file or folder"),
        (("PRED", "nowhere"), "there is no such file or folder"),
        (("PRED", "CORPUS", "--protocol", "lve"), "--protocol lve: known are jambatalk, codetalker"),
        (("PRED", "CORPUS", "--split", "dev"), "no split 'dev'"),
        (("PRED", "CORPUS", "--regions", "nowhere.npz"), "cannot be read as regions"),
        (("PRED", "CORPUS", "--fps", "45"), "no multiple of the predicted 45"),
        (("PRED", "CORPUS", "--pictures", "CORPUS/faces.npy"), "cannot write"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_2(corpus, tmp_path, capsys, arguments, message):
    folder = predictions(corpus, tmp_path / "p")
    (corpus / "faces.npy").exists() or np.save(corpus / "faces.npy", np.array([[0, 1, 2]]))
    places = {"PRED": str(folder), "CORPUS": str(corpus)}
    code, out, err = run(capsys, *(
        places.get(argument, argument.replace("CORPUS/", f"{corpus}/")) for argument in arguments
    ))  # fmt: skip
    assert code == 2 and message in err and "Traceback" not in err


def test_a_bad_clip_of_the_truth_is_refused_or_skipped_and_counted(corpus, tmp_path, capsys):
    folder = predictions(corpus, tmp_path / "p")
    rows = Corpus(corpus).clips("test")[0].rows
    vertices = np.load(corpus / "data_verts.npy")
    vertices[rows[1]] = np.nan
    np.save(corpus / "data_verts.npy", vertices)
    code, _, err = run(capsys, folder, corpus)
    assert code == 2 and "NaN or Inf" in err
    code, out, _ = run(capsys, folder, corpus, "--skip-bad")
    assert code == 0 and "skipped: " in out


def test_every_protocol_says_what_it_computes(capsys):
    code, out, _ = run(capsys, "--describe")
    assert code == 0 and "codetalker (version 1)" in out and "mm" in out and "warning" in out


def test_the_release_protocol_warns(corpus, tmp_path, capsys):
    code, _, err = run(capsys, predictions(corpus, tmp_path / "p"), corpus, "--protocol", "jambatalk-release")
    assert "left ear" in err and code == 2 and "192 coordinates" in err  # this mesh has seven vertices


def test_pages_show_errors_and_both_faces(corpus, tmp_path, capsys):
    np.save(corpus / "faces.npy", np.array([[0, 1, 2], [2, 3, 4], [4, 5, 6]]))
    folder = predictions(corpus, tmp_path / "p", lambda x: x * np.float32(1.02))
    code, _, err = run(capsys, folder, corpus, "--pictures", tmp_path / "pages")
    assert code == 0, err
    index = (tmp_path / "pages" / "index.html").read_text()
    assert "polyline" in index and "least error" in index and "LVE" in index
    linked = [path for path in (tmp_path / "pages").glob("*.html") if path.name in index]
    assert linked and all("prediction, truth, mean error" in path.read_text() for path in linked)


def test_side_by_side_is_within_its_loss_of_both(corpus):
    clip = Corpus(corpus).clips("test")[0]
    template = Corpus(corpus).templates[clip.subject]
    truth = clip.read(slice(None, None, 2))
    pair = comparison.Pair("a", truth * np.float32(1.05), truth, template, 30.0, {})
    shown = pictures.side_by_side(pair, np.array([[0, 1, 2], [4, 5, 6]]), None)
    heads = np.split(shown.vertices, 3, axis=1)
    place = np.split(shown.template, 3)
    for head, at, wanted in zip(heads, place, (pair.predicted, truth, truth), strict=True):
        assert np.sqrt(np.mean((head - (at - template) - wanted) ** 2)) < 2 * pictures.LOSS
    painted = shown.regions["colour"]
    assert np.isnan(painted[:14]).all() and np.isfinite(painted[14:]).all()


def test_heat_goes_from_blue_to_red():
    cold, hot = pictures.heat(np.array([0.0, 1.0]))
    assert cold[2] > cold[0] and hot[0] > hot[2]
