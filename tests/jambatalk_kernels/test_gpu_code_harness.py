"""The harness that reads GPU machine code sees what it should: on kernels made to be good or bad."""

import gpu_code
import pytest

needs_triton = pytest.mark.skipif(gpu_code.missing_tools() is not None, reason=str(gpu_code.missing_tools()))
needs_nvcc = pytest.mark.skipif(gpu_code.nvcc() is None, reason="there is no nvcc on this machine")

BAD_AND_GOOD = """
__global__ void narrow(const float* x, float* y, int n) {
  for (int t = 0; t < n; ++t) y[t * 128 + threadIdx.x] = x[t * 128 + threadIdx.x];
}
template <int N>
__global__ void wide(const float4* x, float4* y, int n) {
  for (int t = 0; t < n; ++t) y[t * N + threadIdx.x] = x[t * N + threadIdx.x];
}
template __global__ void wide<64>(const float4*, float4*, int);
__global__ void local(const int* x, float* y) {
  float kept[64];
  for (int i = 0; i < 64; ++i) kept[x[i] & 63] = i;
  __shared__ float shared[256];
  shared[threadIdx.x] = kept[x[threadIdx.x] & 63];
  __syncthreads();
  y[threadIdx.x] = shared[255 - threadIdx.x];
}
"""


@needs_triton
@pytest.mark.parametrize(
    ("value", "kind"),
    [(1e-6, "fp32"), (0.0, "fp32"), (1.0, "fp32"), (1, "constexpr"), (None, "constexpr"), (3, "i32"), (48, "i32:16")],
)
def test_arguments_are_compiled_as_what_a_launch_would_make_of_them(value, kind):
    from jambatalk_kernels.triton_launches import _kind

    assert _kind(value) == kind


@needs_triton
def test_triton_samples():
    codes = gpu_code.compile_triton("gpu_code_samples", 90)
    assert set(codes) == {"wide", "narrow", "spilling"}
    wide, narrow, spilling = codes["wide"], codes["narrow"], codes["spilling"]
    # 256 values of 2 bytes by 32 threads: one load of 16 bytes each; without alignment, eight of 2.
    loop = wide.hot_loop(r"MUFU\.EX2")
    assert loop.count(r"LDG\.E\.128") >= 1 and loop.count(r"LDG") == loop.count(r"LDG\.E\.128")
    assert loop.count(r"MUFU\.EX2") == 8 * loop.count(r"LDG")
    assert narrow.hot_loop(r"MUFU").count(r"LDG\S*\.128") == 0
    assert narrow.hot_loop(r"MUFU").count(r"LDG\S*\.U16") >= 8
    assert wide.local_memory == 0 and wide.stack_bytes == 0 and 0 < wide.registers < 255
    # 128 x 128 floats do not fit 32 threads' registers.
    assert spilling.local_memory > 0 and spilling.stack_bytes > 0
    assert wide.warps == 1 and wide.shared_bytes == 0


@needs_triton
@needs_nvcc
def test_cuda_samples(tmp_path):
    source = tmp_path / "samples.cu"
    source.write_text(BAD_AND_GOOD)
    codes = gpu_code.compile_cuda(str(source), "sm_89")
    assert set(codes) == {"narrow", "wide<64>", "local"}
    assert codes["wide<64>"].count(r"LDG\.E\.128") >= 1 and codes["narrow"].count(r"LDG\.E\.128") == 0
    assert codes["wide<64>"].innermost_loops() and codes["narrow"].innermost_loops()
    assert codes["local"].local_memory > 0 and codes["local"].stack_bytes == 256
    assert codes["local"].shared_bytes == 1024 and codes["narrow"].spill_bytes == 0
    assert codes["narrow"].registers > 0


def test_ptxas_report():
    text = (
        "ptxas info    : Compiling entry function '_Z1a' for 'sm_89'\n"
        "ptxas info    : Function properties for _Z1a\n"
        "    8 bytes stack frame, 20 bytes spill stores, 24 bytes spill loads\n"
        "ptxas info    : Used 56 registers, used 1 barriers, 8 bytes cumulative stack size, 2048 bytes smem\n"
        "ptxas info    : Compiling entry function '_Z1b' for 'sm_89'\n"
        "ptxas info    : Function properties for _Z1b\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 10 registers, used 0 barriers\n"
    )
    assert gpu_code.ptxas_report(text) == {
        "_Z1a": {"registers": 56, "stack_bytes": 8, "spill_bytes": 44, "shared_bytes": 2048},
        "_Z1b": {"registers": 10, "stack_bytes": 0, "spill_bytes": 0, "shared_bytes": 0},
    }
