"""The configuration round-trips, refuses nonsense by name, and knows its own look-ahead."""

import json
from fractions import Fraction

import pytest

from jambatalk.config import ARRANGEMENTS, ConfigError, JambaTalkConfig


@pytest.mark.parametrize("preset", ["vocaset", "biwi", "demo"])
def test_round_trip_through_json(preset):
    config = JambaTalkConfig.from_preset(preset, subjects=["a", "b"], fps="30000/1001")
    assert JambaTalkConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.frame_rate == Fraction(30000, 1001)


def test_presets_are_the_design_table():
    vocaset, biwi, demo = (JambaTalkConfig.from_preset(name) for name in ("vocaset", "biwi", "demo"))
    assert [c.vertices for c in (vocaset, biwi, demo)] == [5023, 23370, 5085]
    assert [c.fps for c in (vocaset, biwi, demo)] == [30, 25, 30]
    assert [(c.d_model, c.heads, c.kv_heads) for c in (vocaset, biwi, demo)] == [(512, 8, 1), (512, 8, 1), (128, 4, 1)]
    assert [c.hidden for c in (vocaset, biwi, demo)] == [1024, 1024, 256]
    assert [c.attention_window for c in (vocaset, biwi, demo)] == [None, None, 300]
    for config in (vocaset, biwi, demo):
        assert (config.experts, config.top_k, config.states, config.conv_width, config.expand) == (4, 2, 16, 4, 2)
    assert vocaset.motion_size == 15069 and biwi.motion_size == 70110 and demo.motion_size == 64
    assert (vocaset.encoder.hidden, vocaset.encoder.layers) == (768, 12)
    assert vocaset.encoder.context == "full" and vocaset.encoder.freeze_front_end
    assert demo.encoder.context == "windowed" and not demo.encoder.freeze_front_end
    assert vocaset.time_step_rank == 32


def test_arrangements_are_the_papers():
    assert ARRANGEMENTS == {"moe-moe": "EMETEME", "m-moe": "MEMTEME", "m-m": "MEMTMEM", "moe-m": "EMETMEM"}
    assert JambaTalkConfig().arrangement == "moe-moe"


def test_lookahead_of_the_demo_is_within_the_promise():
    demo = JambaTalkConfig.from_preset("demo")
    assert 0 < demo.lookahead_ms <= 320
    assert JambaTalkConfig.from_preset("vocaset").lookahead_ms is None


def test_wav2vec2_hop_and_receptive_field():
    encoder = JambaTalkConfig().encoder
    assert (encoder.hop, encoder.receptive_field) == (320, 400)
    # 30 frames/s on 50 features/s: five features for every three frames
    assert [encoder.feature_position(t, Fraction(30)) for t in range(4)] == [0, Fraction(5, 3), Fraction(10, 3), 5]


def test_frames_are_rounded_exactly():
    config = JambaTalkConfig(fps=30)
    assert [config.frames(n) for n in (0, 266, 267, 16000, 800, 1333, 1334)] == [0, 0, 1, 30, 2, 2, 3]
    assert config.frames(16000 * 36000) == 30 * 36000


@pytest.mark.parametrize(
    "change, text",
    [
        (dict(depth=3), "depth"),
        (dict(encoder=dict(colour=1)), "encoder.colour"),
        (dict(encoder=3), "encoder"),
        (dict(arrangement="t-t"), "arrangement"),
        (dict(d_model=0), "d_model"),
        (dict(d_model="512"), "d_model"),
        (dict(heads=7), "heads"),
        (dict(kv_heads=3), "kv_heads"),
        (dict(top_k=5), "top_k"),
        (dict(attention_window=0), "attention_window"),
        (dict(motion_rank=10**6), "motion_rank"),
        (dict(fps=0), "fps"),
        (dict(fps="fast"), "fps"),
        (dict(subjects=["a", "a"]), "subjects"),
        (dict(encoder=dict(context="half")), "context"),
        (dict(encoder=dict(context="windowed")), "conv_norm"),
        (dict(encoder=dict(context="windowed", conv_norm="layer")), "odd"),
        (dict(encoder=dict(conv_dim=[1, 2])), "conv_dim"),
        (dict(encoder=dict(heads=5)), "heads"),
    ],
)
def test_nonsense_is_refused_by_name(change, text):
    with pytest.raises(ConfigError, match=text):
        JambaTalkConfig.from_dict(change)


def test_an_unknown_preset_is_refused():
    with pytest.raises(ConfigError, match="vocaset, biwi, demo"):
        JambaTalkConfig.from_preset("movie")
