"""The autoregressive loop: what it computes, state in and out, sequences of different length, errors."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from jambatalk_kernels import native_library
from jambatalk_kernels.rollout.op import rollout
from jambatalk_kernels.rollout.program import (
    KIND,
    AttentionMixer,
    DenseMLP,
    Layer,
    MambaMixer,
    MoEMLP,
    Program,
    RolloutState,
)

WIDTH, INNER, STATES, RANK = 8, 16, 4, 2


def make_program(window=3, feedback=True, rope_base=100.0):
    generator = torch.Generator().manual_seed(0)

    def random(*shape, scale=0.4):
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale

    def near_one(size):
        return 1 + random(size, scale=0.1)

    mamba = MambaMixer(
        norm=near_one(WIDTH),
        in_proj=random(2 * INNER, WIDTH),
        conv_weight=random(INNER, 4),
        conv_bias=random(INNER),
        x_proj=random(RANK + 2 * STATES, INNER),
        dt_norm=near_one(RANK),
        b_norm=near_one(STATES),
        c_norm=near_one(STATES),
        dt_proj=random(INNER, RANK),
        dt_bias=random(INNER),
        A=-torch.arange(1, STATES + 1, dtype=torch.float64).repeat(INNER, 1),
        D=random(INNER),
        out_proj=random(WIDTH, INNER),
    )
    attention = AttentionMixer(
        near_one(WIDTH),
        random(8, WIDTH),
        random(4, WIDTH),
        random(4, WIDTH),
        random(WIDTH, 8),
        heads=2,
        kv_heads=1,
        window=window,
        rope_base=rope_base,
    )
    dense = DenseMLP(near_one(WIDTH), random(2 * 6, WIDTH), random(WIDTH, 6))
    moe = MoEMLP(near_one(WIDTH), random(3, WIDTH), random(3, 2 * 6, WIDTH), random(3, WIDTH, 6), top_k=2)
    return Program(
        (Layer(mamba, moe), Layer(attention, dense)),
        near_one(WIDTH),
        random(WIDTH, WIDTH) if feedback else None,
        random(WIDTH) if feedback else None,
    )


def make_inputs(batch=2, frames=9):
    return torch.randn(batch, frames, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("splits", [[1] * 9, [4, 5], [8, 1], [2, 3, 4]])
def test_any_split_equals_one_call(window, splits):
    program, inputs = make_program(window), make_inputs()
    whole, end = rollout(program, inputs)
    state, start = None, 0
    for size in splits:
        hidden, state = rollout(program, inputs[:, start : start + size], state)
        torch.testing.assert_close(hidden, whole[:, start : start + size])
        start += size
    assert state.position.tolist() == [9, 9]
    torch.testing.assert_close(state.feedback, end.feedback)


def test_feedback_is_the_folded_matrix_of_the_previous_hidden():
    program, inputs = make_program(), make_inputs()
    open_loop = Program(program.layers, program.final_norm, None, None)
    closed, _ = rollout(program, inputs)
    assert (closed[:, 0] == rollout(open_loop, inputs)[0][:, 0]).all()  # nothing is fed back into the first frame
    fed = inputs.clone()
    fed[:, 1:] += closed[:, :-1] @ program.feedback.T + program.feedback_bias
    torch.testing.assert_close(rollout(open_loop, fed)[0], closed)
    assert (closed - rollout(open_loop, inputs)[0])[:, 1:].abs().min(-1).values.max() > 1e-3  # it matters


def test_state_given_is_not_changed():
    program, inputs = make_program(), make_inputs()
    _, state = rollout(program, inputs)
    before = [tensor.clone() for tensor in state.tensors()]
    rollout(program, inputs, state)
    assert all(torch.equal(a, b) for a, b in zip(before, state.tensors(), strict=True))


def test_lengths_are_as_sequences_alone():
    program, inputs = make_program(), make_inputs(batch=4)
    lengths = torch.tensor([5, 0, 9, 5])
    hidden, state = rollout(program, inputs, lengths=lengths)
    for row, length in enumerate(lengths.tolist()):
        alone, alone_state = rollout(program, inputs[row : row + 1, :length])
        torch.testing.assert_close(hidden[row, :length], alone[0])
        assert (hidden[row, length:] == 0).all()
        for mine, theirs in zip(state.tensors(), alone_state.tensors(), strict=True):
            torch.testing.assert_close(mine[row], theirs[0])


def test_rows_of_a_batch_do_not_mix():
    program, inputs = make_program(), make_inputs()
    together, _ = rollout(program, inputs)
    for row in range(2):
        torch.testing.assert_close(rollout(program, inputs[row : row + 1])[0][0], together[row])


def test_weights_dtype_rounds_the_matrices_only():
    program, inputs = make_program(), make_inputs()
    exact, low = rollout(program, inputs)[0], rollout(program, inputs, weights_dtype=torch.bfloat16)[0]
    assert low.dtype == torch.float64
    assert 0 < (low - exact).abs().max() < 0.5
    again = rollout(program.rounded(torch.bfloat16), inputs)[0]
    assert torch.equal(low, again)


def test_memory_of_the_state_does_not_grow_with_a_window():
    program, inputs = make_program(window=3), make_inputs(frames=40)
    _, short = rollout(program, inputs[:, :3])
    _, long = rollout(program, inputs)
    assert [t.shape for t in short.tensors()] == [t.shape for t in long.tensors()]


# ---- the state as a file ----

GO_ON = """
import sys, torch
from safetensors.torch import load_file, save_file
from jambatalk_kernels import rollout
from jambatalk_kernels.rollout.program import RolloutState
from test_rollout import make_program

inputs, folder = load_file(sys.argv[1] + "/inputs.safetensors")["inputs"], sys.argv[1]
hidden, state = rollout(make_program(), inputs, RolloutState.load(folder + "/state"), backend=sys.argv[2])
save_file({"hidden": hidden} | state.to_tensors(), folder + "/end.safetensors")
"""


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_rollout_goes_on_in_another_process_with_the_same_bytes(tmp_path, backend):
    if backend == "cpu" and not native_library()[0]:
        pytest.skip(native_library()[1])
    program, inputs = make_program(), make_inputs()
    whole, end = rollout(program, inputs, backend=backend)
    _, state = rollout(program, inputs[:, :5], backend=backend)
    state.save(tmp_path / "state")
    save_file({"inputs": inputs[:, 5:].contiguous()}, tmp_path / "inputs.safetensors")
    command = [sys.executable, "-c", GO_ON, str(tmp_path), backend]
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    there = load_file(tmp_path / "end.safetensors")
    assert torch.equal(there.pop("hidden"), whole[:, 5:])
    here = end.to_tensors()
    assert there.keys() == here.keys() and all(torch.equal(there[name], here[name]) for name in here)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["end.safetensors", "inputs.safetensors", "state"]


def test_a_state_that_shares_memory_can_be_saved(tmp_path):
    state = rollout(make_program(), make_inputs())[1]
    first = state.map(lambda tensor: tensor[:1])  # views, not all of them contiguous
    first.mixers[0].scan = state.mixers[0].scan.mT.contiguous().mT[:1]
    first.save(tmp_path / "state")
    loaded = RolloutState.load(tmp_path / "state")
    assert all(torch.equal(a, b) for a, b in zip(loaded.tensors(), first.tensors(), strict=True))


def _without(name):
    return lambda tensors: tensors.pop(name)


def _changed(name, change):
    return lambda tensors: tensors.update({name: change(tensors[name]).contiguous()})


@pytest.mark.parametrize(
    "change, text",
    [
        (_without("position"), "position is missing|batch"),
        (_without("feedback"), "feedback is missing"),
        (_without("mixers.0.scan"), r"mixers\.0\.scan is missing"),
        (_without("mixers.1.v"), r"mixers\.1\.v is missing"),
        (lambda t: [t.pop("mixers.0.conv"), t.pop("mixers.0.scan")], r"no place for mixers\.1\.k"),
        (lambda t: t.update(surplus=torch.zeros(1)), "no place for surplus"),
        (_changed("feedback", lambda x: x[:1]), r"feedback must have 2 axes and the batch \(2\) first, got .*1, 8"),
        (_changed("mixers.0.scan", lambda x: x[0]), r"mixers\.0\.scan must have 3 axes"),
        (_changed("position", lambda x: x.double()), "position must not be torch.float64"),
        (_changed("mixers.1.position", lambda x: x - 10), r"mixers\.1\.position is negative"),
        (_changed("mixers.1.k", lambda x: x.long()), r"mixers\.1\.k must not be torch.int64"),
    ],
)
def test_a_file_that_is_no_state_is_refused_in_one_line(tmp_path, change, text):
    path = tmp_path / "state"
    rollout(make_program(), make_inputs())[1].save(path)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"kind": KIND})
    with pytest.raises(ValueError, match=text) as caught:
        RolloutState.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_other_files_are_refused_in_one_line(tmp_path):
    path = tmp_path / "state"
    with pytest.raises(FileNotFoundError):
        RolloutState.load(path)
    rollout(make_program(), make_inputs())[1].save(path)
    whole = path.read_bytes()
    for content in (b"", b"PK\x03\x04", whole[:-1], whole[: len(whole) // 2], b"\xff" * 64):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="not a whole safetensors file") as caught:
            RolloutState.load(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    save_file({"weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="not the state of a rollout"):
        RolloutState.load(path)


def test_a_state_of_attention_with_a_window_is_not_continued_without():
    state = rollout(make_program(window=3), make_inputs())[1]
    with pytest.raises(ValueError, match=r"state\.mixers\[1\] has room for 3 of its 9 positions"):
        rollout(make_program(window=None), make_inputs(), state)


def test_a_cache_that_grows_by_frames_is_not_enlarged_for_each():
    program, inputs = make_program(window=None), make_inputs(frames=64)
    state, capacities = None, set()
    for frame in range(64):
        _, state = rollout(program, inputs[:, frame : frame + 1], state)
        capacities.add(state.mixers[1].capacity)
    assert len(capacities) <= 12 and max(capacities) <= 96


def test_no_frames_and_no_sequences():
    program = make_program()
    hidden, state = rollout(program, make_inputs(frames=0))
    assert hidden.shape == (2, 0, WIDTH) and state.position.tolist() == [0, 0]
    assert rollout(program, make_inputs(batch=0))[0].shape == (0, 9, WIDTH)


@pytest.mark.parametrize(
    "change, error, text",
    [
        (dict(program=3), TypeError, "program"),
        (dict(inputs=torch.zeros(2, 9, WIDTH + 1, dtype=torch.float64)), ValueError, "inputs"),
        (dict(inputs=torch.zeros(2, 9, WIDTH)), TypeError, "inputs"),
        (dict(inputs=torch.zeros(2, 9, WIDTH).long()), TypeError, "inputs"),
        (dict(state=1), TypeError, "state"),
        (
            dict(state=RolloutState.empty(make_program().layers, WIDTH, 3, dtype=torch.float64)),
            ValueError,
            "batch of 3",
        ),
        (
            dict(state=RolloutState.empty(make_program().layers[:1], WIDTH, 2, dtype=torch.float64)),
            ValueError,
            "layers",
        ),
        (dict(lengths=torch.tensor([1])), ValueError, "lengths"),
        (dict(lengths=[1, 2]), TypeError, "lengths"),
        (dict(weights_dtype=torch.int8), TypeError, "weights_dtype"),
        (dict(backend="cuda"), RuntimeError, "rollout"),
    ],
)
def test_errors_name_the_argument(change, error, text):
    with pytest.raises(error, match=text):
        rollout(**(dict(program=make_program(), inputs=make_inputs()) | change))
