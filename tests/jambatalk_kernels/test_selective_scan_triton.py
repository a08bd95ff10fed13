"""The Triton kernels of the selective scan against the definition: in the interpreter, or on a card where there is one.

The launchers are called as they are; what the op does around them is tested in test_selective_scan.py. The interpreter
takes milliseconds per position, so shapes are small, and chunks too: 16 positions or 8, unless a test says otherwise.
"""

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_accurate
from test_selective_scan import inputs

from jambatalk_kernels.selective_scan import heuristics
from jambatalk_kernels.selective_scan.heuristics import Layout
from jambatalk_kernels.selective_scan.reference import scan_reference

pytest.importorskip("triton", reason="triton is not installed")
from jambatalk_kernels.selective_scan import triton as scan  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ARGUMENTS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
# States per lane, channels per lane, warps, lanes of a channel, steps, splits.
LAYOUTS = {
    "wide": Layout(4, 2, 1, 4, 4, 1),
    "warps": Layout(2, 1, 2, 8, 4, 1),
    "lanes": Layout(1, 1, 1, 16, 4, 1),
    "split": Layout(4, 1, 1, 4, 4, 3),
}


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    monkeypatch.setattr(scan, "chunk_length", lambda states: 16)


@pytest.fixture
def force(monkeypatch):
    def use(layout, chunk=8):
        monkeypatch.setattr(scan, "chunk_length", lambda states: chunk)
        monkeypatch.setattr(scan, "_forward_layout", lambda *sizes: layout)
        monkeypatch.setattr(scan, "_backward_layout", lambda *sizes: layout)

    return use


def named_inputs(*shape, without=(), **options):
    return {k: v.to(DEVICE) for k, v in inputs(*shape, **options).items() if k not in without}


def forward(named, cu_seqlens=None, softplus=True, save=False):
    return scan.scan_forward(*(named.get(name) for name in ARGUMENTS), cu_seqlens, softplus, save)


def reference(named, cu_seqlens=None, softplus=True):
    named = {name: named.get(name) for name in ARGUMENTS}
    initial_state = named.pop("initial_state")
    return scan_reference(*named.values(), softplus, initial_state, cu_seqlens)


def weights_of(y, final_state):
    """The same numbers at every precision: as few bits as bfloat16 has."""
    g = torch.Generator().manual_seed(1)
    return [torch.randn(t.shape, generator=g).bfloat16().to(t.device, t.dtype) for t in (y, final_state)]


def kernel_results(named, cu_seqlens=None, softplus=True, weigh=(True, True)):
    """y, final state and all gradients from the launchers."""
    y, final_state, saved = forward(named, cu_seqlens, softplus, save=True)
    weights = [w if wanted else None for w, wanted in zip(weights_of(y, final_state), weigh, strict=True)]
    arguments = [named.get(name) for name in ARGUMENTS]
    grads = scan.scan_backward(*weights, *arguments, cu_seqlens, saved, softplus)
    for grad, argument in zip(grads, arguments, strict=True):
        assert grad.shape == ((0,) if argument is None else argument.shape)
        assert argument is None or grad.dtype == argument.dtype
    grads = {f"d{name}": grad for name, grad in zip(ARGUMENTS, grads, strict=True) if name in named}
    return {"y": y, "final_state": final_state, **grads}


def reference_results(named, cu_seqlens=None, softplus=True, weigh=(True, True), dtype=None):
    named = {name: tensor.detach().to(dtype or tensor.dtype).requires_grad_() for name, tensor in named.items()}
    y, final_state = reference(named, cu_seqlens, softplus)
    weighted = zip((y, final_state), weights_of(y, final_state), weigh, strict=True)
    loss = sum((t * w).sum() for t, w, wanted in weighted if wanted)
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True, materialize_grads=True)
    return {
        "y": y.detach(),
        "final_state": final_state.detach(),
        **dict(zip((f"d{n}" for n in named), grads, strict=True)),
    }


def assert_same(got, want, tolerance=1e-13):
    for name in want:
        assert got[name].dtype == want[name].dtype and got[name].shape == want[name].shape, name
        if want[name].numel():
            scale = want[name].double().square().mean().sqrt()
            assert (got[name].double() - want[name].double()).abs().max() <= tolerance * max(scale, 1e-3), name


# ---- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_the_reference(name, force):
    """More than a chunk and than a block of channels, padded states, a tile that is not full."""
    force(LAYOUTS[name])
    named = named_inputs(1, 18, 17 if name == "wide" else 5, 13)
    assert_same(kernel_results(named), reference_results(named))


def test_packed_sequences(force):
    """Boundaries within tiles and chunks, empty sequences, positions outside of all; long ones are cut in two."""
    force(LAYOUTS["wide"]._replace(splits=2))
    cu_seqlens = torch.tensor([1, 1, 3, 11, 11, 16, 17], dtype=torch.int32, device=DEVICE)
    named = named_inputs(1, 19, 3, 5, sequences=6)
    got = kernel_results(named, cu_seqlens)
    assert_same(got, reference_results(named, cu_seqlens))
    for name in ("y", "du", "ddelta", "dB", "dC", "dz"):
        assert (got[name][:, :1] == 0).all() and (got[name][:, 17:] == 0).all(), name


@pytest.mark.parametrize("bounds", [[3, 7], [-5, 99], [0, 8, 4, 6], [4, 2, 0]], ids=str)
def test_wild_cu_seqlens_are_clamped(bounds):
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=DEVICE)
    named = named_inputs(1, 10, 2, 3, sequences=len(bounds) - 1)
    assert_same(kernel_results(named, cu_seqlens), reference_results(named, cu_seqlens))


@pytest.mark.parametrize("without", ["D", "z", "delta_bias", "initial_state", "all"])
def test_every_argument_is_optional(without):
    without = ("D", "z", "delta_bias", "initial_state") if without == "all" else (without,)
    named = named_inputs(1, 5, 3, 4, without=without)
    assert_same(kernel_results(named, softplus=len(without) == 1), reference_results(named, softplus=len(without) == 1))


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("weigh", [(True, False), (False, True)], ids=["no final", "no y"])
def test_either_output_may_have_no_gradient(weigh, splits, force):
    force(LAYOUTS["wide"]._replace(splits=splits))
    named = named_inputs(1, 9, 2, 3)
    assert_same(kernel_results(named, weigh=weigh), reference_results(named, weigh=weigh))


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (2, 3, 33, 3), (1, 5, 2, 17), (1, 3, 2, 256), (2, 0, 3, 4), (0, 3, 3, 4), (1, 3, 0, 4)],
    ids=str,
)  # fmt: skip
def test_shapes(shape):
    """The layouts are those that the heuristics choose."""
    named = named_inputs(*shape)
    assert_same(kernel_results(named), reference_results(named), tolerance=1e-12)


def test_strides_are_read_in_place():
    """Channel-first u, channel-last delta, every second row of z, expanded B, transposed A, states last but one."""
    named = named_inputs(2, 6, 5, 3)
    strided = {
        "u": named["u"].transpose(1, 2).contiguous().transpose(1, 2),
        "z": named["z"].repeat_interleave(2, 1)[:, ::2],
        "B": named["B"][:1, :1].expand(2, 6, 3),
        "A": named["A"].t().contiguous().t(),
        "initial_state": named["initial_state"].transpose(1, 2).contiguous().transpose(1, 2),
        "D": named["D"].repeat_interleave(3)[::3],
    }
    named |= strided
    assert_same(kernel_results(named), reference_results(named))


def assert_rule(named):
    """At most twice the error of PyTorch at the same precision, and the absolute bars of the contract."""
    exact = reference_results({name: tensor.double() for name, tensor in named.items()})
    peer, ours = reference_results(named), kernel_results(named)
    for name, want in exact.items():
        assert ours[name].dtype == peer[name].dtype
        assert_accurate(ours[name], want, peer[name], 1e-5 if ours[name].dtype == torch.float32 else 5e-3, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_accuracy_rule(dtype):
    assert_rule({name: tensor.to(dtype) for name, tensor in named_inputs(1, 24, 4, 16).items()})


def test_mixed_dtypes():
    half, single = torch.bfloat16, torch.float32
    dtypes = (half, single, single, torch.float16, half, single, half, torch.float64, single)
    assert_rule({k: v.to(d) for (k, v), d in zip(named_inputs(1, 24, 3, 4).items(), dtypes, strict=True)})


def test_softplus_is_torchs():
    x = torch.linspace(-40, 40, 128, dtype=torch.float64, device=DEVICE).reshape(1, 1, -1)
    zero, one = x.new_zeros(128, 1), x.new_ones(1, 1, 1)
    # With A = 0, B = C = u = 1 the output is softplus(delta) itself.
    y = scan.scan_forward(torch.ones_like(x), x, zero, one, one, None, None, None, None, None, True, False)[0]
    torch.testing.assert_close(y, F.softplus(x), rtol=1e-14, atol=0)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the infinity times nothing
def test_padding_keeps_infinities():
    """Three states in four places: what fills the fourth must not turn infinity into NaN."""
    named = named_inputs(1, 3, 2, 3, without=("D", "z"))
    named["B"].abs_()
    named["C"].abs_()
    named["u"][0, 1, 0] = float("inf")
    for got, want in zip(forward(named), reference(named), strict=False):
        torch.testing.assert_close(got, want, equal_nan=True)
        assert got.isinf().any() and not got.isnan().any()


# ---- states ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [0, 1, 4, 9])
def test_two_halves_are_the_whole(cut):
    named = named_inputs(1, 9, 3, 4)
    whole, end, _ = forward(named)
    halves, state = [], named["initial_state"]
    for part in (slice(None, cut), slice(cut, None)):
        rest = {k: v[:, part] if v.dim() == 3 else v for k, v in named.items()} | {"initial_state": state}
        y, state, _ = forward(rest)
        halves.append(y)
    torch.testing.assert_close(torch.cat(halves, 1), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, end, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("states", [1, 16, 19])
def test_steps_are_the_scan(states):
    named = named_inputs(2, 3, 5, states)
    y, final_state, _ = forward(named)
    state = named.pop("initial_state").transpose(1, 2).contiguous().transpose(1, 2)
    for t in range(3):
        row = [named[name][:, t] if named[name].dim() == 3 else named[name] for name in ARGUMENTS[:-1]]
        got = scan.scan_step(state, *row, True)
        torch.testing.assert_close(got, y[:, t], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, final_state, rtol=1e-12, atol=1e-12)


def test_step_with_a_narrow_state_and_nothing_optional():
    named = named_inputs(2, 1, 5, 16, dtype=torch.float32, without=("D", "z", "delta_bias"))
    state = named.pop("initial_state").bfloat16()
    row = [named[name][:, 0] if named[name].dim() == 3 else named[name] for name in named]
    want, want_state = scan_reference(*named.values(), initial_state=state)
    pointer = state.data_ptr()
    got = scan.scan_step(state, *row, None, None, None, False)
    torch.testing.assert_close(got, want[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, want_state.bfloat16())
    assert state.data_ptr() == pointer


# ---- the contract ---------------------------------------------------------------------------------------------------


def test_same_bytes_twice_and_in_turns(monkeypatch):
    """Sequences that share the scratch memory one after the other give what they give together."""
    named = named_inputs(2, 7, 3, 4, dtype=torch.float32)
    first, second = kernel_results(named), kernel_results(named)
    monkeypatch.setattr(scan, "SCRATCH_ELEMENTS", 1)
    in_turns = kernel_results(named)
    for name in first:
        assert torch.equal(first[name], second[name]) and torch.equal(first[name], in_turns[name]), name


def test_saved_states_are_no_more_than_the_inputs(monkeypatch):
    monkeypatch.undo()
    for states in (1, 16, 64, 256):
        for length in (1, 63, 64, 65, 1000):
            inputs_in_bfloat16 = 2 * (2 * length * 512 + 2 * length * states)
            saved = 4 * torch.Size(scan.chunk_states_shape(1, length, 512, states)).numel()
            assert saved <= inputs_in_bfloat16, (states, length)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wide", "split"])
def test_real_chunks(name, force, monkeypatch):
    monkeypatch.undo()
    force(LAYOUTS[name], chunk=heuristics.chunk_length(16))
    named = named_inputs(1, 140, 5, 16, sequences=2)
    cu_seqlens = torch.tensor([0, 30, 140], dtype=torch.int32, device=DEVICE)
    assert_same(kernel_results(named, cu_seqlens), reference_results(named, cu_seqlens))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_random_shapes(seed, force):
    g = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high, (), generator=g))

    layout = list(LAYOUTS.values())[seed % 4]
    force(layout._replace(splits=draw(1, 4)))
    batch, length, channels, states = draw(1, 3), draw(1, 30), draw(1, 20), draw(1, 17)
    cu_seqlens = sequences = None
    if seed % 3:
        batch, sequences = 1, draw(1, 6)
        inner = torch.randint(0, length + 1, (sequences - 1,), generator=g).sort().values.tolist()
        cu_seqlens = torch.tensor([0, *inner, length], dtype=torch.int32, device=DEVICE)
    named = named_inputs(batch, length, channels, states, seed=seed, sequences=sequences)
    assert_same(kernel_results(named, cu_seqlens), reference_results(named, cu_seqlens), tolerance=1e-11)


# ---- heuristics -----------------------------------------------------------------------------------------------------


def backward_layout(*sizes):
    return heuristics.backward_layout(*sizes, capability=90)


@pytest.mark.parametrize("choose", [heuristics.forward_layout, backward_layout])
def test_layouts_hold_every_state_once_and_every_channel(choose):
    for sequences in (1, 8, 100):
        for channels in (1, 33, 1024, 4096):
            for states in range(1, 257):
                layout = choose(sequences, 2048, channels, states, 132)
                places = layout.states_per_lane * layout.lanes_n
                assert states <= places <= max(4, 2 * states - 1)
                assert layout.states_per_lane <= 8 and layout.lanes_n <= 32
                assert layout.lanes_n % layout.steps == 0 and heuristics.chunk_length(states) % layout.steps == 0
                # A program is no wider than the channels, up to rounding.
                assert layout.warps == 1 or layout.channels // 2 < channels
                assert 1 <= layout.splits <= 2048 // heuristics.chunk_length(states)


def warps_in_all(layout, sequences, channels):
    return sequences * -(-channels // layout.channels) * layout.warps * layout.splits


def test_a_small_problem_is_spread_over_the_card():
    for choose in (heuristics.forward_layout, backward_layout):
        for sequences, length, channels in ((1, 600, 1024), (1, 60_000, 256), (2, 4096, 64)):
            layout = choose(sequences, length, channels, 16, 132)
            # A warp for every second scheduler at least, though that takes a second walk over time.
            assert warps_in_all(layout, sequences, channels) >= 2 * 132
            assert layout.warps <= 4
    assert heuristics.forward_layout(1, 100, 64, 16, 132).splits == 1  # too short to cut


def test_a_large_problem_shares_the_reading_of_B_and_C():
    for multiprocessors in (128, 132):
        layout = heuristics.forward_layout(8, 2048, 2048, 16, multiprocessors)
        assert layout.splits == 1 and layout.channels_per_lane >= 2 and layout.lanes_n == 4
        assert warps_in_all(layout, 8, 2048) >= 4 * multiprocessors
        layout = backward_layout(8, 2048, 2048, 16, multiprocessors)
        assert layout.splits == 1 and layout.channels_per_lane == 2
        assert heuristics.backward_layout(8, 2048, 2048, 16, multiprocessors, 120).channels_per_lane == 1  # spills
        # Partial sums of dB and dC: at most 4 bytes per element, of the 14 that backward moves in bfloat16.
        assert 2 * 16 * 4 / layout.channels <= 4
