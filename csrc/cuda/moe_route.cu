// Routing tokens to experts on a GPU: softmax, top-k, the statistics of the load, and the stable sort by expert.
//
//   p = softmax(l);   experts = the top_k largest of p, ties to the lowest index
//   weights = p[experts], over their sum if renormalised;   probability_sums = the sum of p over the tokens
//   order, offsets = the stable sort of the assignments (token * top_k + slot) by expert
//
// A token has 1, 2, 8 or 32 lanes of a warp; each holds eight neighbouring experts in registers. A row without a
// softmax (NaN, +infinity, or nothing but -infinity) has NaN probabilities and weights, and experts 0 .. top_k - 1.
//
// The sort: an assignment's place is where its expert's segment begins, plus the earlier tokens that picked the expert
// (no token picks one twice). Those of the same warp are counted by a vote, those of earlier warps of the block in
// shared memory. Where one block holds all tokens (512 or 1024 lanes) that is all, in one launch. Otherwise a second
// kernel adds what earlier blocks have: every block sums the table of picks (blocks, experts) for itself, which is a
// few kilobytes in the L2 cache. All sums have a fixed order: equal bytes every run. Whatever belongs to one token does
// not depend on where in the batch it stands; the sums over tokens do, by rounding.
//
// Cost: tokens * (experts * (in + 4) + 12 top_k) bytes, and 8 more per assignment where there are two launches; up to
// some thousand tokens the latency of memory and of the launches is all there is. Source: kernels.md 1.5.
#include "cuda/device.h"

namespace jambatalk::cuda {
namespace {

constexpr int kHeld = 8;  // experts that a lane holds, two vectors of four
constexpr int kVector = 4;
constexpr unsigned kAll = 0xffffffffu;
constexpr int kSortThreads = 512, kBackwardThreads = 128;
constexpr int kMostExperts = 256;

// Threads of a block that holds all tokens. They leave 64 registers for each, or 128 where more is kept.
constexpr int most_threads(bool float64, int lanes) { return float64 || lanes > 2 ? 512 : 1024; }

// How the tokens are cut.
struct Plan {
  int lanes, threads;      // lanes of a token, threads of a block
  int64_t blocks, chunks;  // a block takes `chunks` times as many tokens as it can hold at once
  int padded;              // experts that `lanes` lanes hold: the pitch of the tables
  JT_DEVICE int64_t tokens_at_once() const { return threads / lanes; }
};

// What the second kernel needs of the first.
struct Tables {
  void* sums;      // (blocks, padded) of the compute type: each block's part of probability_sums
  int32_t* picks;  // (blocks, padded)
  int32_t* rank;   // (tokens, top_k): earlier picks of the same expert in the same block
};

int lanes_for(int64_t experts) { return experts <= 8 ? 1 : experts <= 16 ? 2 : experts <= 64 ? 8 : 32; }

Plan make_plan(const RouteCall& call) {
  Plan plan{};
  plan.lanes = lanes_for(call.experts), plan.padded = plan.lanes * kHeld;
  const int64_t wanted = call.tokens * plan.lanes;
  if (wanted <= most_threads(call.logits.dtype == Dtype::kFloat64, plan.lanes)) {
    plan.threads = int(max((wanted + 31) / 32, int64_t(1)) * 32), plan.blocks = plan.chunks = 1;
    return plan;
  }
  // The more experts, the fewer and larger blocks: every block of the second kernel reads the picks of all.
  plan.threads = plan.lanes <= 2 ? 128 : plan.lanes == 8 ? 256 : 512;
  const int64_t at_once = plan.threads / plan.lanes, pieces = (call.tokens + at_once - 1) / at_once;
  const int64_t room = call.device.multiprocessors * int64_t(plan.lanes <= 2 ? 4 : 2);
  plan.chunks = (pieces + room - 1) / room;
  plan.blocks = (pieces + plan.chunks - 1) / plan.chunks;
  return plan;
}

int64_t compute_size(const RouteCall& call) { return call.logits.dtype == Dtype::kFloat64 ? 8 : 4; }

Tables tables(const RouteForward& call, const Plan& plan) {
  char* at = static_cast<char*>(call.workspace);
  Tables result{};
  result.sums = at;
  result.picks = reinterpret_cast<int32_t*>(at + plan.blocks * plan.padded * compute_size(call));
  result.rank = result.picks + plan.blocks * plan.padded;
  return result;
}

template <int G, class V>
JT_DEVICE V sum_of_group(V value) {
  JT_UNROLL
  for (int step = 1; step < G; step *= 2) value += __shfl_xor_sync(kAll, value, step);
  return value;
}

// A token's eight values from `first` on; what does not exist is `otherwise`. T void: any dtype and strides.
template <class T, class A>
JT_DEVICE void load_held(const Array& array, int64_t token, int64_t first, int64_t experts, A otherwise,
                         A (&out)[kHeld]) {
  JT_UNROLL
  for (int i = 0; i < kHeld; ++i) out[i] = otherwise;
  if constexpr (std::is_void_v<T>) {
    JT_UNROLL
    for (int i = 0; i < kHeld; ++i) {
      if (first + i < experts) out[i] = load_any<A>(array, token * array.stride[1] + (first + i) * array.stride[2]);
    }
  } else {
    const T* row = static_cast<const T*>(array.data) + token * array.stride[1] + first;
    JT_UNROLL
    for (int half = 0; half < kHeld; half += kVector) {
      if (first + half >= experts) continue;
      const auto vector = load_vector<T, kVector>(row + half);
      JT_UNROLL
      for (int i = 0; i < kVector; ++i) out[half + i] = convert<A>(vector.lane[i]);
    }
  }
}

// The same back, to rows that are `experts` long and lie one after the other. In vectors where `wide`.
template <class M, class A>
JT_DEVICE void store_held(M* row, int64_t first, int64_t experts, bool wide, const A (&in)[kHeld]) {
  JT_UNROLL
  for (int half = 0; half < kHeld; half += kVector) {
    if (first + half >= experts) continue;
    if (wide) {
      Vector<M, kVector> vector;
      JT_UNROLL
      for (int i = 0; i < kVector; ++i) vector.lane[i] = convert<M>(in[half + i]);
      store_vector<M, kVector>(row + first + half, vector);
    } else {
      JT_UNROLL
      for (int i = 0; i < kVector; ++i) {
        if (first + half + i < experts) row[first + half + i] = convert<M>(in[half + i]);
      }
    }
  }
}

// One warp: begins[e] = the sum of counts before e, for e < padded; the offsets too, where they are wanted.
JT_DEVICE void scan_experts(const int32_t* counts, int32_t* begins, int padded, int64_t experts, int32_t* offsets) {
  const int lane = int(threadIdx.x % 32);
  int32_t carried = 0;
  for (int from = 0; from < padded; from += 32) {
    const int e = from + lane;
    const int32_t own = e < padded ? counts[e] : 0;
    int32_t until = own;
    JT_UNROLL
    for (int step = 1; step < 32; step *= 2) {
      const int32_t before = __shfl_up_sync(kAll, until, step);
      if (lane >= step) until += before;
    }
    if (e < padded) begins[e] = carried + until - own;
    if (offsets != nullptr && e < experts) offsets[e + 1] = carried + until;
    carried += __shfl_sync(kAll, until, 31);
  }
  if (offsets != nullptr && lane == 0) offsets[0] = 0;
}

// Dynamic shared memory: (warps + 2) * padded int32, or warps * padded of the compute type; at most 32 KB.
template <class A>
int64_t forward_shared(const Plan& plan) {
  const int64_t warps = plan.threads / 32;
  return max((warps + 2) * int64_t(sizeof(int32_t)), warps * int64_t(sizeof(A))) * plan.padded;
}

// At most 512 threads where it takes more than 64 registers: 128 each are all that a multiprocessor has.
// budget: registers <= 128, spills 0, shared <= 0
template <class T, class A, int G>
__global__ void __launch_bounds__(most_threads(sizeof(A) == 8, G), 1) route_kernel(const RouteForward call,
                                                                                  const Plan plan, const Tables to) {
  constexpr int kPadded = G * kHeld;
  JT_DYNAMIC_SHARED(route_memory);
  const int warps = int(blockDim.x / 32), warp = int(threadIdx.x / 32), lane = int(threadIdx.x % 32);
  const int part = lane % G;
  const int64_t experts = call.experts, first = part * kHeld;
  const int top_k = int(call.top_k);
  const bool alone = plan.blocks == 1, wide = experts % kVector == 0;
  int32_t* const earlier = reinterpret_cast<int32_t*>(route_memory);  // (warps, kPadded): picks before this warp's
  int32_t* const total = earlier + warps * kPadded;                   // picks up to here
  int32_t* const begins = total + kPadded;
  JT_ROLLED
  for (int e = int(threadIdx.x); e < kPadded; e += int(blockDim.x)) total[e] = 0;
  unsigned absent = 0;  // of the lane's experts
  unsigned same = 0;    // the lanes that hold the same experts of other tokens
  JT_UNROLL
  for (int i = 0; i < kHeld; ++i) absent |= unsigned(first + i >= experts) << i;
  JT_UNROLL
  for (int i = 0; i < 32; i += G) same |= 1u << (i + part);
  A sums[kHeld];
  JT_UNROLL
  for (int i = 0; i < kHeld; ++i) sums[i] = A(0);

  for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
    const int64_t token = (blockIdx.x * plan.chunks + chunk) * plan.tokens_at_once() + threadIdx.x / G;
    const bool inside = token < call.tokens;
    A p[kHeld];
    JT_UNROLL
    for (int i = 0; i < kHeld; ++i) p[i] = A(0);
    if (inside) load_held<T, A>(call.logits, token, first, experts, -A(INFINITY), p);

    A highest = p[0];
    JT_UNROLL
    for (int i = 1; i < kHeld; ++i) highest = p[i] > highest ? p[i] : highest;
    JT_UNROLL
    for (int step = 1; step < G; step *= 2) {
      const A other = __shfl_xor_sync(kAll, highest, step);
      highest = other > highest ? other : highest;
    }
    A whole = A(0);
    JT_UNROLL
    for (int i = 0; i < kHeld; ++i) whole += p[i] = exp(p[i] - highest);
    whole = sum_of_group<G>(whole);
    const bool broken = whole != whole;
    const A scale = A(1) / whole;
    JT_UNROLL
    for (int i = 0; i < kHeld; ++i) {
      p[i] *= scale;
      if (inside) sums[i] += p[i];
    }
    if (inside) store_held(static_cast<A*>(call.probabilities) + token * experts, first, experts, wide, p);

    unsigned taken = absent, slots = 0;  // four bits per expert held: its slot, where taken
    A kept = A(0);
    for (int slot = 0; slot < top_k; ++slot) {
      A best = A(-1);
      int index = kMostExperts;
      JT_UNROLL
      for (int i = 0; i < kHeld; ++i) {
        const A value = broken ? A(0) : p[i];
        if ((taken >> i & 1) == 0 && value > best) best = value, index = int(first) + i;
      }
      JT_UNROLL
      for (int step = 1; step < G; step *= 2) {
        const A other = __shfl_xor_sync(kAll, best, step);
        const int at = __shfl_xor_sync(kAll, index, step);
        if (other > best || (other == best && at < index)) best = other, index = at;
      }
      kept += best;
      if (index / kHeld == part) taken |= 1u << index % kHeld, slots |= unsigned(slot) << 4 * (index % kHeld);
    }
    const unsigned picked = inside ? taken & ~absent : 0;
    const A factor = call.renormalize ? A(1) / kept : A(1);
    uint64_t ranks = 0;  // eight bits per expert held: the earlier tokens of this warp that picked it
    JT_UNROLL
    for (int i = 0; i < kHeld; ++i) {
      const unsigned mates = __ballot_sync(kAll, picked >> i & 1) & same;
      ranks |= uint64_t(__popc(mates & ((1u << lane) - 1))) << 8 * i;
      if (lane < G) earlier[warp * kPadded + first + i] = __popc(mates);
    }
    __syncthreads();
    JT_ROLLED
    for (int e = int(threadIdx.x); e < kPadded; e += int(blockDim.x)) {
      int32_t until = total[e];
      for (int w = 0; w < warps; ++w) {
        const int32_t own = earlier[w * kPadded + e];
        earlier[w * kPadded + e] = until;
        until += own;
      }
      total[e] = until;
    }
    __syncthreads();
    if (alone) {  // then there is one chunk
      if (warp == 0) scan_experts(total, begins, kPadded, experts, call.offsets);
      __syncthreads();
    }
    JT_UNROLL
    for (int i = 0; i < kHeld; ++i) {
      if ((picked >> i & 1) == 0) continue;
      const int64_t assignment = token * top_k + (slots >> 4 * i & 15);
      const int32_t rank = earlier[warp * kPadded + first + i] + int32_t(ranks >> 8 * i & 255);
      static_cast<A*>(call.weights)[assignment] = p[i] * factor;
      call.chosen[assignment] = int32_t(first) + i;
      if (alone)
        call.order[begins[first + i] + rank] = int32_t(assignment);
      else
        to.rank[assignment] = rank;
    }
  }

  if (!alone) {
    JT_ROLLED
    for (int e = int(threadIdx.x); e < kPadded; e += int(blockDim.x)) to.picks[blockIdx.x * kPadded + e] = total[e];
  }
  __syncthreads();  // the memory has a second use
  A* const parts = reinterpret_cast<A*>(route_memory);  // (warps, kPadded)
  JT_UNROLL
  for (int i = 0; i < kHeld; ++i) {
    JT_UNROLL
    for (int step = G; step < 32; step *= 2) sums[i] += __shfl_xor_sync(kAll, sums[i], step);
    if (lane < G) parts[warp * kPadded + first + i] = sums[i];
  }
  __syncthreads();
  JT_ROLLED
  for (int e = int(threadIdx.x); e < kPadded; e += int(blockDim.x)) {
    A sum = A(0);
    for (int w = 0; w < warps; ++w) sum += parts[w * kPadded + e];
    if (!alone)
      static_cast<A*>(to.sums)[blockIdx.x * kPadded + e] = sum;
    else if (e < experts)
      static_cast<A*>(call.probability_sums)[e] = sum;
  }
}

// The sum of `own` over the threads of each expert e = threadIdx.x % padded, in a fixed order; in out[e] once all
// threads have passed a barrier. parts: up to kSortThreads values in shared memory, for as long.
template <class V>
JT_DEVICE void sum_over_parts(V own, int padded, V* parts, V* out) {
  const int warps_per_row = padded > 32 ? padded / 32 : 1, rows = kSortThreads / 32 / warps_per_row;
  const int e = int(threadIdx.x) % padded;
  for (int step = padded; step < 32; step *= 2) own += __shfl_xor_sync(kAll, own, step);
  if (int(threadIdx.x % 32) < padded) parts[int(threadIdx.x / 32) / warps_per_row * padded + e] = own;
  __syncthreads();
  if (int(threadIdx.x) < padded) {
    V sum = V(0);
    for (int row = 0; row < rows; ++row) sum += parts[row * padded + e];
    out[e] = sum;
  }
}

// Block b sorts the assignments that block b of the first kernel ranked.
//
// budget: registers <= 40, spills 0, shared <= 14336
template <class A>
__global__ void __launch_bounds__(kSortThreads) route_sort_kernel(const RouteForward call, const Plan plan,
                                                                  const Tables from) {
  __shared__ int32_t total[kMostExperts], earlier[kMostExperts], begins[kMostExperts];
  __shared__ int32_t parts[2][kSortThreads];
  __shared__ A float_parts[kSortThreads], sums[kMostExperts];
  const int padded = plan.padded, e = int(threadIdx.x) % padded;
  const int64_t span = plan.chunks * plan.tokens_at_once(), block = blockIdx.x;
  const int64_t end = min((block + 1) * span, call.tokens) * call.top_k;
  int64_t at = block * span * call.top_k + threadIdx.x;
  int32_t expert = 0, rank = 0;  // of the first one, on their way while the table is read
  if (at < end) expert = call.chosen[at], rank = from.rank[at];
  int32_t all = 0, before = 0;
  A sum = A(0);
  for (int64_t b = int(threadIdx.x) / padded; b < plan.blocks; b += kSortThreads / padded) {
    const int32_t picks = from.picks[b * padded + e];
    all += picks;
    if (b < block) before += picks;
    if (block == 0) sum += static_cast<const A*>(from.sums)[b * padded + e];
  }
  sum_over_parts(all, padded, parts[0], total);
  sum_over_parts(before, padded, parts[1], earlier);
  if (block == 0) sum_over_parts(sum, padded, float_parts, sums);
  __syncthreads();
  if (threadIdx.x < 32) scan_experts(total, begins, padded, call.experts, block == 0 ? call.offsets : nullptr);
  if (block == 0 && threadIdx.x < call.experts) static_cast<A*>(call.probability_sums)[threadIdx.x] = sums[threadIdx.x];
  __syncthreads();
  while (at < end) {
    call.order[begins[expert] + earlier[expert] + rank] = int32_t(at);
    at += kSortThreads;
    if (at < end) expert = call.chosen[at], rank = from.rank[at];
  }
}

// dl = p (g - <g, p>), where g is the gradient of p: that of the probabilities, of their sums, and of the weights,
// which with renormalisation are w = p / S, S the sum over the picks: dp = (dw - <dw, w>) / S.
//
// budget: registers <= 80, spills 0, shared <= 0
template <class T, class A, int G>
__global__ void __launch_bounds__(kBackwardThreads) route_backward_kernel(const RouteBackward call) {
  const int64_t token = (int64_t(blockIdx.x) * kBackwardThreads + threadIdx.x) / G;
  const int64_t experts = call.experts, first = int64_t(threadIdx.x % G) * kHeld;
  const int top_k = int(call.top_k);
  const bool inside = token < call.tokens, wide = experts % kVector == 0;
  A p[kHeld], g[kHeld];
  JT_UNROLL
  for (int i = 0; i < kHeld; ++i) p[i] = g[i] = A(0);
  if (inside) {
    const A* row = static_cast<const A*>(call.probabilities) + token * experts;
    const Array probabilities{const_cast<A*>(row), DtypeOf<A>::value, {0, 0, 1}};
    if (wide)
      load_held<A, A>(probabilities, 0, first, experts, A(0), p);
    else
      load_held<void, A>(probabilities, 0, first, experts, A(0), p);
    if (call.grad_probabilities.data != nullptr) {
      load_held<void, A>(call.grad_probabilities, token, first, experts, A(0), g);
    }
    JT_UNROLL
    for (int i = 0; i < kHeld; ++i) {
      if (call.grad_probability_sums.data != nullptr && first + i < experts) {
        g[i] += load_any<A>(call.grad_probability_sums, (first + i) * call.grad_probability_sums.stride[2]);
      }
    }
    if (call.grad_weights.data != nullptr) {
      const auto grad_weight = [&](int slot) {
        return load_any<A>(call.grad_weights, token * call.grad_weights.stride[1] + slot * call.grad_weights.stride[2]);
      };
      const int32_t* chosen = call.chosen + token * top_k;
      A factor = A(1), shift = A(0);
      if (call.renormalize) {
        A sum = A(0);
        for (int slot = 0; slot < top_k; ++slot) {
          sum += row[min(max(int64_t(chosen[slot]), int64_t(0)), experts - 1)];
          shift += static_cast<const A*>(call.weights)[token * top_k + slot] * grad_weight(slot);
        }
        factor = A(1) / sum;
      }
      for (int slot = 0; slot < top_k; ++slot) {
        const A grad = (grad_weight(slot) - shift) * factor;
        const int at = int(chosen[slot] - first);
        JT_UNROLL
        for (int i = 0; i < kHeld; ++i) g[i] += at == i ? grad : A(0);
      }
    }
  }
  A inner = A(0);
  JT_UNROLL
  for (int i = 0; i < kHeld; ++i) inner += g[i] * p[i];
  inner = sum_of_group<G>(inner);
  JT_UNROLL
  for (int i = 0; i < kHeld; ++i) g[i] = p[i] * (g[i] - inner);
  if (!inside) return;
  if constexpr (std::is_void_v<T>) {
    JT_UNROLL
    for (int i = 0; i < kHeld; ++i) {
      if (first + i < experts) store_any<A>(call.grad_logits, token * experts + first + i, g[i]);
    }
  } else {
    store_held(static_cast<T*>(call.grad_logits.data) + token * experts, first, experts, wide, g);
  }
}

// Calls run(T*, A, lanes) with the dtype of `array` where vectors of four fit, otherwise with T void; A is what is
// computed in, `lanes` those of a token.
template <class Run>
const char* with_layout(const RouteCall& call, const Array& array, const Run& run) {
  const auto with_lanes = [&](auto* type, auto compute) {
    switch (lanes_for(call.experts)) {
      case 1:
        return run(type, compute, std::integral_constant<int, 1>{});
      case 2:
        return run(type, compute, std::integral_constant<int, 2>{});
      case 8:
        return run(type, compute, std::integral_constant<int, 8>{});
      default:
        return run(type, compute, std::integral_constant<int, 32>{});
    }
  };
  const bool fours = call.experts % kVector == 0;
  if (call.logits.dtype == Dtype::kFloat64) return with_lanes(static_cast<void*>(nullptr), double{});
  if (fours && vectors_fit<float, kVector>(array)) return with_lanes(static_cast<float*>(nullptr), float{});
  if (fours && vectors_fit<__nv_bfloat16, kVector>(array)) {
    return with_lanes(static_cast<__nv_bfloat16*>(nullptr), float{});
  }
  if (fours && vectors_fit<__half, kVector>(array)) return with_lanes(static_cast<__half*>(nullptr), float{});
  return with_lanes(static_cast<void*>(nullptr), float{});
}

}  // namespace

int64_t route_forward_workspace(const RouteForward& call) {
  const Plan plan = make_plan(call);
  if (plan.blocks == 1) return 0;
  return plan.blocks * plan.padded * (compute_size(call) + 4) + call.tokens * call.top_k * 4;
}

const char* launch_route_forward(const RouteForward& call) {
  const Plan plan = make_plan(call);
  const Tables between = tables(call, plan);
  return with_layout(call, call.logits, [&](auto* type, auto compute, auto lanes) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = decltype(compute);
    const char* error = launch(route_kernel<T, A, lanes()>, unsigned(plan.blocks), unsigned(plan.threads),
                               forward_shared<A>(plan), call.device, call, plan, between);
    if (error != nullptr || plan.blocks == 1) return error;
    return launch(route_sort_kernel<A>, unsigned(plan.blocks), kSortThreads, 0, call.device, call, plan, between);
  });
}

const char* launch_route_backward(const RouteBackward& call) {
  return with_layout(call, call.grad_logits, [&](auto* type, auto compute, auto lanes) {
    using T = std::remove_pointer_t<decltype(type)>;
    const int64_t blocks = (call.tokens * lanes() + kBackwardThreads - 1) / kBackwardThreads;
    return launch(route_backward_kernel<T, decltype(compute), lanes()>, unsigned(blocks), kBackwardThreads, 0,
                  call.device, call);
  });
}

}  // namespace jambatalk::cuda
