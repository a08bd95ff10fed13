"""Which backend runs, what forces it, and what is said when it cannot."""

import warnings

import pytest
import torch

import jambatalk_kernels
from jambatalk_kernels import BackendUnavailable, backends, use_backend
from jambatalk_kernels.attention import op as attention_op
from jambatalk_kernels.backends import choose
from jambatalk_kernels.causal_conv1d import op as conv_op
from jambatalk_kernels.moe import op as moe_op
from jambatalk_kernels.selective_scan import op as scan_op

BOTH = {"cpu": None, "reference": None}
WITHOUT_CPU = {"cpu": "no such library", "reference": None}


@pytest.fixture(autouse=True)
def no_wish_from_outside(monkeypatch):
    monkeypatch.delenv("JAMBATALK_KERNELS_BACKEND", raising=False)
    monkeypatch.setattr(backends, "_warned", set())


def test_the_first_that_can_run_is_taken():
    assert choose("op", None, BOTH) == "cpu"
    assert choose("op", None, {"reference": None, "cpu": "the inputs are on cuda"}) == "reference"


def test_precedence_of_argument_block_and_environment(monkeypatch):
    monkeypatch.setenv("JAMBATALK_KERNELS_BACKEND", "reference")
    assert choose("op", None, BOTH) == "reference"
    with use_backend("cpu"):
        assert choose("op", None, BOTH) == "cpu"
        with use_backend("reference"):
            assert choose("op", None, BOTH) == "reference"
            assert choose("op", "cpu", BOTH) == "cpu"
        assert choose("op", None, BOTH) == "cpu"
    assert choose("op", None, BOTH) == "reference"


def test_a_list_is_an_order_of_preference(monkeypatch):
    with use_backend("cpu", "reference"):
        assert choose("op", None, WITHOUT_CPU) == "reference"
    monkeypatch.setenv("JAMBATALK_KERNELS_BACKEND", " cpu , reference ")
    assert choose("op", None, WITHOUT_CPU) == "reference"


def test_forced_and_unusable_names_op_backend_and_reason():
    with pytest.raises(BackendUnavailable, match=r"my_op.*'cpu'.*no such library"):
        choose("my_op", "cpu", WITHOUT_CPU)
    with pytest.raises(BackendUnavailable, match=r"my_op.*'triton' does not exist for this op"):
        choose("my_op", "triton", BOTH)
    with use_backend("cuda", "triton"), pytest.raises(BackendUnavailable, match=r"'cuda'.*'triton'"):
        choose("my_op", None, BOTH)


def test_unknown_names_are_value_errors(monkeypatch):
    with pytest.raises(ValueError, match="'gpu'.*reference, cpu, triton, cuda"):
        choose("op", "gpu", BOTH)
    with pytest.raises(ValueError, match="'gpu'"), use_backend("gpu"):
        pass
    with pytest.raises(ValueError, match="at least one"), use_backend():
        pass
    monkeypatch.setenv("JAMBATALK_KERNELS_BACKEND", "gpu")
    with pytest.raises(ValueError, match="JAMBATALK_KERNELS_BACKEND.*'gpu'"):
        choose("op", None, BOTH)


def test_a_fallback_warns_once_per_op_and_reason():
    with pytest.warns(RuntimeWarning, match="op: running on backend 'reference' because 'cpu' cannot: no such library"):
        assert choose("op", None, WITHOUT_CPU) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choose("op", None, WITHOUT_CPU)
    with pytest.warns(RuntimeWarning, match="other"):
        choose("other", None, WITHOUT_CPU)


def test_a_block_is_undone_by_an_exception():
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert choose("op", None, BOTH) == "cpu"


def test_ops_obey_the_environment(monkeypatch):
    monkeypatch.setenv("JAMBATALK_KERNELS_BACKEND", "cuda")
    with pytest.raises(BackendUnavailable, match="causal_conv1d.*'cuda'.*on the CPU"):
        jambatalk_kernels.causal_conv1d(torch.zeros(1, 2, 3), torch.zeros(3, 4))


def test_a_library_of_another_version_is_refused(monkeypatch):
    loaded, _ = backends._load_native()
    if not loaded:
        pytest.skip("there is no native library to refuse (JAMBATALK_BUILD=none)")
    monkeypatch.setattr(backends, "NATIVE_VERSION", -1)
    loaded, reason = backends._load_native()
    assert not loaded and "-1" in reason and "pip install" in reason


def test_the_schemas_of_the_triton_ops_are_the_native_ones():
    if not backends.native_library()[0]:
        pytest.skip("there is no native library to compare with (JAMBATALK_BUILD=none)")
    for op in (conv_op, scan_op, moe_op, attention_op):
        for schema in op.SCHEMAS:
            name = schema[: schema.index("(")]
            native = str(getattr(torch.ops.jambatalk, name).default._schema)
            triton = str(getattr(torch.ops.jambatalk_triton, name).default._schema)
            assert triton.replace("jambatalk_triton", "jambatalk") == native


@pytest.mark.parametrize(
    "entry, capability, runs",
    [
        ("8.0", (8, 0), True), ("8.0", (8, 9), True), ("8.9", (8, 6), False), ("8.0", (9, 0), False),
        ("9.0a", (9, 0), True), ("9.0a", (10, 0), False), ("8.0+PTX", (12, 0), True), ("12.0+PTX", (9, 0), False),
        ("10.0f", (10, 0), True),
    ],
)  # fmt: skip
def test_what_a_cuda_build_covers(entry, capability, runs):
    options = backends.gpu_candidates(capability, True, entry, False)
    assert (options["cuda"] is None) == runs


def test_on_a_gpu_an_unvalidated_cuda_kernel_runs_only_when_forced():
    options = backends.gpu_candidates((9, 0), True, "9.0a", validated=False)
    assert choose("op", None, options) == "triton" and choose("op", "cuda", options) == "cuda"
    assert choose("op", None, backends.gpu_candidates((9, 0), True, "9.0a", validated=True)) == "cuda"
    assert choose("op", None, backends.gpu_candidates((9, 0), True, "8.0", validated=True)) == "triton"


def test_on_a_gpu_the_reasons_are_told():
    with pytest.warns(RuntimeWarning, match="'triton' cannot: triton is not installed"):
        assert choose("op", None, backends.gpu_candidates((9, 0), False, "", False)) == "reference"
    with pytest.warns(RuntimeWarning, match="sm_80 or newer.*sm_75"):
        assert choose("op", None, backends.gpu_candidates((7, 5), True, "", False)) == "reference"
    with pytest.raises(BackendUnavailable, match="built without CUDA"):
        choose("op", "cuda", backends.gpu_candidates((9, 0), True, "", False))
    with pytest.raises(BackendUnavailable, match="'cpu'.*on a GPU"):
        choose("op", "cpu", backends.gpu_candidates((9, 0), True, "", False))


def test_other_devices_run_on_the_reference():
    options = backends.candidates("op", torch.empty(1, device="meta"))
    assert choose("op", None, options) == "reference"
    with pytest.raises(BackendUnavailable, match="'triton'.*meta"):
        choose("op", "triton", options)
