// The native mixture-of-experts ops: routing, and the experts' MLP around PyTorch's own matrix products.
// Schemas in schemas.h; what is not a matrix product is in moe_kernel.h.
#include <algorithm>
#include <array>
#include <cstring>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/isa.h"
#include "cpu/ops.h"
#include "cpu/tensors.h"

namespace jambatalk {
namespace {

// So few assignments that every needed expert is read once, by a matrix-vector product of ours: the decoding case.
constexpr int64_t kFewAssignments = 16;

Activation activation_of(const std::string& name) {
  if (name == "swiglu") return Activation::kSwiglu;
  if (name == "gelu") return Activation::kGelu;
  STD_TORCH_CHECK(name == "relu", "activation: expected swiglu, gelu or relu, got ", name);
  return Activation::kRelu;
}

Tensor new_indices(std::initializer_list<int64_t> sizes) {
  std::vector<int64_t> size(sizes), stride(size.size());
  int64_t step = 1;
  for (size_t i = size.size(); i-- > 0;) stride[i] = step, step *= size[i];
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(size.size()), size.data(), stride.data(),
                                                         aoti_torch_dtype_int32(), aoti_torch_device_type_cpu(), 0,
                                                         &handle));
  return Tensor(handle);
}

int32_t* indices(const Tensor& tensor) { return static_cast<int32_t*>(const_cast<void*>(tensor.const_data_ptr())); }

// out = a b, by PyTorch (oneDNN or MKL): on segments of a hundred rows nothing of ours is faster.
void multiply(const Tensor& a, const Tensor& b, Tensor& out) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  (void)torch::stable::detail::to<Tensor>(stack[0]);  // the result is `out` again: release this handle
}

Tensor rows_of(const Tensor& tensor, const Segment& segment) {
  Tensor self = tensor;
  return torch::stable::narrow(self, 0, segment.begin, segment.end - segment.begin);
}
Tensor expert_of(const Tensor& weights, const Segment& segment) {
  return torch::stable::select(weights, 0, segment.expert);
}
Tensor turned(const Tensor& matrix) { return torch::stable::transpose(matrix, 0, 1); }

// What forward and backward know of a routing. The values of the indices are clamped: nothing reads out of range.
struct Plan {
  int64_t tokens, top_k, experts, rows;
  std::vector<int32_t> assignment;  // row -> token * top_k + slot
  std::vector<int32_t> position;    // assignment -> row
  std::vector<Segment> segments;    // of the experts that have rows
  bool dense;                       // every expert has every token, in order: no row moves

  Plan(const Tensor& weights, const Tensor& experts_tensor, const Tensor& order, const Tensor& offsets,
       ScalarType compute) {
    STD_TORCH_CHECK(weights.dim() == 2 && weights.is_contiguous() && weights.scalar_type() == compute &&
                        experts_tensor.dim() == 2 && order.dim() == 1 && offsets.dim() == 1 && offsets.size(0) >= 2,
                    "routing: expected what moe_route returns");
    tokens = weights.size(0), top_k = weights.size(1), experts = offsets.size(0) - 1, rows = tokens * top_k;
    for (const Tensor* tensor : {&experts_tensor, &order, &offsets}) {
      STD_TORCH_CHECK(tensor->scalar_type() == ScalarType::Int && tensor->is_contiguous() && tensor->is_cpu(),
                      "routing: expected contiguous int32 indices on the CPU");
    }
    STD_TORCH_CHECK(order.size(0) == rows && experts_tensor.numel() == rows && rows < (int64_t{1} << 31),
                    "routing: order and experts must have one entry per assignment");
    const int32_t *from = indices(order), *bounds = indices(offsets);
    assignment.resize(size_t(rows)), position.assign(size_t(rows), 0);
    for (int64_t r = 0; r < rows; ++r) {
      const int32_t a = from[r] < 0 ? 0 : from[r] >= rows ? int32_t(rows - 1) : from[r];
      assignment[size_t(r)] = a, position[size_t(a)] = int32_t(r);
    }
    int64_t begin = 0;
    for (int64_t e = 0; e < experts; ++e) {
      const int64_t end = std::min(rows, std::max<int64_t>(begin, bounds[e + 1]));
      if (end > begin) segments.push_back({e, begin, end});
      begin = end;
    }
    dense = top_k == experts && begin == rows;
    for (const Segment& segment : segments) dense = dense && segment.end - segment.begin == tokens;
  }
};

// rows[r] = x[token of row r]; where nothing moves, the caller uses x itself.
Tensor gathered(const Tensor& x, const Plan& plan) {
  const int64_t columns = x.size(1), size = int64_t(x.element_size());
  Tensor rows = new_tensor(x.scalar_type(), {plan.rows, columns});
  const char* from = static_cast<const char*>(x.const_data_ptr());
  char* to = static_cast<char*>(rows.mutable_data_ptr());
  const int64_t row_step = x.stride(0) * size, step = x.stride(1) * size;
  torch::stable::parallel_for(0, plan.rows, 1 + 65536 / (columns * size + 1), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const char* source = from + plan.assignment[size_t(r)] / plan.top_k * row_step;
      if (step == size) {
        std::memcpy(to + r * columns * size, source, size_t(columns * size));
      } else {
        char* target = to + r * columns * size;
        for (int64_t c = 0; c < columns; ++c) std::memcpy(target + c * size, source + c * step, size_t(size));
      }
    }
  });
  return rows;
}

// The rows that an expert reads: of x itself where nothing moves, of the gathered copy otherwise.
Tensor input_rows(const Tensor& x, const Tensor& rows, const Plan& plan, const Segment& segment) {
  return plan.dense ? x : rows_of(rows, segment);
}

Tensor combined(const Tensor& rows, const Plan& plan, const void* weights) {
  Tensor y = new_tensor(rows.scalar_type(), {plan.tokens, rows.size(1)});
  CombineCall call{};
  call.batch = 1, call.groups = plan.tokens, call.top_k = plan.top_k, call.columns = rows.size(1);
  call.dtype = memory_type("rows", rows);
  call.rows = rows.const_data_ptr(), call.position = plan.position.data(), call.weights = weights;
  call.y = y.mutable_data_ptr();
  run_tasks(kernels_for(compute_type(rows)).combine_slots, call, plan.top_k * call.columns / 8);
  return y;
}

// (rows, columns) -> (columns,), one row after the other in float64: the same for any number of threads.
Tensor sums_of_columns(const Tensor& matrix) {
  const int64_t columns = matrix.size(1);
  std::vector<double> sums(size_t(columns), 0.0);
  Tensor result = new_tensor(matrix.scalar_type(), {columns});
  const auto add_up = [&]<class T>(const T* from, T* to) {
    for (int64_t r = 0; r < matrix.size(0); ++r) {
      for (int64_t c = 0; c < columns; ++c) sums[size_t(c)] += double(from[r * columns + c]);
    }
    for (int64_t c = 0; c < columns; ++c) to[c] = T(sums[size_t(c)]);
  };
  const void* from = matrix.const_data_ptr();
  void* to = result.mutable_data_ptr();
  if (matrix.scalar_type() == ScalarType::Double)
    add_up(static_cast<const double*>(from), static_cast<double*>(to));
  else
    add_up(static_cast<const float*>(from), static_cast<float*>(to));
  return result;
}

void check_experts(const Tensor& x, const Plan& plan, const Tensor& w_in, const Tensor& w_out, Activation activation) {
  const int64_t parts = activation == Activation::kSwiglu ? 2 : 1;
  STD_TORCH_CHECK(x.dim() == 2 && w_in.dim() == 3 && w_out.dim() == 3 && x.size(0) == plan.tokens &&
                      w_in.size(0) == plan.experts && w_out.size(0) == plan.experts && w_in.size(2) == x.size(1) &&
                      w_in.size(1) == parts * w_out.size(2),
                  "moe_mlp: the shapes of x, routing, w_in and w_out do not fit");
  STD_TORCH_CHECK(x.is_cpu() && w_in.is_cpu() && w_out.is_cpu() && x.scalar_type() == w_in.scalar_type() &&
                      x.scalar_type() == w_out.scalar_type(),
                  "moe_mlp: expected x, w_in and w_out on the CPU and of one dtype");
}

// One expert after the other, each row's dot products in vector lanes; nothing but the weights is large.
Tensor few_rows(const Tensor& x, const Plan& plan, const Tensor& weights, const Tensor& w_in, const Tensor& w_out,
                Activation activation) {
  const ScalarType compute = compute_type(x);
  const KernelSet& kernel = kernels_for(compute);
  const int64_t hidden = w_out.size(2), d_out = w_out.size(1);
  Tensor wide = x;
  if (x.scalar_type() != compute) wide = torch::stable::to(x, compute);
  const Tensor rows = gathered(wide, plan);
  Tensor activated = new_tensor(compute, {plan.rows, hidden}), out = new_tensor(compute, {plan.rows, d_out});
  MatvecCall call{};
  call.segments = plan.segments.data(), call.batch = int64_t(plan.segments.size());
  call.activation = activation;
  const auto run = [&](const Tensor& from, const Tensor& w, Tensor& to, bool activate) {
    call.x = from.const_data_ptr(), call.out = to.mutable_data_ptr(), call.activate = activate;
    call.w = as_array("w", w, {w.size(0), w.size(1), w.size(2)});
    call.inner = from.size(1), call.outputs = to.size(1), call.block = 32;
    call.groups = (call.outputs + call.block - 1) / call.block;
    run_tasks(kernel.expert_matvec, call, call.block * call.inner / 4);
  };
  run(rows, w_in, activated, true);
  run(activated, w_out, out, false);
  const Tensor y = combined(out, plan, weights.const_data_ptr());
  return x.scalar_type() == compute ? y : torch::stable::to(y, x.scalar_type());
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> moe_route(const Tensor& logits, int64_t top_k,
                                                                     bool renormalize) {
  STD_TORCH_CHECK(logits.dim() == 2 && top_k >= 1 && top_k <= logits.size(1) && logits.is_cpu(),
                  "moe_route: expected logits (tokens, experts) on the CPU and top_k of 1 .. experts");
  const int64_t tokens = logits.size(0), experts = logits.size(1), assignments = tokens * top_k;
  STD_TORCH_CHECK(assignments < (int64_t{1} << 31), "moe_route: too many assignments");
  const ScalarType compute = compute_type(logits);
  Tensor weights = new_tensor(compute, {tokens, top_k}), probabilities = new_tensor(compute, {tokens, experts});
  Tensor chosen = new_indices({tokens, top_k}), order = new_indices({assignments});
  Tensor offsets = new_indices({experts + 1});
  RouteCall call{};
  call.batch = 1, call.groups = tokens, call.experts = experts, call.top_k = top_k, call.renormalize = renormalize;
  call.logits = as_array("logits", logits, {tokens, experts});
  call.probabilities = probabilities.mutable_data_ptr(), call.weights = weights.mutable_data_ptr();
  call.chosen = indices(chosen);
  run_tasks(kernels_for(compute).route_forward, call, experts * (2 + top_k));
  // Histogram, prefix sum and stable scatter: a few integers per assignment, in one pass each.
  int32_t *bounds = indices(offsets), *sorted = indices(order);
  std::memset(bounds, 0, size_t(experts + 1) * sizeof(int32_t));
  for (int64_t a = 0; a < assignments; ++a) ++bounds[call.chosen[a] + 1];
  for (int64_t e = 0; e < experts; ++e) bounds[e + 1] += bounds[e];
  std::vector<int32_t> next(bounds, bounds + experts);
  for (int64_t a = 0; a < assignments; ++a) sorted[next[size_t(call.chosen[a])]++] = int32_t(a);
  return {weights, chosen, probabilities, order, offsets, sums_of_columns(probabilities)};
}

Tensor moe_route_backward(const OptionalTensor& grad_weights, const OptionalTensor& grad_probabilities,
                          const OptionalTensor& grad_probability_sums, const Tensor& logits, const Tensor& weights,
                          const Tensor& experts, const Tensor& probabilities, bool renormalize) {
  STD_TORCH_CHECK(logits.dim() == 2 && weights.dim() == 2, "moe_route_backward: expected what forward took and gave");
  const int64_t tokens = logits.size(0), count = logits.size(1), top_k = weights.size(1);
  const ScalarType compute = compute_type(logits);
  STD_TORCH_CHECK(weights.scalar_type() == compute && probabilities.scalar_type() == compute &&
                      experts.scalar_type() == ScalarType::Int && weights.is_contiguous() && experts.is_contiguous() &&
                      probabilities.is_contiguous() && probabilities.numel() == tokens * count &&
                      weights.numel() == tokens * top_k && experts.numel() == weights.numel() && top_k <= count &&
                      (!grad_weights.has_value() || grad_weights->scalar_type() == compute),
                  "moe_route_backward: expected what forward gave");
  Tensor grad = new_tensor(logits.scalar_type(), {tokens, count});
  RouteCall call{};
  call.batch = 1, call.groups = tokens, call.experts = count, call.top_k = top_k, call.renormalize = renormalize;
  call.probabilities = const_cast<void*>(probabilities.const_data_ptr());
  call.weights = const_cast<void*>(weights.const_data_ptr()), call.chosen = indices(experts);
  call.grad_weights = as_array("grad_weights", grad_weights, {tokens, top_k});
  call.grad_probabilities = as_array("grad_probabilities", grad_probabilities, {tokens, count});
  call.grad_probability_sums = as_array("grad_probability_sums", grad_probability_sums, {count});
  call.grad_logits = as_array("grad_logits", grad, {tokens, count});
  run_tasks(kernels_for(compute).route_backward, call, 2 * count);
  return grad;
}

std::tuple<Tensor, Tensor> moe_mlp(const Tensor& x, const Tensor& weights, const Tensor& experts, const Tensor& order,
                                   const Tensor& offsets, const Tensor& w_in, const Tensor& w_out,
                                   const std::string& activation, bool save) {
  const Activation kind = activation_of(activation);
  const ScalarType type = x.scalar_type();
  const Plan plan(weights, experts, order, offsets, compute_type(x));
  check_experts(x, plan, w_in, w_out, kind);
  if (!save && plan.rows <= kFewAssignments) {
    return {few_rows(x, plan, weights, w_in, w_out, kind), new_tensor(type, {0})};
  }
  const int64_t hidden = w_out.size(2);
  Tensor preactivation = new_tensor(type, {plan.rows, w_in.size(1)}), activated = new_tensor(type, {plan.rows, hidden});
  Tensor out = new_tensor(type, {plan.rows, w_out.size(1)});
  const Tensor rows = plan.dense ? x : gathered(x, plan);
  for (const Segment& segment : plan.segments) {
    Tensor target = rows_of(preactivation, segment);
    multiply(input_rows(x, rows, plan, segment), turned(expert_of(w_in, segment)), target);
  }
  ActivateCall call{};
  call.batch = 1, call.groups = plan.rows, call.hidden = hidden, call.activation = kind;
  call.dtype = memory_type("x", x);
  call.preactivation = preactivation.const_data_ptr(), call.activated = activated.mutable_data_ptr();
  run_tasks(kernels_for(compute_type(x)).expert_activate, call, 2 * hidden);
  for (const Segment& segment : plan.segments) {
    Tensor target = rows_of(out, segment);
    multiply(rows_of(activated, segment), turned(expert_of(w_out, segment)), target);
  }
  return {combined(out, plan, weights.const_data_ptr()), save ? preactivation : new_tensor(type, {0})};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> moe_mlp_backward(const Tensor& grad_y, const Tensor& x,
                                                            const Tensor& weights, const Tensor& experts,
                                                            const Tensor& order, const Tensor& offsets,
                                                            const Tensor& w_in, const Tensor& w_out,
                                                            const Tensor& preactivation,
                                                            const std::string& activation) {
  const Activation kind = activation_of(activation);
  const ScalarType type = x.scalar_type();
  const Plan plan(weights, experts, order, offsets, compute_type(x));
  check_experts(x, plan, w_in, w_out, kind);
  const int64_t hidden = w_out.size(2), d = x.size(1), d_out = w_out.size(1);
  STD_TORCH_CHECK(grad_y.dim() == 2 && grad_y.size(0) == plan.tokens && grad_y.size(1) == d_out &&
                      grad_y.scalar_type() == type && preactivation.scalar_type() == type &&
                      preactivation.is_contiguous() && preactivation.numel() == plan.rows * w_in.size(1),
                  "moe_mlp_backward: expected what forward took and gave");
  Tensor dweights = new_tensor(weights.scalar_type(), {plan.tokens, plan.top_k});
  Tensor dw_in = new_tensor(type, {plan.experts, w_in.size(1), d});
  Tensor dw_out = new_tensor(type, {plan.experts, d_out, hidden});
  Tensor activated = new_tensor(type, {plan.rows, hidden});
  Tensor dpreactivation = new_tensor(type, {plan.rows, w_in.size(1)});
  Tensor dx_rows = new_tensor(type, {plan.rows, d});
  const Tensor rows = plan.dense ? x : gathered(x, plan), grad_rows = plan.dense ? grad_y : gathered(grad_y, plan);
  if (int64_t(plan.segments.size()) < plan.experts) fill_zero(dw_in), fill_zero(dw_out);
  for (const Segment& segment : plan.segments) {
    Tensor target = rows_of(activated, segment);
    multiply(input_rows(grad_y, grad_rows, plan, segment), expert_of(w_out, segment), target);
  }
  ActivateCall call{};
  call.batch = 1, call.groups = plan.rows, call.hidden = hidden, call.activation = kind;
  call.dtype = memory_type("x", x);
  call.preactivation = preactivation.const_data_ptr(), call.activated = activated.mutable_data_ptr();
  call.dpreactivation = dpreactivation.mutable_data_ptr(), call.order = plan.assignment.data();
  call.weights = weights.const_data_ptr(), call.dweights = dweights.mutable_data_ptr();
  run_tasks(kernels_for(compute_type(x)).expert_activate_backward, call, 4 * hidden);
  for (const Segment& segment : plan.segments) {
    const Tensor d_segment = rows_of(dpreactivation, segment);
    Tensor into_w_out = expert_of(dw_out, segment), into_w_in = expert_of(dw_in, segment);
    Tensor into_x = rows_of(dx_rows, segment);
    multiply(turned(input_rows(grad_y, grad_rows, plan, segment)), rows_of(activated, segment), into_w_out);
    multiply(turned(d_segment), input_rows(x, rows, plan, segment), into_w_in);
    multiply(d_segment, expert_of(w_in, segment), into_x);
  }
  return {combined(dx_rows, plan, nullptr), dweights, dw_in, dw_out};
}

}  // namespace jambatalk
