// Tiles of the GEMM in plain C++.
#pragma once

#include <cstdint>

#include "tile.h"

namespace RQ_TIER {
namespace {

constexpr int TILE_ROWS = 4;
constexpr bool UNPACK_ONCE = false;
constexpr int64_t BLOCK_STEPS = 32;  // 8 KiB of nibbles, which stay in the first cache level
inline int64_t block_steps(int64_t) { return BLOCK_STEPS; }

template <bool Packed>
inline void rows(const uint8_t* w, const int8_t* a, int64_t lda, int count, int64_t steps, int, Ahead, int32_t* acc) {
  for (int r = 0; r < count; r++, a += lda, acc += PANEL)
    for (int64_t k = 0; k < steps; k++) {
      const int8_t* x = a + 8 * k;
      const uint8_t* line = w + k * (Packed ? 256 : 512);
      for (int c = 0; c < PANEL; c++) {
        int32_t sum = 0;
        for (int t = 0; t < 4; t++) {
          const int both = line[4 * c + t], next = Packed ? both >> 4 : line[256 + 4 * c + t];
          sum += (Packed ? both & 15 : both) * x[t] + next * x[4 + t];
        }
        acc[c] += sum;
      }
    }
}

inline void unpack(const uint8_t*, int64_t, uint8_t*) {}

}  // namespace
}  // namespace RQ_TIER
