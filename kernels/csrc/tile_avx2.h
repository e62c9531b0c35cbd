// Tiles of the GEMM by AVX2, and by the dot products of AVX-VNNI where the tier has them.
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

// The hardware follows a stream only to the end of its 4 KiB page: lines of 64 bytes of the next block are asked for.
template <int LINES>
inline void fetch_ahead(const uint8_t* w) {
  for (int i = 0; i < LINES; i++) _mm_prefetch((const char*)w + 256 * BLOCK_STEPS + 64 * i, _MM_HINT_T0);
}

inline __m256i four_inputs(const int8_t* a) {
  int32_t x;
  memcpy(&x, a, 4);
  return _mm256_set1_epi32(x);
}

#if defined(RQ_AVXVNNI)

constexpr bool BYTES_AS_THEY_ARE = true;
constexpr int64_t safe_steps(int, int64_t steps) { return steps; }
inline __m256i add_products(__m256i sum, __m256i w0, __m256i a0, __m256i w1, __m256i a1) {
  return _mm256_dpbusd_avx_epi32(_mm256_dpbusd_avx_epi32(sum, w0, a0), w1, a1);
}
inline I widened(__m256i sum) { return {sum}; }

#else

constexpr bool BYTES_AS_THEY_ARE = false;
// Products of nibbles are added in int16 as long as they cannot overflow: a step adds at most 4 * 15 * 2^(act_bits - 1).
constexpr int64_t safe_steps(int act_bits, int64_t) { return act_bits == 4 ? 64 : 4; }
inline __m256i add_products(__m256i sum, __m256i w0, __m256i a0, __m256i w1, __m256i a1) {
  return _mm256_add_epi16(sum, _mm256_add_epi16(_mm256_maddubs_epi16(w0, a0), _mm256_maddubs_epi16(w1, a1)));
}
inline I widened(__m256i sum) { return {_mm256_madd_epi16(sum, _mm256_set1_epi16(1))}; }

#endif

// Without VNNI bytes need 16 bits a factor: R rows and H quarter lines (4 channels each) with R H = 8. A sum has two
// numbers a channel, of which each takes two of four inputs.
template <int R, int H>
inline void byte_tile(const uint8_t* w, const int8_t* a, int64_t lda, int64_t steps, int32_t* acc) {
  __m256i sum[R][H];
  for (auto& row : sum)
    for (__m256i& v : row) v = _mm256_setzero_si256();
  for (int64_t k = 0; k < 2 * steps; k++, w += 256, a += 4) {
    fetch_ahead<(H + 3) / 4>(w);
    __m256i x[R];
    for (int r = 0; r < R; r++) x[r] = _mm256_cvtepi8_epi16(_mm256_castsi256_si128(four_inputs(a + r * lda)));
    for (int h = 0; h < H; h++) {
      const __m256i line = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)(w + 16 * h)));
      for (int r = 0; r < R; r++) sum[r][h] = _mm256_add_epi32(sum[r][h], _mm256_madd_epi16(line, x[r]));
    }
  }
  for (int r = 0; r < R; r++)
    for (int h = 0; h < H; h += 2) {
      const __m256i both = _mm256_hadd_epi32(sum[r][h], sum[r][h + 1]);
      int32_t* to = acc + r * PANEL + 4 * h;
      store(to, load(to) + I{_mm256_permute4x64_epi64(both, 0xD8)});
    }
}

// R rows and H half lines (8 channels each) with R H = 8; as bytes a step has its second four inputs 256 bytes on.
template <int R, int H, bool Packed>
inline void tile(const uint8_t* w, const int8_t* a, int64_t lda, int64_t steps, int act_bits, int32_t* acc) {
  const __m256i low = _mm256_set1_epi8(15);
  const int64_t safe = safe_steps(act_bits, steps);
  for (int64_t begin = 0; begin < steps; begin += safe) {
    const int64_t end = begin + safe < steps ? begin + safe : steps;
    __m256i sum[R][H];
    for (auto& row : sum)
      for (__m256i& v : row) v = _mm256_setzero_si256();
    for (int64_t k = begin; k < end; k++, w += Packed ? 256 : 512) {
      fetch_ahead<H / 2>(w);
      if (!Packed) fetch_ahead<H / 2>(w + 256);
      const auto first = [&](int h) {
        const __m256i line = _mm256_loadu_si256((const __m256i*)(w + 32 * h));
        return Packed ? _mm256_and_si256(line, low) : line;
      };
      const auto second = [&](int h) {
        if (!Packed) return _mm256_loadu_si256((const __m256i*)(w + 256 + 32 * h));
        return _mm256_and_si256(_mm256_srli_epi32(_mm256_loadu_si256((const __m256i*)(w + 32 * h)), 4), low);
      };
      // What there is less of stays in registers: there are 16.
      if constexpr (H <= 2) {
        __m256i w0[H], w1[H];
        for (int h = 0; h < H; h++) w0[h] = first(h), w1[h] = second(h);
        for (int r = 0; r < R; r++) {
          const __m256i a0 = four_inputs(a + r * lda + 8 * k), a1 = four_inputs(a + r * lda + 8 * k + 4);
          for (int h = 0; h < H; h++) sum[r][h] = add_products(sum[r][h], w0[h], a0, w1[h], a1);
        }
      } else {
        __m256i a0[R], a1[R];
        for (int r = 0; r < R; r++) a0[r] = four_inputs(a + r * lda + 8 * k), a1[r] = four_inputs(a + r * lda + 8 * k + 4);
        for (int h = 0; h < H; h++) {
          const __m256i w0 = first(h), w1 = second(h);
          for (int r = 0; r < R; r++) sum[r][h] = add_products(sum[r][h], w0, a0[r], w1, a1[r]);
        }
      }
    }
    for (int r = 0; r < R; r++)
      for (int h = 0; h < H; h++) {
        int32_t* to = acc + r * PANEL + 8 * h;
        store(to, load(to) + widened(sum[r][h]));
      }
  }
}

// R rows times the whole panel, some channels at a time. What is read more than once is read in blocks.
template <int R, bool Packed>
inline void panel(const uint8_t* w, const int8_t* a, int64_t lda, int64_t steps, int act_bits, int32_t* acc) {
  constexpr int T = 8 / R;
  constexpr bool whole_tiles = Packed || BYTES_AS_THEY_ARE;
  const int64_t block = whole_tiles && 8 * T == PANEL ? steps : BLOCK_STEPS;
  for (int64_t k = 0; k < steps; k += block, w += block * (Packed ? 256 : 512), a += 8 * block) {
    const int64_t part = steps - k < block ? steps - k : block;
    if constexpr (whole_tiles)
      for (int c = 0; c < PANEL; c += 8 * T) tile<R, T, Packed>(w + 4 * c, a, lda, part, act_bits, acc + c);
    else
      for (int c = 0; c < PANEL; c += 4 * T) byte_tile<R, T>(w + 4 * c, a, lda, part, acc + c);
  }
}

template <bool Packed>
inline void rows(const uint8_t* w, const int8_t* a, int64_t lda, int count, int64_t steps, int act_bits, Ahead,
                 int32_t* acc) {
  int r = 0;
  for (; r + 4 <= count; r += 4) panel<4, Packed>(w, a + r * lda, lda, steps, act_bits, acc + r * PANEL);
  for (; r + 2 <= count; r += 2) panel<2, Packed>(w, a + r * lda, lda, steps, act_bits, acc + r * PANEL);
  if (r < count) panel<1, Packed>(w, a + r * lda, lda, steps, act_bits, acc + r * PANEL);
}

inline void unpack(const uint8_t*, int64_t, uint8_t*) {}

}  // namespace
}  // namespace RQ_TIER
