// Tensors of the stable ABI as the kernels see them, with the checks that keep a wrong call from reading wild memory.
// The friendly messages are Python's (jambatalk_kernels/*/op.py); these are the last line of defence.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <optional>
#include <vector>

#include "cpu/isa.h"

namespace jambatalk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline ScalarType compute_type(const Tensor& like) {
  return like.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Dtype memory_type(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::Double:
      return Dtype::kFloat64;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    default:
      STD_TORCH_CHECK(false, name, ": expected a float dtype");
  }
}

inline Array as_array(const char* name, const Tensor& tensor, std::initializer_list<int64_t> sizes) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, ": expected a CPU tensor");
  const auto shape = tensor.sizes(), strides = tensor.strides();
  STD_TORCH_CHECK(shape.size() == sizes.size(), name, ": expected ", sizes.size(), " dimensions, got ", shape.size());
  Array array;
  array.dtype = memory_type(name, tensor);
  STD_TORCH_CHECK(sizes.size() <= 3, name, ": at most three dimensions");
  const size_t missing = 3 - sizes.size();
  size_t i = 0;
  for (int64_t size : sizes) {
    STD_TORCH_CHECK(shape[i] == size, name, ": expected size ", size, " in dimension ", i, ", got ", shape[i]);
    array.stride[missing + i] = strides[i];
    ++i;
  }
  array.data = const_cast<void*>(tensor.const_data_ptr());
  return array;
}

inline Array as_array(const char* name, const OptionalTensor& tensor, std::initializer_list<int64_t> sizes) {
  return tensor.has_value() ? as_array(name, *tensor, sizes) : Array{};
}

// A new contiguous CPU tensor. With JAMBATALK_KERNELS_CHECK=1 it is full of NaN, so that a test sees what was not
// written.
Tensor new_tensor(ScalarType type, std::initializer_list<int64_t> sizes);

// Aligned memory of an op's own, which costs a call less than a tensor; as a new tensor, it may be full of NaN.
struct FreeMemory {
  void operator()(void* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<void, FreeMemory>;
Memory new_memory(size_t bytes);
void fill_zero(Tensor& tensor);

// The gradient of `tensor`: a new tensor like it, or an empty one where there is nothing to take a gradient of.
inline Tensor new_gradient(const OptionalTensor& tensor, ScalarType otherwise, std::initializer_list<int64_t> sizes) {
  return tensor.has_value() ? new_tensor(tensor->scalar_type(), sizes) : new_tensor(otherwise, {0});
}

// The sequences of a call, cut into pieces where a chunk begins (positions that are multiples of `chunk`). The values
// of cu_seqlens are clamped into 0 .. length, and to rise.
struct Pieces {
  std::vector<Piece> list;
  int64_t longest = 0;
  Pieces(const OptionalTensor& cu_seqlens, int64_t batch, int64_t length, int64_t chunk);
};

inline int64_t sequences_of(const OptionalTensor& cu_seqlens, int64_t batch) {
  if (!cu_seqlens.has_value()) return batch;
  STD_TORCH_CHECK(cu_seqlens->dim() == 1 && cu_seqlens->size(0) >= 2 && cu_seqlens->is_cpu() && batch == 1 &&
                      cu_seqlens->scalar_type() == ScalarType::Int,
                  "cu_seqlens: expected int32 (sequences + 1,) on the CPU, and batch 1");
  return cu_seqlens->size(0) - 1;
}

// Groups of channels, each a multiple of the padding.
inline int64_t group_size(int64_t channels, int64_t groups) {
  const int64_t even = (channels + groups - 1) / groups;
  const int64_t padded = (even + kChannelPadding - 1) / kChannelPadding * kChannelPadding;
  return padded > 0 ? padded : kChannelPadding;
}
inline int64_t padded_channels(int64_t channels) {
  return (channels + kChannelPadding - 1) / kChannelPadding * kChannelPadding;
}
inline int64_t group_count(int64_t channels, int64_t group_channels) {
  return (channels + group_channels - 1) / group_channels;
}

// Runs kernel(call, begin, end) over batch * groups tasks; `cost` is the work of one task in vector operations or so.
template <class Call>
void run_tasks(void (*kernel)(const Call&, int64_t, int64_t), const Call& call, int64_t cost) {
  const int64_t tasks = call.batch * call.groups;
  if (tasks == 0) return;
  // A thread is worth waking for some ten microseconds of work.
  const int64_t grain = cost > 0 ? 1 + 40000 / cost : tasks;
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
}

inline const KernelSet& kernels_for(ScalarType compute) {
  return compute == ScalarType::Double ? kernels().float64 : kernels().float32;
}

// partial (batch, ...) -> total (...), in total's dtype.
void sum_over_batch(const Tensor& partial, Tensor& total);

}  // namespace jambatalk
