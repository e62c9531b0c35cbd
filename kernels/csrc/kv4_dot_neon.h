// The dot products of the 4-bit cache by NEON. What they compute: kv4_dot.h.
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <type_traits>

#include "vec.h"

namespace RQ_TIER {
namespace {

// Codes are 0 to 15, so they may be signed or not, as the row is.
template <int LANE>
inline int32x4_t add_products(int32x4_t sum, uint8x16_t codes, int8x16_t row) {
  return vdotq_laneq_s32(sum, vreinterpretq_s8_u8(codes), row, LANE);
}
template <int LANE>
inline int32x4_t add_products(int32x4_t sum, uint8x16_t codes, uint8x16_t row) {
  return vreinterpretq_s32_u32(vdotq_laneq_u32(vreinterpretq_u32_s32(sum), codes, row, LANE));
}

inline int8x16_t load16(const int8_t* p) { return vld1q_s8(p); }
inline uint8x16_t load16(const uint8_t* p) { return vld1q_u8(p); }

// One stream, R <= 4 rows.
template <int R, int STRIDE, class A, class Tile>
inline void dot_rows(const Tile& tile, int64_t tiles, const A* rows, int32_t* out, int64_t stride) {
  int32x4_t sum[R][4];
#pragma GCC unroll 4
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) sum[r][c] = vdupq_n_s32(0);
  for (int64_t i = 0; i < tiles; i++, rows += 16) {
    const uint8_t* codes = tile(i);
    decltype(load16(rows)) row[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) row[r] = load16(rows + r * STRIDE);
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) {
      const uint8x16_t front = vld1q_u8(codes + 16 * c), back = vld1q_u8(codes + 64 + 16 * c);
      const uint8x16_t low = vdupq_n_u8(15);
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) {
        sum[r][c] = add_products<0>(sum[r][c], vandq_u8(front, low), row[r]);
        sum[r][c] = add_products<1>(sum[r][c], vshrq_n_u8(front, 4), row[r]);
        sum[r][c] = add_products<2>(sum[r][c], vandq_u8(back, low), row[r]);
        sum[r][c] = add_products<3>(sum[r][c], vshrq_n_u8(back, 4), row[r]);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) vst1q_s32(out + r * stride + 4 * c, sum[r][c]);
}

template <int R, int S, int STRIDE, class A, class Tiles>
inline void dot(const Tiles& tile, const Tiles& ahead, int64_t tiles, const A* rows, int32_t* out, int64_t stride) {
  for (int s = 0; s < S; s++) {
    for (int64_t i = 0; i < tiles; i++) {
      __builtin_prefetch(ahead(s, i));
      __builtin_prefetch(ahead(s, i) + 64);
    }
    const auto stream = [&](int64_t i) { return tile(s, i); };
    int r = 0;
    for (; r + 4 <= R; r += 4) dot_rows<4, STRIDE>(stream, tiles, rows + r * STRIDE, out + r * stride + 16 * s, stride);
    if constexpr (R % 4) dot_rows<R % 4, STRIDE>(stream, tiles, rows + r * STRIDE, out + r * stride + 16 * s, stride);
  }
}

// b is 0 to 127.
inline int32_t dot_bytes(const uint8_t* a, const int8_t* b, int64_t n) {
  uint32x4_t sum = vdupq_n_u32(0);
  for (int64_t i = 0; i < n; i += 16) sum = vdotq_u32(sum, vld1q_u8(a + i), vreinterpretq_u8_s8(vld1q_s8(b + i)));
  return int32_t(vaddvq_u32(sum));
}

}  // namespace
}  // namespace RQ_TIER
