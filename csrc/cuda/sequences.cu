// bounds_i = max over j <= i of clamp(cu_seqlens_j, 0, length): what the kernels of packed calls walk and search. One
// block; a thread takes a run of entries, and the runs' maxima are combined in shared memory. Some microseconds, for
// packed calls only, and no other kernel need distrust the values.
#include "cuda/device.h"

namespace jambatalk::cuda {
namespace {

constexpr int kThreads = 256;

// budget: registers <= 40, spills 0, shared <= 1024
__global__ void __launch_bounds__(kThreads) bounds_kernel(const BoundsCall call) {
  __shared__ int32_t highest[kThreads];  // of each thread's run, then of all runs up to it
  const int64_t count = call.sequences + 1, run = (count + kThreads - 1) / kThreads;
  const int64_t begin = min(int64_t(threadIdx.x) * run, count), end = min(begin + run, count);
  const int32_t limit = int32_t(min(call.length, int64_t(2147483647)));
  int32_t most = 0;
  for (int64_t i = begin; i < end; ++i) most = max(most, min(call.cu_seqlens[i * call.stride], limit));
  highest[threadIdx.x] = most;
  for (int step = 1; step < kThreads; step *= 2) {
    __syncthreads();
    const int32_t before = int(threadIdx.x) >= step ? highest[threadIdx.x - step] : 0;
    __syncthreads();
    highest[threadIdx.x] = max(highest[threadIdx.x], before);
  }
  __syncthreads();
  most = threadIdx.x > 0 ? highest[threadIdx.x - 1] : 0;
  for (int64_t i = begin; i < end; ++i) {
    most = max(most, min(call.cu_seqlens[i * call.stride], limit));
    call.bounds[i] = most;
  }
}

}  // namespace

const char* launch_bounds(const BoundsCall& call) { return launch(bounds_kernel, 1, kThreads, 0, call.device, call); }

}  // namespace jambatalk::cuda
