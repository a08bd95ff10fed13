// Kernels with one mistake each, for test_cuda_on_cpu.py; mistake 0 is none.
#include "cuda/device.h"
#include <cuda_pipeline.h>

namespace jambatalk::cuda {
namespace {

__global__ void flawed_kernel(const float* in, float* out, int mistake) {
  __shared__ float fixed[64];
  JT_DYNAMIC_SHARED(bytes);
  float* sized = reinterpret_cast<float*>(bytes);
  const int i = int(threadIdx.x);
  if (mistake == 1 && i >= 32) return;  // and the others wait for it
  if (mistake != 2 || i != 7) fixed[i] = in[i];
  if (mistake == 3 && i < 32) __syncthreads();  // a barrier that half of the threads do not see
  __pipeline_memcpy_async(sized + i * 4, in + i * 4, 16);
  __pipeline_commit();
  if (mistake != 4) __pipeline_wait_prior(0);
  if (mistake != 5) __syncthreads();
  float sum = fixed[63 - i] + sized[(63 - i) * 4];
  if (mistake == 6) sum += sized[mistake + 4 * 64 + i];  // beyond the end
  if (mistake != 7 || i % 32 < 16) sum += __shfl_xor_sync(0xffffffffu, sum, 1);
  if (mistake == 8) sum += __shfl_down_sync(0x0000ffffu, sum, 1);  // called by lanes that the mask leaves out
  out[i] = sum + float(__popc(__ballot_sync(0xffffffffu, i & 1)));
}

}  // namespace
}  // namespace jambatalk::cuda

extern "C" const char* cuda_on_cpu_mistake(const float* in, float* out, int mistake) {
  using namespace jambatalk::cuda;
  return launch(flawed_kernel, 1, 64, mistake == 9 ? 300 * 1024 : 1024, Device{}, in, out, mistake);
}
