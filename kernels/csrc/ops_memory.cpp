// torch ops about memory: large_pages, weight_pages.
#include "memory.h"

#include <sys/mman.h>

#include <atomic>
#include <tuple>

#include "binding.h"

namespace rotquant {
namespace {

// MADV_COLLAPSE of Linux 6.1, which older headers do not name. It needs no MADV_HUGEPAGE, which would part memory from its
// neighbours: a page that two mappings share is never large.
constexpr int collapse = 25;
std::atomic<int64_t> weight_total{0}, weight_given{0};

// Pages of 2 MiB that hold a tensor's storage, and how many the system has given.
std::tuple<int64_t, int64_t> large_pages(const Tensor& x) {
  REQUIRE(x.is_cpu() && x.is_contiguous(), "large_pages takes contiguous tensors on the CPU");
  const LargePages found = ask_large_pages(x.const_data_ptr(), x.numel() * int64_t(x.element_size()));
  return {found.pages, found.given};
}

// The same of all weights that were packed so far.
std::tuple<int64_t, int64_t> weight_pages() { return {weight_total, weight_given}; }

}  // namespace

LargePages ask_large_pages(const void* data, int64_t bytes) {
  LargePages found{0, 0};
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t size = 2 << 20;
  const uintptr_t first = uintptr_t(data) / size * size, last = uintptr_t(data) + uintptr_t(bytes);
  for (uintptr_t page = first; page < last; page += size, found.pages++) {
    if (madvise((void*)page, size, collapse) == 0)
      found.given++;
    else if (page >= uintptr_t(data) && page + size <= last)
      madvise((void*)page, size, MADV_HUGEPAGE);  // an older system's, in its own time
  }
#endif
  return found;
}

void ask_large_weight(const void* data, int64_t bytes) {
  const LargePages found = ask_large_pages(data, bytes);
  weight_total += found.pages;
  weight_given += found.given;
}

STABLE_TORCH_LIBRARY_FRAGMENT(rotquant, m) {
  m.def("large_pages(Tensor x) -> (int, int)");
  m.def("weight_pages() -> (int, int)");
}
STABLE_TORCH_LIBRARY_IMPL(rotquant, CompositeExplicitAutograd, m) {
  m.impl("weight_pages", TORCH_BOX(&weight_pages));
  m.impl("large_pages", TORCH_BOX(&large_pages));
}

}  // namespace rotquant
