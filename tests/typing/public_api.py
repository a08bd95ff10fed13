# mypy: disallow-untyped-calls, disallow-any-unimported
"""What a user's type checker sees of the public functions. `make lint` checks it with mypy; nothing runs it."""

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import assert_type

import numpy as np
import torch
from torch import Tensor

import jambatalk_kernels as kernels
from jambatalk import audio, export
from jambatalk.animation import Animation
from jambatalk.audio import Audio
from jambatalk.config import JambaTalkConfig
from jambatalk.data.vocaset import Clip, Corpus
from jambatalk.model import JambaTalk
from jambatalk.talking_face import TalkingFace
from jambatalk_kernels import KVCache, Routing, compat
from jambatalk_kernels.rollout.program import Program, RolloutState


def ops(x: Tensor, flag: bool) -> None:
    assert_type(kernels.selective_scan(x, x, x, x, x), Tensor)
    assert_type(kernels.selective_scan(x, x, x, x, x, return_final_state=False), Tensor)
    assert_type(kernels.selective_scan(x, x, x, x, x, x, z=x, return_final_state=True), tuple[Tensor, Tensor])
    assert_type(kernels.selective_scan(x, x, x, x, x, return_final_state=flag), Tensor | tuple[Tensor, Tensor])
    assert_type(kernels.selective_scan_step(x, x, x, x, x, x, backend="cpu"), Tensor)
    assert_type(kernels.causal_conv1d(x, x, activation="silu"), Tensor)
    assert_type(kernels.causal_conv1d(x, x, x, return_final_state=True), tuple[Tensor, Tensor])
    assert_type(kernels.causal_conv1d(x, x, return_final_state=flag), Tensor | tuple[Tensor, Tensor])
    assert_type(kernels.causal_conv1d_step(x, x, x), Tensor)
    routing = kernels.moe_route(x, 2)
    assert_type(routing, Routing)
    assert_type(routing.experts, Tensor)
    assert_type(kernels.moe_mlp(x, routing, x, x, activation="gelu"), Tensor)
    assert_type(kernels.load_balancing_loss([routing, routing]), Tensor)
    cos, sin = kernels.rotary_table(x, 64)
    cache = KVCache.empty(1, 600, 1, 64, dtype=torch.bfloat16)
    assert_type(cache, KVCache)
    assert_type(kernels.rope_attention(x, x, x, cos, sin, window=300, cache=cache), Tensor)
    assert_type(kernels.rope_attention_step(x, x, x, cos, sin, cache), Tensor)
    assert_type(kernels.native_library(), tuple[bool, str])
    with kernels.use_backend("cpu", "reference"):
        pass


def drop_in(x: Tensor, flag: bool) -> None:
    assert_type(compat.selective_scan_fn(x, x, x, x, x, x, None, x, True), Tensor)
    assert_type(compat.selective_scan_fn(x, x, x, x, x, return_last_state=True), tuple[Tensor, Tensor])
    assert_type(compat.selective_scan_fn(x, x, x, x, x, return_last_state=flag), Tensor | tuple[Tensor, Tensor])
    assert_type(compat.causal_conv1d_fn(x, x, activation="silu"), Tensor)
    assert_type(compat.causal_conv1d_fn(x, x, return_final_states=True), tuple[Tensor, Tensor])
    assert_type(compat.causal_conv1d_update(x, x, x), Tensor)
    assert_type(compat.install(), tuple[str, ...])


def loop(program: Program, inputs: Tensor) -> None:
    hidden, state = kernels.rollout(program, inputs, weights_dtype=torch.bfloat16)
    assert_type(hidden, Tensor)
    assert_type(state, RolloutState)
    state.save(Path("state.safetensors"))
    assert_type(RolloutState.load("state.safetensors"), RolloutState)


def speak(samples: np.ndarray) -> None:
    model = JambaTalk.from_pretrained()
    assert_type(model, JambaTalk)
    assert_type(TalkingFace.from_pretrained("folder", device="cpu"), TalkingFace)
    assert_type(model.config, JambaTalkConfig)
    assert_type(JambaTalkConfig.from_preset("demo", subjects=["a"]), JambaTalkConfig)
    assert_type(model.encode(torch.zeros(1, 16000)), Tensor)
    assert_type(model.decode(torch.zeros(1, 30, 512), torch.zeros(1, 30, 64)), tuple[Tensor, list[Routing]])
    assert_type(audio.load("speech.wav"), Audio)
    animation = model.animate(samples, 44100, subject="mean", fps="30000/1001")
    assert_type(animation, Animation)
    assert_type(model.animate(Path("speech.wav")), Animation)
    assert_type(model.animate(torch.zeros(16000), progress=print), Animation)
    assert_type(animation.vertices, np.ndarray)
    assert_type(animation.iter_vertices(64), Iterator[np.ndarray])
    assert_type(animation.fps, Fraction)
    assert_type(animation.duration, Fraction)
    assert_type(animation.resample(25), Animation)
    assert_type(export.write(animation, "face.html"), Path)
    Animation(animation.coefficients, animation.basis, animation.template, animation.faces, fps=30)


def learn(folder: Path) -> None:
    corpus = Corpus(folder, skip_bad=True)
    assert_type(corpus.clips("train"), list[Clip])
    assert_type(corpus.faces, np.ndarray | None)
