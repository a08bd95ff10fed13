"""python -m jambatalk.infer: every promise of the command, on a tiny model with random weights."""

import json
import os
import pickle
import re
import signal
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file

from jambatalk import infer
from jambatalk.config import JambaTalkConfig
from jambatalk.model import JambaTalk

ROOT = Path(infer.__file__).parent.parent
VERTICES = 30


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a model that moves: 30 vertices, 30 frames/s, windowed encoder."""
    torch.manual_seed(0)
    config = JambaTalkConfig.from_preset(
        "demo",
        vertices=VERTICES,
        d_model=16,
        heads=2,
        hidden=16,
        experts=2,
        motion_rank=4,
        attention_window=20,
        subjects=["anna", "bert"],
        encoder=dict(
            context="windowed",
            freeze_front_end=False,
            attention_back=4,
            attention_ahead=1,
            conv_dim=[8] * 7,
            conv_norm="layer",
            hidden=16,
            layers=1,
            heads=2,
            ffn=16,
            pre_norm=True,
            pos_conv_kernel=5,
            pos_conv_groups=4,
        ),
    )
    model = JambaTalk(config)
    torch.nn.init.normal_(model.head.weight, std=1e-3)
    random = np.random.default_rng(0)
    model.motion_basis.copy_(torch.from_numpy(np.linalg.qr(random.standard_normal((3 * VERTICES, 4)))[0]))
    template = random.uniform(-0.1, 0.1, (VERTICES, 3))
    faces = np.stack([np.arange(VERTICES - 2), np.arange(1, VERTICES - 1), np.arange(2, VERTICES)], 1)
    regions = {
        "part": np.zeros(VERTICES, np.int64),
        "inner_lip_upper": np.array([1, 2]),
        "inner_lip_lower": np.array([3, 4]),
    }
    model.set_head(np.stack([template, template * 1.1]), faces, regions, 0.01)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder beside one with audio of various kinds."""
    folder, sounds = tmp_path / "work", tmp_path / "sounds"
    folder.mkdir()
    sounds.mkdir()
    monkeypatch.chdir(folder)
    return folder


def sound(path, seconds=0.5, rate=16000, channels=1, **options):
    path = Path(path)
    noise = np.random.default_rng(1).uniform(-0.3, 0.3, (round(seconds * rate), channels))
    soundfile.write(path, noise, rate, **options)
    return str(path)


def refused(capsys, *arguments, leaves=()):
    """Runs the command, which must refuse in one line and leave the current folder as it was. Returns the line."""
    capsys.readouterr()
    try:
        code = infer.main([*map(str, arguments), "--quiet"])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert code == 2 and out == ""
    assert re.fullmatch(r"jambatalk: error: [^\n]+\n", err), err
    assert sorted(os.listdir()) == sorted(leaves)
    return err


# What works


def test_no_audio_is_the_bundled_clip(model, here, capsys):
    assert infer.main(["--model", str(model), "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert out == "demo.html\n" and err == ""
    assert os.listdir() == ["demo.html"] and "{{" not in Path("demo.html").read_text("utf-8")


def test_the_bundled_clip_is_what_the_readme_says():
    info = soundfile.info(infer.DEMO_CLIP)
    assert (info.samplerate, info.channels, info.subtype) == (16000, 1, "PCM_16") and 5 < info.duration < 9


@pytest.mark.parametrize(
    "name, rate, channels, options",
    [
        ("a.wav", 8000, 1, {}),
        ("a.wav", 192000, 2, {"subtype": "PCM_24"}),
        ("a.wav", 44100, 8, {"subtype": "FLOAT"}),
        ("a.flac", 48000, 6, {"subtype": "PCM_24"}),
        ("a.ogg", 22050, 2, {}),
        ("ein Stück – 音.flac", 16000, 1, {}),
    ],
)
def test_any_audio(model, here, capsys, name, rate, channels, options):
    path = sound(here.parent / "sounds" / name, 0.45, rate, channels, **options)
    assert infer.main([path, "-o", "out.npz", "--model", str(model), "--quiet"]) == 0
    with np.load("out.npz", allow_pickle=False) as saved:
        exact = Fraction(soundfile.info(path).frames, rate)
        assert saved["vertices"].shape == (round(exact * 30), VERTICES, 3) and saved["vertices"].dtype == np.float32
        assert np.isfinite(saved["vertices"]).all() and saved["vertices"].std(0).max() > 0
        assert saved["faces"].dtype == np.int32 and saved["faces"].shape == (VERTICES - 2, 3)
        assert saved["template"].shape == (VERTICES, 3) and saved["fps"] == 30


def test_silence(model, here):
    soundfile.write("../sounds/silence.wav", np.zeros(8000), 16000)
    assert infer.main(["../sounds/silence.wav", "--model", str(model), "-o", "a.npy", "--quiet"]) == 0
    assert np.isfinite(np.load("a.npy")).all()


@pytest.mark.parametrize("fps, frames", [("25", 12), ("60", 30), ("30000/1001", 15), ("29.97", 15), ("1.5", 1)])
def test_fps(model, here, capsys, fps, frames):
    path = sound("../sounds/a.wav")  # half a second
    assert infer.main([path, "--model", str(model), "--fps", fps, "-o", "a.npz", "--json"]) == 0
    line = json.loads(capsys.readouterr().out)
    assert line["frames"] == frames == len(np.load("a.npz")["vertices"])
    assert line["fps"] == pytest.approx(float(Fraction(fps))) and np.load("a.npz")["fps"] == pytest.approx(
        float(Fraction(fps))
    )


def test_json(model, here, capsys):
    paths = [sound("../sounds/a.wav"), sound("../sounds/b b.flac", 1.0, 8000)]
    assert infer.main([*paths, "--model", str(model), "-o", "{stem}.npz", "--json"]) == 0
    out, err = capsys.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["output"] for line in lines] == ["a.npz", "b b.npz"] and sorted(os.listdir()) == ["a.npz", "b b.npz"]
    for line, path, seconds in zip(lines, paths, (0.5, 1.0), strict=True):
        assert line["input"] == path and line["frames"] == seconds * 30 and line["fps"] == 30
        assert line["audio_seconds"] == seconds
        assert set(line["seconds"]) == {"read", "encode", "decode", "vertices", "write"}
        assert all(value > 0 for value in line["seconds"].values())
    assert err.count("s of audio") == 2  # the summaries


def test_several_files_into_a_folder(model, here, capsys):
    paths = [sound("../sounds/a.wav"), sound("../sounds/b.wav")]
    assert infer.main([*paths, "--model", str(model), "-o", "faces/", "--quiet"]) == 0
    assert capsys.readouterr().out.split() == ["faces/a.html", "faces/b.html"]
    assert sorted(os.listdir("faces")) == ["a.html", "b.html"]
    assert infer.main([paths[0], "--model", str(model), "-o", "faces", "--quiet"]) == 0  # a folder that is there
    assert infer.main([*paths, "--model", str(model), "--quiet"]) == 0
    assert sorted(os.listdir()) == ["a.html", "b.html", "faces"]


def test_one_bad_file_does_not_stop_the_others(model, here, capsys):
    good = sound("../sounds/good.wav")
    whole = Path(sound("../sounds/whole.flac", 2.0)).read_bytes()
    Path("../sounds/bad.flac").write_bytes(whole[: len(whole) // 2] + bytes(100) + whole[len(whole) // 2 + 100 :])
    assert infer.main(["../sounds/bad.flac", good, "--model", str(model), "-o", "{stem}.npz", "--quiet"]) == 2
    out, err = capsys.readouterr()
    assert out == "good.npz\n" and os.listdir() == ["good.npz"]
    assert err.count("\n") == 1 and "bad.flac" in err


@pytest.mark.parametrize(
    "subject, template", [("anna", 1.0), ("bert", 1.1), ("1", 1.1), ("mean", 1.05), ("unknown", 1.05)]
)
def test_subject(model, here, subject, template):
    assert (
        infer.main([sound("../sounds/a.wav"), "--model", str(model), "--subject", subject, "-o", "a.npz", "--quiet"])
        == 0
    )
    anna = load_file(model / "model.safetensors")["templates"][0]
    assert np.allclose(np.load("a.npz")["template"], anna * template, atol=1e-6)


@pytest.mark.parametrize("options", [[], ["--seed", "7"], ["--backend", "reference"], ["--weights", "bfloat16"]])
def test_the_same_bytes_every_time(model, here, options):
    path = sound("../sounds/a.wav")
    for name in ("a.npz", "b.npz", "a.html", "b.html"):
        assert infer.main([path, "--model", str(model), "-o", name, "--quiet", *options]) == 0
    for kind in ("npz", "html"):
        assert Path(f"a.{kind}").read_bytes() == Path(f"b.{kind}").read_bytes()


def test_native_backend(model, here, capsys):
    from jambatalk_kernels.backends import native_library

    path = sound("../sounds/a.wav")
    loaded, reason = native_library()
    if loaded:
        for name, backend in (("a.npy", "cpu"), ("b.npy", "reference")):
            assert infer.main([path, "--model", str(model), "-o", name, "--backend", backend, "--quiet"]) == 0
        assert np.abs(np.load("a.npy") - np.load("b.npy")).max() < 1e-5
    else:
        assert reason.split(":")[0] in refused(capsys, path, "--model", model, "--backend", "cpu")


def test_weights(model, here):
    """bfloat16 rounds the loop's matrices to 8 bits: other vertices, by some thousandths of their motion."""
    path = sound("../sounds/a.wav")
    for name, weights in (("a.npy", "float32"), ("b.npy", "bfloat16")):
        assert infer.main([path, "--model", str(model), "-o", name, "--weights", weights, "--quiet"]) == 0
    motion = np.load("a.npy") - np.load("a.npy").mean(0)
    assert 0 < np.abs(np.load("a.npy") - np.load("b.npy")).max() < 0.05 * np.abs(motion).max()


def test_progress_goes_to_the_terminal_only(model, here, capsys):
    infer.main([sound("../sounds/a.wav"), "--model", str(model), "-o", "a.npy"])
    out, err = capsys.readouterr()
    assert out == "a.npy\n"
    assert "a.wav: 0.50 s of audio, 15 frames at 30 fps" in err and "%" not in err  # no bar where there is no terminal


# What is refused: one line, exit code 2, nothing left behind


def test_bad_audio(model, here, capsys):
    there = here.parent / "sounds"
    whole = Path(sound(there / "whole.wav", 1.0)).read_bytes()
    (there / "cut.wav").write_bytes(whole[:-1000])
    (there / "empty.wav").touch()
    (there / "noise.wav").write_bytes(os.urandom(3000))
    soundfile.write(there / "none.wav", np.zeros(0), 16000)
    for name, value in (("nan", np.nan), ("inf", np.inf)):
        soundfile.write(there / f"{name}.wav", np.array([0.0] * 999 + [value]), 16000, subtype="FLOAT")
    sound(there / "short.wav", 0.01)
    for name, words in (
        ("missing.wav", "no such file"),
        ("cut.wav", "truncated"),
        ("empty.wav", "empty"),
        ("noise.wav", "corrupt"),
        ("none.wav", "no samples"),
        ("nan.wav", "NaN"),
        ("inf.wav", "Inf"),
        ("short.wav", "too short"),
        (".", "folder"),
    ):
        for output in ([], ["-o", "a.npz"]):
            assert words in refused(capsys, there / name, "--model", model, *output)
    assert "too short" in refused(capsys, sound(there / "a.wav", 0.1), "--model", model, "--fps", 2)


def test_bad_output(model, here, capsys):
    path = sound("../sounds/a.wav")
    (here / "folder.npz").mkdir()
    for output, words in (
        ("a.obj", "known: .html, .npz, .npy"),
        ("noextension", "known:"),
        ("nowhere/a.npz", "no folder"),
        ("nowhere/deep/", "cannot make the folder"),
        ("../sounds/a.wav/x.npz", "no folder"),
    ):
        assert words in refused(capsys, path, "--model", model, "-o", output, leaves=["folder.npz"])


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs Linux's /proc, where nobody can make a file")
def test_output_that_cannot_be_written_is_noticed_before_the_work(here, capsys, monkeypatch):
    monkeypatch.setattr(infer, "_load_model", lambda arguments: pytest.fail("the model was loaded"))
    assert "cannot write /proc/a.npz" in refused(capsys, sound("../sounds/a.wav"), "-o", "/proc/a.npz")


def test_full_disk(model, here, capsys):
    resource = pytest.importorskip("resource")
    path = sound("../sounds/a.wav", 4.0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, before[1]))
    try:
        assert "cannot write a.npz" in refused(capsys, path, "--model", model, "-o", "a.npz")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_ambiguous_outputs(model, here, capsys):
    a, b, other = sound("../sounds/a.wav"), sound("../sounds/b.wav"), sound("../sounds/a.flac")
    assert "one file for 2 inputs" in refused(capsys, a, b, "--model", model, "-o", "x.npz")
    assert "both be written to a.html" in refused(capsys, a, other, "--model", model)
    assert "both" in refused(capsys, a, a, "--model", model, "-o", "{stem}.npz")
    Path("a.npy").write_bytes(Path(a).read_bytes())
    assert "is an input" in refused(capsys, "a.npy", "--model", model, "-o", "a.npy", leaves=["a.npy"])


@pytest.mark.parametrize(
    "options, words",
    [
        (["--fps", "0"], "fps"),
        (["--fps", "many"], "fps"),
        (["--fps", "1e9"], "fps"),
        (["--subject", "clara"], "anna, bert, mean, unknown"),
        (["--device", "abacus"], "--device abacus"),
        (["--backend", "abacus"], "abacus"),
        (["--seed", "x"], "--seed"),
        (["--frobnicate"], "--frobnicate"),
    ],
)
def test_bad_options(model, here, capsys, options, words):
    assert words in refused(capsys, sound("../sounds/a.wav"), "--model", model, *options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("options", [["--device", "cuda"], ["--backend", "triton"], ["--backend", "cuda"]])
def test_no_gpu(model, here, capsys, options, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # the tests interpret Triton's kernels on the CPU; users do not
    assert options[1] in refused(capsys, sound("../sounds/a.wav"), "--model", model, *options)


def test_bad_checkpoints(model, here, capsys):
    path = sound("../sounds/a.wav")
    tensors, config = load_file(model / "model.safetensors"), (model / "config.json").read_text()

    def case(name, tensors_or_bytes=None, text=config):
        folder = here.parent / name
        folder.mkdir()
        if text is not None:
            (folder / "config.json").write_text(text)
        if isinstance(tensors_or_bytes, bytes):
            (folder / "model.safetensors").write_bytes(tensors_or_bytes)
        elif tensors_or_bytes is not None:
            save_file(tensors_or_bytes, folder / "model.safetensors")
        return folder

    missing = {name: value for name, value in tensors.items() if name != "head.weight"}
    whole = (model / "model.safetensors").read_bytes()
    nan = {**tensors, "head.bias": torch.full_like(tensors["head.bias"], float("nan"))}
    for folder, words in (
        (case("missing", missing), "head.weight"),
        (case("shape", {**tensors, "head.weight": tensors["head.weight"].T.contiguous()}), "shape"),
        (case("pickle", pickle.dumps({"a": 1})), "pickle"),
        (case("cut", whole[: len(whole) // 2]), "safetensors"),
        (case("rubbish", b"rubbish rubbish rubbish"), "safetensors"),
        (case("no weights"), "model.safetensors: missing"),
        (case("no config", tensors, None), "config.json: missing"),
        (case("no json", tensors, "{"), "JSON"),
        (case("unknown key", tensors, '{"colour": 1}'), "colour"),
        (case("nan", nan), "NaN"),
        (here.parent / "nowhere", "no such folder"),
    ):
        assert words in refused(capsys, path, "--model", folder, "-o", "a.npz")
    torch.save(tensors, here.parent / "pickle" / "model.safetensors")
    assert "pickle" in refused(capsys, path, "--model", here.parent / "pickle")


def test_a_half_written_old_file_stays(model, here, capsys):
    """What was there before a refusal is there after it."""
    Path("a.npz").write_bytes(b"precious")
    path = sound("../sounds/a.wav", 0.01)
    assert "too short" in refused(capsys, path, "--model", model, "-o", "a.npz", leaves=["a.npz"])
    assert Path("a.npz").read_bytes() == b"precious"


# As a command


def command(*arguments, **options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "jambatalk.infer", *map(str, arguments)],
        env=environment,
        text=True,
        capture_output=True,
        timeout=300,
        **options,
    )


def test_command(model, here):
    path = sound("../sounds/ein Stück.wav")
    done = command(path, "--model", model)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "ein Stück.html\n" and os.listdir() == ["ein Stück.html"]
    refused = command("missing.wav")
    assert refused.returncode == 2 and refused.stderr == "jambatalk: error: missing.wav: no such file\n"


def test_help_and_refusals_import_nothing_heavy(here):
    """Help comes in well under a second because torch is not imported; so do refusals of bad audio."""
    check = (
        "import sys; from jambatalk import infer\n"
        "try: code = infer.main(sys.argv[1:])\n"
        "except SystemExit as stop: code = stop.code\n"
        "assert not {'torch', 'transformers', 'scipy'} & set(sys.modules), 'heavy'\n"
        "sys.exit(code)"
    )
    for arguments, code in ((["--help"], 0), (["missing.wav"], 2), ([sound("../sounds/a.wav"), "-o", "a.obj"], 2)):
        done = subprocess.run(
            [sys.executable, "-c", check, *arguments],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            text=True,
            capture_output=True,
            timeout=60,
        )
        assert done.returncode == code, done.stderr


def test_interrupt(model, here, capsys, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(JambaTalk, "animate", interrupt)
    assert infer.main([sound("../sounds/a.wav"), "--model", str(model)]) == 130
    assert capsys.readouterr().err.strip().splitlines() == ["jambatalk: interrupted"] and os.listdir() == []


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_interrupt_in_earnest(model, here):
    short, long = sound("../sounds/a.wav"), sound("../sounds/long.wav", 1200.0, 8000)
    process = subprocess.Popen(
        [sys.executable, "-m", "jambatalk.infer", short, long, "--model", str(model), "--json"],
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # else ignored where a shell runs us with &
    )
    first = json.loads(process.stdout.readline())
    process.send_signal(signal.SIGINT)  # in the midst of the second file
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and out == ""
    assert err.strip().splitlines()[-1] == "jambatalk: interrupted" and "Traceback" not in err
    assert os.listdir() == [first["output"]]
