"""`python -m jambatalk.synthesize OUT`: make a synthetic corpus in the layout of the VOCASET release."""

from __future__ import annotations

import argparse
import json
import sys

DESCRIPTION = """\
Make a synthetic talking-face corpus in the layout of the VOCASET release: speech from text-to-speech engines, a face
that moves with it. Twelve identities with forty sentences each are about 7 GB. The same arguments give the same bytes.
Needs: pip install 'jambatalk[synthetic]' and Debian's flite (apt-get install flite)."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code (2: one line on stderr says what is wrong)."""
    parser = argparse.ArgumentParser(prog="python -m jambatalk.synthesize", description=DESCRIPTION)
    parser.add_argument("out", metavar="OUT", help="folder to create")
    parser.add_argument("--identities", type=int, default=12, help="people (default 12: 8 train, 2 val, 2 test)")
    parser.add_argument("--sentences", type=int, default=40, help="sentences each (default 40)")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument(
        "--recordings",
        metavar="DIR",
        help="labelled recordings (python -m jambatalk.data.synthetic."
        "recordings DIR): each speaker there is one more training identity",
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes (default 1)")
    parser.add_argument("--json", action="store_true", help="print the measures as one JSON line")
    options = parser.parse_args(arguments)
    try:
        if options.seed < 0 or options.jobs < 1:
            raise ValueError("--seed must be 0 or more and --jobs 1 or more")
        from jambatalk.data.synthetic.corpus import write_corpus

        manifest = write_corpus(
            options.out,
            options.identities,
            options.sentences,
            options.seed,
            options.jobs,
            progress=sys.stderr.isatty() or not options.json,
            recordings=options.recordings,
        )
    except KeyboardInterrupt:
        print("synthesize: interrupted, nothing written", file=sys.stderr)
        return 130
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        print(f"synthesize: {error}", file=sys.stderr)
        return 2
    measures = manifest["ground_truth"]
    if options.json:
        print(
            json.dumps(
                {
                    "output": options.out,
                    "clips": manifest["clips"],
                    "frames": manifest["frames"],
                    "seconds": manifest["seconds"],
                    **measures,
                }
            )
        )
    else:
        print(f"{options.out}: {manifest['clips']} clips, {manifest['seconds']:.0f} s, {manifest['frames']} frames")
        for name, value in measures.items():
            print(f"  {name:32} {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
