// Memory that is read from end to end, packed weights and the KV cache, in pages of 2 MiB: a processor looks up the
// places of so few pages at a time that with 4 KiB a virtual machine reads a half to a third as fast.
#pragma once

#include <cstdint>

namespace rotquant {

// Pages of 2 MiB that hold `data`, and how many of them the system has given.
struct LargePages {
  int64_t pages, given;
};

// Asks for large pages under memory that is written already. The pages at both ends hold others' memory too, which may
// not be all there yet; what stays in small pages is only slower.
LargePages ask_large_pages(const void* data, int64_t bytes);

// The same for packed weights, summed up for `weight_pages`.
void ask_large_weight(const void* data, int64_t bytes);

// The same for anonymous memory that nobody writes meanwhile and that may be zero still: such a page is given back and comes
// anew, large and zero, at half the price of a copy. (A private mapping of a file would come back as the file has it.)
LargePages make_large_pages(void* data, int64_t bytes);

}  // namespace rotquant
