"""python -m jambatalk.infer [AUDIO ...] -o OUT: speech in, a talking face out.

Nothing heavy is imported before the arguments, the outputs and the audio have been checked: a mistake costs a fraction
of a second, and `--help` less.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import torch

    from jambatalk.audio import Audio
    from jambatalk.talking_face import TalkingFace

DEMO_CLIP = Path(__file__).with_name("assets") / "demo.wav"
OK, BAD_INPUT, INTERRUPTED = 0, 2, 130


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:  # argparse would print the usage, too: ten lines where one will do
        self.exit(BAD_INPUT, f"jambatalk: error: {message} (--help shows how)\n")


def parser() -> argparse.ArgumentParser:
    p = _Parser(
        prog="python -m jambatalk.infer",
        description="Turns speech into a talking 3D face. Without AUDIO it speaks the bundled clip.",
        epilog="exit code: 0 done; 2 bad input, one line on stderr says what; 130 interrupted",
    )
    p.add_argument(
        "audio", nargs="*", type=Path, metavar="AUDIO", help="wav, flac, ogg, mp3, ...; any rate, any channels"
    )
    p.add_argument(
        "-o",
        "--output",
        metavar="OUT",
        help="file to write, its extension names the format: .html (a page to open, with sound), .npz (vertices, "
        "faces, template, fps) or .npy (vertices). Of several AUDIO: a pattern such as 'faces/{stem}.npz', or a folder "
        "for .html (existing, or ending in / and then made). Default: {stem}.html in the current folder",
    )
    p.add_argument("--model", metavar="DIR", help="checkpoint folder or hub id (default: the bundled demo)")
    p.add_argument(
        "--subject",
        metavar="NAME",
        help="whose face and speaking style: a training identity, by name or number, 'mean' or 'unknown' (default)",
    )
    p.add_argument(
        "--fps", metavar="N", help="frames per second of the output, such as 25 or 30000/1001 (default: the model's)"
    )
    p.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: cpu)")
    p.add_argument(
        "--backend",
        choices=("cpu", "reference", "triton", "cuda"),
        help="kernels to run on; ops without them use the reference (default: the fastest there is)",
    )
    p.add_argument(
        "--weights",
        choices=("float32", "bfloat16"),
        default="float32",
        help="how the decoder's loop keeps its matrices: bfloat16 is faster where they are large, and rounds them to 8 "
        "bits (default: float32)",
    )
    p.add_argument(
        "--seed", type=int, default=0, help="of the noise that FaceDiffuser starts from; others draw none (default: 0)"
    )
    p.add_argument("--json", action="store_true", help="print one JSON line a file instead of its path")
    p.add_argument("--quiet", action="store_true", help="no progress bar and no summary")
    return p


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns the exit code. Prints the path of each file written, or a line of JSON, on stdout."""
    arguments = parser().parse_args(argv)
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        print("jambatalk: interrupted", file=sys.stderr)
        return INTERRUPTED
    except MemoryError:
        return _fail("out of memory")


class _Mistake(ValueError):
    """Something about the command line that cannot be. The message is one line."""


def _run(arguments: argparse.Namespace) -> int:
    from jambatalk.audio import AudioError
    from jambatalk.export import ExportError

    try:
        jobs = _plan(arguments)
    except (_Mistake, AudioError, ExportError) as error:
        return _fail(error)

    model, program, code = None, None, OK
    for source, output in jobs:
        try:
            audio, seconds = _read(source, output, arguments)
        except (AudioError, ExportError) as error:
            code = _fail(error)  # the other files are still worth doing
            continue
        if model is None:
            from jambatalk.config import ConfigError
            from jambatalk.talking_face import CheckpointError
            from jambatalk_kernels.backends import BackendUnavailable

            try:
                model = _load_model(arguments)
                program = model.program()
            except (_Mistake, CheckpointError, ConfigError, BackendUnavailable, OSError) as error:
                return _fail(error)
        try:
            result = _animate(model, program, audio, source, output, seconds, arguments)
        except (AudioError, ExportError, BackendUnavailable) as error:
            code = _fail(error)
            continue
        print(json.dumps(result) if arguments.json else output, flush=True)
    return code


def _plan(arguments: argparse.Namespace) -> list[tuple[Path, Path]]:
    """(input, output) of every file, after everything that can be refused before decoding has been."""
    from jambatalk import audio, export

    if arguments.fps is not None:
        audio.exact_fps(arguments.fps)
    sources = arguments.audio or [DEMO_CLIP]
    outputs = [_output(source, arguments.output, len(sources)) for source in sources]
    for source in sources:
        audio.check_file(source)
    if arguments.output and arguments.output.endswith(("/", os.sep)):
        try:
            Path(arguments.output).mkdir(exist_ok=True)
        except OSError as error:
            raise _Mistake(f"cannot make the folder {arguments.output}: {error.strerror}") from None
    taken: dict[Path, Path] = {}
    for source, output in zip(sources, outputs, strict=True):
        export.check(output)
        real = Path(os.path.realpath(output))
        if real in taken:
            raise _Mistake(f"{taken[real]} and {source} would both be written to {output}")
        if any(real == Path(os.path.realpath(other)) for other in sources):
            raise _Mistake(f"{output} is an input, and would be overwritten")
        taken[real] = source
    return list(zip(sources, outputs, strict=True))


def _output(source: Path, wish: str | None, count: int) -> Path:
    if wish is None:
        return Path(f"{source.stem}.html")
    if "{stem}" in wish:
        return Path(wish.replace("{stem}", source.stem))
    if wish.endswith(("/", os.sep)) or os.path.isdir(wish):
        return Path(wish) / f"{source.stem}.html"
    if count > 1:
        raise _Mistake(
            f"-o {wish} is one file for {count} inputs: give a folder ({wish}/) or a pattern ('{{stem}}.npz')"
        )
    return Path(wish)


def _read(source: Path, output: Path, arguments: argparse.Namespace) -> tuple[Audio, dict[str, float]]:
    from jambatalk import export
    from jambatalk.audio import frames_for, load

    start = time.perf_counter()
    audio = load(source)
    seconds = {"read": time.perf_counter() - start}
    export.check(output, audio.duration)
    if arguments.fps is not None:
        frames_for(audio.duration, arguments.fps)
    return audio, seconds


def _load_model(arguments: argparse.Namespace) -> TalkingFace:
    import torch

    from jambatalk.model import JambaTalk
    from jambatalk.talking_face import TalkingFace

    try:
        device = torch.device(arguments.device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise _Mistake(f"--device {arguments.device} cannot be used: {_first_line(error)}") from None
    if arguments.backend is not None:
        _check_backend(arguments.backend, device)
    model = TalkingFace.from_pretrained(arguments.model, device=device)
    model.seed = arguments.seed
    if isinstance(model, JambaTalk):
        model.weights_dtype = getattr(torch, arguments.weights)
    elif arguments.weights != "float32":
        raise _Mistake(f"--weights {arguments.weights}: {arguments.model} is a {model.config.model}, without that loop")
    names = [*model.config.subjects, "mean", "unknown", *map(str, range(len(model.config.subjects)))]
    if arguments.subject is not None and arguments.subject not in names:
        known = [*model.config.subjects, "mean", "unknown"]
        raise _Mistake(f"--subject {arguments.subject} is not one of {', '.join(known)}")
    return model


def _check_backend(backend: str, device: torch.device) -> None:
    """Runs the smallest scan on the backend. Raises BackendUnavailable with the reason if it cannot."""
    import torch

    from jambatalk_kernels import selective_scan

    x, state = torch.zeros(1, 1, 1, device=device), torch.zeros(1, 1, device=device)
    selective_scan(x, x, state, x, x, backend=backend)


def _animate(
    model: TalkingFace,
    program: Any,
    audio: Audio,
    source: Path,
    output: Path,
    seconds: dict[str, float],
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """Runs the model on one file, writes the output, and returns the line of JSON."""
    from tqdm import tqdm

    from jambatalk.audio import frames_for
    from jambatalk.export import write
    from jambatalk_kernels.backends import use_backend

    frames = frames_for(audio.duration, model.config.frame_rate)
    with tqdm(
        total=frames, desc=source.name, unit="frame", leave=False, disable=True if arguments.quiet else None
    ) as bar:

        def progress(share: float) -> None:
            bar.update(round(share * bar.total) - bar.n)

        with use_backend(arguments.backend, "reference") if arguments.backend else nullcontext():
            animation = model.animate(
                audio, subject=arguments.subject, fps=arguments.fps, progress=progress, program=program
            )
    seconds = {**seconds, **{name: animation.seconds.get(name, 0.0) for name in ("encode", "decode")}}
    before, start = animation.seconds.get("vertices", 0.0), time.perf_counter()
    write(animation, output)
    seconds["vertices"] = animation.seconds.get("vertices", 0.0) - before
    seconds["write"] = time.perf_counter() - start - seconds["vertices"]
    if not arguments.quiet:
        print(
            f"{source.name}: {float(audio.duration):.2f} s of audio, {animation.frames} frames "
            f"at {float(animation.fps):g} fps, in {sum(seconds.values()):.2f} s",
            file=sys.stderr,
        )
    fps = animation.fps
    return {
        "input": str(source),
        "output": str(output),
        "frames": animation.frames,
        "fps": fps.numerator if fps.denominator == 1 else float(fps),
        "audio_seconds": float(audio.duration),
        "seconds": {name: round(value, 6) for name, value in seconds.items()},
    }


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _fail(error: object) -> int:
    print(f"jambatalk: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    return BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
