#include "cpu/tensors.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>

namespace jambatalk {
namespace {

void spoil(void* memory, size_t bytes) {
  const char* check = std::getenv("JAMBATALK_KERNELS_CHECK");
  // All bits set is NaN in every float format.
  if (check != nullptr && *check != '\0' && std::strcmp(check, "0") != 0) std::memset(memory, 0xff, bytes);
}

}  // namespace

Tensor new_tensor(ScalarType type, std::initializer_list<int64_t> sizes) {
  int64_t strides[4], step = 1;
  STD_TORCH_CHECK(sizes.size() <= 4, "at most four dimensions");
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = step;
    step *= sizes.begin()[i];
  }
  int32_t dtype = aoti_torch_dtype_float32();
  if (type == ScalarType::Double) dtype = aoti_torch_dtype_float64();
  if (type == ScalarType::BFloat16) dtype = aoti_torch_dtype_bfloat16();
  if (type == ScalarType::Half) dtype = aoti_torch_dtype_float16();
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.begin(), strides, dtype,
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  Tensor tensor(handle);
  spoil(tensor.mutable_data_ptr(), size_t(step) * tensor.element_size());
  return tensor;
}

Memory new_memory(size_t bytes) {
  Memory memory(std::aligned_alloc(64, std::max<size_t>(64, (bytes + 63) / 64 * 64)));
  STD_TORCH_CHECK(memory != nullptr, "out of memory");
  spoil(memory.get(), bytes);
  return memory;
}

void fill_zero(Tensor& tensor) {
  if (tensor.numel() > 0) std::memset(tensor.mutable_data_ptr(), 0, size_t(tensor.numel()) * tensor.element_size());
}

Pieces::Pieces(const OptionalTensor& cu_seqlens, int64_t batch, int64_t length, int64_t chunk) {
  const auto add = [&](int64_t begin, int64_t end, int64_t sequence) {
    int64_t at = begin;
    do {
      const int64_t next = std::min(end, (at / chunk + 1) * chunk);
      list.push_back({at, next, sequence, begin, end, at == begin, next == end});
      longest = std::max(longest, next - at);
      at = next;
    } while (at < end);
  };
  if (!cu_seqlens.has_value()) {
    add(0, length, 0);
    return;
  }
  const int32_t* bounds = static_cast<const int32_t*>(cu_seqlens->const_data_ptr());
  const int64_t count = cu_seqlens->size(0), step = cu_seqlens->stride(0);
  int64_t begin = std::clamp<int64_t>(bounds[0], 0, length);
  for (int64_t s = 0; s + 1 < count; ++s) {
    const int64_t end = std::max(begin, std::clamp<int64_t>(bounds[(s + 1) * step], 0, length));
    add(begin, end, s);
    begin = end;
  }
}

void sum_over_batch(const Tensor& partial, Tensor& total) {
  const int64_t count = total.numel(), step = 1024;  // a flat sum, in rows of `step` for the threads' sake
  const int64_t whole = count / step;
  const auto run = [&](int64_t begin, int64_t rows, int64_t columns) {
    SumCall call{};
    call.batch = 1, call.groups = rows, call.terms = partial.size(0), call.columns = columns;
    call.partial = static_cast<const char*>(partial.const_data_ptr()) + begin * int64_t(partial.element_size());
    call.row_stride = columns, call.term_stride = count;
    call.target.dtype = memory_type("total", total);
    call.target.data = static_cast<char*>(total.mutable_data_ptr()) + begin * int64_t(total.element_size());
    call.target.stride[1] = columns, call.target.stride[2] = 1;
    run_tasks(kernels_for(partial.scalar_type()).sum_terms, call, call.terms * columns / 8);
  };
  run(0, whole, step);
  if (count > whole * step) run(whole * step, 1, count - whole * step);
}

}  // namespace jambatalk
