"""The same weights in transformers' implementations give the same outputs and the same gradients."""

import pytest
import torch
from torch import nn

from jambatalk.audio_encoder import AudioEncoder, _own_names, wav2vec2_config
from jambatalk.config import AudioEncoderConfig, JambaTalkConfig
from jambatalk.decoder import Layer
from jambatalk_kernels import load_balancing_loss

OURS = dict(d_model=16, heads=4, kv_heads=2, hidden=12, states=13, dt_rank=11, experts=4, top_k=2)
TOLERANCE = dict(rtol=1e-5, atol=1e-5)


def jamba(kind):
    from transformers import JambaConfig
    from transformers.models.jamba import modeling_jamba as theirs

    config = JambaConfig(
        hidden_size=16,
        intermediate_size=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=1,
        mamba_d_state=13,  # a norm over few of them, or of the steps, may magnify roundings tenfold
        mamba_d_conv=4,
        mamba_expand=2,
        mamba_dt_rank=11,
        num_experts=4 if kind == "E" else 1,
        num_experts_per_tok=2,
        attn_layer_period=1 if kind == "T" else 2,
        attn_layer_offset=0 if kind == "T" else 1,
        expert_layer_period=1,
        expert_layer_offset=0,
        attn_implementation="eager",
    )
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    cls = theirs.JambaAttentionDecoderLayer if kind == "T" else theirs.JambaMambaDecoderLayer
    layer = cls(config, layer_idx=0)
    with torch.no_grad():
        for parameter in layer.parameters():
            # norms near one, everything else of a size that makes every term matter
            ones = parameter.dim() == 1 and bool((parameter == 1).all())
            parameter.copy_(torch.randn(parameter.shape) * (0.1 if ones else 0.4) + (1 if ones else 0))
    return layer


def ours_with_the_weights_of(layer, kind):
    """Copies, by name, every weight; the keys that are named otherwise are listed here."""
    mine = Layer(JambaTalkConfig(**OURS, rope_base=None), kind)
    theirs = dict(layer.state_dict())
    names = {
        "mixer_norm.weight": theirs.pop("input_layernorm.weight"),
        "mlp_norm.weight": theirs.pop("pre_ff_layernorm.weight"),
    }
    for name in list(theirs):
        if name.startswith(("mamba.", "self_attn.")):
            names["mixer." + name.split(".", 1)[1]] = theirs.pop(name)
    if kind == "E":
        names["mlp.router.weight"] = theirs.pop("feed_forward.router.weight")
        names["mlp.w_in"] = theirs.pop("feed_forward.experts.gate_up_proj")
        names["mlp.w_out"] = theirs.pop("feed_forward.experts.down_proj")
    else:
        names["mlp.w_in"] = torch.cat(
            [theirs.pop("feed_forward.gate_proj.weight"), theirs.pop("feed_forward.up_proj.weight")]
        )
        names["mlp.w_out"] = theirs.pop("feed_forward.down_proj.weight")
    assert not theirs  # nothing of theirs is left out
    mine.load_state_dict(names)  # strict: nothing of ours is either
    return mine


@pytest.mark.parametrize("kind", ["M", "E", "T"])
def test_layer_equals_transformers_jamba(kind):
    theirs = jamba(kind)
    mine = ours_with_the_weights_of(theirs, kind)
    x = torch.randn(2, 11, 16, requires_grad=True)
    same = x.detach().clone().requires_grad_()
    options = {}
    if kind == "T":  # their eager attention masks nothing by itself
        options["attention_mask"] = torch.full((11, 11), float("-inf")).triu(1)[None, None]
    logits = []
    if kind == "E":
        theirs.feed_forward.router.register_forward_hook(lambda module, args, output: logits.append(output[0]))
    expected = theirs(x, **options)
    expected = expected[0] if isinstance(expected, tuple) else expected
    y, routing = mine(same)
    assert (expected - x).abs().mean() > 0.1  # the layer does something
    torch.testing.assert_close(y, expected, **TOLERANCE)
    weight = torch.randn_like(y)
    losses = [(expected * weight).sum(), (y * weight).sum()]
    if kind == "E":
        from transformers.models.jamba.modeling_jamba import load_balancing_loss_func

        balance = [load_balancing_loss_func(tuple(logits), 4, 2), load_balancing_loss(routing)]
        torch.testing.assert_close(balance[1], balance[0])
        losses = [loss + 50 * each for loss, each in zip(losses, balance, strict=True)]  # enough to be seen
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(same.grad, x.grad, rtol=1e-4, atol=1e-4)
    gradients = ours_with_the_weights_of(_gradients_as_weights(theirs), kind).state_dict()
    for name, parameter in mine.named_parameters():
        torch.testing.assert_close(
            parameter.grad, gradients[name], rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


def _gradients_as_weights(layer: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(parameter.grad)
    return layer


@pytest.mark.parametrize(
    "options",
    [
        dict(pos_conv_kernel=6),  # base: group norm, no bias, post-norm
        dict(pos_conv_kernel=6, conv_bias=True, conv_norm="layer", pre_norm=True),  # large, xlsr
    ],
    ids=["base", "large"],
)
def test_encoder_equals_transformers_wav2vec2(options):
    from transformers import Wav2Vec2Model

    config = AudioEncoderConfig(conv_dim=[8] * 7, hidden=16, heads=2, ffn=24, layers=3, pos_conv_groups=2, **options)
    torch.manual_seed(0)
    theirs = Wav2Vec2Model(wav2vec2_config(config)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    mine = AudioEncoder(config, 30).eval()
    mine.load_state_dict(_own_names(theirs.state_dict()))
    samples = torch.randn(2, 8000)
    with torch.no_grad():
        y = mine.contextualise(mine.convolve(samples))  # the stages without the interpolation between them
        expected = theirs(samples).last_hidden_state
    assert expected.std() > 0.1
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_attention_rotation_is_transformers_llama_rotation():
    """Jamba has no rotation; the convention (halves, not interleaved; base 10000) is that of Llama."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    from jambatalk_kernels.attention.reference import rotary_table, rotate_grouped

    q, k = torch.randn(1, 7, 4, 8), torch.randn(1, 7, 2, 8)
    cos, sin = rotary_table(torch.arange(7), 8)
    inverse = 1.0 / (10000 ** (torch.arange(0, 8, 2) / 8))
    angle = torch.cat([torch.arange(7)[:, None] * inverse] * 2, -1)[None]
    expected = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), angle.cos(), angle.sin())
    mine = rotate_grouped(q, k, cos[:, None], sin[:, None], False)
    for a, b in zip(mine, expected, strict=True):
        torch.testing.assert_close(a, b.transpose(1, 2), rtol=1e-5, atol=1e-5)
