"""python -m jambatalk.train DATA: train JambaTalk on a corpus in the VOCASET layout."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m jambatalk.train",
        description="Train JambaTalk on a corpus in the VOCASET layout (as released, or by jambatalk.synthesize). "
        "The run folder ends with config.json and model.safetensors, which jambatalk.infer takes as --model.",
    )
    p.add_argument("data", type=Path, metavar="DATA", help="folder of the corpus")
    p.add_argument(
        "--preset", choices=("vocaset", "biwi", "demo"), default="vocaset", help="model size (default: vocaset)"
    )
    p.add_argument("--out", type=Path, default=Path("runs/jambatalk"), help="run folder (default: runs/jambatalk)")
    p.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in the run folder")
    p.add_argument("--encoder", metavar="PATH_OR_ID", help="a Wav2Vec 2.0 checkpoint to start the audio encoder from")
    p.add_argument("--init", metavar="DIR", help="a JambaTalk checkpoint to start from (default: from scratch)")
    p.add_argument("--arrangement", choices=("moe-moe", "m-moe", "m-m", "moe-m"), help="order of the decoder's layers")
    p.add_argument("--steps", type=int, help="optimisation steps in all")
    p.add_argument("--batch", type=int, help="clips a step")
    p.add_argument("--learning-rate", type=float)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--save-every", type=int, metavar="N", help="steps between checkpoints")
    p.add_argument("--validate-every", type=int, metavar="N", help="steps between validations")
    p.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    p.add_argument(
        "--overfit-one-batch", action="store_true", help="train on the first batch only, to see that it can learn"
    )
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    for name in ("steps", "batch", "save_every", "validate_every", "threads"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            return _fail(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    if args.learning_rate is not None and not args.learning_rate > 0:
        return _fail(f"--learning-rate must be positive, not {args.learning_rate}")
    if (args.out / "checkpoints").exists() and not args.resume:
        return _fail(f"{args.out} holds a run already: --resume goes on with it, or choose another --out")

    import torch
    from tqdm import tqdm

    from jambatalk.config import JambaTalkConfig
    from jambatalk.data.vocaset import Corpus
    from jambatalk.training import Trainer, TrainingOptions

    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        corpus = Corpus(args.data)
        overrides = {"arrangement": args.arrangement} if args.arrangement else {}
        config = JambaTalkConfig.from_preset(args.preset, **overrides)
        names = ("steps", "batch", "learning_rate", "seed", "save_every", "validate_every", "overfit_one_batch")
        given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
        options = TrainingOptions.for_preset(args.preset, **given)
        args.out.mkdir(parents=True, exist_ok=True)
        trainer = Trainer(config, options, corpus, args.out, args.encoder, args.init)
        if args.resume and trainer.resume():
            print(f"resumed at step {trainer.step}", file=sys.stderr)
    except (ValueError, OSError) as error:
        return _fail(str(error).splitlines()[0])
    if corpus.missing:
        print(f"{len(corpus.missing)} sequences have no data and are left out", file=sys.stderr)
    if trainer.outside is not None:
        print(f"motion basis: rank {config.motion_rank}, {trainer.outside:.2e} of the motion outside", file=sys.stderr)

    with tqdm(total=options.steps, initial=trainer.step, unit="step", disable=None) as bar:

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
    print(out / "model.safetensors")
    return 0


def _fail(message: str) -> int:
    print(f"jambatalk: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
