// A packed program as jambatalk_kernels/rollout/packing.py writes it: integers in the order in which they are read
// here, and the sections of one block of memory that they point to. What lies outside of it is refused.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cstdint>

namespace jambatalk {

class PlanReader {
 public:
  PlanReader(const int64_t* numbers, int64_t count, int64_t storage_bytes)
      : next_(numbers), end_(numbers + count), size_(storage_bytes) {}

  int64_t number(int64_t least, int64_t most = int64_t{1} << 24) {
    STD_TORCH_CHECK(next_ < end_ && *next_ >= least && *next_ <= most, "rollout: this plan was not made by packing.py");
    return *next_++;
  }

  // Where a section of so many elements begins, in bytes.
  int64_t section(int64_t elements, int64_t element_size) {
    const int64_t offset = number(0, size_);
    STD_TORCH_CHECK(offset % 64 == 0 && elements >= 0 && elements <= (size_ - offset) / element_size,
                    "rollout: a section of the plan is not in the storage");
    return offset;
  }

  void finish() const { STD_TORCH_CHECK(next_ == end_, "rollout: the plan has more than one program"); }

 private:
  const int64_t *next_, *end_;
  int64_t size_;
};

}  // namespace jambatalk
