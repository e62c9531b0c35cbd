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
constexpr int64_t BLOCK_STEPS = 256;
inline int64_t block_steps(int64_t tiles) { return tiles < 8 ? 32 : BLOCK_STEPS; }

// How nibbles are fetched: in so many streams at once, since the hardware follows each only to the end of its 4 KiB page,
// and so many bytes ahead. Four streams were tried on a Xeon with matrix units alone; other processors keep one.
#if defined(RQ_AMX)
constexpr int64_t STREAMS = 4, STREAM_AHEAD = 4096, UNPACK_AHEAD = 2048;
#else
constexpr int64_t STREAMS = 1, STREAM_AHEAD = 8192, UNPACK_AHEAD = 8192;
#endif

template <int R>
using Sums = __m512i[R][4];

template <int R>
inline void load_sums(const int32_t* acc, Sums<R>& sum) {
#pragma GCC unroll 6
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) sum[r][j] = _mm512_loadu_si512(acc + r * PANEL + 16 * j);
}

template <int R>
inline void store_sums(const Sums<R>& sum, int32_t* acc) {
#pragma GCC unroll 6
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) _mm512_storeu_si512(acc + r * PANEL + 16 * j, sum[r][j]);
}

// Weights as nibbles.
template <int R>
inline void tile_packed(const uint8_t* w, const int8_t* a, int64_t lda, int64_t steps, int32_t* acc) {
  Sums<R> sum;
  load_sums<R>(acc, sum);
  const __m512i low = _mm512_set1_epi8(15);
  const auto step = [&](int64_t k, int64_t further) {
    const uint8_t* lines = w + 256 * k;
    const int8_t* x = a + 8 * k;
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      _mm_prefetch((const char*)lines + further + 64 * j, _MM_HINT_T0);
      const __m512i both = _mm512_loadu_si512(lines + 64 * j);
      const __m512i first = _mm512_and_si512(both, low);
      const __m512i second = _mm512_and_si512(_mm512_srli_epi32(both, 4), low);
#pragma GCC unroll 6
      for (int r = 0; r < R; r++) {
        int32_t a0, a1;
        memcpy(&a0, x + r * lda, 4);
        memcpy(&a1, x + r * lda + 4, 4);
        sum[r][j] = _mm512_dpbusd_epi32(sum[r][j], first, _mm512_set1_epi32(a0));
        sum[r][j] = _mm512_dpbusd_epi32(sum[r][j], second, _mm512_set1_epi32(a1));
      }
    }
  };
  // Behind a stream's end lies what the next one began with; the same stream goes on in the panel behind this one.
  const int64_t part = steps / STREAMS, near = part - STREAM_AHEAD / 256;
  for (int64_t k = 0; k < part; k++) {
    const int64_t further = k < near ? STREAM_AHEAD : STREAM_AHEAD + 256 * (steps - part);
#pragma GCC unroll 4
    for (int64_t s = 0; s < STREAMS; s++) step(k + s * part, further);
  }
  for (int64_t k = part * STREAMS; k < steps; k++) step(k, STREAM_AHEAD);
  store_sums<R>(sum, acc);
}

// Weights as bytes.
template <int R>
inline void tile_bytes(const uint8_t* w, const int8_t* a, int64_t lda, int64_t steps, Ahead ahead, int32_t* acc) {
  Sums<R> sum;
  load_sums<R>(acc, sum);
  for (int64_t k = 0; k < steps; k++, a += 8) {
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
  store_sums<R>(sum, acc);
}

template <int R, bool Packed>
inline void tile(const uint8_t* w, const int8_t* a, int64_t lda, int64_t steps, Ahead ahead, int32_t* acc) {
  if constexpr (Packed)
    tile_packed<R>(w, a, lda, steps, acc);
  else
    tile_bytes<R>(w, a, lda, steps, ahead, acc);
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
      _mm_prefetch((const char*)w + UNPACK_AHEAD + 64 * j, _MM_HINT_T0);
      const __m512i both = _mm512_loadu_si512(w + 64 * j);
      _mm512_store_si512(to + 64 * j, _mm512_and_si512(both, low));
      _mm512_store_si512(to + 256 + 64 * j, _mm512_and_si512(_mm512_srli_epi32(both, 4), low));
    }
}

}  // namespace
}  // namespace RQ_TIER
