"""The expert kernels as they are launched on Hopper, for gpu_code.compile_triton, which asks for no capability."""

from jambatalk_kernels.moe import triton_mlp


def ahead_of_time_cases():
    return triton_mlp.ahead_of_time_cases((9, 0))
