// Tiles of the GEMM by the matrix products of NEON: two rows, two channels and eight inputs an instruction.
#pragma once

#include <arm_neon.h>

#include <cstdint>

#include "tile_neon.h"

namespace RQ_TIER {
namespace {

constexpr int TILE_ROWS = 6;  // rows; 3 x 8 accumulators leave registers for the weights

// Eight inputs of two rows, one behind the other.
inline int8x16_t two_rows(const int8_t* a, int64_t lda) { return vcombine_s8(vld1_s8(a), vld1_s8(a + lda)); }

// 2 P rows and 4 C channels, from which `w` and `acc` start. A sum holds two rows of a channel, then of the next.
template <int P, int C, bool Packed>
inline void pairs(const uint8_t* w, const int8_t* a, int64_t lda, int64_t steps, int32_t* acc) {
  int32x4_t sum[P][2 * C];
#pragma GCC unroll 3
  for (int p = 0; p < P; p++)
#pragma GCC unroll 8
    for (int c = 0; c < C; c++) {
      const int32_t* from = acc + 2 * p * PANEL + 4 * c;
      sum[p][2 * c] = vzip1q_s32(vld1q_s32(from), vld1q_s32(from + PANEL));
      sum[p][2 * c + 1] = vzip2q_s32(vld1q_s32(from), vld1q_s32(from + PANEL));
    }
  for (int64_t k = 0; k < steps; k++, a += 8, w += Packed ? 256 : 512) {
    int8x16_t x[P];
#pragma GCC unroll 3
    for (int p = 0; p < P; p++) x[p] = two_rows(a + 2 * p * lda, lda);
#pragma GCC unroll 8
    for (int c = 0; c < C; c++) {
      const uint8x16_t line = vld1q_u8(w + 16 * c);
      const uint8x16_t first = Packed ? vandq_u8(line, vdupq_n_u8(15)) : line;
      const uint8x16_t second = Packed ? vshrq_n_u8(line, 4) : vld1q_u8(w + 256 + 16 * c);
      // 4 + 4 inputs of each channel side by side, two channels a vector
      const uint32x4_t low = vreinterpretq_u32_u8(first), high = vreinterpretq_u32_u8(second);
      const uint8x16_t front = vreinterpretq_u8_u32(vzip1q_u32(low, high));
      const uint8x16_t back = vreinterpretq_u8_u32(vzip2q_u32(low, high));
#pragma GCC unroll 3
      for (int p = 0; p < P; p++) {
        sum[p][2 * c] = vusmmlaq_s32(sum[p][2 * c], front, x[p]);
        sum[p][2 * c + 1] = vusmmlaq_s32(sum[p][2 * c + 1], back, x[p]);
      }
    }
  }
#pragma GCC unroll 3
  for (int p = 0; p < P; p++)
#pragma GCC unroll 8
    for (int c = 0; c < C; c++) {
      int32_t* to = acc + 2 * p * PANEL + 4 * c;
      vst1q_s32(to, vuzp1q_s32(sum[p][2 * c], sum[p][2 * c + 1]));
      vst1q_s32(to + PANEL, vuzp2q_s32(sum[p][2 * c], sum[p][2 * c + 1]));
    }
}

// The whole panel, 4 C channels at a time.
template <int P, int C, bool Packed>
inline void paired_panel(const uint8_t* w, const int8_t* a, int64_t lda, int64_t steps, int32_t* acc) {
  for (int c = 0; c < PANEL / 4; c += C) pairs<P, C, Packed>(w + 16 * c, a, lda, steps, acc + 4 * c);
}

template <bool Packed>
inline void rows(const uint8_t* w, const int8_t* a, int64_t lda, int count, int64_t steps, int, Ahead, int32_t* acc) {
  const int even = count / 2 * 2;
  if (even == 2) paired_panel<1, 8, Packed>(w, a, lda, steps, acc);
  if (even == 4) paired_panel<2, 4, Packed>(w, a, lda, steps, acc);
  if (even == 6) paired_panel<3, 4, Packed>(w, a, lda, steps, acc);
  if (count > even) panel<1, 16, Packed>(w, a + even * lda, lda, steps, acc + even * PANEL);
}

}  // namespace
}  // namespace RQ_TIER
