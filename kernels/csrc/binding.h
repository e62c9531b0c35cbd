// Shared by the op files: the chosen tier, checked views of tensors, scratch memory, threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <sys/mman.h>

#include <atomic>
#include <cstdlib>
#include <string>

#include "tier.h"

namespace rotquant {

#define REQUIRE(condition, ...) STD_TORCH_CHECK(condition, "rotquant: ", __VA_ARGS__)

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The tier in use: the best of this machine, or what `cpu_tier` was told.
const Tier& tier();

inline DType dtype_of(const Tensor& t, const char* what) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: REQUIRE(false, what, " must be float32, bfloat16 or float16");
  }
}

inline void check_dense(const Tensor& t, ScalarType type, const char* what) {
  REQUIRE(t.scalar_type() == type && t.is_contiguous(), what, " has a wrong dtype or is not contiguous");
}

// Memory of this thread that grows and stays: `slot` tells apart what is in use at the same time.
inline void* scratch(int slot, size_t bytes) {
  struct Buffer {
    void* data = nullptr;
    size_t size = 0;
    ~Buffer() { free(data); }
  };
  thread_local Buffer buffers[4];
  Buffer& b = buffers[slot];
  if (b.size < bytes) {
    free(b.data);
    b.size = (bytes + bytes / 4 + 4095) / 4096 * 4096;
    b.data = aligned_alloc(4096, b.size);
    REQUIRE(b.data, "out of memory");
  }
  return b.data;
}

// Large pages let one thread read 10 to 20% more bytes a second. To be asked before the memory is written.
inline void ask_for_huge_pages(void* data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  const uintptr_t huge = 2 << 20, first = (uintptr_t(data) + huge - 1) / huge * huge;
  const uintptr_t last = (uintptr_t(data) + uintptr_t(bytes)) / huge * huge;
  if (last > first) madvise((void*)first, last - first, MADV_HUGEPAGE);
#endif
}

// work(i) for i in 0..items in torch's own thread pool. Threads take the next item when they are free:
// on a shared machine equal shares would all wait for the thread that was interrupted.
template <class Work>
inline void parallel(int64_t items, bool worthwhile, const Work& work) {
  const int64_t threads = worthwhile ? int64_t(torch::stable::get_num_threads()) : 1;
  if (threads <= 1 || items <= 1) {
    for (int64_t i = 0; i < items; i++) work(i);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads < items ? threads : items, 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < items;) work(i);
  });
}

}  // namespace rotquant
