"""python -m jambatalk.train DATA: train JambaTalk, or a baseline, on a corpus in the VOCASET layout.

Several processes or machines share each batch: `accelerate launch -m jambatalk.train DATA ...`, or `torchrun -m` so;
without either there is one process.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from pathlib import Path

from jambatalk.config import MODELS
from jambatalk.data.vocaset import add_arguments


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m jambatalk.train",
        description="Train JambaTalk, or a baseline, on a corpus in the VOCASET layout (as released, as FaceFormer "
        "prepares it, or by jambatalk.synthesize) or on BIWI. The run folder ends with config.json and "
        "model.safetensors, which jambatalk.infer takes as --model; log.jsonl and TensorBoard's events are written as "
        "it goes.",
    )
    p.add_argument("data", type=Path, metavar="DATA", help="folder of the corpus")
    p.add_argument("--model", choices=MODELS, default="jambatalk", help="what to train (default: jambatalk)")
    p.add_argument(
        "--preset", choices=("vocaset", "biwi", "demo"), default="vocaset", help="model size (default: vocaset)"
    )
    p.add_argument("--config", type=Path, metavar="FILE", help="JSON with values that replace the preset's")
    p.add_argument("--out", type=Path, default=Path("runs/jambatalk"), help="run folder (default: runs/jambatalk)")
    p.add_argument(
        "--resume",
        action="store_true",
        help="go on from the newest checkpoint in the run folder, with the options it was started with unless given",
    )
    p.add_argument("--encoder", metavar="PATH_OR_ID", help="a Wav2Vec 2.0 checkpoint to start the audio encoder from")
    p.add_argument("--init", metavar="DIR", help="a checkpoint of the same model to start from (default: from scratch)")
    p.add_argument("--arrangement", choices=("moe-moe", "m-moe", "m-m", "moe-m"), help="order of JambaTalk's layers")
    p.add_argument("--epochs", type=int, help="times every clip is seen (default: 200; demo: 2400 steps)")
    p.add_argument("--steps", type=int, help="optimisation steps in all, instead of epochs")
    p.add_argument("--batch", type=int, help="clips a step (default: 4; demo: 8)")
    p.add_argument("--learning-rate", type=float, help="of Adam (default: 1e-4; demo: 1.5e-3)")
    p.add_argument("--clip-norm", type=float, help="largest norm of the gradient (default: 1)")
    p.add_argument("--ema", type=float, help="decay of a moving average of the weights, which is what is kept then")
    p.add_argument(
        "--precision",
        choices=("float32", "bf16"),
        help="bf16: autocast, where PyTorch has bfloat16 products for the device (default: float32)",
    )
    p.add_argument("--seed", type=int)
    p.add_argument("--save-every", type=int, metavar="N", help="steps between checkpoints (default: 500)")
    p.add_argument("--keep", type=int, metavar="N", help="checkpoints that stay (default: 3)")
    p.add_argument("--validate-every", type=int, metavar="N", help="steps between validations (default: 500)")
    p.add_argument("--device", choices=("auto", "cpu"), default="auto", help="auto: a GPU where there is one")
    p.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    p.add_argument(
        "--overfit-one-batch", action="store_true", help="train on the first batch only, to see that it can learn"
    )
    add_arguments(p)
    return p


POSITIVE = ("epochs", "steps", "batch", "save_every", "keep", "validate_every", "threads", "data_fps", "clip_norm")
OPTIONS = (
    *("epochs", "steps", "batch", "learning_rate", "clip_norm", "ema", "precision", "seed"),
    *("save_every", "keep", "validate_every"),
)


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    for name in POSITIVE:
        value = getattr(args, name)
        if value is not None and not value >= (1 if isinstance(value, int) else 1e-30):
            return _fail(f"--{name.replace('_', '-')} must be {'at least 1' if isinstance(value, int) else 'positive'}"
                         f", not {value}")  # fmt: skip
    if args.learning_rate is not None and not args.learning_rate > 0:
        return _fail(f"--learning-rate must be positive, not {args.learning_rate}")
    if args.ema is not None and not 0 <= args.ema < 1:
        return _fail(f"--ema must be at least 0 and below 1, not {args.ema}")
    if args.seed is not None and args.seed < 0:
        return _fail(f"--seed must not be negative, is {args.seed}")
    if args.arrangement and args.model != "jambatalk":
        return _fail(f"--arrangement is of jambatalk, not of {args.model}")
    if (args.out / "checkpoints").exists() and not args.resume:
        return _fail(f"{args.out} holds a run already: --resume goes on with it, or choose another --out")

    import torch
    from tqdm import tqdm

    from jambatalk.data.vocaset import Corpus
    from jambatalk.talking_face import model_class
    from jambatalk.training import Trainer, TrainingOptions, multiplies_bfloat16, newest_checkpoint

    if args.threads:
        torch.set_num_threads(args.threads)
    main_process = os.environ.get("RANK", "0") == "0"
    given = {name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None}
    if args.overfit_one_batch:
        given["overfit_one_batch"] = True
    try:
        corpus = Corpus(args.data, units=args.units, fps=args.data_fps, skip_bad=args.skip_bad)
        checkpoint = newest_checkpoint(args.out) if args.resume else None
        overrides = read_overrides(args.config)
        if args.arrangement:
            overrides["arrangement"] = args.arrangement
        config = model_class(args.model).config_class.from_preset(args.preset, **overrides)
        if checkpoint is None:
            options = TrainingOptions.for_preset(args.preset, **given)
        else:
            options = TrainingOptions.of_checkpoint(checkpoint, **given)
        args.out.mkdir(parents=True, exist_ok=True)
        trainer = Trainer(config, options, corpus, args.out, args.encoder, args.init, checkpoint, args.device)
    except (ValueError, OSError) as error:
        return _fail(str(error).splitlines()[0])
    if options.precision == "bf16" and not multiplies_bfloat16(trainer.device):
        options.precision = "float32"
        if main_process:
            print("PyTorch has no bfloat16 products for this device: training in float32", file=sys.stderr)
    if main_process:
        if importlib.util.find_spec("tensorboard") is None:
            print("tensorboard is not installed (extra `train`): figures go to log.jsonl alone", file=sys.stderr)
        if checkpoint is not None:
            print(f"resumed at step {trainer.step}", file=sys.stderr)
        if corpus.missing:
            print(f"{len(corpus.missing)} sequences have no data and are left out", file=sys.stderr)
        for why in corpus.bad:
            print(f"skipped: {why}", file=sys.stderr)
        if corpus.bad:
            print(f"{len(corpus.bad)} bad clips or subjects are left out", file=sys.stderr)
        if trainer.outside is not None:
            rank = trainer.model.config.motion_rank
            print(f"motion basis: rank {rank}, {trainer.outside:.2e} of the motion outside", file=sys.stderr)

    with tqdm(total=options.steps, initial=trainer.step, unit="step", disable=None if main_process else True) as bar:

        def report(step: int, values: dict[str, float]) -> None:
            text = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
            if "error_mm" in values:
                bar.write(f"step {step}: {text}", file=sys.stderr)
            else:
                bar.update(step - bar.n)
                bar.set_postfix_str(text)

        try:
            out = trainer.run(report)
        except FloatingPointError as error:
            return _fail(str(error))
        except KeyboardInterrupt:
            print(f"stopped at step {trainer.step}: --resume goes on from the last checkpoint", file=sys.stderr)
            return 130
    trainer.close()
    if main_process:
        print(out / "model.safetensors")
    return 0


def read_overrides(path: Path | None) -> dict:
    """The configuration in a JSON file, {} without one. Errors: ValueError, one line."""
    if path is None:
        return {}
    try:
        values = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


def _fail(message: str) -> int:
    print(f"jambatalk: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
