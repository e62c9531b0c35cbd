// Tiles of the GEMM by the dot products of NEON: four inputs of four channels an instruction.
#pragma once

#include <arm_neon.h>

#include <cstdint>

#include "tile.h"
#include "vec.h"

namespace RQ_TIER {
namespace {

#if !defined(RQ_I8MM)
constexpr int TILE_ROWS = 4;
#endif
constexpr bool UNPACK_ONCE = false;
constexpr int64_t BLOCK_STEPS = 32;  // 8 KiB of nibbles, which stay in the first cache level
inline int64_t block_steps(int64_t) { return BLOCK_STEPS; }

// R rows and 4 C channels, from which `w` and `acc` start. Bytes are signed for the instruction, w - 128, and
// 128 times the row's sum comes on top.
template <int R, int C, bool Packed>
inline void tile(const uint8_t* w, const int8_t* a, int64_t lda, int64_t steps, int32_t* acc) {
  int32x4_t sum[R][C];
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) {
    const int32x4_t base = vdupq_n_s32(Packed ? 0 : 128 * sum_i8(a + r * lda, 8 * steps));
#pragma GCC unroll 16
    for (int c = 0; c < C; c++) sum[r][c] = vaddq_s32(vld1q_s32(acc + r * PANEL + 4 * c), base);
  }
  for (int64_t k = 0; k < steps; k++, a += 8, w += Packed ? 256 : 512) {
    int8x8_t x[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) x[r] = vld1_s8(a + r * lda);
#pragma GCC unroll 16
    for (int c = 0; c < C; c++) {
      const uint8x16_t line = vld1q_u8(w + 16 * c);
      uint8x16_t first, second;
      if constexpr (Packed) {
        first = vandq_u8(line, vdupq_n_u8(15));
        second = vshrq_n_u8(line, 4);
      } else {
        first = veorq_u8(line, vdupq_n_u8(128));
        second = veorq_u8(vld1q_u8(w + 256 + 16 * c), vdupq_n_u8(128));
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) {
        sum[r][c] = vdotq_lane_s32(sum[r][c], vreinterpretq_s8_u8(first), x[r], 0);
        sum[r][c] = vdotq_lane_s32(sum[r][c], vreinterpretq_s8_u8(second), x[r], 1);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; r++)
#pragma GCC unroll 16
    for (int c = 0; c < C; c++) vst1q_s32(acc + r * PANEL + 4 * c, sum[r][c]);
}

// The whole panel, 4 C channels at a time.
template <int R, int C, bool Packed>
inline void panel(const uint8_t* w, const int8_t* a, int64_t lda, int64_t steps, int32_t* acc) {
  for (int c = 0; c < PANEL / 4; c += C) tile<R, C, Packed>(w + 16 * c, a, lda, steps, acc + 4 * c);
}

#if !defined(RQ_I8MM)
template <bool Packed>
inline void rows(const uint8_t* w, const int8_t* a, int64_t lda, int count, int64_t steps, int, Ahead, int32_t* acc) {
  switch (count) {
    case 1: return panel<1, 16, Packed>(w, a, lda, steps, acc);
    case 2: return panel<2, 8, Packed>(w, a, lda, steps, acc);
    case 3: return panel<3, 4, Packed>(w, a, lda, steps, acc);
    default: return panel<4, 4, Packed>(w, a, lda, steps, acc);
  }
}
#endif

inline void unpack(const uint8_t*, int64_t, uint8_t*) {}

}  // namespace
}  // namespace RQ_TIER
