// The native rollout: reads the packed program, lays out the sequences' memory, starts the threads. Schema in
// schemas.h; the loop itself in rollout_kernel.h; the packing in jambatalk_kernels/rollout/packing.py.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <thread>

#include "common/plan.h"
#include "cpu/isa.h"
#include "cpu/ops.h"
#include "cpu/tensors.h"

namespace jambatalk {
namespace {

int64_t padded(int64_t size, int64_t to) { return (size + to - 1) / to * to; }

Memory zeroed_memory(size_t bytes) {
  Memory memory = new_memory(bytes);
  std::memset(memory.get(), 0, bytes);
  return memory;
}

PlanReader reader_of(const Tensor& plan, const Tensor& storage) {
  STD_TORCH_CHECK(plan.is_cpu() && plan.dim() == 1 && plan.is_contiguous() && plan.scalar_type() == ScalarType::Long &&
                      storage.is_cpu() && storage.dim() == 1 && storage.is_contiguous() &&
                      storage.scalar_type() == ScalarType::Byte,
                  "rollout: expected plan (int64) and storage (uint8), one-dimensional on the CPU");
  return {static_cast<const int64_t*>(plan.const_data_ptr()), plan.numel(), storage.numel()};
}

class Program {
 public:
  Program(const Tensor& plan, const Tensor& storage, ScalarType compute)
      : reader_(reader_of(plan, storage)),
        memory_(static_cast<const char*>(storage.const_data_ptr())),
        element_(compute == ScalarType::Double ? 8 : 4) {
    call.width = reader_.number(1);
    call.bfloat16 = reader_.number(0, 1) == 1;
    STD_TORCH_CHECK(!call.bfloat16 || compute == ScalarType::Float, "rollout: bfloat16 weights are for float32");
    const int64_t count = reader_.number(0, 1 << 16);
    call.final_norm = vector(call.width);
    if (reader_.number(0, 1) == 1) {
      call.feedback = matrix(call.width, call.width, 1);
      call.feedback_bias = vector(padded(call.width, kPanel));
    }
    layers.resize(size_t(count));
    for (RolloutLayer& layer : layers) read(layer);
    reader_.finish();
    call.layers = layers.data(), call.layer_count = count;
  }

  RolloutCall call{};
  std::vector<RolloutLayer> layers;

 private:
  const void* section(int64_t elements, int64_t element_size) {
    return memory_ + reader_.section(elements, element_size);
  }
  const void* vector(int64_t size) { return section(size, element_); }

  PackedMatrix matrix(int64_t out, int64_t in, int64_t count) {
    PackedMatrix result;
    result.in = padded(in, kInputPadding), result.panels = padded(out, kPanel) / kPanel;
    result.data = section(count * result.panels * kPanel * result.in, call.bfloat16 ? 2 : element_);
    return result;
  }

  void read(RolloutLayer& layer) {
    layer = RolloutLayer{};
    const int64_t d = call.width;
    layer.attention = reader_.number(0, 1) == 1;
    layer.norm = vector(d);
    if (layer.attention) {
      layer.heads = reader_.number(1, 1 << 12), layer.kv_heads = reader_.number(1, layer.heads);
      layer.head_dim = reader_.number(2, 1 << 12), layer.window = reader_.number(0, int64_t{1} << 40);
      STD_TORCH_CHECK(layer.heads % layer.kv_heads == 0 && layer.head_dim % 2 == 0, "rollout: heads do not fit");
      layer.pitch = padded(layer.head_dim, kFeaturePadding);
      layer.strips = padded(layer.heads / layer.kv_heads, kRowStrip) / kRowStrip;
      layer.frequency = static_cast<const double*>(section(layer.head_dim / 2, 8));
      layer.in = matrix((layer.heads + 2 * layer.kv_heads) * layer.head_dim, d, 1);
      layer.out = matrix(d, layer.heads * layer.head_dim, 1);
    } else {
      layer.inner = reader_.number(1), layer.width = reader_.number(1, 16), layer.rank = reader_.number(1);
      layer.states = reader_.number(1, 1 << 16);
      const int64_t channels = padded(layer.inner, kPanel);
      layer.in = matrix(2 * channels, d, 1), layer.x_proj = matrix(layer.rank + 2 * layer.states, layer.inner, 1);
      layer.dt_proj = matrix(layer.inner, layer.rank, 1), layer.out = matrix(d, layer.inner, 1);
      layer.taps = vector(channels * (layer.width + 1)), layer.A = vector(channels * layer.states);
      layer.D = vector(channels), layer.dt_bias = vector(channels);
      layer.dt_norm = vector(layer.rank), layer.b_norm = vector(layer.states), layer.c_norm = vector(layer.states);
    }
    layer.mlp_norm = vector(d);
    layer.experts = reader_.number(1, 1 << 16), layer.top_k = reader_.number(1, layer.experts);
    layer.hidden = reader_.number(1);
    if (reader_.number(0, 1) == 1) layer.router = vector(layer.experts * padded(d, kPanel));
    STD_TORCH_CHECK(layer.router != nullptr || layer.experts == 1, "rollout: experts need a router");
    layer.w_in = matrix(2 * padded(layer.hidden, kPanel / 2), d, layer.experts);
    layer.w_out = matrix(d, layer.hidden, layer.experts);
  }

  PlanReader reader_;
  const char* memory_;
  int64_t element_;
};

void* state_memory(const char* name, const Tensor& tensor, ScalarType type, std::initializer_list<int64_t> sizes) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.is_contiguous() && tensor.scalar_type() == type &&
                      tensor.dim() == int64_t(sizes.size()) &&
                      std::equal(sizes.begin(), sizes.end(), tensor.sizes().begin()),
                  "rollout: state: ", name, " does not fit the program");
  return const_cast<void*>(tensor.const_data_ptr());
}

// The state's tensors, in the order of RolloutState.tensors().
void attach_state(Program& program, const std::vector<Tensor>& state, ScalarType type, int64_t batch) {
  size_t at = 0;
  const auto next = [&]() -> const Tensor& {
    STD_TORCH_CHECK(at < state.size(), "rollout: state has too few tensors");
    return state[at++];
  };
  for (RolloutLayer& layer : program.layers) {
    if (layer.attention) {
      const Tensor &keys = next(), &values = next(), &position = next();
      layer.capacity = keys.dim() == 4 ? keys.size(1) : 0;
      layer.panels = padded(layer.capacity, kTileKeys) / kTileKeys;
      STD_TORCH_CHECK(layer.capacity >= 1, "rollout: state: the cache has no room");
      layer.keys = state_memory("k", keys, type, {batch, layer.capacity, layer.kv_heads, layer.head_dim});
      layer.values = state_memory("v", values, type, {batch, layer.capacity, layer.kv_heads, layer.head_dim});
      layer.position = static_cast<int64_t*>(state_memory("position", position, ScalarType::Long, {batch}));
      for (int64_t i = 0; i < batch; ++i) {
        STD_TORCH_CHECK(layer.position[i] >= 0, "rollout: state: a position is negative");
      }
    } else {
      const Tensor &conv = next(), &scan = next();
      state_memory("conv", conv, type, {batch, layer.width - 1, layer.inner});
      state_memory("scan", scan, type, {batch, layer.inner, layer.states});
      layer.conv_state = as_array("conv", conv, {batch, layer.width - 1, layer.inner});
      layer.scan_state = as_array("scan", scan, {batch, layer.inner, layer.states});
    }
  }
  program.call.feedback_state = state_memory("feedback", next(), type, {batch, program.call.width});
  program.call.position = static_cast<int64_t*>(state_memory("position", next(), ScalarType::Long, {batch}));
  STD_TORCH_CHECK(at == state.size(), "rollout: state has too many tensors");
}

// Where in a sequence's memory everything is.
void lay_out(Program& program, int64_t element) {
  RolloutCall& call = program.call;
  const int64_t line = 64 / element;
  int64_t first = 0, projected = 0, low = 0, mixed = 0, rows = 0, activated = 0, experts = 1;
  call.most_slots = 1;
  for (const RolloutLayer& layer : program.layers) {
    first = std::max(first, layer.in.panels * kPanel);
    projected = std::max(projected, layer.x_proj.panels * kPanel);
    low = std::max(low, layer.dt_proj.in);
    mixed = std::max(mixed, std::max(layer.out.in, layer.dt_proj.panels * kPanel));
    rows = std::max(rows, layer.kv_heads * layer.strips * kRowStrip * layer.pitch);
    activated = std::max(activated, layer.top_k * layer.w_in.panels * (kPanel / 2) + kInputPadding);
    experts = std::max(experts, layer.experts);
    call.most_slots = std::max(call.most_slots, layer.top_k);
  }
  int64_t end = 0;
  const auto take = [&](int64_t size) {
    const int64_t at = end;
    end += padded(size, line);
    return at;
  };
  const int64_t d = padded(call.width, kPanel);
  call.x = take(d), call.normed = take(d), call.feedback_vector = take(d);
  call.first = take(first), call.projected = take(projected), call.low = take(low), call.mixed = take(mixed);
  call.queries = take(rows), call.sums = take(rows);
  call.activated = take(activated), call.probabilities = take(call.most_slots + experts);
  for (RolloutLayer& layer : program.layers) {
    if (layer.attention) {
      layer.cache_offset = call.cache_pitch;
      call.cache_pitch += layer.kv_heads * layer.panels * 2 * kTileKeys * layer.pitch;
      continue;
    }
    const int64_t channels = padded(layer.inner, kPanel);
    layer.conv_offset = take(channels * (layer.width - 1)), layer.scan_offset = take(channels * layer.states);
  }
  // Not a multiple of the page size, or the sequences' vectors would compete for the same lines of the cache.
  call.pitch = end + line;
  call.list_offset = padded(experts + 1, 16);
}

}  // namespace

void rollout(const Tensor& plan, const Tensor& storage, const Tensor& inputs, const Tensor& lengths,
             const Tensor& hidden, std::vector<Tensor> state, int64_t begin, int64_t end, double eps, int64_t group,
             int64_t workers) {
  const ScalarType type = inputs.scalar_type();
  STD_TORCH_CHECK(inputs.dim() == 3 && (type == ScalarType::Float || type == ScalarType::Double),
                  "rollout: expected inputs (batch, frames, d) of float32 or float64");
  const int64_t batch = inputs.size(0), frames = inputs.size(1), element = type == ScalarType::Double ? 8 : 4;
  Program program(plan, storage, type);
  RolloutCall& call = program.call;
  STD_TORCH_CHECK(0 <= begin && begin <= end && end <= frames && group >= 1 && workers >= 1,
                  "rollout: bad range of frames");
  STD_TORCH_CHECK(lengths.is_cpu() && lengths.scalar_type() == ScalarType::Long && lengths.is_contiguous() &&
                      lengths.dim() == 1 && lengths.size(0) == batch,
                  "rollout: expected lengths (batch,) int64");
  STD_TORCH_CHECK(hidden.scalar_type() == type, "rollout: hidden must have the dtype of inputs");
  call.inputs = as_array("inputs", inputs, {batch, frames, call.width});
  call.hidden = as_array("hidden", hidden, {batch, frames, call.width});
  STD_TORCH_CHECK(call.width == 1 || hidden.stride(2) == 1, "rollout: hidden must be contiguous");
  call.hidden.stride[2] = 1;
  call.begin = begin, call.eps = eps;
  attach_state(program, state, type, batch);
  lay_out(program, element);

  // The longest first, dealt to the machines in turns, so that their work is alike.
  const int64_t* length = static_cast<const int64_t*>(lengths.const_data_ptr());
  std::vector<RolloutSequence> order;
  for (int64_t i = 0; i < batch; ++i) {
    const int64_t own = std::min(length[i], end) - begin;
    if (own > 0) order.push_back({i, own});
  }
  if (order.empty()) return;
  std::stable_sort(order.begin(), order.end(), [](const auto& a, const auto& b) { return a.frames > b.frames; });
  const int64_t live = int64_t(order.size()), machine_count = (live + group - 1) / group;
  std::vector<std::vector<RolloutSequence>> dealt(static_cast<size_t>(machine_count));
  for (int64_t i = 0; i < live; ++i) dealt[size_t(i % machine_count)].push_back(order[size_t(i)]);

  const int64_t route_size = call.list_offset + 2 * group * call.most_slots;
  const Memory memory = zeroed_memory(size_t(live * call.pitch * element));
  const Memory caches = new_memory(size_t(live * call.cache_pitch * element));
  const Memory routes = zeroed_memory(size_t(machine_count * route_size) * sizeof(int32_t));
  std::vector<RolloutMachine> machines(static_cast<size_t>(machine_count));
  char *vectors = static_cast<char*>(memory.get()), *panels = static_cast<char*>(caches.get());
  for (size_t i = 0; i < machines.size(); ++i) {
    RolloutMachine& machine = machines[i];
    machine.sequences = dealt[i].data(), machine.count = int64_t(dealt[i].size());
    machine.workers = workers;
    machine.memory = vectors, machine.caches = panels;
    machine.routes = static_cast<int32_t*>(routes.get()) + int64_t(i) * route_size;
    machine.give_way = [] { std::this_thread::yield(); };
    vectors += machine.count * call.pitch * element, panels += machine.count * call.cache_pitch * element;
  }
  const auto kernel = kernels_for(type).rollout;
  if (workers > 1) {
    for (RolloutMachine& machine : machines) {
      torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) { kernel(call, machine); });
    }
  } else {
    std::atomic<size_t> next{0};
    torch::stable::parallel_for(0, machine_count, 1, [&](int64_t, int64_t) {
      for (size_t i = next++; i < machines.size(); i = next++) kernel(call, machines[i]);
    });
  }
}

}  // namespace jambatalk
