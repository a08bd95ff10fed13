// The native attention ops: tensors to arrays, what is cached, plans of tiles, threads. Schemas in schemas.h; the
// kernels in attention_kernel.h.
#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/isa.h"
#include "cpu/ops.h"
#include "cpu/tensors.h"

namespace jambatalk {
namespace {

constexpr int64_t kChunks = 8;          // of a batch entry at most, backward: bounds the memory of partial sums
constexpr int64_t kTasks = 8;           // of a step: as many are made of one sequence, if the cache is long enough
constexpr int64_t kLeastStretch = 128;  // cached keys that are worth a task

// A tensor whose axes are those named by `axes`, of (batch, position, head, feature).
HeadArray head_array(const char* name, const Tensor& tensor, std::initializer_list<int> axes,
                     std::initializer_list<int64_t> sizes) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, ": expected a CPU tensor");
  const auto shape = tensor.sizes(), strides = tensor.strides();
  STD_TORCH_CHECK(shape.size() == sizes.size(), name, ": expected ", sizes.size(), " dimensions, got ", shape.size());
  HeadArray array;
  array.dtype = memory_type(name, tensor);
  array.data = const_cast<void*>(tensor.const_data_ptr());
  for (size_t i = 0; i < sizes.size(); ++i) {
    const int64_t size = sizes.begin()[i];
    STD_TORCH_CHECK(shape[i] == size, name, ": expected size ", size, " in dimension ", i, ", got ", shape[i]);
    array.stride[axes.begin()[i]] = strides[i];
  }
  return array;
}

HeadArray rows_of(const char* name, const Tensor& tensor, const AttentionCall& call, int64_t heads, bool step) {
  return step ? head_array(name, tensor, {0, 2, 3}, {call.entries, heads, call.size})
              : head_array(name, tensor, {0, 1, 2, 3}, {call.entries, call.length, heads, call.size});
}

// cos or sin, in one of the shapes that op.py lists; an axis that is not there has stride 0.
HeadArray table_of(const char* name, const Tensor& table, const AttentionCall& call, bool step) {
  const int64_t half = call.size / 2, b = call.entries, t = call.length, g = call.kv_heads;
  if (step) {
    return table.dim() == 2 ? head_array(name, table, {0, 3}, {b, half})
                            : head_array(name, table, {0, 2, 3}, {b, g, half});
  }
  if (table.dim() == 2) return head_array(name, table, {1, 3}, {t, half});
  if (table.dim() == 3) return head_array(name, table, {1, 2, 3}, {t, g, half});
  STD_TORCH_CHECK(table.dim() == 4, name, ": expected 2 to 4 dimensions, got ", table.dim());
  HeadArray array = head_array(name, table, {0, 1, 2, 3}, {b, t, table.size(2) == 1 ? 1 : g, half});
  if (table.size(2) == 1) array.stride[2] = 0;
  return array;
}

// The gradient of cos or sin.
Tensor new_table(const Tensor& like) {
  const auto size = like.sizes();
  const ScalarType type = like.scalar_type();
  if (like.dim() == 2) return new_tensor(type, {size[0], size[1]});
  if (like.dim() == 3) return new_tensor(type, {size[0], size[1], size[2]});
  return new_tensor(type, {size[0], size[1], size[2], size[3]});
}

AttentionCall describe(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos, const Tensor& sin,
                       bool causal, std::optional<int64_t> window, double scale, bool interleaved, bool step) {
  const size_t dimensions = step ? 3 : 4;
  STD_TORCH_CHECK(size_t(q.dim()) == dimensions && size_t(k.dim()) == dimensions &&
                      q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type(),
                  "rope_attention: expected q, k and v of one dtype and of ", dimensions, " dimensions");
  AttentionCall call{};
  call.batch = call.entries = q.size(0), call.length = step ? 1 : q.size(1);
  call.heads = q.size(dimensions - 2), call.kv_heads = k.size(dimensions - 2), call.size = q.size(dimensions - 1);
  STD_TORCH_CHECK(call.kv_heads > 0 && call.heads % call.kv_heads == 0 && call.size > 0 && call.size % 2 == 0,
                  "rope_attention: expected heads % kv_heads == 0 and an even head_dim");
  STD_TORCH_CHECK(!window.has_value() || (*window > 0 && causal), "rope_attention: expected a positive causal window");
  call.group = call.heads / call.kv_heads;
  call.pitch = (call.size + kFeaturePadding - 1) / kFeaturePadding * kFeaturePadding;
  call.causal = causal, call.interleaved = interleaved, call.scale = scale, call.window = window.value_or(0);
  call.q = rows_of("q", q, call, call.heads, step);
  call.k = rows_of("k", k, call, call.kv_heads, step);
  call.v = rows_of("v", v, call, call.kv_heads, step);
  call.cos = table_of("cos", cos, call, step), call.sin = table_of("sin", sin, call, step);
  call.tiles = (call.length * call.group + kTileRows - 1) / kTileRows;
  call.panels = (call.length + kTileKeys - 1) / kTileKeys;
  return call;
}

// What was cached before, by batch entry.
class Cached {
 public:
  // unbounded: positions may go on for ever, as in a ring that holds the window.
  Cached(AttentionCall& call, const OptionalTensor& k, const OptionalTensor& v, const OptionalTensor& positions,
         bool unbounded = false) {
    STD_TORCH_CHECK(k.has_value() == v.has_value() && k.has_value() == positions.has_value(),
                    "cache: expected keys, values and positions, or none");
    if (k.has_value()) read(call, *k, *v, *positions, unbounded);
  }

 private:
  void read(AttentionCall& call, const Tensor& cache_k, const Tensor& cache_v, const Tensor& positions,
            bool unbounded) {
    STD_TORCH_CHECK(call.causal && call.starts == nullptr, "cache: expected causal attention without cu_seqlens");
    STD_TORCH_CHECK(cache_k.dim() == 4 && cache_k.size(1) > 0,
                    "cache.k: expected (batch, capacity, kv_heads, head_dim)");
    STD_TORCH_CHECK(positions.is_cpu() && positions.dim() == 1 && positions.size(0) == call.entries &&
                        positions.scalar_type() == ScalarType::Long,
                    "cache.position: expected int64 (batch,) on the CPU");
    call.capacity = cache_k.size(1);
    const std::initializer_list<int64_t> shape = {call.entries, call.capacity, call.kv_heads, call.size};
    call.cache_k = head_array("cache.k", cache_k, {0, 1, 2, 3}, shape);
    call.cache_v = head_array("cache.v", cache_v, {0, 1, 2, 3}, shape);
    const int64_t* from = static_cast<const int64_t*>(positions.const_data_ptr());
    unbounded = unbounded || (call.window > 0 && call.capacity >= call.window);
    int64_t most = 0;
    for (int64_t b = 0; b < call.entries; ++b) {
      const int64_t at = std::clamp<int64_t>(from[b * positions.stride(0)], 0, int64_t{1} << 60);
      STD_TORCH_CHECK(unbounded || at + call.length <= call.capacity, "cache: capacity ", call.capacity,
                      " is too small for ", at, " + ", call.length, " positions");
      position.push_back(at);
      past.push_back(std::min(at, call.capacity));
      if (call.window > 0) past.back() = std::min(past.back(), call.window - 1);
      most = std::max(most, past.back());
    }
    call.position = position.data(), call.past = past.data();
    call.panels = (most + call.length + kTileKeys - 1) / kTileKeys;
  }

  std::vector<int64_t> position, past;
};

// The bounds of each position's sequence; a position outside of all sees nothing.
struct Bounds {
  std::vector<int64_t> starts, stops;

  Bounds(AttentionCall& call, const OptionalTensor& cu_seqlens) {
    if (!cu_seqlens.has_value()) return;
    sequences_of(cu_seqlens, call.entries);
    starts.resize(size_t(call.length)), stops.resize(size_t(call.length));
    for (int64_t t = 0; t < call.length; ++t) starts[t] = stops[t] = t;
    const Pieces pieces(cu_seqlens, call.entries, call.length, std::max<int64_t>(call.length, 1));
    for (const Piece& piece : pieces.list) {
      for (int64_t t = piece.begin; t < piece.end; ++t) starts[t] = piece.begin, stops[t] = piece.end;
    }
    call.starts = starts.data(), call.stops = stops.data();
  }
};

// Memory for packed keys or values.
Tensor new_panels(const AttentionCall& call, ScalarType type, int64_t panels) {
  return new_tensor(type, {call.entries * call.kv_heads, panels, kTileKeys, call.pitch});
}

void pack(AttentionCall call, const KernelSet& kernels) {
  call.groups = call.kv_heads * call.panels;
  run_tasks(kernels.attention_pack, call, kTileKeys * call.pitch / 2);
}

void append(AttentionCall call, const KernelSet& kernels) {
  call.groups = call.kv_heads;
  run_tasks(kernels.attention_append, call, std::min(call.length, call.capacity) * call.pitch);
}

// Products of a tile, in vector operations or so.
int64_t tile_cost(const AttentionCall& call, int64_t keys, int64_t products) {
  return kTileRows * (keys + kTileKeys) * call.pitch / 16 * products;
}

// Chunks of tiles that see about as many keys each; how many depends on the shape alone.
std::vector<AttentionChunk> plan_chunks(AttentionCall& call) {
  const int64_t wanted = 2 * kChunks / std::max<int64_t>(1, call.entries * call.kv_heads);
  call.chunk_count = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, std::min(kChunks, call.tiles)));
  std::vector<AttentionChunk> chunks;
  for (int64_t entry = 0; entry < call.entries; ++entry) {
    const auto seen_by = [&](int64_t tile) {
      const int64_t last = std::min((tile + 1) * kTileRows, call.length * call.group) - 1;
      return Visible{visible_keys(call, entry, tile * kTileRows / call.group).low,
                     visible_keys(call, entry, last / call.group).high};
    };
    const auto cost = [&](int64_t tile) {
      return std::max<int64_t>(0, seen_by(tile).high - seen_by(tile).low) + kTileKeys;
    };
    int64_t total = 0, spent = 0, tile = 0, offset = 0;
    for (int64_t t = 0; t < call.tiles; ++t) total += cost(t);
    for (int64_t c = 0; c < call.chunk_count; ++c) {
      AttentionChunk chunk;
      chunk.first_tile = tile, chunk.offset = offset;
      for (; tile < call.tiles &&
             (c + 1 == call.chunk_count || spent + cost(tile) / 2 <= total * (c + 1) / call.chunk_count);
           ++tile) {
        spent += cost(tile);
      }
      chunk.end_tile = tile;
      if (chunk.first_tile < tile) {
        chunk.first_panel = seen_by(chunk.first_tile).low / kTileKeys;
        chunk.end_panel = std::max(chunk.first_panel, (seen_by(tile - 1).high + kTileKeys - 1) / kTileKeys);
        offset += chunk.end_panel - chunk.first_panel;
      }
      chunks.push_back(chunk);
    }
    call.partial_panels = std::max(call.partial_panels, offset);
  }
  call.chunks = chunks.data();
  return chunks;
}

}  // namespace

std::tuple<Tensor, Tensor> rope_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos,
                                          const Tensor& sin, bool causal, std::optional<int64_t> window, double scale,
                                          bool interleaved, const OptionalTensor& cu_seqlens,
                                          const OptionalTensor& cache_k, const OptionalTensor& cache_v,
                                          const OptionalTensor& position, bool save) {
  AttentionCall call = describe(q, k, v, cos, sin, causal, window, scale, interleaved, false);
  const Bounds bounds(call, cu_seqlens);
  const Cached cached(call, cache_k, cache_v, position);
  const ScalarType type = compute_type(q);
  const KernelSet& kernels = kernels_for(type);
  Tensor y = new_tensor(q.scalar_type(), {call.entries, call.length, call.heads, call.size});
  Tensor logsumexp = save ? new_tensor(type, {call.entries, call.heads, call.length}) : new_tensor(type, {0});
  Tensor keys = new_panels(call, type, call.panels), values = new_panels(call, type, call.panels);
  call.y = rows_of("y", y, call, call.heads, false);
  call.logsumexp = save ? logsumexp.mutable_data_ptr() : nullptr;
  call.turned_keys = keys.mutable_data_ptr(), call.value_rows = values.mutable_data_ptr();
  pack(call, kernels);
  call.groups = call.kv_heads * call.tiles;
  run_tasks(kernels.attention_forward, call, tile_cost(call, call.panels * kTileKeys / 2, 2));
  return {y, logsumexp};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> rope_attention_backward(
    const Tensor& grad_y, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos, const Tensor& sin,
    const Tensor& y, const Tensor& logsumexp, bool causal, std::optional<int64_t> window, double scale,
    bool interleaved, const OptionalTensor& cu_seqlens, const OptionalTensor& cache_k, const OptionalTensor& cache_v,
    const OptionalTensor& position) {
  AttentionCall call = describe(q, k, v, cos, sin, causal, window, scale, interleaved, false);
  const Bounds bounds(call, cu_seqlens);
  const Cached cached(call, cache_k, cache_v, position);
  const int64_t b = call.entries, t = call.length, g = call.kv_heads;
  const ScalarType type = compute_type(q), dtype = q.scalar_type();
  const KernelSet& kernels = kernels_for(type);
  call.grad_y = rows_of("grad_y", grad_y, call, call.heads, false);
  call.y = rows_of("y", y, call, call.heads, false);
  STD_TORCH_CHECK(
      logsumexp.is_contiguous() && logsumexp.scalar_type() == type && logsumexp.numel() == b * call.heads * t,
      "logsumexp: expected what the forward pass saved");
  call.logsumexp = const_cast<void*>(logsumexp.const_data_ptr());

  Tensor dq = new_tensor(dtype, {b, t, call.heads, call.size});
  Tensor dk = new_tensor(dtype, {b, t, g, call.size}), dv = new_tensor(dtype, {b, t, g, call.size});
  call.dq = rows_of("dq", dq, call, call.heads, false);
  call.dk = rows_of("dk", dk, call, g, false), call.dv = rows_of("dv", dv, call, g, false);
  Tensor rotated = dtype == type ? dq : new_tensor(type, {b, t, call.heads, call.size});
  call.rotated_grad = rotated.mutable_data_ptr();
  call.tables_by_entry = cos.dim() == 4;
  call.tables_by_head = cos.dim() > 2 && cos.size(cos.dim() - 2) == g;
  Tensor dcos = new_table(cos), dsin = new_table(sin);
  call.dcos = table_of("dcos", dcos, call, false), call.dsin = table_of("dsin", dsin, call, false);
  if (b == 0) fill_zero(dcos), fill_zero(dsin);

  const std::vector<AttentionChunk> chunks = plan_chunks(call);
  Tensor turned_keys = new_panels(call, type, call.panels), key_rows = new_panels(call, type, call.panels);
  Tensor turned_values = new_panels(call, type, call.panels);
  Tensor dkeys = new_panels(call, type, call.partial_panels), dvalues = new_panels(call, type, call.partial_panels);
  call.turned_keys = turned_keys.mutable_data_ptr(), call.key_rows = key_rows.mutable_data_ptr();
  call.turned_values = turned_values.mutable_data_ptr();
  call.partial_keys = dkeys.mutable_data_ptr(), call.partial_values = dvalues.mutable_data_ptr();
  pack(call, kernels);
  call.groups = g * call.chunk_count;
  run_tasks(kernels.attention_backward, call,
            tile_cost(call, call.panels * kTileKeys / 2, 5) * (call.tiles / call.chunk_count + 1));
  call.batch = 1, call.groups = t;
  run_tasks(kernels.attention_finish, call, b * (call.heads + 2 * g) * call.pitch / 2);
  return {dq, dk, dv, dcos, dsin};
}

void rope_attention_append(const Tensor& k, const Tensor& v, const Tensor& cos, const Tensor& sin,
                           const Tensor& cache_k, const Tensor& cache_v, const Tensor& position, bool interleaved) {
  AttentionCall call = describe(k, k, v, cos, sin, true, std::nullopt, 1, interleaved, false);
  const Cached cached(call, cache_k, cache_v, position, true);
  append(call, kernels_for(compute_type(k)));
}

Tensor rope_attention_step(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos, const Tensor& sin,
                           const Tensor& cache_k, const Tensor& cache_v, const Tensor& position,
                           std::optional<int64_t> window, double scale, bool interleaved) {
  AttentionCall call = describe(q, k, v, cos, sin, true, window, scale, interleaved, true);
  const Cached cached(call, cache_k, cache_v, position);
  const ScalarType type = compute_type(q);
  const KernelSet& kernels = kernels_for(type);
  Tensor y = new_tensor(q.scalar_type(), {call.entries, call.heads, call.size});
  call.y = rows_of("y", y, call, call.heads, true);
  call.parts = (call.group + kStepHeads - 1) / kStepHeads;
  const int64_t tasks = std::max<int64_t>(1, call.entries * call.kv_heads * call.parts);
  call.splits = std::clamp<int64_t>(kTasks / tasks, 1, std::max<int64_t>(1, call.capacity / kLeastStretch));
  const Memory partial =
      new_memory(size_t(tasks * call.splits * kStepHeads * (call.pitch + 2)) * (type == ScalarType::Double ? 8 : 4));
  call.partial = partial.get();
  append(call, kernels);
  call.groups = call.kv_heads * call.parts * call.splits;
  run_tasks(kernels.attention_step, call, kStepHeads * call.capacity / call.splits * (call.pitch / 8 + 3));
  call.groups = call.heads;
  run_tasks(kernels.attention_step_combine, call, call.splits * call.pitch / 4);
  return y;
}

}  // namespace jambatalk
