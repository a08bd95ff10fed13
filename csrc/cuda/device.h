// What the kernels share: loads and stores of any dtype, 16-byte vectors, launches. Included by .cu files only.
//
// tests/cuda_on_cpu compiles the same files as plain C++, one fiber per thread, with headers of its own in place of
// CUDA's. What it asks of a kernel: `JT_DYNAMIC_SHARED(name)` for dynamic shared memory, launches through launch(),
// no inline PTX outside of this page, and no intrinsic that tests/cuda_on_cpu/cuda_runtime.h does not have.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda/launch.h"

#if defined(__CUDACC__)
#define JT_DEVICE __device__ __forceinline__
#define JT_UNROLL _Pragma("unroll")
#define JT_ROLLED _Pragma("unroll 1")
// Dynamic shared memory as bytes. One name per file: all declarations of a file are one symbol.
#define JT_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#else
#define JT_DEVICE inline
#define JT_UNROLL
#define JT_ROLLED
#define JT_DYNAMIC_SHARED(name) unsigned char* const name = cuda_on_cpu::dynamic_shared()
#endif

namespace jambatalk::cuda {

// ---- dtypes

template <class T>
struct DtypeOf;
template <>
struct DtypeOf<float> {
  static constexpr Dtype value = Dtype::kFloat32;
};
template <>
struct DtypeOf<double> {
  static constexpr Dtype value = Dtype::kFloat64;
};
template <>
struct DtypeOf<__nv_bfloat16> {
  static constexpr Dtype value = Dtype::kBFloat16;
};
template <>
struct DtypeOf<__half> {
  static constexpr Dtype value = Dtype::kFloat16;
};

template <class To>
JT_DEVICE To convert(float x) {
  if constexpr (std::is_same_v<To, __nv_bfloat16>)
    return __float2bfloat16_rn(x);
  else if constexpr (std::is_same_v<To, __half>)
    return __float2half_rn(x);
  else
    return To(x);
}
template <class To>
JT_DEVICE To convert(double x) {
  if constexpr (std::is_same_v<To, __nv_bfloat16>)
    return __double2bfloat16(x);
  else if constexpr (std::is_same_v<To, __half>)
    return __double2half(x);
  else
    return To(x);
}
template <class To>
JT_DEVICE To convert(__nv_bfloat16 x) {
  return To(__bfloat162float(x));
}
template <class To>
JT_DEVICE To convert(__half x) {
  return To(__half2float(x));
}

// Element `at` of an array whose dtype is known at run time only: the same branch for all threads, so it costs issue
// slots, not divergence. T is the compute type.
template <class T>
JT_DEVICE T load_any(const Array& array, int64_t at) {
  switch (array.dtype) {
    case Dtype::kFloat32:
      return convert<T>(static_cast<const float*>(array.data)[at]);
    case Dtype::kFloat64:
      return convert<T>(static_cast<const double*>(array.data)[at]);
    case Dtype::kBFloat16:
      return convert<T>(static_cast<const __nv_bfloat16*>(array.data)[at]);
    default:
      return convert<T>(static_cast<const __half*>(array.data)[at]);
  }
}

template <class T>
JT_DEVICE void store_any(const Array& array, int64_t at, T value) {
  switch (array.dtype) {
    case Dtype::kFloat32:
      static_cast<float*>(array.data)[at] = convert<float>(value);
      break;
    case Dtype::kFloat64:
      static_cast<double*>(array.data)[at] = convert<double>(value);
      break;
    case Dtype::kBFloat16:
      static_cast<__nv_bfloat16*>(array.data)[at] = convert<__nv_bfloat16>(value);
      break;
    default:
      static_cast<__half*>(array.data)[at] = convert<__half>(value);
  }
}

JT_DEVICE int64_t offset(const Array& array, int64_t i, int64_t j, int64_t k) {
  return i * array.stride[0] + j * array.stride[1] + k * array.stride[2];
}

// ---- vectors: N values that move in one instruction (4, 8 or 16 bytes; several where they are more)

template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Vector {
  T lane[N];
};

template <int Bytes>
struct Word;
template <>
struct Word<2> {
  using type = unsigned short;
};
template <>
struct Word<4> {
  using type = unsigned;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

// Through words, since a struct of small members may be moved member by member.
template <class T, int N>
JT_DEVICE Vector<T, N> load_vector(const T* at) {
  using W = typename Word<alignof(Vector<T, N>)>::type;
  constexpr int kWords = int(sizeof(Vector<T, N>) / sizeof(W));
  Vector<T, N> vector;
  W words[kWords];
  JT_UNROLL
  for (int i = 0; i < kWords; ++i) words[i] = reinterpret_cast<const W*>(at)[i];
  memcpy(&vector, words, sizeof(vector));
  return vector;
}

template <class T, int N>
JT_DEVICE void store_vector(T* at, const Vector<T, N>& vector) {
  using W = typename Word<alignof(Vector<T, N>)>::type;
  constexpr int kWords = int(sizeof(Vector<T, N>) / sizeof(W));
  W words[kWords];
  memcpy(words, &vector, sizeof(vector));
  JT_UNROLL
  for (int i = 0; i < kWords; ++i) __stwb(reinterpret_cast<W*>(at) + i, words[i]);  // = would become 4-byte stores
}

// May `Vector<T, N>` be used along the last dimension of `array`, at multiples of N? Host side.
template <class T, int N>
bool vectors_fit(const Array& array) {
  constexpr int64_t bytes = alignof(Vector<T, N>);
  return array.dtype == DtypeOf<T>::value && array.stride[2] == 1 &&
         reinterpret_cast<uintptr_t>(array.data) % bytes == 0 && array.stride[0] * int64_t(sizeof(T)) % bytes == 0 &&
         array.stride[1] * int64_t(sizeof(T)) % bytes == 0;
}

// ---- functions on the special function unit

// x * sigmoid(x) = x / (1 + e^-x), to some ulp.
template <class T>
JT_DEVICE T silu(T x) {
  if constexpr (std::is_same_v<T, float>)
    return __fdividef(x, 1.0f + expf(-x));
  else
    return x / (T(1) + ::exp(-x));
}
template <class T>
JT_DEVICE T sigmoid(T x) {
  if constexpr (std::is_same_v<T, float>)
    return __fdividef(1.0f, 1.0f + expf(-x));
  else
    return T(1) / (T(1) + ::exp(-x));
}
// The same for results that are rounded to 16 bits: e^x with an error of |x| ulp takes two instructions, not eight.
JT_DEVICE float silu_16bit(float x) { return __fdividef(x, 1.0f + __expf(-x)); }
JT_DEVICE float sigmoid_16bit(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }

// ---- blocks that meet

// 16 bytes that nobody writes while the kernel runs and that this multiprocessor needs once in a while only.
JT_DEVICE uint4 load_streamed(const uint4* at) {
#if defined(__CUDACC__)
  uint4 value;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
      : "l"(at));
  return value;
#else
  return *at;
#endif
}

// What this block wrote before is seen by whoever reads the new value with load_acquire.
JT_DEVICE void add_release(unsigned* at, unsigned value) {
#if defined(__CUDACC__)
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(at), "r"(value) : "memory");
#else
  *at += value;
#endif
}
JT_DEVICE unsigned load_acquire(const unsigned* at) {
#if defined(__CUDACC__)
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
  return value;
#else
  return *at;
#endif
}

// Nanoseconds of the device's clock. On the host a millisecond passes with every look, and other threads go on.
JT_DEVICE uint64_t look_at_clock() {
#if defined(__CUDACC__)
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
#else
  return cuda_on_cpu::look_at_clock();
#endif
}

// ---- launches

// How many blocks the device holds at once.
template <class... Parameters>
int64_t most_blocks(void (*kernel)(Parameters...), int threads, int64_t shared, const Device& device) {
  int blocks = 0;
  const cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, size_t(shared));
  return error == cudaSuccess ? int64_t(blocks) * device.multiprocessors : 0;
}

// kernel<<<blocks, threads, shared, stream>>>(arguments...), with the error, and the permission that more than 48 KB of
// dynamic shared memory needs. An empty grid launches nothing. `together`: all blocks run at once, or none does.
template <class... Parameters, class... Arguments>
const char* launch_some(bool together, void (*kernel)(Parameters...), dim3 blocks, dim3 threads, int64_t shared,
                        const Device& device, const Arguments&... arguments) {
  if (blocks.x == 0 || blocks.y == 0 || blocks.z == 0) return nullptr;
  cudaError_t error = cudaSuccess;
  if (shared > 48 * 1024) {
    error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 int(shared));
  }
  if (error == cudaSuccess) {
    cudaLaunchConfig_t config{};
    config.gridDim = blocks, config.blockDim = threads, config.dynamicSmemBytes = size_t(shared);
    config.stream = static_cast<cudaStream_t>(device.stream);
    cudaLaunchAttribute cooperative{};
    cooperative.id = cudaLaunchAttributeCooperative, cooperative.val.cooperative = 1;
    if (together) config.attrs = &cooperative, config.numAttrs = 1;
    error = cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
  }
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // clear it: it is reported here
  return cudaGetErrorString(error);
}

template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), dim3 blocks, dim3 threads, int64_t shared, const Device& device,
                   const Arguments&... arguments) {
  return launch_some(false, kernel, blocks, threads, shared, device, arguments...);
}

}  // namespace jambatalk::cuda
