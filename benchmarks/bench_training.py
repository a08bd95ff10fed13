"""Training: one step of the `demo` preset against the same model on transformers' Jamba layers; on a card, an epoch.

A step is everything from a batch on the device to changed weights: encoder, decoder, losses, backward, clipping, Adam.
Random weights and random data of the corpora's shapes.
"""

from __future__ import annotations

import os
import time

import pytest
import torch
from torch import Tensor, nn

from benchmarks.results import Case

try:
    from jambatalk.config import JambaTalkConfig
    from jambatalk.losses import MotionLoss
    from jambatalk.model import JambaTalk
    from jambatalk.training import Batch, Objective, TrainingOptions, multiplies_bfloat16
except ModuleNotFoundError as error:  # a machine that has what the kernels need and no more
    pytest.skip(f"the model cannot be imported: {error}", allow_module_level=True)

SECONDS = 4.0  # of a clip of VOCASET, about
CLIPS = 314  # of VOCASET's training split
EPOCH_BATCH = 16


class TheirLayer(nn.Module):
    """A layer of transformers' Jamba in the place of ours, as its model runs it: no rotation, no routing to report."""

    def __init__(self, config: JambaTalkConfig, kind: str):
        super().__init__()
        from transformers import JambaConfig
        from transformers.models.jamba import modeling_jamba as theirs

        jamba = JambaConfig(
            hidden_size=config.d_model, intermediate_size=config.hidden, num_hidden_layers=1,
            num_attention_heads=config.heads, num_key_value_heads=config.kv_heads, mamba_d_state=config.states,
            mamba_d_conv=config.conv_width, mamba_expand=config.expand, mamba_dt_rank=config.time_step_rank,
            num_experts=config.experts if kind == "E" else 1, num_experts_per_tok=config.top_k,
            expert_layer_period=1, expert_layer_offset=0,
            attn_layer_period=1 if kind == "T" else 2, attn_layer_offset=0 if kind == "T" else 1,
        )  # fmt: skip
        jamba._attn_implementation = "sdpa"
        if hasattr(jamba, "_experts_implementation"):
            jamba._experts_implementation = "eager"
        layer = theirs.JambaAttentionDecoderLayer if kind == "T" else theirs.JambaMambaDecoderLayer
        self.layer = layer(jamba, layer_idx=0)
        for name, parameter in self.layer.named_parameters():  # its router and experts are left as they were allocated
            if name.endswith(("router.weight", "gate_up_proj", "down_proj")):
                nn.init.uniform_(parameter, -(parameter.shape[-1] ** -0.5), parameter.shape[-1] ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y[0] if isinstance(y, tuple) else y


class TheirDecoder(nn.Module):
    """Their layers on the padded batch, since they know no packing, and our final norm."""

    def __init__(self, config: JambaTalkConfig, norm: nn.Module):
        super().__init__()
        self.layers, self.norm = nn.ModuleList(TheirLayer(config, kind) for kind in config.layers), norm

    def forward(self, x: Tensor, valid: Tensor) -> tuple[Tensor, list, None]:
        for layer in self.layers:
            x = layer(x)
        return self.norm(x), [], None


class Step:
    """One optimisation step, again and again on the same batch."""

    def __init__(self, objective: Objective, batch: Batch):
        self.objective, self.batch = objective.train(), batch
        self.parameters = [p for p in objective.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, weight_decay=0.0, fused=True)

    def __call__(self, inputs: object = None) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        sum(self.objective(self.batch).values()).backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()


def make_objective(preset: str, theirs: bool = False, sizes: dict | None = None, **options) -> Objective:
    torch.manual_seed(0)
    config = JambaTalkConfig.from_preset(preset, subjects=[f"speaker {i}" for i in range(8)], **(sizes or {}))
    model = JambaTalk(config)
    nn.init.normal_(model.head.weight, std=1e-4)
    if theirs:
        model.decoder = TheirDecoder(config, model.decoder.norm)
    loss = MotionLoss(torch.ones(config.motion_size))
    return Objective(model, loss, TrainingOptions(**options))


def make_batch(config: JambaTalkConfig, clips: int, generated: float = 0.0, seed: int = 0) -> Batch:
    """Clips around `SECONDS` long, padded to the longest. generated: share of clips fed with the model's own motion."""
    random = torch.Generator().manual_seed(seed)
    lengths = ((0.75 + 0.5 * torch.rand(clips, generator=random)) * SECONDS * 16000).long()
    counts = [config.frames(int(n)) for n in lengths]
    valid = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
    samples = torch.randn(clips, int(lengths.max()), generator=random) * 0.05
    samples[torch.arange(samples.shape[1]) >= lengths[:, None]] = 0
    motion = torch.randn(clips, max(counts), config.motion_size, generator=random) * valid[..., None] * 1e-3
    return Batch(
        samples=samples, lengths=lengths, motion=motion, phones=torch.full(valid.shape, -100), valid=valid,
        style=torch.arange(clips) % 9, generated=valid & (torch.arange(clips) < generated * clips)[:, None], noise=None,
    )  # fmt: skip


def epoch(objective: Objective, batches: list[Batch], device: str) -> float:
    """Seconds of a step on each batch, from the host's memory to changed weights."""
    step = Step(objective, batches[0])
    if device == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    for batch in batches:
        step.batch = batch.to(torch.device(device))
        step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def operations(objective: Objective, batch: Batch) -> int:
    """Multiply-adds of a step's matrix products and convolutions, times two, forward and backward: PyTorch's as it
    counts them, and those inside the mixture-of-experts op."""
    from torch.utils.flop_counter import FlopCounterMode

    def product(left, right, *others, **more):
        return 2 * left.numel() * right[0]

    with FlopCounterMode(display=False, custom_mapping={torch.ops.mkldnn._linear_pointwise: product}) as counter:
        sum(objective(batch).values()).backward()
    config = objective.model.config
    experts = 3 * config.d_model * config.hidden * config.top_k * config.layers.count("E")
    return counter.get_total_flops() + 3 * 2 * int(batch.valid.sum()) * experts


@pytest.mark.parametrize("precision, generated", [("float32", 0.0), ("bf16", 0.0), ("float32", 0.9)])
def test_step_of_demo_against_transformers_layers(contest, native, precision, generated):
    """Compared without rollouts, which their layers could only step through. With them, the demo's share: ours alone.

    Encoder, losses and Adam are the same for both, so the products of a step (`operations`) at this machine's peak
    bound how much faster the whole step can be.
    """
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("this process may use one core: the bar is for two")
    if precision == "bf16" and not multiplies_bfloat16(torch.device("cpu")):
        pytest.skip("PyTorch has no bfloat16 products for this processor: jambatalk.train takes float32 in their place")
    ours = make_objective("demo", precision=precision)
    batch = make_batch(ours.model.config, 8, generated)
    parameters = sum(p.numel() for p in ours.parameters())
    frames = int(batch.valid.sum())
    case = Case(
        f"training step demo {precision}, batch 8, {generated:.0%} rollouts, 2 threads, {native.cpu_isa()}", "training",
        "cpu", bytes=7 * 4 * parameters, operations={precision: operations(ours, batch)}, limit="matrix products",
        facts={"preset": "demo", "precision": precision, "batch": 8, "frames": frames, "threads": 2,
               "parameters": parameters,
               "generated": generated, "isa": native.cpu_isa()},
    )  # fmt: skip
    others = {}
    if not generated:
        others["transformers"] = Step(make_objective("demo", theirs=True, precision=precision), batch)
    contest(case, Step(ours, batch), [{}], others, threads=dict.fromkeys(["ours", *others], 2), rounds=6)
    case.note("frames/s", frames / case.seconds["ours"])
    if others:
        case.bar("faster than transformers' layers by", case.seconds["transformers"] / case.seconds["ours"], least=10)


@pytest.mark.parametrize("generated", [0.0, 0.5])
def test_epoch_of_vocaset_on_a_card(contest, generated):
    """Every clip once, in batches of 16 that lie in pinned memory (reading them overlaps with the steps), under
    bfloat16 autocast with the front end frozen. The paper: 48 s on an RTX 4090. generated: 0.5 is the default's share
    of rollouts once its ramp is over."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU: the bar is for a card")
    objective = make_objective("vocaset", precision="bf16").cuda()
    config = objective.model.config
    sizes = [min(EPOCH_BATCH, CLIPS - first) for first in range(0, CLIPS, EPOCH_BATCH)]
    batches = [make_batch(config, size, generated, seed) for seed, size in enumerate(sizes)]
    for batch in batches:
        for name, value in vars(batch).items():
            if value is not None and name != "lengths":
                setattr(batch, name, value.pin_memory())
    flops = operations(objective, batches[0].to("cuda")) * CLIPS // EPOCH_BATCH
    epoch(objective, batches[:1], "cuda")  # kernels are compiled
    torch.cuda.reset_peak_memory_stats()
    seconds = epoch(objective, batches, "cuda")
    peak = torch.cuda.max_memory_allocated()
    parameters = sum(p.numel() for p in objective.parameters())
    case = Case(
        f"epoch vocaset bfloat16 autocast, batch {EPOCH_BATCH}, {generated:.0%} rollouts", "training", "cuda",
        bytes=len(batches) * 7 * 4 * parameters, operations={"bfloat16": flops}, limit="matrix products",
        facts={"preset": "vocaset", "batch": EPOCH_BATCH, "clips": CLIPS, "parameters": parameters,
               "frames": sum(int(batch.valid.sum()) for batch in batches), "generated": generated},
    )  # fmt: skip
    case.seconds["ours"] = seconds
    contest.keep(case)
    case.bar("seconds of an epoch", seconds, most=15 if "H200" in torch.cuda.get_device_name() else 48)
    case.bar("peak memory in GB", peak / 1e9, most=24)
