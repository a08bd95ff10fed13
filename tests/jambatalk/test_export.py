"""Every format holds what it promises; a file is whole or not there."""

import base64
import errno
import io
import json
import os
import re
import zipfile
import zlib
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import soundfile

from jambatalk import export
from jambatalk.animation import Animation
from jambatalk.export import ExportError, html


def ball(rows=24, columns=32, radius=0.1):
    """A closed mesh: vertices (V, 3) metres, faces (F, 3) counter-clockwise from outside."""
    polar, around = np.meshgrid(
        np.linspace(0, np.pi, rows), np.linspace(0, 2 * np.pi, columns, endpoint=False), indexing="ij"
    )
    vertices = radius * np.stack(
        [np.sin(polar) * np.sin(around), np.cos(polar), np.sin(polar) * np.cos(around)], -1
    ).reshape(-1, 3)
    i, j = np.meshgrid(np.arange(rows - 1), np.arange(columns), indexing="ij")
    a, b = i * columns + j, i * columns + (j + 1) % columns
    c, d = a + columns, b + columns
    return vertices, np.concatenate([np.stack([a, c, b], -1).reshape(-1, 3), np.stack([b, c, d], -1).reshape(-1, 3)])


def clip(seconds=2.0, rank=6, mesh=None, noise=0.0, fps=30, offset=False, sound=True, **fields):
    """A ball that breathes in smooth bumps of up to some millimetres."""
    vertices, faces = ball() if mesh is None else mesh
    random = np.random.default_rng(0)
    frames = round(seconds * fps)
    times = np.arange(frames) / fps
    bumps = []
    for _ in range(rank):
        middle = vertices[random.integers(len(vertices))]
        bump = np.exp(-((vertices - middle) ** 2).sum(1) / 0.05**2)
        bumps.append(
            (bump[:, None] * random.standard_normal(3) + noise * random.standard_normal(vertices.shape)).reshape(-1)
        )
    coefficients = 0.008 * np.stack([np.sin(2 * np.pi * (0.7 + 0.6 * k) * times + k) / (1 + k) for k in range(rank)], 1)
    samples = (0.5 * np.sin(2 * np.pi * 220 * np.arange(round(seconds * 16000)) / 16000)).astype(np.float32)
    return Animation(
        coefficients,
        np.stack(bumps, 1),
        vertices,
        faces,
        fps,
        offset=0.002 * bumps[0] if offset else None,
        audio=(samples, 16000) if sound else None,
        **fields,
    )


def unpack(path):
    """facts, arrays and the wav of a page, read as viewer.js reads them, by other code."""
    page = path.read_text("utf-8")
    block = {
        name: re.search(rf'id="{name}">(.*?)</script>', page, re.S).group(1)
        for name in ("facts-json", "geometry", "sound")
    }
    facts = json.loads(block["facts-json"])
    data, at, arrays = zlib.decompress(base64.b64decode(block["geometry"])), 0, {}
    for name, kind, count in facts["arrays"]:
        size = int(kind[1:]) // 8
        planes = np.frombuffer(data, np.uint8, size * count, at).reshape(size, count).astype(np.int64)
        value = sum(plane << (8 * i) for i, plane in enumerate(planes))
        at += size * count
        if kind[0] != "u":
            value = np.where(value & 1, -(value + 1) // 2, value // 2)
        arrays[name] = np.cumsum(value) if kind[0] == "d" else value
    assert at == len(data)
    return facts, arrays, base64.b64decode(block["sound"]), page


def rebuilt(facts, arrays):
    """(frames, V, 3) metres."""
    shapes = arrays["shapes"].reshape(facts["shapes"], len(arrays["base"])).astype(float)
    weights = arrays["weights"].reshape(facts["frames"], facts["shapes"]) * np.array(facts["weight_steps"])
    return ((arrays["base"] * facts["base_step"] + weights @ shapes) / 1000).reshape(facts["frames"], -1, 3)


# npz and npy


@pytest.mark.parametrize("offset", [False, True])
def test_npz(tmp_path, offset):
    a = clip(seconds=10, offset=offset)  # more than one chunk of frames
    a.save(tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz", allow_pickle=False) as saved:
        assert set(saved.files) == {"vertices", "faces", "template", "fps"}
        assert saved["vertices"].dtype == np.float32 and saved["faces"].dtype == np.int32
        assert saved["vertices"].shape == (300, len(a.template), 3)
        assert np.allclose(saved["vertices"], a.vertices, atol=1e-7)
        assert np.array_equal(saved["faces"], a.faces) and np.array_equal(saved["template"], a.template)
        assert saved["fps"] == 30
    assert zipfile.ZipFile(tmp_path / "a.npz").testzip() is None


def test_npy(tmp_path):
    a = clip(seconds=10)
    a.save(tmp_path / "a.npy")
    saved = np.load(tmp_path / "a.npy", allow_pickle=False)
    assert saved.dtype == np.float32 and np.allclose(saved, a.vertices, atol=1e-7)
    assert np.load(tmp_path / "a.npy", mmap_mode="r").shape == saved.shape


@pytest.mark.parametrize("extension", [".npz", ".npy"])
def test_long_clips_are_streamed(extension, monkeypatch):
    """Ten minutes: 18000 frames. No more than a chunk of vertices exists at once."""
    import tracemalloc

    class Sink(io.RawIOBase):
        """Takes everything, keeps nothing."""

        at = 0

        def writable(self):
            return True

        def seekable(self):
            return True

        def tell(self):
            return self.at

        def seek(self, offset, whence=0):
            self.at = offset
            return offset

        def write(self, data):
            self.at += len(memoryview(data).cast("B"))
            return len(memoryview(data).cast("B"))

    a = clip(seconds=600, rank=2, sound=False, mesh=ball(12, 16))
    sink = Sink()
    tracemalloc.start()
    export.FORMATS[extension].write(a, sink)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sink.at > 18000 * a.template.nbytes > 40e6
    assert peak < 4 * 256 * a.template.nbytes


# html


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_page_moves_as_the_animation_does(tmp_path, offset, noise):
    a = clip(offset=offset, noise=noise, rank=20)
    a.save(tmp_path / "a.html")
    facts, arrays, wav, _ = unpack(tmp_path / "a.html")
    off = np.linalg.norm(rebuilt(facts, arrays) - a.vertices, axis=-1).max() * 1000
    assert off <= 0.05
    assert off == pytest.approx(facts["error_mm"], abs=1e-3)
    assert facts["frames"] == a.frames and facts["fps"] == 30 and facts["duration"] == 2.0
    assert np.array_equal(arrays["faces"].reshape(-1, 3), a.faces)
    samples, rate = soundfile.read(io.BytesIO(wav), dtype="float32")
    assert rate == 16000 and np.abs(samples - a.audio[0]).max() < 1e-4


def test_page_keeps_few_shapes_of_a_simple_motion(tmp_path):
    a = clip(rank=40)  # the later bumps are tiny
    a.save(tmp_path / "a.html")
    assert 0 < unpack(tmp_path / "a.html")[0]["shapes"] < 40


def test_page_of_a_still_face(tmp_path):
    a = clip()
    a.coefficients[:] = 0
    a.save(tmp_path / "a.html")
    facts, arrays, _, _ = unpack(tmp_path / "a.html")
    assert facts["shapes"] == 0 and facts["error_mm"] <= 0.05
    assert np.abs(rebuilt(facts, arrays) - a.template).max() < 1e-5


def test_page_of_one_frame_without_sound(tmp_path):
    a = clip(seconds=1 / 30, sound=False)
    a.save(tmp_path / "a.html")
    facts, arrays, wav, _ = unpack(tmp_path / "a.html")
    assert wav == b"" and facts["sound"] == 0
    assert np.abs(rebuilt(facts, arrays) - a.vertices).max() < 5e-5


def test_page_with_a_basis_of_dependent_columns(tmp_path):
    """A linear vertex head has no orthonormal basis: here ranks are lost, and scales are far apart."""
    a = clip(rank=5)
    basis = np.concatenate([a.basis * 1e3, a.basis[:, :3] * 1e3, np.zeros((len(a.basis), 2))], 1)
    b = Animation(
        np.concatenate([a.coefficients, a.coefficients[:, :3], a.coefficients[:, :2]], 1) / 2e3,
        basis,
        a.template,
        a.faces,
        30,
    )
    b.save(tmp_path / "b.html")
    facts, arrays, _, _ = unpack(tmp_path / "b.html")
    assert np.abs(rebuilt(facts, arrays) - b.vertices).max() < 5e-5
    assert facts["shapes"] <= 5


def test_page_is_self_contained_and_deterministic(tmp_path):
    a = clip(subject="</script><b>Zoë")
    a.save(tmp_path / "a.html")
    a.save(tmp_path / "other.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "other.html").read_bytes()
    facts, _, _, page = unpack(tmp_path / "a.html")
    assert facts["subject"] == "</script><b>Zoë"
    assert page.count("</script>") == page.count("<script") == 4
    assert not re.search(r"https?://|<link|\bsrc=|@import|url\(|\{\{", page)
    for control in ("play", "scrub", "time", "speed", "loop", "front"):
        assert f'id="{control}"' in page


def test_page_knows_the_parts_of_the_face(tmp_path):
    vertices, _ = ball()
    part = np.zeros(len(vertices), np.int64)
    part[(vertices[:, 2] > 0.08) & (vertices[:, 1] > 0)] = 1
    part[(vertices[:, 2] > 0.08) & (vertices[:, 1] < -0.02)] = 4
    upper, lower = np.flatnonzero(vertices[:, 1] > 0.09), np.flatnonzero(vertices[:, 1] < -0.09)
    lower = lower[: len(upper)]
    a = clip(
        regions={"part": part, "inner_lip_upper": upper, "inner_lip_lower": lower}, opening_scale=0.01, offset=True
    )
    a.save(tmp_path / "a.html")
    facts, arrays, _, _ = unpack(tmp_path / "a.html")
    assert len(facts["eyes"]) == 8
    surface = arrays["surface"].reshape(-1, 4)
    assert (
        (surface[part == 1, 2] == 2).all() and (surface[part == 4, 2] == 0).all() and (surface[part == 0, 2] == 1).all()
    )
    gap = (a.vertices[:, upper, 1] - a.vertices[:, lower, 1]).mean(1) - (
        a.template[upper, 1] - a.template[lower, 1]
    ).mean()
    assert np.abs(arrays["opening"] / 1000 - gap / 0.01).max() < 2e-3
    a.regions["part"] = part[:5]  # of another mesh: not painted
    a.save(tmp_path / "a.html")
    assert unpack(tmp_path / "a.html")[0]["eyes"] is None


def test_light_is_dim_where_the_surface_is_hidden():
    """A small ball inside a large one sees no sky."""
    outer, faces = ball()
    inner = outer * 0.3
    light = html._ambient_light(np.concatenate([outer, inner]), np.concatenate([faces, faces + len(outer)]))
    assert light[: len(outer)].mean() > 0.85 and light[len(outer) :].mean() < 0.1


def test_page_is_small():
    """The bar: 1.5 MB for 7 s of the demo's head, here with motion in every one of 52 units."""
    face = pytest.importorskip("jambatalk.face")
    try:
        head = face.load_head()
    except face.MissingPackage as error:
        pytest.skip(str(error))
    random = np.random.default_rng(0)
    weights = np.clip(np.cumsum(random.standard_normal((218, 52)), 0) * 0.05, 0, 1)
    basis = np.stack([head.units[name] for name in face.ARKIT_UNITS]).reshape(52, -1).T
    sound = (random.uniform(-0.5, 0.5, 116400).astype(np.float32), 16000)
    a = Animation(weights, basis, head.template, head.faces, 30, audio=sound, regions=head.regions, opening_scale=0.01)
    out = io.BytesIO()
    html.write(a, out)
    assert len(out.getvalue()) < 1.5e6


def test_page_has_a_limit(tmp_path):
    a = clip(seconds=1, sound=False, duration=Fraction(1801))
    with pytest.raises(ExportError, match=r"30\.0 minutes, and \.html takes at most 30; write \.npz, \.npy"):
        a.save(tmp_path / "a.html")
    with pytest.raises(ExportError, match="at most 30"):
        export.check(tmp_path / "a.html", Fraction(1801))
    export.check(tmp_path / "a.html", Fraction(1800))
    export.check(tmp_path / "a.npz", Fraction(36000))
    assert not list(tmp_path.iterdir())


def test_page_needs_faces(tmp_path):
    a = clip()
    a.faces = a.faces[:0]
    with pytest.raises(ExportError, match="no triangles"):
        a.save(tmp_path / "a.html")
    assert not list(tmp_path.iterdir())


# Whole or not there


def refused(path, animation=None):
    with pytest.raises(ExportError) as by_check:
        export.check(path)
    with pytest.raises(ExportError) as by_write:
        export.write(animation or clip(), path)
    assert str(by_check.value) == str(by_write.value) and "\n" not in str(by_check.value)
    return str(by_check.value)


def test_unknown_extensions(tmp_path):
    for name in ("a.obj", "a", "a.html.gz", ".html"):
        assert "known: .html, .npz, .npy" in refused(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder.npz").mkdir()
    assert "there is no folder" in refused(tmp_path / "nowhere" / "a.npz")
    assert "there is no folder" in refused(tmp_path / "file" / "a.npz")
    assert "a folder" in refused(tmp_path / "folder.npz")
    assert "name" in refused(tmp_path / ("x" * 300 + ".npz"))
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.npz"]


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs Linux's /proc, where nobody can make a file")
def test_folder_without_permission():
    assert "cannot write /proc/a.npz" in refused("/proc/a.npz")


@pytest.mark.parametrize("extension", [".html", ".npz", ".npy"])
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), ValueError("no")]
)
def test_failure_on_the_way_leaves_the_old_file(tmp_path, monkeypatch, extension, error):
    path = tmp_path / f"a{extension}"
    path.write_bytes(b"old")

    def fail(animation, file):
        file.write(b"half")
        raise error

    monkeypatch.setattr(export.FORMATS[extension], "write", fail)
    with pytest.raises(ExportError if isinstance(error, OSError) else type(error)) as caught:
        export.write(clip(), path)
    if isinstance(error, OSError):
        assert "No space left" in str(caught.value) and str(path) in str(caught.value)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("extension", [".html", ".npz", ".npy"])
def test_full_disk(tmp_path, extension):
    """The kernel refuses to let a file grow beyond 20 kB: what a full disk does, in earnest."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(ExportError, match="cannot write"):
            export.write(clip(), tmp_path / f"a{extension}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_motion_that_is_no_number(tmp_path, value):
    a = clip()
    a.coefficients[3, 1] = value
    for extension in export.FORMATS:
        with pytest.raises(ExportError, match="NaN or Inf"):
            a.save(tmp_path / f"a{extension}")
    assert not list(tmp_path.iterdir())


def test_overwrites_through_links_with_ordinary_permissions(tmp_path):
    (tmp_path / "real.npy").write_bytes(b"old")
    (tmp_path / "link.npy").symlink_to("real.npy")
    clip().save(tmp_path / "link.npy")
    assert (tmp_path / "link.npy").is_symlink() and np.load(tmp_path / "real.npy").shape[0] == 60
    (tmp_path / "probe").touch()
    clip().save(tmp_path / "new.NPY")  # any case of the extension
    assert (tmp_path / "new.NPY").stat().st_mode == (tmp_path / "probe").stat().st_mode


def test_names_with_spaces_and_letters_of_all_kinds(tmp_path):
    for extension in export.FORMATS:
        path = tmp_path / f"mein Gesicht – 顔{extension}"
        assert clip().save(path) is None and path.stat().st_size > 1000


def test_the_viewer_is_installed_with_the_package():
    """The page's template is data, and data reaches a wheel only by a pattern in pyproject.toml."""
    tomllib = pytest.importorskip("tomllib")
    package = Path(export.__file__).parent.parent
    project = package.parent / "pyproject.toml"
    if not project.is_file():
        pytest.skip("the tests run against an installed package: the other tests of the page show that it is whole")
    patterns = tomllib.loads(project.read_text("utf-8"))["tool"]["setuptools"]["package-data"]["jambatalk"]
    patterns = [pattern + "/*" if pattern.endswith("**") else pattern for pattern in patterns]
    reached = {path for pattern in patterns for path in package.glob(pattern)}
    assert {package / "export" / "viewer" / name for name in ("page.html", "style.css", "viewer.js")} <= reached
