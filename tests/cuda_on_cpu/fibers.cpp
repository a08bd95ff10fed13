// The blocks, threads and warps of cuda_runtime.h, as fibers on one host thread.
#include <link.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "cuda_runtime.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_on_cpu {
namespace {

#if defined(CUDA_ON_CPU_ASAN)
constexpr size_t kStack = 1 << 20;
#else
constexpr size_t kStack = 1 << 17;
#endif

struct Copy {
  void* target;
  const void* source;
  size_t bytes, zeros;
};

struct Fiber {
  enum State { kReady, kWaiting, kEnded } state = kReady;
  void* place[5];  // where it goes on (__builtin_setjmp)
  ucontext_t context;
  bool started = false;
  uint3 thread;
  // what it waits for
  Operation operation;
  unsigned mask;
  uint64_t value;
  const char* file;
  int line;
  std::deque<std::vector<Copy>> copies;  // committed batches, the last one open
};

std::vector<std::unique_ptr<Fiber>> fibers;  // kept: the stacks are reused
Fiber** members;                             // of this block, `threads` of them
size_t threads;
Fiber* running;
void* scheduler[5];
const std::function<void()>* body;
uint64_t received[32];  // what the warp that goes on now was given
unsigned char* shared;
bool backwards;
std::string error;
std::unordered_map<const void*, int> allowed_shared;
uint64_t milliseconds;
int lost_block = -1;

__attribute__((noinline)) void jump(void** place) { __builtin_longjmp(place, 1); }
__attribute__((noinline)) void change(void** from, void** to) {
  if (__builtin_setjmp(from) == 0) jump(to);
}

void fiber_main() {
  for (;;) {
    (*body)();
    running->state = Fiber::kEnded;
    change(running->place, scheduler);
  }
}

__attribute__((noinline)) void enter_first_time(Fiber* fiber) {
  if (__builtin_setjmp(scheduler) == 0) setcontext(&fiber->context);
}

void resume(Fiber* fiber) {
  running = fiber;
  threadIdx = fiber->thread;
  if (fiber->started) {
    change(scheduler, fiber->place);
  } else {
    fiber->started = true;
    enter_first_time(fiber);
  }
}

void new_fiber() {
  auto fiber = std::make_unique<Fiber>();
  void* stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stack == MAP_FAILED) std::abort();
  getcontext(&fiber->context);
  fiber->context.uc_stack.ss_sp = stack;
  fiber->context.uc_stack.ss_size = kStack;
  fiber->context.uc_link = nullptr;
  makecontext(&fiber->context, fiber_main, 0);
  fibers.push_back(std::move(fiber));
}

void wait() {
  running->state = Fiber::kWaiting;
  change(running->place, scheduler);
}

std::string describe(const Fiber& fiber) {
  std::string text = "thread (" + std::to_string(fiber.thread.x) + ", " + std::to_string(fiber.thread.y) + ", " +
                     std::to_string(fiber.thread.z) + ") of block (" + std::to_string(blockIdx.x) + ", " +
                     std::to_string(blockIdx.y) + ", " + std::to_string(blockIdx.z) + ")";
  if (fiber.state == Fiber::kEnded) return text + " has ended";
  static const char* names[] = {"__syncthreads", "__syncwarp", "a shuffle", "a vote", "a reduction"};
  return text + " waits in " + names[int(fiber.operation)] + " at " + fiber.file + ":" + std::to_string(fiber.line);
}

// Lets the lanes of a warp go on whose masks are complete. -> did any?
bool release_warp(size_t first) {
  const size_t count = std::min<size_t>(32, threads - first);
  for (size_t i = 0; i < count; ++i) {
    const Fiber& lane = *members[first + i];
    if (lane.state != Fiber::kWaiting || lane.operation == Operation::kBarrier) continue;
    if ((lane.mask >> i & 1) == 0) {
      error = "the mask does not name the caller: " + describe(lane);
      return false;
    }
    bool complete = true;
    for (size_t j = 0; j < 32 && complete; ++j) {
      if ((lane.mask >> j & 1) == 0) continue;
      if (j >= count) {
        error = "the mask names lanes that do not exist: " + describe(lane);
        return false;
      }
      const Fiber& other = *members[first + j];
      complete = other.state == Fiber::kWaiting && other.operation == lane.operation && other.mask == lane.mask;
    }
    if (!complete) continue;
    const unsigned mask = lane.mask;
    for (size_t j = 0; j < count; ++j) {
      if ((mask >> j & 1) == 0) continue;
      received[j] = members[first + j]->value;
      members[first + j]->state = Fiber::kReady;
    }
    return true;
  }
  return false;
}

bool release_block() {
  const auto at_barrier = [](const Fiber& fiber) {
    return fiber.state == Fiber::kWaiting && fiber.operation == Operation::kBarrier;
  };
  const auto together = [&](const Fiber& a, const Fiber& b) {
    return at_barrier(a) && at_barrier(b) && a.line == b.line && std::strcmp(a.file, b.file) == 0;
  };
  const Fiber* first = members[0];
  for (size_t i = 0; i < threads; ++i) {
    if (together(*first, *members[i])) continue;
    // Name two that wait for different things.
    const Fiber* other = fibers[i].get();
    for (size_t j = 0; j < threads && other->state == first->state && other->line == first->line; ++j) {
      other = members[j];
    }
    error = "the threads of a block have parted: " + describe(*first) + "; " + describe(*other);
    return false;
  }
  for (size_t i = 0; i < threads; ++i) members[i]->state = Fiber::kReady;
  return true;
}

// __shared__ variables are thread_local ones of this library: all of its thread-local block, which exists from the
// first touch on.
thread_local volatile char touched;

int poison_static(dl_phdr_info* info, size_t, void*) {
  const auto here = reinterpret_cast<ElfW(Addr)>(&poison_static);
  bool mine = false;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& segment = info->dlpi_phdr[i];
    const ElfW(Addr) begin = info->dlpi_addr + segment.p_vaddr;
    mine |= segment.p_type == PT_LOAD && here >= begin && here < begin + segment.p_memsz;
  }
  if (!mine) return 0;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    if (info->dlpi_phdr[i].p_type == PT_TLS && info->dlpi_tls_data != nullptr) {
      std::memset(info->dlpi_tls_data, 0xff, info->dlpi_phdr[i].p_memsz);
    }
  }
  return 1;
}

struct Block {
  uint3 index;
  std::vector<Fiber*> fibers;
  std::unique_ptr<unsigned char, decltype(&std::free)> memory{nullptr, &std::free};
  bool ended = false;
};

void begin_block(Block& block, uint64_t number, size_t first_fiber, size_t shared_bytes) {
  block.index = {unsigned(number % gridDim.x), unsigned(number / gridDim.x % gridDim.y),
                 unsigned(number / gridDim.x / gridDim.y)};
  block.memory.reset(static_cast<unsigned char*>(std::aligned_alloc(16, (shared_bytes + 15) / 16 * 16)));
  if (shared_bytes > 0) std::memset(block.memory.get(), 0xff, shared_bytes);
  while (fibers.size() < first_fiber + threads) new_fiber();
  for (size_t i = 0; i < threads; ++i) {
    Fiber* fiber = fibers[first_fiber + i].get();
    fiber->state = Fiber::kReady;
    fiber->thread = {unsigned(i) % blockDim.x, unsigned(i) / blockDim.x % blockDim.y,
                     unsigned(i) / blockDim.x / blockDim.y};
    fiber->copies.assign(1, {});
    block.fibers.push_back(fiber);
  }
}

// Until all threads of the block wait for the block, or look at the clock, or have ended.
void advance(Block& block) {
  blockIdx = block.index, shared = block.memory.get(), members = block.fibers.data();
  const size_t warps = (threads + 31) / 32;
  for (size_t w = 0; w < warps; ++w) {
    const size_t first = (backwards ? warps - 1 - w : w) * 32, count = std::min<size_t>(32, threads - first);
    do {
      for (size_t i = 0; i < count; ++i) {
        Fiber* fiber = members[first + (backwards ? count - 1 - i : i)];
        if (fiber->state == Fiber::kReady) resume(fiber);
      }
    } while (release_warp(first));
    if (!error.empty()) return;
  }
  const auto in = [&](Fiber::State state) { return [state](const Fiber* fiber) { return fiber->state == state; }; };
  block.ended = std::all_of(block.fibers.begin(), block.fibers.end(), in(Fiber::kEnded));
  if (!block.ended && std::none_of(block.fibers.begin(), block.fibers.end(), in(Fiber::kReady))) release_block();
}

void poison_shared_memory() {
  touched = 1;
  dl_iterate_phdr(poison_static, nullptr);
}

}  // namespace

unsigned char* dynamic_shared() { return shared; }
int lane() { return int((threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32); }

void wait_for_block(const char* file, int line) {
  running->operation = Operation::kBarrier, running->file = file, running->line = line;
  wait();
}

const uint64_t* exchange(Operation operation, unsigned mask, uint64_t value, const char* file, int line) {
  running->operation = operation, running->mask = mask, running->value = value;
  running->file = file, running->line = line;
  wait();
  return received;
}

void copy_later(void* target, const void* source, size_t bytes, size_t zeros) {
  running->copies.back().push_back({target, source, bytes, zeros});
}
void commit_copies() { running->copies.emplace_back(); }
void wait_for_copies(size_t but) {
  while (running->copies.size() > but + 1) {
    for (const Copy& copy : running->copies.front()) {
      std::memcpy(copy.target, copy.source, copy.bytes - copy.zeros);
      std::memset(static_cast<char*>(copy.target) + copy.bytes - copy.zeros, 0, copy.zeros);
    }
    running->copies.pop_front();
  }
}

uint64_t look_at_clock() {
  change(running->place, scheduler);
  return ++milliseconds * 1'000'000;
}

cudaError_t run(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& thread) {
  gridDim = config.gridDim, blockDim = config.blockDim;
  threads = size_t(blockDim.x) * blockDim.y * blockDim.z;
  const auto allowed = allowed_shared.find(kernel);
  const size_t most = allowed == allowed_shared.end() ? 48 * 1024 : size_t(allowed->second);
  // The limits of every card that is served.
  if (threads == 0 || threads > 1024 || gridDim.x == 0 || gridDim.y == 0 || gridDim.z == 0 || gridDim.y > 65535 ||
      gridDim.z > 65535 || gridDim.x > 2147483647u || config.dynamicSmemBytes > most) {
    return cudaErrorInvalidConfiguration;
  }
  const uint64_t blocks = uint64_t(gridDim.x) * gridDim.y * gridDim.z;
  const bool together = config.numAttrs > 0;
  int multiprocessors = 0;
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0);
  if (together && blocks > uint64_t(multiprocessors)) return cudaErrorCooperativeLaunchTooLarge;
  body = &thread;
  error.clear();
  if (together) {
    poison_shared_memory();
    std::vector<Block> running_blocks(blocks);
    for (uint64_t i = 0; i < blocks; ++i) begin_block(running_blocks[i], i, i * threads, config.dynamicSmemBytes);
    for (bool left = true; left && error.empty();) {
      left = false;
      for (uint64_t i = 0; i < blocks && error.empty(); ++i) {
        const uint64_t number = backwards ? blocks - 1 - i : i;
        if (running_blocks[number].ended || int(number) == lost_block) continue;
        advance(running_blocks[number]);
        left = true;
      }
    }
  } else {
    for (uint64_t i = 0; i < blocks && error.empty(); ++i) {
      Block block;
      begin_block(block, backwards ? blocks - 1 - i : i, 0, config.dynamicSmemBytes);
      poison_shared_memory();
      while (!block.ended && error.empty()) advance(block);
    }
  }
  if (error.empty()) return cudaSuccess;
  fibers.clear();  // they stopped halfway
  return cudaErrorLaunchFailure;
}

}  // namespace cuda_on_cpu

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  if (value > 227 * 1024) return cudaErrorInvalidConfiguration;
  cuda_on_cpu::allowed_shared[kernel] = value;
  return cudaSuccess;
}

const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaErrorLaunchFailure) return cuda_on_cpu::error.c_str();
  return error == cudaSuccess ? "no error" : "invalid configuration argument";
}

// This block of cooperative launches never begins; -1: all do.
extern "C" void cuda_on_cpu_lose_block(int number) { cuda_on_cpu::lost_block = number; }

extern "C" void cuda_on_cpu_order(int backwards) { cuda_on_cpu::backwards = backwards != 0; }
