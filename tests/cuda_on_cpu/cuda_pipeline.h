// cp.async: a copy is done when it is waited for, so that a kernel which does not wait reads what was there before.
#pragma once

#include "cuda_runtime.h"

inline void __pipeline_memcpy_async(void* target, const void* source, size_t bytes, size_t zeros = 0) {
  cuda_on_cpu::copy_later(target, source, bytes, zeros);
}
inline void __pipeline_commit() { cuda_on_cpu::commit_copies(); }
inline void __pipeline_wait_prior(size_t but) { cuda_on_cpu::wait_for_copies(but); }
