// CUDA on the host, for tests: stands in for CUDA's headers, so that csrc/cuda/*.cu compile as plain C++ and their
// results can be checked without a GPU. This folder comes first in the include path.
//
// Every thread of a block is a fiber; blocks run one after another, the fibers of a block in a fixed order (forwards,
// or backwards after cuda_on_cpu_order(1): a kernel whose bytes change with the order has a race). A fiber runs until
// it waits for the others. It is an error, reported as the launch's error with file and line, when
//   - __syncthreads is not reached by all threads of the block, or by some on another line;
//   - a warp function is called by lanes that its mask does not name, or with a mask that names lanes which have ended,
//     do not exist, or wait for something else.
// Shared memory is full of NaN when a block begins, so is what a shuffle gets from a lane outside of its mask, and an
// asynchronous copy happens when it is waited for, not before. Under AddressSanitizer an access beyond shared memory is
// found too. The blocks of a cooperative launch run in turns, each until all its threads wait or look at the clock;
// static shared memory would be one for all of them. What is not modelled: memory order, within a warp beyond the two
// orders and between blocks at all; approximate functions (the exact ones run), limits on registers.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

// ---- what the compiler knows in CUDA

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#if defined(CUDA_ON_CPU_ASAN)
#define __shared__ static  // with redzones around it
#else
#define __shared__ static thread_local  // together in one place, which can be poisoned
#endif

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

#define CUDA_ON_CPU_VECTOR(type, name)                             \
  struct alignas(2 * sizeof(type)) name##2 { type x, y; };         \
  struct alignas(16) name##4 { type x, y, z, w; };                 \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; } \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
CUDA_ON_CPU_VECTOR(float, float)
CUDA_ON_CPU_VECTOR(double, double)
CUDA_ON_CPU_VECTOR(int, int)
CUDA_ON_CPU_VECTOR(unsigned, uint)
#undef CUDA_ON_CPU_VECTOR

// ---- the runtime

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719,
  cudaErrorCooperativeLaunchTooLarge = 720
};
using cudaStream_t = struct CUstream_st*;
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative = 2 };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int cooperative;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor
};
// A small card, so that small inputs are cut into pieces too: 4 multiprocessors of sm_89.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? 4 : attribute == cudaDevAttrComputeCapabilityMajor ? 8 : 9;
  return cudaSuccess;
}

// One block of any kernel on each of them.
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}

const char* cudaGetErrorString(cudaError_t error);
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);
inline cudaError_t cudaMemsetAsync(void* target, int value, size_t bytes, cudaStream_t) {
  if (bytes > 0) std::memset(target, value, bytes);
  return cudaSuccess;
}

namespace cuda_on_cpu {

enum class Operation { kBarrier, kSyncWarp, kShuffle, kBallot, kReduce };

unsigned char* dynamic_shared();
cudaError_t run(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& thread);
void wait_for_block(const char* file, int line);
// Gives `value` to the lanes of `mask` and waits for theirs; -> the 32 values, valid until the next wait.
const uint64_t* exchange(Operation operation, unsigned mask, uint64_t value, const char* file, int line);
int lane();
uint64_t look_at_clock();  // a millisecond later than the last time, and after everybody else had a turn
void copy_later(void* target, const void* source, size_t bytes, size_t zeros);
void commit_copies();
void wait_for_copies(size_t but);

template <class T>
T shuffle(unsigned mask, T value, int source, const char* file, int line) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  const uint64_t* all = exchange(Operation::kShuffle, mask, bits, file, line);
  bits = (mask >> source & 1) != 0 ? all[source] : ~uint64_t(0);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace cuda_on_cpu

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  return cuda_on_cpu::run(*config, reinterpret_cast<const void*>(kernel), [&] { kernel(Parameters(arguments)...); });
}

// ---- synchronisation and warp functions

#define CUDA_ON_CPU_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(CUDA_ON_CPU_HERE) { cuda_on_cpu::wait_for_block(file, line); }
inline void __syncwarp(unsigned mask = 0xffffffffu, CUDA_ON_CPU_HERE) {
  cuda_on_cpu::exchange(cuda_on_cpu::Operation::kSyncWarp, mask, 0, file, line);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, CUDA_ON_CPU_HERE) {
  const int lane = cuda_on_cpu::lane();
  return cuda_on_cpu::shuffle(mask, value, (lane & ~(width - 1)) | (source & (width - 1)), file, line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, CUDA_ON_CPU_HERE) {
  const int lane = cuda_on_cpu::lane(), source = lane ^ bits;
  return cuda_on_cpu::shuffle(mask, value, source < (lane & ~(width - 1)) + width ? source : lane, file, line);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, CUDA_ON_CPU_HERE) {
  const int lane = cuda_on_cpu::lane(), source = lane - int(by);
  return cuda_on_cpu::shuffle(mask, value, source >= (lane & ~(width - 1)) ? source : lane, file, line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, CUDA_ON_CPU_HERE) {
  const int lane = cuda_on_cpu::lane(), source = lane + int(by);
  return cuda_on_cpu::shuffle(mask, value, source < (lane & ~(width - 1)) + width ? source : lane, file, line);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, CUDA_ON_CPU_HERE) {
  const uint64_t* all = cuda_on_cpu::exchange(cuda_on_cpu::Operation::kBallot, mask, predicate != 0, file, line);
  unsigned result = 0;
  for (int i = 0; i < 32; ++i) result |= unsigned((mask >> i & 1) != 0 && all[i] != 0) << i;
  return result;
}
inline int __any_sync(unsigned mask, int predicate, CUDA_ON_CPU_HERE) {
  return __ballot_sync(mask, predicate, file, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, CUDA_ON_CPU_HERE) {
  return __ballot_sync(mask, predicate, file, line) == mask;
}
inline unsigned __activemask() { return 0xffffffffu; }
inline void __threadfence() {}
inline void __threadfence_block() {}

// ---- loads with a hint, bits, arithmetic

template <class T>
T __ldg(const T* at) {
  return *at;
}
template <class T>
T __ldcs(const T* at) {
  return *at;
}
template <class T>
T __ldcg(const T* at) {
  return *at;
}
template <class T>
void __stcs(T* at, T value) {
  *at = value;
}
template <class T>
void __stcg(T* at, T value) {
  *at = value;
}
template <class T>
void __stwb(T* at, T value) {
  *at = value;
}

inline float __int_as_float(int x) {
  float y;
  std::memcpy(&y, &x, 4);
  return y;
}
inline int __float_as_int(float x) {
  int y;
  std::memcpy(&y, &x, 4);
  return y;
}
inline float __uint_as_float(unsigned x) { return __int_as_float(int(x)); }
inline unsigned __float_as_uint(float x) { return unsigned(__float_as_int(x)); }
inline double __longlong_as_double(long long x) {
  double y;
  std::memcpy(&y, &x, 8);
  return y;
}
inline long long __double_as_longlong(double x) {
  long long y;
  std::memcpy(&y, &x, 8);
  return y;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }

inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline void sincospif(float x, float* sine, float* cosine) {
  *sine = float(std::sin(double(x) * 3.141592653589793)), *cosine = float(std::cos(double(x) * 3.141592653589793));
}
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline int __float2int_rn(float x) { return int(std::nearbyint(x)); }

template <class T>
constexpr T min(T x, T y) {
  return y < x ? y : x;
}
template <class T>
constexpr T max(T x, T y) {
  return x < y ? y : x;
}
