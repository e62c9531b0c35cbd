// Tiles of the GEMM by AVX2.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "tile.h"
#include "vec.h"

namespace RQ_TIER {
namespace {

constexpr int TILE_ROWS = 4;
constexpr bool UNPACK_ONCE = false;
constexpr int64_t BLOCK_STEPS = 32;  // 8 KiB of nibbles, which stay in the first cache level
inline int64_t block_steps(int64_t) { return BLOCK_STEPS; }

// R rows and H half lines (8 channels each) with R H = 8. Products of nibbles are added in int16 as long as
// they cannot overflow: a step adds at most 4 * 15 * 2^(act_bits - 1).
template <int R, int H>
inline void nibble_tile(const uint8_t* w, const int8_t* a, int64_t lda, int64_t steps, int act_bits, int32_t* acc) {
  const __m256i low = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  const int64_t safe = act_bits == 4 ? 64 : 4;
  for (int64_t begin = 0; begin < steps; begin += safe) {
    const int64_t end = begin + safe < steps ? begin + safe : steps;
    __m256i sum[R][H];
    for (auto& row : sum)
      for (__m256i& v : row) v = _mm256_setzero_si256();
    for (int64_t k = begin; k < end; k++) {
      __m256i a0[R], a1[R];
      for (int r = 0; r < R; r++) {
        int32_t x0, x1;
        memcpy(&x0, a + r * lda + 8 * k, 4);
        memcpy(&x1, a + r * lda + 8 * k + 4, 4);
        a0[r] = _mm256_set1_epi32(x0);
        a1[r] = _mm256_set1_epi32(x1);
      }
      for (int h = 0; h < H; h++) {
        const __m256i both = _mm256_loadu_si256((const __m256i*)(w + 256 * k + 32 * h));
        const __m256i first = _mm256_and_si256(both, low), second = _mm256_and_si256(_mm256_srli_epi32(both, 4), low);
        for (int r = 0; r < R; r++) {
          const __m256i pair = _mm256_add_epi16(_mm256_maddubs_epi16(first, a0[r]), _mm256_maddubs_epi16(second, a1[r]));
          sum[r][h] = _mm256_add_epi16(sum[r][h], pair);
        }
      }
    }
    for (int r = 0; r < R; r++)
      for (int h = 0; h < H; h++) {
        int32_t* to = acc + r * PANEL + 8 * h;
        store(to, load(to) + I{_mm256_madd_epi16(sum[r][h], ones)});
      }
  }
}

// Bytes need 16 bits a factor: 4 channels of 4 inputs at a time.
inline void byte_row(const uint8_t* w, const int8_t* a, int64_t steps, int32_t* acc) {
  for (int c = 0; c < PANEL; c += 4) {
    __m256i sum = _mm256_setzero_si256();
    for (int64_t k = 0; k < 2 * steps; k++) {
      int32_t x;
      memcpy(&x, a + 4 * k, 4);
      const __m256i all = _mm256_cvtepi8_epi16(_mm_set1_epi32(x));
      const __m256i line = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)(w + 256 * k + 4 * c)));
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(line, all));
    }
    alignas(32) int32_t halves[8];
    _mm256_store_si256((__m256i*)halves, sum);
    for (int i = 0; i < 4; i++) acc[c + i] += halves[2 * i] + halves[2 * i + 1];
  }
}

template <bool Packed>
inline void rows(const uint8_t* w, const int8_t* a, int64_t lda, int count, int64_t steps, int act_bits, Ahead,
                 int32_t* acc) {
  if constexpr (!Packed) {
    for (int r = 0; r < count; r++) byte_row(w, a + r * lda, steps, acc + r * PANEL);
  } else {
    int r = 0;
    for (; r + 4 <= count; r += 4)
      for (int h = 0; h < 8; h += 2)
        nibble_tile<4, 2>(w + 32 * h, a + r * lda, lda, steps, act_bits, acc + r * PANEL + 8 * h);
    for (; r + 2 <= count; r += 2)
      for (int h = 0; h < 8; h += 4)
        nibble_tile<2, 4>(w + 32 * h, a + r * lda, lda, steps, act_bits, acc + r * PANEL + 8 * h);
    if (r < count) nibble_tile<1, 8>(w, a + r * lda, lda, steps, act_bits, acc + r * PANEL);
  }
}

inline void unpack(const uint8_t*, int64_t, uint8_t*) {}

}  // namespace
}  // namespace RQ_TIER
