// The native mixture-of-experts ops: routing and the experts' MLP. Schemas in schemas.h, kernels in moe_kernel.h.
#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <string>
#include <tuple>
#include <utility>
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

// What forward and backward know of a routing. The values of the indices are clamped: nothing reads out of range.
struct Plan {
  int64_t tokens, top_k, experts, rows;
  std::vector<int32_t> assignment;  // row -> token * top_k + slot
  std::vector<int32_t> token;       // row -> token
  std::vector<int32_t> position;    // assignment -> row
  std::vector<Segment> segments;    // one per expert, some of them empty
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
    assignment.resize(size_t(rows)), token.resize(size_t(rows)), position.assign(size_t(rows), 0);
    for (int64_t r = 0; r < rows; ++r) {
      const int32_t a = from[r] < 0 ? 0 : from[r] >= rows ? int32_t(rows - 1) : from[r];
      assignment[size_t(r)] = a, token[size_t(r)] = a / int32_t(top_k), position[size_t(a)] = int32_t(r);
    }
    const int64_t product_rows = kernels_for(compute).product_rows;
    int64_t begin = 0, panel = 0;
    for (int64_t e = 0; e < experts; ++e) {
      const int64_t end = std::min(rows, std::max<int64_t>(begin, bounds[e + 1]));
      segments.push_back({e, begin, end, panel});
      panel += (end - begin + product_rows - 1) / product_rows, begin = end;
    }
    dense = top_k == experts && begin == rows;
    for (const Segment& segment : segments) dense = dense && segment.end - segment.begin == tokens;
  }
};

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

Array experts_matrix(const char* name, const Tensor& w, bool turned) {
  Array array = as_array(name, w, {w.size(0), w.size(1), w.size(2)});
  if (turned) std::swap(array.stride[1], array.stride[2]);
  return array;
}

// The weights as the right factor: their rows are the result's columns, or with `turned` their columns are.
Factor weights_factor(const char* name, const Tensor& w, bool turned = false) {
  Factor factor;
  factor.array = experts_matrix(name, w, turned);
  return factor;
}

// `matrix` (rows or tokens, columns) with its rows on an axis of a product. `source`: row -> row of `matrix`, or null.
Factor rows_factor(const char* name, const Tensor& matrix, RowsOn axis, const std::vector<int32_t>* source = nullptr) {
  Factor factor;
  factor.array = as_array(name, matrix, {matrix.size(0), matrix.size(1)});
  factor.array.stride[0] = 0;
  if (axis == RowsOn::kDepth) std::swap(factor.array.stride[1], factor.array.stride[2]);
  factor.rows_on = axis;
  factor.source = source != nullptr ? source->data() : nullptr;
  return factor;
}

// Whether the products of this dtype are of pairs: only the AVX-512 kernels of a processor with AVX512_BF16 know them.
bool in_pairs(ScalarType type) {
#if defined(__x86_64__)
  static const bool supported = __builtin_cpu_supports("avx512bf16");
  return supported && type == ScalarType::BFloat16 && &kernels() == &kAvx512Kernels;
#else
  return false;
#endif
}

int64_t blocks_of(int64_t size, int64_t block) { return (size + block - 1) / block; }

// Tasks are taken from a counter: no thread waits for a share that another has not finished. `work`: multiplications,
// or their like, of all tasks.
template <class Call>
void take_turns(void (*kernel)(const Call&, int64_t, int64_t), const Call& call, int64_t tasks, int64_t work) {
  if (tasks == 0) return;
  std::atomic<int64_t> next{0};
  const int64_t few = 400000;  // ten microseconds or so: not worth waking a thread
  const int64_t grain = std::min(tasks, 1 + tasks * few / (work + 1));
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t, int64_t) {
    for (int64_t t = next++; t < tasks; t = next++) kernel(call, t, t + 1);
  });
}

// Lays out all panels of a factor before the product, for tasks that share them. `size`: of the axis without rows.
Tensor lay_out(Factor& factor, const Plan& plan, int64_t size, ScalarType type) {
  const ScalarType compute = type == ScalarType::Double ? type : ScalarType::Float;
  const KernelSet& kernel = kernels_for(compute);
  const bool left = factor.rows_on == RowsOn::kLanes;
  std::vector<PackTask> tasks;
  int64_t elements = 0;
  for (size_t s = 0; s < (factor.shared ? 1 : plan.segments.size()); ++s) {
    const int64_t rows = plan.segments[s].end - plan.segments[s].begin;
    const int64_t panels = left ? blocks_of(rows, kernel.product_rows) : blocks_of(size, kernel.product_columns);
    for (int64_t p = 0; p < panels; ++p) tasks.push_back({int64_t(s), p});
    elements += panels * (left ? kernel.product_rows * size : kernel.product_columns * rows);
  }
  Tensor packed = new_tensor(compute, {elements});
  factor.packed = packed.mutable_data_ptr();
  PackCall call{};
  call.segments = plan.segments.data(), call.tasks = tasks.data(), call.factor = factor;
  call.lanes = call.depth = size, call.pairs = in_pairs(type);
  take_turns(kernel.pack_panels, call, int64_t(tasks.size()), 8 * elements);
  return packed;
}

using ProductKernel = void (*)(const ProductCall&, int64_t, int64_t);

// Cuts a product of every expert into tasks and runs them.
void multiply(ProductKernel kernel, ProductCall& call, const Plan& plan, ScalarType type) {
  // What a task lays out and sums up stays in the L2 cache.
  constexpr int64_t kLeftPanels = 16, kRightPanels = 4;
  const KernelSet& kernels = kernels_for(type);
  const bool over_rows = call.left.rows_on == RowsOn::kDepth;
  const int64_t width = call.right.half > 0 ? kernels.product_columns / 2 : kernels.product_columns;
  std::vector<ProductTask> tasks;
  int64_t work = 0;
  for (size_t s = 0; s < plan.segments.size(); ++s) {
    const int64_t rows = plan.segments[s].end - plan.segments[s].begin;
    const int64_t lines = over_rows ? call.lines : rows;
    const int64_t line_panels = blocks_of(lines, kernels.product_rows), panels = blocks_of(call.columns, width);
    const int64_t line_blocks = blocks_of(line_panels, kLeftPanels), blocks = blocks_of(panels, kRightPanels);
    for (int64_t outer = 0; outer < (over_rows ? line_blocks : blocks); ++outer) {
      for (int64_t inner = 0; inner < (over_rows ? blocks : line_blocks); ++inner) {
        const int64_t i = over_rows ? outer : inner, j = over_rows ? inner : outer;
        tasks.push_back({int64_t(s), i * line_panels / line_blocks, (i + 1) * line_panels / line_blocks,
                         j * panels / blocks, (j + 1) * panels / blocks});
      }
    }
    work += lines * call.columns * (over_rows ? rows : call.depth);
  }
  call.segments = plan.segments.data(), call.tasks = tasks.data(), call.pairs = in_pairs(type);
  take_turns(kernel, call, int64_t(tasks.size()), work);
}

// out[r] = w[expert of r] rows[r], with `turned` w[expert of r]^T rows[r].
void multiply_rows(const char* name, const Tensor& rows, const Tensor& w, bool turned, Tensor& out, const Plan& plan) {
  const ScalarType type = rows.scalar_type();
  ProductCall call{};
  call.left = rows_factor("rows", rows, RowsOn::kLanes);
  const Tensor packed = lay_out(call.left, plan, rows.size(1), type);
  call.right = weights_factor(name, w, turned);
  call.columns = out.size(1), call.depth = rows.size(1), call.dtype = memory_type(name, w);
  call.out = out.mutable_data_ptr();
  multiply(kernels_for(type).multiply_experts, call, plan, type);
}

// dw[e] = sum over the rows r of expert e of grad[r] input[r]^T, each r through its `source`.
void multiply_weights(const Tensor& grad, const std::vector<int32_t>* grad_source, const Tensor& input,
                      const std::vector<int32_t>* input_source, Tensor& dw, const Plan& plan) {
  const ScalarType type = dw.scalar_type();
  ProductCall call{};
  call.left = rows_factor("grad", grad, RowsOn::kDepth, grad_source);
  call.right = rows_factor("input", input, RowsOn::kDepth, input_source);
  const Tensor packed = lay_out(call.right, plan, input.size(1), type);
  call.lines = dw.size(1), call.columns = dw.size(2), call.dtype = memory_type("grad", dw);
  call.out = dw.mutable_data_ptr();
  multiply(kernels_for(type).multiply_experts, call, plan, type);
}

// rows[r] = x[token of row r]
Tensor gathered(const Tensor& x, const Plan& plan) {
  const int64_t columns = x.size(1), size = int64_t(x.element_size());
  Tensor rows = new_tensor(x.scalar_type(), {plan.rows, columns});
  const char* from = static_cast<const char*>(x.const_data_ptr());
  char* to = static_cast<char*>(rows.mutable_data_ptr());
  for (int64_t r = 0; r < plan.rows; ++r) {
    for (int64_t c = 0; c < columns; ++c, to += size) {
      std::memcpy(to, from + (plan.token[size_t(r)] * x.stride(0) + c * x.stride(1)) * size, size_t(size));
    }
  }
  return rows;
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
  std::vector<Segment> busy;
  for (const Segment& segment : plan.segments) {
    if (segment.end > segment.begin) busy.push_back(segment);
  }
  MatvecCall call{};
  call.segments = busy.data(), call.batch = int64_t(busy.size());
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
  const ScalarType compute = compute_type(x);
  const KernelSet& kernel = kernels_for(compute);
  const int64_t hidden = w_out.size(2);
  Tensor preactivation = new_tensor(type, {save ? plan.rows : 0, w_in.size(1)});
  Tensor activated = new_tensor(type, {plan.rows, hidden}), out = new_tensor(type, {plan.rows, w_out.size(1)});
  {
    ProductCall call{};
    call.left = rows_factor("x", x, RowsOn::kLanes, &plan.token);
    call.left.shared = plan.dense;
    const Tensor packed = lay_out(call.left, plan, x.size(1), type);
    call.right = weights_factor("w_in", w_in);
    call.right.half = kind == Activation::kSwiglu ? hidden : 0;
    call.columns = hidden, call.depth = x.size(1), call.dtype = memory_type("x", x);
    call.activation = kind, call.hidden = hidden, call.activated = activated.mutable_data_ptr();
    call.preactivation = save ? preactivation.mutable_data_ptr() : nullptr;
    multiply(kernel.multiply_activate, call, plan, type);
  }
  multiply_rows("w_out", activated, w_out, false, out, plan);
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
  const ScalarType compute = compute_type(x);
  const KernelSet& kernel = kernels_for(compute);
  Tensor activated = new_tensor(type, {plan.rows, hidden});
  Tensor dpreactivation = new_tensor(type, {plan.rows, w_in.size(1)});
  Tensor dots = new_tensor(compute, {blocks_of(hidden, kernel.product_columns), plan.tokens, plan.top_k});
  {
    ProductCall call{};
    call.left = rows_factor("grad_y", grad_y, RowsOn::kLanes, &plan.token);
    call.left.shared = plan.dense;
    const Tensor packed = lay_out(call.left, plan, d_out, type);
    call.right = weights_factor("w_out", w_out, true);
    call.columns = hidden, call.depth = d_out, call.dtype = memory_type("x", x);
    call.activation = kind, call.hidden = hidden, call.activated = activated.mutable_data_ptr();
    call.preactivation = const_cast<void*>(preactivation.const_data_ptr());
    call.dpreactivation = dpreactivation.mutable_data_ptr(), call.rows = plan.rows;
    call.assignment = plan.assignment.data(), call.weights = weights.const_data_ptr();
    call.dots = dots.mutable_data_ptr();
    multiply(kernel.multiply_activate_backward, call, plan, type);
  }
  sum_over_batch(dots, dweights);
  Tensor dx_rows = new_tensor(type, {plan.rows, d});
  multiply_rows("w_in", dpreactivation, w_in, true, dx_rows, plan);
  multiply_weights(dpreactivation, nullptr, x, &plan.token, dw_in, plan);
  multiply_weights(grad_y, &plan.token, activated, nullptr, dw_out, plan);
  return {combined(dx_rows, plan, nullptr), dweights, dw_in, dw_out};
}

}  // namespace jambatalk
