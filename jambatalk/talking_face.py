"""What every talking face here has: a head, styles, an audio encoder, speech in and motion out, a checkpoint folder.

`jambatalk.model.JambaTalk` and the baselines in `jambatalk.baselines` are `TalkingFace`s. A new one brings

- a configuration, derived from `TalkingFaceConfig`, whose `model` is its name in `config.MODELS`;
- `style`, an embedding with a row for each training identity and a last one for "unknown", and `head`, the linear map
  from the last hidden vector to motion;
- `losses`, what a training step minimises, with the help of a `jambatalk.training.Lesson`;
- `roll`, how it moves by itself.

Motion is displacement from the identity's neutral face, in metres, 3V numbers a frame; or, with `motion_rank`, its
coefficients in the columns of `motion_basis`.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from jambatalk.audio_encoder import AudioEncoder
from jambatalk.config import MODELS, SAMPLING_RATE, ConfigError, TalkingFaceConfig
from jambatalk_kernels.linear import Linear

if TYPE_CHECKING:
    from typing import Self  # Python 3.11

    from jambatalk.animation import Animation
    from jambatalk.audio import AudioLike
    from jambatalk.training import Lesson

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
BUNDLED = Path(__file__).parent / "assets" / "demo"
CHUNK_FRAMES = 600  # animate() works through a clip this many frames at a time, where the model can go on from a state
KEEP_FLOAT32 = ("templates", "opening_scale")  # half precision would move a vertex of a head by up to 0.1 mm


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded; one line that says which and why."""


def model_class(name: str) -> type[TalkingFace]:
    """The class of a model by its name in configurations and on command lines."""
    if name not in MODELS:
        raise ConfigError(f"model must be one of {', '.join(MODELS)}, got {name!r}")
    module, _, cls = MODELS[name].partition(":")
    return getattr(importlib.import_module(module), cls)


class TalkingFace(nn.Module):
    """Speech to motion. `encode` and `generate` are its parts; `animate` is what most people want."""

    config_class: ClassVar[type[TalkingFaceConfig]]
    style: nn.Embedding
    head: nn.Linear
    templates: Tensor  # (subjects, V, 3), as the next two from `set_head`
    faces: Tensor  # (F, 3) int32
    opening_scale: Tensor  # ()
    motion_basis: Tensor | None  # (3V, motion_rank)

    def __init__(self, config: TalkingFaceConfig):
        super().__init__()
        self.config = config
        self.seed = 0  # of what a model draws when it generates; most draw nothing
        self.encoder = AudioEncoder(config.encoder, config.frame_rate)
        self.audio_projection = Linear(config.encoder.hidden, config.d_model)

        # What inference needs of the corpus that the model was trained on: see set_head.
        subjects = max(1, len(config.subjects))
        self.register_buffer("templates", torch.zeros(subjects, config.vertices, 3))
        self.register_buffer("faces", torch.zeros(0, 3, dtype=torch.int32))
        self.register_buffer("opening_scale", torch.tensor(1.0))
        basis = None if config.motion_rank is None else torch.eye(3 * config.vertices, config.motion_rank)
        self.register_buffer("motion_basis", basis)

    # The face

    def set_head(
        self,
        templates: Tensor | np.ndarray,
        faces: Tensor | np.ndarray | None,
        regions: Mapping[str, Tensor | np.ndarray],
        opening_scale: float,
    ) -> None:
        """Fill the buffers that describe the face.

        templates: (subjects, V, 3) metres, in the order of `config.subjects`. faces: (F, 3) vertex indices, or None.
        regions: name -> index or label array, kept as `region_<name>`. opening_scale: metres, the inner-lip gap above
        the template's that counts as open.
        """
        templates = torch.as_tensor(templates, dtype=torch.float32)
        if templates.shape != self.templates.shape:
            raise ValueError(f"templates must be {tuple(self.templates.shape)}, got {tuple(templates.shape)}")
        device = self.templates.device
        self.templates = templates.to(device).clone()
        faces = torch.zeros(0, 3) if faces is None else torch.as_tensor(faces)
        self.faces = faces.to(device=device, dtype=torch.int32).reshape(-1, 3).clone()
        self.opening_scale = torch.tensor(float(opening_scale), device=device)
        for name, index in regions.items():
            self.register_buffer(f"region_{name}", torch.as_tensor(np.asarray(index)).to(device, torch.int64).clone())

    @property
    def regions(self) -> dict[str, Tensor]:
        return {
            name.removeprefix("region_"): buffer
            for name, buffer in self.named_buffers(recurse=False)
            if name.startswith("region_")
        }

    # Style

    @property
    def unknown_style(self) -> int:
        """The id of the learned "unknown" identity."""
        return len(self.config.subjects)

    def style_vector(self, style: Tensor | str | int | None, batch: int) -> Tensor:
        """(batch, d). style: (batch,) ids; (batch, d) vectors, taken as they are; one id or one training identity's
        name for all; "mean" of the training identities; "unknown" or None."""
        if isinstance(style, Tensor):
            if style.is_floating_point():
                return style
            return self.style(style.expand(batch))
        weight = self.style.weight
        if style is None or style == "unknown":
            vector = weight[self.unknown_style]
        elif isinstance(style, int):
            if not 0 <= style <= self.unknown_style:
                raise ValueError(f"style id must be between 0 and {self.unknown_style}, got {style}")
            vector = weight[style]
        elif style == "mean":
            vector = weight[: self.unknown_style].mean(0) if self.unknown_style else weight[0]
        else:
            vector = weight[self.subject_index(style)]
        return vector.expand(batch, -1)

    def subject_index(self, name: str) -> int:
        if name not in self.config.subjects:
            raise ValueError(
                f"unknown subject {name!r}; this model knows "
                f"{', '.join(self.config.subjects) or 'none'}, and also 'mean' and 'unknown'"
            )
        return self.config.subjects.index(name)

    # What each model has of its own

    def losses(self, lesson: Lesson) -> dict[str, Tensor]:
        """What a training step minimises, by name; their sum is the loss. One without a gradient is only reported."""
        raise NotImplementedError

    @property
    def stages(self) -> tuple[float, ...]:
        """Where each stage of training begins, as a share of the run's steps. `lesson.batch.stage` counts them from 0;
        the learning rate's schedule and the average of the weights begin anew with each."""
        return (0.0,)

    def roll(
        self,
        features: Tensor,
        style: Tensor | str | int | None,
        state: Any = None,
        lengths: Tensor | None = None,
        program: Any = None,
    ) -> tuple[Tensor, Any]:
        """Moves by itself, without gradient: features (batch, frames, d) -> hidden (batch, frames, head.in_features),
        which `head` turns into motion, and the state for the frames that follow (None of a `WholeClip`).

        style: see `style_vector`. state: of the frames before. lengths: (batch,) frames of each sequence; what comes
        beyond does not matter, and does not change what comes before. program: see there.
        """
        raise NotImplementedError

    def program(self) -> Any:
        """What is worth working out once for many calls of `roll` with the same weights."""
        return None

    # The parts

    def encode(self, samples: Tensor, lengths: Tensor | None = None, frames: int | None = None) -> Tensor:
        """samples (batch, n) float at 16 kHz, lengths (batch,) samples of each -> (batch, frames, d_model).

        frames: of the longest clip; round(duration * fps) by default. A clip's features do not depend on the padding.
        """
        return self.audio_projection(self.encoder(samples, lengths, frames))

    @torch.no_grad()
    def generate(
        self,
        features: Tensor,
        style: Tensor | str | int | None = None,
        state: Any = None,
        lengths: Tensor | None = None,
        program: Any = None,
    ) -> tuple[Tensor, Any]:
        """Speaks: features (batch, frames, d) from `encode` -> motion (batch, frames, motion_size), and the state for
        the frames that follow. Continues from `state`.

        style: see `style_vector`. lengths: (batch,) frames of each sequence; the motion beyond has no meaning.
        program: from `self.program()`, to prepare once for many calls.
        """
        hidden, state = self.roll(features, style, state, lengths, program)
        return self.head(hidden), state

    # Use

    @torch.no_grad()
    def animate(
        self,
        audio: AudioLike,
        sampling_rate: int | None = None,
        subject: str | int | None = None,
        fps: float | str | Fraction | None = None,
        progress: Callable[[float], None] | None = None,
        program: Any = None,
    ) -> Animation:
        """Speech to a moving face.

        audio: a path, an array or a tensor (one or several channels), or a `jambatalk.audio.Audio`.
        sampling_rate: of an array; 16000 if not given.
        subject: whose style and whose face: the name or the number of a training identity, "mean", or None: the learned
            style of an unknown speaker on the mean face.
        fps: frames per second of the result; the model's own by default.
        progress: called now and then with the share of the work that is done.
        program: from `self.program()`, to prepare once for many calls; that takes as long as a second of speech or so.

        Raises jambatalk.audio.AudioError (one line) for audio that cannot be used, ValueError for an unknown subject.
        Memory beyond the result does not grow with the clip where the encoder is `windowed` and attention has a window.
        """
        from jambatalk import audio as audio_module
        from jambatalk.animation import Animation

        progress = progress or (lambda done: None)
        style, template, name = self._identity(subject)
        output_rate = None if fps is None else audio_module.exact_fps(fps)
        clock = time.perf_counter
        started = clock()
        sound = audio_module.load(audio, sampling_rate)
        rate = self.config.frame_rate
        if output_rate is not None:
            audio_module.frames_for(sound.duration, output_rate)  # too short for it: say so before the work
        frames = audio_module.frames_for(sound.duration, rate)
        seconds = {"read": clock() - started, "encode": 0.0, "decode": 0.0, "vertices": 0.0, "write": 0.0}

        was_training = self.training
        self.eval()
        try:
            parameter = self.head.weight
            samples = torch.from_numpy(sound.samples).to(device=parameter.device, dtype=parameter.dtype)[None]
            begun = clock()
            program = self.program() if program is None else program
            seconds["decode"] += clock() - begun
            state = None
            # With a basis the animation keeps its coefficients; without one, the hidden vectors that W_out reads.
            basis = self.motion_basis
            width = self.head.in_features if basis is None else basis.shape[1]
            coefficients = np.empty((frames, width), dtype=np.float32)
            pieces = self._features(samples, frames)
            while True:
                begun = clock()
                piece = next(pieces, None)
                seconds["encode"] += clock() - begun
                if piece is None:
                    break
                start, features = piece
                begun = clock()
                hidden, state = self.roll(features, style, state, None, program)
                made = (hidden if basis is None else self.head(hidden))[0]
                coefficients[start : start + len(made)] = made.float().cpu().numpy()
                seconds["decode"] += clock() - begun
                progress((start + len(made)) / frames)
        finally:
            self.train(was_training)
        animation = Animation(
            coefficients=coefficients,
            basis=(self.head.weight if basis is None else basis).float().cpu().numpy(),
            offset=self.head.bias.float().cpu().numpy() if basis is None else None,
            template=template.float().cpu().numpy(),
            faces=self.faces.cpu().numpy(),
            fps=rate,
            audio=(sound.samples, SAMPLING_RATE),
            regions={key: value.cpu().numpy() for key, value in self.regions.items()},
            opening_scale=float(self.opening_scale),
            subject=name,
            seconds=seconds,
            duration=sound.duration,
        )
        return animation if output_rate is None else animation.resample(output_rate)

    def _features(self, samples: Tensor, frames: int) -> Iterator[tuple[int, Tensor]]:
        """Yields (first frame, features (1, at most CHUNK_FRAMES, d)) in order, in constant memory where the encoder is
        windowed."""
        if self.config.encoder.context == "full":
            features = self.encode(samples, frames=frames)
            for start in range(0, frames, CHUNK_FRAMES):
                yield start, features[:, start : start + CHUNK_FRAMES]
        else:
            for start, hidden in self.encoder.chunks(samples[0], frames, CHUNK_FRAMES):
                yield start, self.audio_projection(hidden)

    def _identity(self, subject: str | int | None) -> tuple[str | int | None, Tensor, str]:
        """style, template (V, 3), name."""
        known = self.config.subjects
        if subject is None or subject in ("unknown", "mean"):
            return subject, self.templates.mean(0), subject or "unknown"
        if isinstance(subject, str) and subject not in known and subject.isdigit():
            subject = int(subject)
        if isinstance(subject, int):
            if not 0 <= subject < len(known):
                raise ValueError(f"subject must be below {len(known)}, the number of identities, got {subject}")
            return subject, self.templates[subject], known[subject]
        index = self.subject_index(subject)
        return index, self.templates[index], subject

    # Files

    def save_pretrained(self, folder: str | os.PathLike, dtype: torch.dtype | None = None) -> None:
        """Write config.json and model.safetensors, each by an atomic rename. dtype: of the floating-point tensors, such
        as torch.float16 (templates stay float32); as they are by default."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for name, value in self.state_dict().items():
            if dtype is not None and value.is_floating_point() and name not in KEEP_FLOAT32:
                value = value.to(dtype)
            tensors[name] = value.detach().cpu().contiguous().clone()  # clone: safetensors refuses shared memory
        partial = folder / f".{WEIGHTS_FILE}.{os.getpid()}"
        try:
            save_file(tensors, partial, metadata={"format": "pt"})
            os.replace(partial, folder / WEIGHTS_FILE)
            partial.write_text(json.dumps(self.config.to_dict(), indent=1) + "\n")
            os.replace(partial, folder / CONFIG_FILE)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike | None = None, device: torch.device | str | None = None) -> Self:
        """Load a folder with config.json and model.safetensors, or a hub id; the bundled demo by default. The model
        comes in evaluation mode, in float32. `TalkingFace.from_pretrained` takes a checkpoint of any model.

        Raises CheckpointError, one line: no such folder, a missing file or tensor, a wrong shape, an unreadable file,
        a checkpoint of another model.
        """
        folder = BUNDLED if source is None else _folder(source)
        kind, config = _read_config(folder)
        if not issubclass(kind, cls):
            raise CheckpointError(f"{folder}: a checkpoint of {kind.__name__}, not of {cls.__name__}")
        tensors = _read_tensors(folder)
        model = kind(config)
        _fit(model, tensors, folder / WEIGHTS_FILE)
        model.load_state_dict(tensors)
        model.eval()
        return model if device is None else model.to(device)


class WholeClip(TalkingFace):
    """A model that makes all frames of a clip together: nothing goes from one call to the next."""

    def move(self, features: Tensor, style: Tensor | str | int | None, lengths: Tensor | None) -> Tensor:
        """The hidden vectors of `roll`."""
        raise NotImplementedError

    @torch.no_grad()
    def roll(
        self,
        features: Tensor,
        style: Tensor | str | int | None = None,
        state: None = None,
        lengths: Tensor | None = None,
        program: None = None,
    ) -> tuple[Tensor, None]:
        return self.move(features, style, lengths), None

    def _features(self, samples: Tensor, frames: int) -> Iterator[tuple[int, Tensor]]:
        yield 0, self.encode(samples, frames=frames)


def periodic_encoding(period: int, width: int) -> Tensor:
    """(period, width): sinusoids over one period; frame t takes row t % period (FaceFormer's)."""
    position = torch.arange(period, dtype=torch.float64)[:, None]
    frequency = torch.exp(torch.arange(0, width, 2, dtype=torch.float64) * (-math.log(10000.0) / width))
    encoding = torch.zeros(period, width, dtype=torch.float64)
    encoding[:, 0::2] = torch.sin(position * frequency)
    encoding[:, 1::2] = torch.cos(position * frequency)[:, : width // 2]
    return encoding.float()


def shift(motion: Tensor) -> Tensor:
    """(batch, frames, d) -> what each frame is fed with: the motion of the frame before, zero at first."""
    return torch.cat([torch.zeros_like(motion[:, :1]), motion[:, :-1]], dim=1)


def _folder(source: str | os.PathLike) -> Path:
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{folder}: a file; a checkpoint is a folder with {CONFIG_FILE} and {WEIGHTS_FILE}")
    name = os.fspath(source)
    local = name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith("/") or folder.parent.is_dir()
    if local:
        raise CheckpointError(f"{name}: no such folder")
    try:  # owner/name may be a hub id
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE]))
    except Exception as error:  # the hub's errors are many; for the user they are one
        raise CheckpointError(
            f"{name}: no such folder, and the hub has no such model that can be reached ({type(error).__name__})"
        ) from error


def _read_config(folder: Path) -> tuple[type[TalkingFace], TalkingFaceConfig]:
    path = folder / CONFIG_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from None
    try:
        # Checkpoints from before there were other models do not say what they are.
        kind = model_class(values.get("model", "jambatalk") if isinstance(values, dict) else "jambatalk")
        return kind, kind.config_class.from_dict(values)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / WEIGHTS_FILE
    try:
        with open(path, "rb") as file:
            head = file.read(9)
    except FileNotFoundError:
        pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.pkl") for p in folder.glob(pattern))
        hint = f"; {pickles[0]} is a pickle, and pickles are not loaded (they can run code)" if pickles else ""
        raise CheckpointError(f"{path}: missing{hint}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    if head[:2] == b"PK" or head[:1] == b"\x80":  # torch.save writes a zip, older ones and pickle.dump start with PROTO
        if head[8:] != b"{":  # a safetensors header is JSON after eight bytes of length
            raise CheckpointError(f"{path}: a pickle in place of safetensors; they are not loaded (they can run code)")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file: {str(error).splitlines()[0]}") from None


def _fit(model: TalkingFace, tensors: dict[str, Tensor], path: Path) -> None:
    """Check names and shapes, give the model the buffers whose size is the checkpoint's own, and turn half precision
    into the model's."""
    if "faces" in tensors and tensors["faces"].dim() == 2 and tensors["faces"].shape[1] == 3:
        model.faces = torch.zeros_like(tensors["faces"])
    for name, value in tensors.items():
        if name.startswith("region_"):
            model.register_buffer(name, torch.zeros_like(value))
    expected = model.state_dict()
    missing = sorted(set(expected) - set(tensors))
    if missing:
        raise CheckpointError(f"{path}: {_count(missing, 'tensor')} missing, the first is {missing[0]}")
    surplus = sorted(set(tensors) - set(expected))
    if surplus:
        raise CheckpointError(
            f"{path}: {_count(surplus, 'tensor')} that the configuration has no place for, the first is {surplus[0]}"
        )
    for name, want in expected.items():
        if tensors[name].shape != want.shape:
            raise CheckpointError(
                f"{path}: {name} has shape {tuple(tensors[name].shape)}, the configuration needs {tuple(want.shape)}"
            )
        if want.is_floating_point() != tensors[name].is_floating_point():
            raise CheckpointError(f"{path}: {name} is {tensors[name].dtype}, the configuration needs {want.dtype}")
        tensors[name] = tensors[name].to(want.dtype)
    faces, vertices = tensors["faces"], model.config.vertices
    if faces.numel() and not (0 <= int(faces.min()) and int(faces.max()) < vertices):
        raise CheckpointError(f"{path}: faces name vertices beyond the {vertices} there are")


def _count(names: list[str], noun: str) -> str:
    return f"{len(names)} {noun}{'s' * (len(names) != 1)}"
