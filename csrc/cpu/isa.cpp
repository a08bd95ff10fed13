#include "cpu/isa.h"

#include <atomic>
#include <cstdlib>
#include <new>
#include <stdexcept>

namespace jambatalk {
namespace {

// Best first. "wide" is for tests: it runs everywhere and is never chosen by itself.
std::vector<const IsaKernels*> available() {
  std::vector<const IsaKernels*> sets;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    sets.push_back(&kAvx512Kernels);
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    sets.push_back(&kAvx2Kernels);
  }
#endif
  sets.push_back(&kPlainKernels);
  sets.push_back(&kWideKernels);
  return sets;
}

const IsaKernels* find(const std::string& name) {
  std::string names;
  for (const IsaKernels* set : available()) {
    if (name == set->name) return set;
    names += names.empty() ? set->name : std::string(", ") + set->name;
  }
  throw std::runtime_error("JAMBATALK_CPU_ISA: this processor does not run '" + name + "'; it runs " + names);
}

std::atomic<const IsaKernels*> in_use{nullptr};

struct Scratch {
  void* memory = nullptr;
  size_t size = 0;
  ~Scratch() { std::free(memory); }
};

}  // namespace

const IsaKernels& kernels() {
  const IsaKernels* set = in_use.load(std::memory_order_acquire);
  if (set == nullptr) {
    const char* wish = std::getenv("JAMBATALK_CPU_ISA");
    set = wish != nullptr && *wish != '\0' ? find(wish) : available().front();
    in_use.store(set, std::memory_order_release);
  }
  return *set;
}

void use_isa(const std::string& name) { in_use.store(find(name), std::memory_order_release); }

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const IsaKernels* set : available()) names.emplace_back(set->name);
  return names;
}

void* scratch(size_t bytes) {
  thread_local Scratch mine;
  if (bytes > mine.size) {
    std::free(mine.memory);
    mine.size = (bytes + 4095) / 4096 * 4096;
    mine.memory = std::aligned_alloc(64, mine.size);
    if (mine.memory == nullptr) {
      mine.size = 0;
      throw std::bad_alloc();
    }
  }
  return mine.memory;
}

}  // namespace jambatalk
