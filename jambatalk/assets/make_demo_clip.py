"""Makes demo.wav, the clip that `python -m jambatalk.infer` speaks when it is given none.

    python jambatalk/assets/make_demo_clip.py [OUT.wav]        needs: pip install hibari-tts soxr soundfile

A synthetic voice (hibari-tts, Apache-2.0) says two sentences that are not in the training corpus. There is a pause, for
the mouth to rest, and many of p, b and m, for the lips to close. The same bytes every time, with the same versions of
the packages.
"""

import sys
from pathlib import Path

import numpy as np

TEXT = "Hi, I'm the Jamba Talk demo. Bring me a bit of speech, maybe a poem, and my lips will move to match it."
SEED = 0
SAMPLING_RATE = 16000
PEAK = 0.7


def make_clip() -> np.ndarray:
    """(n,) float32, 16 kHz."""
    import hibari
    import soxr

    clip = soxr.resample(np.asarray(hibari.Hibari()(TEXT, seed=SEED), np.float32), 24000, SAMPLING_RATE)
    return (clip * (PEAK / np.abs(clip).max())).astype(np.float32)


if __name__ == "__main__":
    import soundfile

    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("demo.wav")
    clip = make_clip()
    soundfile.write(path, clip, SAMPLING_RATE, subtype="PCM_16")
    print(f"{path}: {len(clip) / SAMPLING_RATE:.2f} s")
