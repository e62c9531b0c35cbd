// torch ops about memory: large_pages_, weight_pages.
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

// Linux 5.14's MADV_POPULATE_WRITE.
constexpr int populate = 23;
constexpr uintptr_t PAGE = 2 << 20;

// Pages of 2 MiB that hold a tensor, and how many the system has given.
std::tuple<int64_t, int64_t> large_pages_(Tensor x) {
  REQUIRE(x.is_cpu() && x.is_contiguous(), "large_pages_ takes contiguous tensors on the CPU");
  const LargePages found = make_large_pages(x.mutable_data_ptr(), x.numel() * int64_t(x.element_size()));
  return {found.pages, found.given};
}

// Whether a page is large now. One that hangs over an end of [data, last) is not asked for twice.
bool collapsed(uintptr_t page, const void* data, uintptr_t last) {
#if defined(MADV_HUGEPAGE)
  if (madvise((void*)page, PAGE, collapse) == 0) return true;
  // An older system has khugepaged, which does it in its own time.
  if (page >= uintptr_t(data) && page + PAGE <= last) madvise((void*)page, PAGE, MADV_HUGEPAGE);
#endif
  return false;
}

bool all_zero(uintptr_t page) {
  const uint64_t* words = (const uint64_t*)page;
  for (uintptr_t i = 0; i < PAGE / 8; i += 64) {
    uint64_t any = 0;
    for (uintptr_t j = 0; j < 64; j++) any |= words[i + j];
    if (any) return false;
  }
  return true;
}

// The same of all weights that were packed so far.
std::tuple<int64_t, int64_t> weight_pages() { return {weight_total, weight_given}; }

}  // namespace

LargePages ask_large_pages(const void* data, int64_t bytes) {
  LargePages found{0, 0};
  const uintptr_t last = uintptr_t(data) + uintptr_t(bytes);
  for (uintptr_t page = uintptr_t(data) / PAGE * PAGE; page < last; page += PAGE, found.pages++)
    found.given += collapsed(page, data, last);
  return found;
}

LargePages make_large_pages(void* data, int64_t bytes) {
  const uintptr_t first = uintptr_t(data) / PAGE * PAGE, last = uintptr_t(data) + uintptr_t(bytes);
  const int64_t pages = int64_t((last - first + PAGE - 1) / PAGE);
  ask_for_huge_pages(data, bytes);
  std::atomic<int64_t> given{0};
  parallel(pages, true, [&](int64_t i) {
    const uintptr_t page = first + uintptr_t(i) * PAGE;
#if defined(MADV_HUGEPAGE)
    if (page >= uintptr_t(data) && page + PAGE <= last && all_zero(page)) {
      madvise((void*)page, PAGE, MADV_DONTNEED);
      madvise((void*)page, PAGE, populate);
    }
#endif
    given += collapsed(page, data, last);
  });
  return {pages, given};
}

void ask_large_weight(const void* data, int64_t bytes) {
  const LargePages found = ask_large_pages(data, bytes);
  weight_total += found.pages;
  weight_given += found.given;
}

STABLE_TORCH_LIBRARY_FRAGMENT(rotquant, m) {
  m.def("large_pages_(Tensor(a!) x) -> (int, int)");
  m.def("weight_pages() -> (int, int)");
}
STABLE_TORCH_LIBRARY_IMPL(rotquant, CompositeExplicitAutograd, m) {
  m.impl("weight_pages", TORCH_BOX(&weight_pages));
  m.impl("large_pages_", TORCH_BOX(&large_pages_));
}

}  // namespace rotquant
