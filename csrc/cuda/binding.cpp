// The CUDA ops on torch's side: checks, outputs, the current device and stream. The only CUDA file that sees torch
// (its stable ABI); compiled by the host's compiler, and by tests/cuda_on_cpu for CPU tensors (JAMBATALK_CUDA_ON_CPU).
//
// Nothing here waits for the device or reads its memory, so everything can be captured in a CUDA graph.
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <vector>

#include "common/plan.h"
#include "cuda/launch.h"
#include "cuda/ops.h"

#if !defined(JAMBATALK_CUDA_ON_CPU)
// In torch's CUDA library only. Weak: a module with CUDA kernels then also loads beside a CPU build of torch.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

namespace jambatalk::cuda {
namespace {

using torch::headeronly::ScalarType;

// Asked once per device: the answers never change, and asking costs as much as a launch.
Device device_facts(int32_t index) {
  constexpr int kKnown = 64;
  static std::atomic<uint64_t> known[kKnown];
  const bool keep = index >= 0 && index < kKnown;
  uint64_t facts = keep ? known[index].load(std::memory_order_relaxed) : 0;
  if (facts == 0) {
    const auto ask = [&](cudaDeviceAttr attribute) {
      int value = 0;
      const cudaError_t error = cudaDeviceGetAttribute(&value, attribute, std::max(index, 0));
      STD_TORCH_CHECK(error == cudaSuccess, "the CUDA runtime does not answer: ", cudaGetErrorString(error));
      return uint64_t(value);
    };
    facts = ask(cudaDevAttrMultiProcessorCount) << 32 |
            (10 * ask(cudaDevAttrComputeCapabilityMajor) + ask(cudaDevAttrComputeCapabilityMinor));
    if (keep) known[index].store(facts, std::memory_order_relaxed);
  }
  return {int32_t(facts >> 32), int32_t(facts & 0xffffffff), nullptr};
}

// One call of an op: where it runs (on the device of its first tensor, which is made the current one, and on torch's
// current stream there), and what it needs from torch.
class Call {
 public:
  Call(const char* op, const Tensor& first) : op_(op) {
    type_ = device_type(first), index_ = first.get_device_index();
#if defined(JAMBATALK_CUDA_ON_CPU)
    device_ = device_facts(index_);
#else
    check(first.is_cuda() && aoti_torch_get_current_cuda_stream != nullptr, "expected CUDA tensors, and CUDA in torch");
    guard_.emplace(index_);
    device_ = device_facts(index_);
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &device_.stream));
#endif
  }

  const Device& device() const { return device_; }

  template <class... Words>
  void check(bool good, const Words&... words) const {
    STD_TORCH_CHECK(good, op_, ": ", words...);
  }
  void launched(const char* error) const { check(error == nullptr, error == nullptr ? "" : error); }

  bool is_here(const Tensor& tensor) const {
    return device_type(tensor) == type_ && tensor.get_device_index() == index_;
  }

  Array array(const char* name, const Tensor& tensor, std::initializer_list<int64_t> sizes) const {
    check(is_here(tensor), name, ": expected a tensor on the device of the first argument");
    check(sizes.size() <= 3, name, ": at most three dimensions");
    const auto shape = tensor.sizes(), strides = tensor.strides();
    check(shape.size() == sizes.size(), name, ": expected ", sizes.size(), " dimensions, got ", shape.size());
    Array array{};
    array.dtype = dtype(name, tensor);
    size_t i = 0;
    for (int64_t size : sizes) {
      check(shape[i] == size, name, ": expected size ", size, " in dimension ", i, ", got ", shape[i]);
      array.stride[3 - sizes.size() + i] = strides[i];
      ++i;
    }
    array.data = const_cast<void*>(tensor.const_data_ptr());
    return array;
  }
  Array array(const char* name, const OptionalTensor& tensor, std::initializer_list<int64_t> sizes) const {
    return tensor.has_value() ? array(name, *tensor, sizes) : Array{};
  }

  // A new contiguous tensor. With JAMBATALK_KERNELS_CHECK=1 it is full of NaN: a test sees what was not written.
  Tensor create(ScalarType type, std::initializer_list<int64_t> sizes) const {
    int64_t strides[4], step = 1;
    for (size_t i = sizes.size(); i-- > 0;) {
      strides[i] = step;
      step *= sizes.begin()[i];
    }
    int32_t code = aoti_torch_dtype_float32();
    if (type == ScalarType::Double) code = aoti_torch_dtype_float64();
    if (type == ScalarType::BFloat16) code = aoti_torch_dtype_bfloat16();
    if (type == ScalarType::Half) code = aoti_torch_dtype_float16();
    if (type == ScalarType::Int) code = aoti_torch_dtype_int32();
    if (type == ScalarType::Byte) code = aoti_torch_dtype_uint8();
    AtenTensorHandle handle;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.begin(), strides, code, type_,
                                                           std::max(index_, 0), &handle));
    Tensor tensor(handle);
    const char* wish = std::getenv("JAMBATALK_KERNELS_CHECK");
    if (wish != nullptr && *wish != '\0' && std::strcmp(wish, "0") != 0 && step > 0) {
      // All bits set is NaN in every float format.
      const cudaError_t error = cudaMemsetAsync(tensor.mutable_data_ptr(), 0xff, size_t(step) * tensor.element_size(),
                                                static_cast<cudaStream_t>(device_.stream));
      launched(error == cudaSuccess ? nullptr : cudaGetErrorString(error));
    }
    return tensor;
  }

  // The gradient of `tensor`: a new tensor like it, or an empty one where there is nothing to take a gradient of.
  Tensor gradient(const OptionalTensor& tensor, ScalarType otherwise, std::initializer_list<int64_t> sizes) const {
    return tensor.has_value() ? create(tensor->scalar_type(), sizes) : create(otherwise, {0});
  }
  Array gradient_array(const OptionalTensor& of, const Tensor& gradient, std::initializer_list<int64_t> sizes) const {
    return of.has_value() ? array("gradient", gradient, sizes) : Array{};
  }

  int64_t sequences(const OptionalTensor& cu_seqlens, int64_t batch) const {
    if (!cu_seqlens.has_value()) return batch;
    check(cu_seqlens->dim() == 1 && cu_seqlens->size(0) >= 2 && is_here(*cu_seqlens) && batch == 1 &&
              cu_seqlens->scalar_type() == ScalarType::Int,
          "cu_seqlens: expected int32 (sequences + 1,) on the device of the first argument, and batch 1");
    return cu_seqlens->size(0) - 1;
  }

  // The bounds of packed sequences (see launch.h); an empty tensor without them.
  Tensor bounds(const OptionalTensor& cu_seqlens, int64_t batch, int64_t length) const {
    if (!cu_seqlens.has_value()) return create(ScalarType::Int, {0});
    const int64_t count = sequences(cu_seqlens, batch);
    Tensor result = create(ScalarType::Int, {count + 1});
    launched(launch_bounds({static_cast<const int32_t*>(cu_seqlens->const_data_ptr()), cu_seqlens->stride(0), count,
                            length, static_cast<int32_t*>(result.mutable_data_ptr()), device_}));
    return result;
  }

 private:
  static int32_t device_type(const Tensor& tensor) {
    int32_t type = 0;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type));
    return type;
  }

  Dtype dtype(const char* name, const Tensor& tensor) const {
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
        check(false, name, ": expected a float dtype");
        return Dtype::kFloat32;
    }
  }

  const char* op_;
  int32_t type_, index_;
  Device device_;
#if !defined(JAMBATALK_CUDA_ON_CPU)
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
#endif
};

ScalarType compute_type(const Tensor& like) {
  return like.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

const int32_t* bounds_pointer(const Tensor& bounds) {
  return bounds.numel() > 0 ? static_cast<const int32_t*>(bounds.const_data_ptr()) : nullptr;
}

// As in jambatalk_kernels/selective_scan/op.py (_native_chunk_states). Longer chunks would save less and recompute
// more.
int64_t chunk_length(int64_t states) { return (states + 63) / 64 * 64; }
int64_t padded_channels(int64_t channels) { return (channels + 15) / 16 * 16; }
int64_t chunks_of(const ScanCall& scan) { return scan.length > 0 ? (scan.length - 1) / scan.chunk : 0; }

void describe(const Call& call, ScanCall& scan, const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B,
              const Tensor& C, const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& delta_bias,
              const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens, const Tensor& bounds,
              bool softplus) {
  const int64_t b = scan.batch = u.size(0), l = scan.length = u.size(1), c = scan.channels = u.size(2);
  const int64_t n = scan.states = A.size(1);
  scan.sequences = call.sequences(cu_seqlens, b);
  scan.chunk = chunk_length(n), scan.padded_channels = padded_channels(c);
  scan.softplus = softplus;
  scan.u = call.array("u", u, {b, l, c});
  scan.delta = call.array("delta", delta, {b, l, c});
  scan.A = call.array("A", A, {c, n});
  scan.B = call.array("B", B, {b, l, n});
  scan.C = call.array("C", C, {b, l, n});
  scan.D = call.array("D", D, {c});
  scan.z = call.array("z", z, {b, l, c});
  scan.delta_bias = call.array("delta_bias", delta_bias, {c});
  scan.initial_state = call.array("initial_state", initial_state, {scan.sequences, c, n});
  scan.bounds = bounds_pointer(bounds);
  scan.device = call.device();
}

void describe(const Call& call, ConvCall& conv, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
              const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens, const Tensor& bounds, bool silu) {
  const int64_t b = conv.batch = x.size(0), l = conv.length = x.size(1), c = conv.channels = x.size(2);
  conv.width = weight.size(1), conv.silu = silu;
  conv.sequences = call.sequences(cu_seqlens, b);
  conv.x = call.array("x", x, {b, l, c});
  conv.weight = call.array("weight", weight, {c, conv.width});
  conv.bias = call.array("bias", bias, {c});
  conv.initial_state = call.array("initial_state", initial_state, {conv.sequences, conv.width - 1, c});
  conv.bounds = bounds_pointer(bounds);
  conv.device = call.device();
}

void check_scan(const Call& call, const Tensor& u, const Tensor& A, int64_t dimensions) {
  call.check(u.dim() == dimensions && A.dim() == 2 && A.size(1) >= 1,
             "expected u (batch, [length,] channels) and A (channels, states)");
}
void check_conv(const Call& call, const Tensor& x, const Tensor& weight, int64_t dimensions) {
  call.check(x.dim() == dimensions && weight.dim() == 2 && weight.size(1) >= 1 && weight.size(1) <= 16,
             "expected x (batch, [length,] channels) and weight (channels, width), width 1 to 16");
}

void check_route(const Call& call, RouteCall& route, const Tensor& logits, int64_t top_k) {
  call.check(logits.dim() == 2, "logits: expected (tokens, experts)");
  route.tokens = logits.size(0), route.experts = logits.size(1), route.top_k = top_k;
  call.check(route.experts <= 256 && top_k >= 1 && top_k <= std::min<int64_t>(route.experts, 16) &&
                 route.tokens < (int64_t{1} << 31) / top_k,
             "expected up to 256 experts, top_k of 1 to 16 and no more than experts, and tokens * top_k below 2^31");
  route.logits = call.array("logits", logits, {route.tokens, route.experts});
  route.device = call.device();
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> selective_scan(const Tensor& u, const Tensor& delta, const Tensor& A,
                                                  const Tensor& B, const Tensor& C, const OptionalTensor& D,
                                                  const OptionalTensor& z, const OptionalTensor& delta_bias,
                                                  const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens,
                                                  bool delta_softplus, bool save_states) {
  const Call call("selective_scan", u);
  check_scan(call, u, A, 3);
  const Tensor bounds = call.bounds(cu_seqlens, u.size(0), u.size(1));
  ScanForward scan{};
  describe(call, scan, u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, bounds, delta_softplus);
  const int64_t b = scan.batch, l = scan.length, c = scan.channels, n = scan.states;
  const ScalarType type = compute_type(u);
  Tensor y = call.create(u.scalar_type(), {b, l, c}), final_state = call.create(type, {scan.sequences, c, n});
  scan.y = call.array("y", y, {b, l, c});
  scan.final_state = call.array("final_state", final_state, {scan.sequences, c, n});
  Tensor chunk_states =
      save_states ? call.create(type, {b, chunks_of(scan), n, scan.padded_channels}) : call.create(type, {0});
  if (save_states) scan.chunk_states = chunk_states.mutable_data_ptr();
  Tensor workspace = call.create(ScalarType::Byte, {scan_forward_workspace(scan)});
  scan.workspace = workspace.mutable_data_ptr();
  call.launched(launch_scan_forward(scan));
  return {y, final_state, chunk_states};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> selective_scan_backward(
    const OptionalTensor& grad_y, const OptionalTensor& grad_final_state, const Tensor& u, const Tensor& delta,
    const Tensor& A, const Tensor& B, const Tensor& C, const OptionalTensor& D, const OptionalTensor& z,
    const OptionalTensor& delta_bias, const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens,
    const Tensor& chunk_states, bool delta_softplus) {
  const Call call("selective_scan_backward", u);
  check_scan(call, u, A, 3);
  const Tensor bounds = call.bounds(cu_seqlens, u.size(0), u.size(1));
  ScanBackward scan{};
  describe(call, scan, u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, bounds, delta_softplus);
  const int64_t b = scan.batch, l = scan.length, c = scan.channels, n = scan.states;
  const ScalarType type = compute_type(u);
  scan.grad_y = call.array("grad_y", grad_y, {b, l, c});
  scan.grad_final_state = call.array("grad_final_state", grad_final_state, {scan.sequences, c, n});
  call.check(chunk_states.scalar_type() == type && chunk_states.is_contiguous() && call.is_here(chunk_states) &&
                 chunk_states.numel() == b * chunks_of(scan) * n * scan.padded_channels,
             "chunk_states: expected what forward saved");
  scan.chunk_states = const_cast<void*>(chunk_states.const_data_ptr());

  Tensor du = call.create(u.scalar_type(), {b, l, c}), ddelta = call.create(delta.scalar_type(), {b, l, c});
  Tensor dA = call.create(A.scalar_type(), {c, n}), dB = call.create(B.scalar_type(), {b, l, n});
  Tensor dC = call.create(C.scalar_type(), {b, l, n}), dD = call.gradient(D, u.scalar_type(), {c});
  Tensor dz = call.gradient(z, u.scalar_type(), {b, l, c}),
         ddelta_bias = call.gradient(delta_bias, u.scalar_type(), {c});
  Tensor dinitial_state = call.gradient(initial_state, u.scalar_type(), {scan.sequences, c, n});
  scan.du = call.array("du", du, {b, l, c});
  scan.ddelta = call.array("ddelta", ddelta, {b, l, c});
  scan.dA = call.array("dA", dA, {c, n});
  scan.dB = call.array("dB", dB, {b, l, n});
  scan.dC = call.array("dC", dC, {b, l, n});
  scan.dD = call.gradient_array(D, dD, {c});
  scan.dz = call.gradient_array(z, dz, {b, l, c});
  scan.ddelta_bias = call.gradient_array(delta_bias, ddelta_bias, {c});
  scan.dinitial_state = call.gradient_array(initial_state, dinitial_state, {scan.sequences, c, n});
  Tensor workspace = call.create(ScalarType::Byte, {scan_backward_workspace(scan)});
  scan.workspace = workspace.mutable_data_ptr();
  call.launched(launch_scan_backward(scan));
  return {du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dinitial_state};
}

Tensor selective_scan_step(const Tensor& state, const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B,
                           const Tensor& C, const OptionalTensor& D, const OptionalTensor& z,
                           const OptionalTensor& delta_bias, bool delta_softplus) {
  const Call call("selective_scan_step", u);
  check_scan(call, u, A, 2);
  ScanStep scan{};
  const int64_t b = scan.batch = u.size(0), c = scan.channels = u.size(1), n = scan.states = A.size(1);
  scan.softplus = delta_softplus;
  scan.state = call.array("state", state, {b, c, n});
  scan.u = call.array("u", u, {b, c});
  scan.delta = call.array("delta", delta, {b, c});
  scan.A = call.array("A", A, {c, n});
  scan.B = call.array("B", B, {b, n});
  scan.C = call.array("C", C, {b, n});
  scan.D = call.array("D", D, {c});
  scan.z = call.array("z", z, {b, c});
  scan.delta_bias = call.array("delta_bias", delta_bias, {c});
  Tensor y = call.create(u.scalar_type(), {b, c});
  scan.y = call.array("y", y, {b, c});
  scan.device = call.device();
  call.launched(launch_scan_step(scan));
  return y;
}

std::tuple<Tensor, Tensor> causal_conv1d(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                         const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens,
                                         bool silu) {
  const Call call("causal_conv1d", x);
  check_conv(call, x, weight, 3);
  const Tensor bounds = call.bounds(cu_seqlens, x.size(0), x.size(1));
  ConvForward conv{};
  describe(call, conv, x, weight, bias, initial_state, cu_seqlens, bounds, silu);
  Tensor y = call.create(x.scalar_type(), {conv.batch, conv.length, conv.channels});
  Tensor final_state = call.create(compute_type(x), {conv.sequences, conv.width - 1, conv.channels});
  conv.y = call.array("y", y, {conv.batch, conv.length, conv.channels});
  conv.final_state = call.array("final_state", final_state, {conv.sequences, conv.width - 1, conv.channels});
  call.launched(launch_conv_forward(conv));
  return {y, final_state};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> causal_conv1d_backward(
    const OptionalTensor& grad_y, const OptionalTensor& grad_final_state, const Tensor& x, const Tensor& weight,
    const OptionalTensor& bias, const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens, bool silu) {
  const Call call("causal_conv1d_backward", x);
  check_conv(call, x, weight, 3);
  const Tensor bounds = call.bounds(cu_seqlens, x.size(0), x.size(1));
  ConvBackward conv{};
  describe(call, conv, x, weight, bias, initial_state, cu_seqlens, bounds, silu);
  const int64_t b = conv.batch, l = conv.length, c = conv.channels, width = conv.width;
  conv.grad_y = call.array("grad_y", grad_y, {b, l, c});
  conv.grad_final_state = call.array("grad_final_state", grad_final_state, {conv.sequences, width - 1, c});
  Tensor dx = call.create(x.scalar_type(), {b, l, c}), dweight = call.create(weight.scalar_type(), {c, width});
  Tensor dbias = call.gradient(bias, x.scalar_type(), {c});
  Tensor dinitial_state = call.gradient(initial_state, x.scalar_type(), {conv.sequences, width - 1, c});
  conv.dx = call.array("dx", dx, {b, l, c});
  conv.dweight = call.array("dweight", dweight, {c, width});
  conv.dbias = call.gradient_array(bias, dbias, {c});
  conv.dinitial_state = call.gradient_array(initial_state, dinitial_state, {conv.sequences, width - 1, c});
  Tensor workspace = call.create(ScalarType::Byte, {conv_backward_workspace(conv)});
  conv.workspace = workspace.mutable_data_ptr();
  call.launched(launch_conv_backward(conv));
  return {dx, dweight, dbias, dinitial_state};
}

Tensor causal_conv1d_step(const Tensor& state, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                          bool silu) {
  const Call call("causal_conv1d_step", x);
  check_conv(call, x, weight, 2);
  ConvStep conv{};
  const int64_t b = conv.batch = x.size(0), c = conv.channels = x.size(1);
  conv.width = weight.size(1), conv.silu = silu;
  conv.state = call.array("state", state, {b, conv.width - 1, c});
  conv.x = call.array("x", x, {b, c});
  conv.weight = call.array("weight", weight, {c, conv.width});
  conv.bias = call.array("bias", bias, {c});
  Tensor y = call.create(x.scalar_type(), {b, c});
  conv.y = call.array("y", y, {b, c});
  conv.device = call.device();
  call.launched(launch_conv_step(conv));
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> moe_route(const Tensor& logits, int64_t top_k,
                                                                     bool renormalize) {
  const Call call("moe_route", logits);
  RouteForward route{};
  check_route(call, route, logits, top_k);
  const int64_t tokens = route.tokens, experts = route.experts;
  route.renormalize = renormalize;
  const ScalarType type = compute_type(logits);
  Tensor weights = call.create(type, {tokens, top_k}), probabilities = call.create(type, {tokens, experts});
  Tensor chosen = call.create(ScalarType::Int, {tokens, top_k}), order = call.create(ScalarType::Int, {tokens * top_k});
  Tensor offsets = call.create(ScalarType::Int, {experts + 1}), sums = call.create(type, {experts});
  route.weights = weights.mutable_data_ptr(), route.probabilities = probabilities.mutable_data_ptr();
  route.chosen = static_cast<int32_t*>(chosen.mutable_data_ptr());
  route.order = static_cast<int32_t*>(order.mutable_data_ptr());
  route.offsets = static_cast<int32_t*>(offsets.mutable_data_ptr());
  route.probability_sums = sums.mutable_data_ptr();
  Tensor workspace = call.create(ScalarType::Byte, {route_forward_workspace(route)});
  route.workspace = workspace.mutable_data_ptr();
  call.launched(launch_route_forward(route));
  return {weights, chosen, probabilities, order, offsets, sums};
}

Tensor moe_route_backward(const OptionalTensor& grad_weights, const OptionalTensor& grad_probabilities,
                          const OptionalTensor& grad_probability_sums, const Tensor& logits, const Tensor& weights,
                          const Tensor& experts, const Tensor& probabilities, bool renormalize) {
  const Call call("moe_route_backward", logits);
  RouteBackward route{};
  call.check(weights.dim() == 2, "weights: expected what forward gave");
  const int64_t top_k = weights.size(1);
  check_route(call, route, logits, top_k);
  const int64_t tokens = route.tokens, count = route.experts;
  route.renormalize = renormalize;
  const ScalarType type = compute_type(logits);
  const auto saved = [&](const Tensor& tensor, ScalarType kind, int64_t columns) {
    call.check(call.is_here(tensor) && tensor.scalar_type() == kind && tensor.is_contiguous() && tensor.dim() == 2 &&
                   tensor.size(0) == tokens && tensor.size(1) == columns,
               "weights, experts, probabilities: expected what forward gave");
    return const_cast<void*>(tensor.const_data_ptr());
  };
  route.weights = saved(weights, type, top_k), route.probabilities = saved(probabilities, type, count);
  route.chosen = static_cast<int32_t*>(saved(experts, ScalarType::Int, top_k));
  route.grad_weights = call.array("grad_weights", grad_weights, {tokens, top_k});
  route.grad_probabilities = call.array("grad_probabilities", grad_probabilities, {tokens, count});
  route.grad_probability_sums = call.array("grad_probability_sums", grad_probability_sums, {count});
  Tensor grad_logits = call.create(logits.scalar_type(), {tokens, count});
  route.grad_logits = call.array("grad_logits", grad_logits, {tokens, count});
  call.launched(launch_route_backward(route));
  return grad_logits;
}

namespace {

// The packed program as the kernel takes it: sections become offsets in units of 64 bytes.
class RolloutProgram {
 public:
  RolloutProgram(const Call& call, RolloutCall& rollout, const Tensor& plan, const Tensor& storage)
      : reader_(static_cast<const int64_t*>(plan.const_data_ptr()), plan.numel(), storage.numel()) {
    call.check(storage.numel() < int64_t{1} << 38, "the packed program is too large");
    width_ = number(1, 1 << 15), half_ = number(0, 1) == 1;
    rollout.width = int32_t(width_), rollout.bfloat16 = half_;
    rollout.layer_count = number(0, kRolloutLayers);
    rollout.final_norm = floats(width_);
    rollout.has_feedback = number(0, 1);
    if (rollout.has_feedback) rollout.feedback = matrix(width_, width_, 1), rollout.feedback_bias = floats(up(width_));
    for (int32_t l = 0; l < rollout.layer_count; ++l) read(call, rollout.layers[l]);
    reader_.finish();
  }

 private:
  static constexpr int64_t kPanel = 32;
  static int64_t up(int64_t size, int64_t to = kPanel) { return (size + to - 1) / to * to; }

  int32_t number(int64_t least, int64_t most) { return int32_t(reader_.number(least, most)); }
  uint32_t floats(int64_t size) { return uint32_t(reader_.section(size, 4) / 64); }
  uint32_t matrix(int64_t out, int64_t in, int64_t count) {
    return uint32_t(reader_.section(count * up(out) * up(in, 8), half_ ? 2 : 4) / 64);
  }

  void read(const Call& call, RolloutLayer& layer) {
    constexpr int64_t kMost = 1 << 15;
    layer.attention = number(0, 1);
    layer.norm = floats(width_);
    if (layer.attention) {
      layer.heads = number(1, 1 << 10), layer.kv_heads = number(1, layer.heads);
      layer.head_dim = number(2, kRolloutHeadDim), layer.window = number(0, int64_t{1} << 30);
      call.check(layer.heads % layer.kv_heads == 0 && layer.head_dim % 2 == 0, "heads do not fit");
      layer.frequency = uint32_t(reader_.section(layer.head_dim / 2, 8) / 64);
      layer.in = matrix(int64_t(layer.heads + 2 * layer.kv_heads) * layer.head_dim, width_, 1);
      layer.out = matrix(width_, int64_t(layer.heads) * layer.head_dim, 1);
    } else {
      layer.inner = number(1, kMost), layer.width = number(1, 16), layer.rank = number(1, kMost);
      layer.states = number(1, 1 << 10);
      const int64_t channels = up(layer.inner);
      layer.in = matrix(2 * channels, width_, 1), layer.x_proj = matrix(layer.rank + 2 * layer.states, layer.inner, 1);
      layer.dt_proj = matrix(layer.inner, layer.rank, 1), layer.out = matrix(width_, layer.inner, 1);
      layer.taps = floats(channels * (layer.width + 1)), layer.A = floats(channels * layer.states);
      layer.D = floats(channels), layer.dt_bias = floats(channels);
      layer.dt_norm = floats(layer.rank), layer.b_norm = floats(layer.states), layer.c_norm = floats(layer.states);
    }
    layer.mlp_norm = floats(width_);
    layer.experts = number(1, kRolloutExperts), layer.top_k = number(1, std::min(layer.experts, kRolloutSlots));
    layer.hidden = number(1, kMost);
    layer.has_router = number(0, 1);
    if (layer.has_router) layer.router = floats(layer.experts * up(width_));
    call.check(layer.has_router || layer.experts == 1, "experts need a router");
    layer.w_in = matrix(2 * up(layer.hidden, kPanel / 2), width_, layer.experts);
    layer.w_out = matrix(width_, layer.hidden, layer.experts);
  }

  PlanReader reader_;
  int64_t width_;
  bool half_;
};

// The state's tensors, in the order of RolloutState.tensors(), and after them what the watchdog writes.
void attach_state(const Call& call, RolloutCall& rollout, const std::vector<Tensor>& state) {
  size_t at = 0;
  const auto next = [&](const char* name, ScalarType type, std::initializer_list<int64_t> sizes) {
    call.check(at < state.size(), "state has too few tensors");
    const Tensor& tensor = state[at++];
    const auto shape = tensor.sizes();
    call.check(call.is_here(tensor) && tensor.is_contiguous() && tensor.scalar_type() == type &&
                   shape.size() == sizes.size() && std::equal(sizes.begin(), sizes.end(), shape.begin()) &&
                   reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0,
               "state: ", name, " does not fit the program");
    return const_cast<void*>(tensor.const_data_ptr());
  };
  const int64_t batch = rollout.batch;
  for (int32_t l = 0; l < rollout.layer_count; ++l) {
    RolloutLayer& layer = rollout.layers[l];
    if (layer.attention) {
      const int64_t capacity = at < state.size() && state[at].dim() == 4 ? state[at].size(1) : 0;
      call.check(capacity >= 1 && capacity < int64_t{1} << 30, "state: the cache has no room, or too much");
      layer.capacity = int32_t(capacity);
      const auto cache = {batch, capacity, int64_t{layer.kv_heads}, int64_t{layer.head_dim}};
      layer.keys = static_cast<float*>(next("k", ScalarType::Float, cache));
      layer.values = static_cast<float*>(next("v", ScalarType::Float, cache));
      layer.position = static_cast<int64_t*>(next("position", ScalarType::Long, {batch}));
    } else {
      layer.conv = static_cast<float*>(next("conv", ScalarType::Float, {batch, layer.width - 1, layer.inner}));
      layer.scan = static_cast<float*>(next("scan", ScalarType::Float, {batch, layer.inner, layer.states}));
    }
  }
  rollout.feedback_state = static_cast<float*>(next("feedback", ScalarType::Float, {batch, rollout.width}));
  rollout.position = static_cast<int64_t*>(next("position", ScalarType::Long, {batch}));
  rollout.error = static_cast<int32_t*>(next("the watchdog's word", ScalarType::Int, {1}));
  call.check(at == state.size(), "state has too many tensors");
}

}  // namespace

// `workers`: blocks per sequence; `group` is the CPU's and 1 here.
void rollout(const Tensor& plan, const Tensor& storage, const Tensor& inputs, const Tensor& lengths,
             const Tensor& hidden, std::vector<Tensor> state, int64_t begin, int64_t end, double eps, int64_t group,
             int64_t workers) {
  const Call call("rollout", inputs);
  call.check(
      inputs.dim() == 3 && inputs.scalar_type() == ScalarType::Float && hidden.scalar_type() == ScalarType::Float,
      "expected inputs and hidden (batch, frames, d) of float32");
  call.check(plan.is_cpu() && plan.dim() == 1 && plan.is_contiguous() && plan.scalar_type() == ScalarType::Long &&
                 call.is_here(storage) && storage.dim() == 1 && storage.is_contiguous() &&
                 storage.scalar_type() == ScalarType::Byte &&
                 reinterpret_cast<uintptr_t>(storage.const_data_ptr()) % 16 == 0,
             "expected plan (int64) on the CPU and storage (uint8) beside inputs, one-dimensional");
  RolloutCall rollout{};
  const RolloutProgram program(call, rollout, plan, storage);
  const int64_t batch = rollout.batch = inputs.size(0), frames = inputs.size(1);
  call.check(0 <= begin && begin <= end && end <= frames, "bad range of frames");
  call.check(group == 1 && workers >= 1 && workers <= 1 << 16, "bad number of blocks");
  rollout.begin = begin, rollout.end = end, rollout.eps = float(eps), rollout.team = int32_t(workers);
  rollout.storage = static_cast<const unsigned char*>(storage.const_data_ptr());
  rollout.inputs = call.array("inputs", inputs, {batch, frames, rollout.width});
  rollout.hidden = call.array("hidden", hidden, {batch, frames, rollout.width});
  call.check(lengths.scalar_type() == ScalarType::Long && lengths.is_contiguous() && lengths.dim() == 1 &&
                 lengths.size(0) == batch && call.is_here(lengths),
             "expected lengths (batch,) int64 beside inputs");
  rollout.lengths = static_cast<const int64_t*>(lengths.const_data_ptr());
  attach_state(call, rollout, state);
  rollout.device = call.device();
  place_rollout(rollout);
  Tensor workspace = call.create(ScalarType::Byte, {rollout_workspace(rollout)});
  rollout.workspace = workspace.mutable_data_ptr();
  call.launched(launch_rollout(rollout));
}

void empty_op(const Tensor&) {}

}  // namespace jambatalk::cuda
