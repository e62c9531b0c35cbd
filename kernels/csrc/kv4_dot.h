// The dot products of the 4-bit cache: rows of 8-bit integers with tiles of 4-bit codes, exact in int32.
//
// A tile is 128 bytes, codes of 16 channels x 16 steps: line s (64 bytes, s = 0, 1), byte 4c + t holds step
// 8s + t of channel c in its low nibble and step 8s + 4 + t in its high nibble. For Q K^T the channels are tokens
// and the steps dimensions of the head, for P V the other way round. Rows of Q are int8, rows of P uint8.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "vec.h"

#if defined(RQ_NEON)
#include "kv4_dot_neon.h"
#else

namespace RQ_TIER {
namespace {

// Into the second cache level: more lines may be on their way there than to the first, and memory is far.
inline void fetch(const uint8_t* tile) {
  __builtin_prefetch(tile, 0, 2);
  __builtin_prefetch(tile + 64, 0, 2);
}

#if defined(RQ_AVX512)

// The instruction multiplies unsigned by signed bytes: codes (0 to 15) may be either.
template <class A>
inline __m512i add_products(__m512i sum, __m512i codes, __m512i row) {
  if constexpr (std::is_signed_v<A>) return _mm512_dpbusd_epi32(sum, codes, row);
  return _mm512_dpbusd_epi32(sum, row, codes);
}

// out[r][16 s + channel] = sum over steps of row r times tile(s, step / 16), for R rows and S streams of tiles.
// Meanwhile ahead(s, i), what will be asked for next, comes into the cache.
template <int R, int S, int STRIDE, class A, class Tiles>
inline void dot(const Tiles& tile, const Tiles& ahead, int64_t tiles, const A* rows, int32_t* out, int64_t stride) {
  __m512i sum[R][S];
#pragma GCC unroll 12
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int s = 0; s < S; s++) sum[r][s] = _mm512_setzero_si512();
  const __m512i mask = _mm512_set1_epi8(15);
  for (int64_t i = 0; i < tiles; i++, rows += 16) {
#pragma GCC unroll 4
    for (int s = 0; s < S; s++) fetch(ahead(s, i));
#pragma GCC unroll 4
    for (int step = 0; step < 4; step++) {  // line step / 2, nibble step % 2
      __m512i codes[S];
#pragma GCC unroll 4
      for (int s = 0; s < S; s++) {
        const __m512i line = _mm512_loadu_si512(tile(s, i) + 64 * (step / 2));
        codes[s] = _mm512_and_si512(step % 2 ? _mm512_srli_epi16(line, 4) : line, mask);
      }
#pragma GCC unroll 12
      for (int r = 0; r < R; r++) {
        int32_t four;
        memcpy(&four, rows + r * STRIDE + 4 * step, 4);
#pragma GCC unroll 4
        for (int s = 0; s < S; s++) sum[r][s] = add_products<A>(sum[r][s], codes[s], _mm512_set1_epi32(four));
      }
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int s = 0; s < S; s++) _mm512_storeu_si512(out + r * stride + 16 * s, sum[r][s]);
}

inline int32_t dot_bytes(const uint8_t* a, const int8_t* b, int64_t n) {
  __m512i sum = _mm512_setzero_si512();
  for (int64_t i = 0; i < n; i += 64)
    sum = _mm512_dpbusd_epi32(sum, _mm512_loadu_si512(a + i), _mm512_loadu_si512(b + i));
  return _mm512_reduce_add_epi32(sum);
}

#elif defined(RQ_AVX2)

#if defined(RQ_AVXVNNI)
template <class A>
inline __m256i add_products(__m256i sum, __m256i codes, __m256i row) {
  if constexpr (std::is_signed_v<A>) return _mm256_dpbusd_avx_epi32(sum, codes, row);
  return _mm256_dpbusd_avx_epi32(sum, row, codes);
}
#else
template <class A>
inline __m256i products(__m256i codes, __m256i row) {
  if constexpr (std::is_signed_v<A>) return _mm256_maddubs_epi16(codes, row);
  return _mm256_maddubs_epi16(row, codes);
}
#endif

// One stream, R <= 4 rows. Without VNNI pairs of products are at most 2 * 15 * 255, so int16 holds the four of a tile.
template <int R, int STRIDE, class A, class Tile>
inline void dot_rows(const Tile& tile, int64_t tiles, const A* rows, int32_t* out, int64_t stride) {
  const __m256i mask = _mm256_set1_epi8(15);
  __m256i sum[R][2];
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) sum[r][0] = sum[r][1] = _mm256_setzero_si256();
  for (int64_t i = 0; i < tiles; i++, rows += 16) {
    const uint8_t* codes = tile(i);
    [[maybe_unused]] __m256i pairs[R][2];
#pragma GCC unroll 4
    for (int step = 0; step < 4; step++) {  // line step / 2, nibble step % 2
      __m256i half[2];
#pragma GCC unroll 2
      for (int h = 0; h < 2; h++) {
        const __m256i line = _mm256_loadu_si256((const __m256i*)(codes + 64 * (step / 2) + 32 * h));
        half[h] = _mm256_and_si256(step % 2 ? _mm256_srli_epi16(line, 4) : line, mask);
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) {
        int32_t four;
        memcpy(&four, rows + r * STRIDE + 4 * step, 4);
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++) {
#if defined(RQ_AVXVNNI)
          sum[r][h] = add_products<A>(sum[r][h], half[h], _mm256_set1_epi32(four));
#else
          const __m256i p = products<A>(half[h], _mm256_set1_epi32(four));
          pairs[r][h] = step ? _mm256_add_epi16(pairs[r][h], p) : p;
          asm("" : "+x"(pairs[r][h]));  // in this order: for a tree of additions there are too few registers
#endif
        }
      }
    }
#if !defined(RQ_AVXVNNI)
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 2
      for (int h = 0; h < 2; h++)
        sum[r][h] = _mm256_add_epi32(sum[r][h], _mm256_madd_epi16(pairs[r][h], _mm256_set1_epi16(1)));
#endif
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; r++)
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) _mm256_storeu_si256((__m256i*)(out + r * stride + 8 * h), sum[r][h]);
}

template <int R, int S, int STRIDE, class A, class Tiles>
inline void dot(const Tiles& tile, const Tiles& ahead, int64_t tiles, const A* rows, int32_t* out, int64_t stride) {
  for (int s = 0; s < S; s++) {
    for (int64_t i = 0; i < tiles; i++) fetch(ahead(s, i));
    const auto stream = [&](int64_t i) { return tile(s, i); };
    int r = 0;
    for (; r + 4 <= R; r += 4) dot_rows<4, STRIDE>(stream, tiles, rows + r * STRIDE, out + r * stride + 16 * s, stride);
    if constexpr (R % 4) dot_rows<R % 4, STRIDE>(stream, tiles, rows + r * STRIDE, out + r * stride + 16 * s, stride);
  }
}

inline int32_t dot_bytes(const uint8_t* a, const int8_t* b, int64_t n) {
  I sum = set1(0);
  for (int64_t i = 0; i < n; i += 32) {
    const __m256i u = _mm256_loadu_si256((const __m256i*)(a + i)), s = _mm256_loadu_si256((const __m256i*)(b + i));
    sum.v = _mm256_add_epi32(sum.v, _mm256_madd_epi16(_mm256_maddubs_epi16(u, s), _mm256_set1_epi16(1)));
  }
  return hsum(sum);
}

#else

template <int R, int S, int STRIDE, class A, class Tiles>
inline void dot(const Tiles& tile, const Tiles&, int64_t tiles, const A* rows, int32_t* out, int64_t stride) {
  for (int r = 0; r < R; r++) {
    for (int s = 0; s < S; s++) {
      int32_t sums[16] = {};
      for (int64_t i = 0; i < tiles; i++) {
        const uint8_t* codes = tile(s, i);
        const A* steps = rows + r * STRIDE + 16 * i;
        for (int line = 0; line < 2; line++)
          for (int c = 0; c < 16; c++)
            for (int t = 0; t < 4; t++) {
              const int32_t both = codes[64 * line + 4 * c + t];
              sums[c] += (both & 15) * steps[8 * line + t] + (both >> 4) * steps[8 * line + 4 + t];
            }
      }
      memcpy(out + r * stride + 16 * s, sums, sizeof(sums));
    }
  }
}

inline int32_t dot_bytes(const uint8_t* a, const int8_t* b, int64_t n) {
  int32_t sum = 0;
  for (int64_t i = 0; i < n; i++) sum += a[i] * b[i];
  return sum;
}

#endif

}  // namespace
}  // namespace RQ_TIER

#endif
