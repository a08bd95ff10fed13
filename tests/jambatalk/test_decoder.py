"""The decoder: causality, state at any split, padding, the arrangements, initial values."""

import pytest
import torch
from torch.nn.functional import softplus

from jambatalk.config import JambaTalkConfig
from jambatalk.decoder import Decoder, MambaMixer

SMALL = dict(d_model=16, heads=4, kv_heads=2, hidden=12, states=4, dt_rank=2)


def make(**options):
    torch.manual_seed(0)
    return Decoder(JambaTalkConfig(**(SMALL | options))).double()


def inputs(batch=2, length=10):
    return torch.randn(batch, length, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize(
    "arrangement, letters", [("moe-moe", "EMETEME"), ("m-moe", "MEMTEME"), ("m-m", "MEMTMEM"), ("moe-m", "EMETMEM")]
)
def test_arrangements(arrangement, letters):
    decoder = make(arrangement=arrangement)
    kinds = [
        "T" if type(layer.mixer).__name__ == "Attention" else "E" if type(layer.mlp).__name__ == "Experts" else "M"
        for layer in decoder.layers
    ]
    assert "".join(kinds) == letters
    _, routings, _ = decoder(inputs())
    assert len(routings) == letters.count("E")
    assert all(routing.weights.shape == (20, 2) for routing in routings)


@pytest.mark.parametrize("window", [None, 3])
def test_causal(window):
    decoder = make(attention_window=window)
    x = inputs()
    changed = x.clone()
    changed[:, 6:] += 1
    before, after = decoder(x)[0], decoder(changed)[0]
    torch.testing.assert_close(after[:, :6], before[:, :6], rtol=0, atol=1e-12)
    assert (after[:, 6:] - before[:, 6:]).abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("splits", [[1] * 10, [10], [4, 6], [9, 1], [2, 5, 3]])
def test_any_split_equals_the_whole(window, splits):
    decoder = make(attention_window=window)
    x = inputs()
    whole = decoder(x)[0]
    state, start = decoder.new_state(2), 0
    for size in splits:
        before = [t.clone() for t in state.tensors()]
        given = state
        hidden, _, state = decoder(x[:, start : start + size], state=state)
        torch.testing.assert_close(hidden, whole[:, start : start + size], rtol=1e-9, atol=1e-9)
        assert all(torch.equal(a, b) for a, b in zip(before, given.tensors(), strict=True))  # the given state is kept
        start += size
    assert state.position.tolist() == [10, 10]


def test_state_gradients_reach_earlier_chunks_through_the_scan():
    decoder = make()
    x = inputs().requires_grad_()
    _, _, state = decoder(x[:, :5], state=decoder.new_state(2))
    hidden, _, _ = decoder(x[:, 5:], state=state)
    (gradient,) = torch.autograd.grad(hidden.sum(), x)
    assert gradient[:, :5].abs().max() > 0


def test_padding_is_invisible_and_not_routed():
    decoder = make()
    x = inputs()
    valid = torch.ones(2, 10, dtype=torch.bool)
    valid[1, 6:] = False
    loud = x.clone()
    loud[1, 6:] = 100
    hidden, routings, _ = decoder(loud, valid)
    alone, alone_routings, _ = decoder(x[1:, :6])
    torch.testing.assert_close(hidden[1, :6], alone[0], rtol=1e-9, atol=1e-9)
    assert not hidden[1, 6:].any()
    torch.testing.assert_close(routings[-1].probabilities[10:], alone_routings[-1].probabilities, rtol=1e-9, atol=1e-9)
    assert routings[0].weights.shape[0] == 16


def test_padding_and_a_state_exclude_each_other():
    decoder = make()
    with pytest.raises(ValueError, match="valid and state"):
        decoder(inputs(), torch.ones(2, 10, dtype=torch.bool), decoder.new_state(2))


def test_the_window_forgets():
    """Without Mamba's memory the attention layer would see nothing beyond its window: the layer alone is tested."""
    decoder = make(attention_window=3)
    attention = decoder.layers[3].mixer
    x = inputs()
    changed = x.clone()
    changed[:, 0] += 1
    difference = (attention(changed) - attention(x)).abs().amax(-1)
    assert difference[:, :3].min() > 1e-4 and difference[:, 3:].max() < 1e-12


def test_initial_values_are_mambas():
    torch.manual_seed(0)
    mixer = MambaMixer(JambaTalkConfig())
    torch.testing.assert_close(mixer.A, -torch.arange(1.0, 17).expand(1024, 16))
    dt = softplus(mixer.dt_proj.bias)
    assert 0.9e-3 < dt.min() < 1.5e-3 and 0.06 < dt.max() < 0.11
    assert 0.005 < dt.log().mean().exp() < 0.02  # log-uniform: the geometric mean is 1e-2
    assert mixer.dt_proj.weight.abs().max() <= 32**-0.5


def test_gradients_reach_every_parameter():
    decoder = make()
    decoder(inputs(batch=3))[0].square().sum().backward()
    silent = [name for name, p in decoder.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not silent
