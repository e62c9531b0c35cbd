// Tiles of the GEMM by 512-bit VNNI instructions.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "tile.h"

namespace RQ_TIER {
namespace {

constexpr int TILE_ROWS = 6;  // rows; 6 x 4 accumulators leave registers for the weights
constexpr bool UNPACK_ONCE = true;
// Steps of a block of weights that `tiles` tiles of rows share. For many, its 128 KiB lie in the second cache level,
// which feeds a tile fast enough, and accumulators move less often; for few, they are used before they leave the first.
// A matrix unit reads them faster than the second level gives them.
constexpr int64_t BLOCK_STEPS = 256;
// What processors with a matrix unit fetch into the first level waits for its few places there.
#if defined(RQ_AMX)
constexpr auto FETCH = _MM_HINT_T1;
inline int64_t block_steps(int64_t) { return 32; }
#else
constexpr auto FETCH = _MM_HINT_T0;
inline int64_t block_steps(int64_t tiles) { return tiles < 8 ? 32 : BLOCK_STEPS; }
#endif

template <int R, bool Packed>
inline void tile(const uint8_t* w, const int8_t* a, int64_t lda, int64_t steps, Ahead ahead, int32_t* acc) {
  __m512i sum[R][4];
#pragma GCC unroll 6
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) sum[r][j] = _mm512_loadu_si512(acc + r * PANEL + 16 * j);
  const __m512i low = _mm512_set1_epi8(15);
  for (int64_t k = 0; k < steps; k++, a += 8) {
    if constexpr (Packed) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) {
        // The hardware follows a stream only to the end of its 4 KiB page.
        _mm_prefetch((const char*)w + 8192 + 64 * j, FETCH);
        const __m512i both = _mm512_loadu_si512(w + 64 * j);
        const __m512i first = _mm512_and_si512(both, low);
        const __m512i second = _mm512_and_si512(_mm512_srli_epi32(both, 4), low);
#pragma GCC unroll 6
        for (int r = 0; r < R; r++) {
          int32_t a0, a1;
          memcpy(&a0, a + r * lda, 4);
          memcpy(&a1, a + r * lda + 4, 4);
          sum[r][j] = _mm512_dpbusd_epi32(sum[r][j], first, _mm512_set1_epi32(a0));
          sum[r][j] = _mm512_dpbusd_epi32(sum[r][j], second, _mm512_set1_epi32(a1));
        }
      }
      w += 256;
    } else {
      if (k % 8 == 0)
        for (int64_t i = 0; i < ahead.lines; i++, ahead.at += 64) _mm_prefetch((const char*)ahead.at, _MM_HINT_T1);
#pragma GCC unroll 2
      for (int half = 0; half < 2; half++, w += 256) {
        __m512i line[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) line[j] = _mm512_loadu_si512(w + 64 * j);
#pragma GCC unroll 6
        for (int r = 0; r < R; r++) {
          int32_t x;
          memcpy(&x, a + r * lda + 4 * half, 4);
          const __m512i all = _mm512_set1_epi32(x);
#pragma GCC unroll 4
          for (int j = 0; j < 4; j++) sum[r][j] = _mm512_dpbusd_epi32(sum[r][j], line[j], all);
        }
      }
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) _mm512_storeu_si512(acc + r * PANEL + 16 * j, sum[r][j]);
}

template <bool Packed>
inline void rows(const uint8_t* w, const int8_t* a, int64_t lda, int count, int64_t steps, int, Ahead ahead,
                 int32_t* acc) {
  switch (count) {
    case 1: return tile<1, Packed>(w, a, lda, steps, ahead, acc);
    case 2: return tile<2, Packed>(w, a, lda, steps, ahead, acc);
    case 3: return tile<3, Packed>(w, a, lda, steps, ahead, acc);
    case 4: return tile<4, Packed>(w, a, lda, steps, ahead, acc);
    case 5: return tile<5, Packed>(w, a, lda, steps, ahead, acc);
    default: return tile<6, Packed>(w, a, lda, steps, ahead, acc);
  }
}

// Nibble lines to byte lines, 256 to 512 bytes a step.
inline void unpack(const uint8_t* w, int64_t steps, uint8_t* to) {
  const __m512i low = _mm512_set1_epi8(15);
  for (int64_t k = 0; k < steps; k++, w += 256, to += 512)
    for (int j = 0; j < 4; j++) {
#if !defined(RQ_AMX)
      _mm_prefetch((const char*)w + 8192 + 64 * j, _MM_HINT_T0);
#endif
      const __m512i both = _mm512_loadu_si512(w + 64 * j);
      _mm512_store_si512(to + 64 * j, _mm512_and_si512(both, low));
      _mm512_store_si512(to + 256 + 64 * j, _mm512_and_si512(_mm512_srli_epi32(both, 4), low));
    }
}

}  // namespace
}  // namespace RQ_TIER
