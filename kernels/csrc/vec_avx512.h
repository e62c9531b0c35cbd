// The vector of the tier AVX-512: 16 lanes; what it has to offer is the same in every tier (vec.h).
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "half.h"

namespace RQ_TIER {
namespace {

constexpr int W = 16;
struct F { __m512 v; };
struct I { __m512i v; };

inline F load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, F a) { _mm512_storeu_ps(p, a.v); }
inline F set1(float x) { return {_mm512_set1_ps(x)}; }
inline F operator+(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F operator-(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F operator*(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F operator/(F a, F b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F fma(F a, F b, F c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F max(F a, F b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F min(F a, F b) { return {_mm512_min_ps(a.v, b.v)}; }
inline F abs(F a) { return {_mm512_abs_ps(a.v)}; }
inline float hmax(F a) { return _mm512_reduce_max_ps(a.v); }
inline float hmin(F a) { return _mm512_reduce_min_ps(a.v); }
inline float hsum(F a) { return _mm512_reduce_add_ps(a.v); }
// Lane i: the sum of v[i]'s lanes.
inline F hsums(const F* v) {
  __m512 sum[4];  // in quarter j of sum[i] those of quarter j of v[4 i .. 4 i + 4]
  for (int i = 0; i < 4; i++) {
    const __m512 a = v[4 * i].v, b = v[4 * i + 1].v, c = v[4 * i + 2].v, d = v[4 * i + 3].v;
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    sum[i] = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  }
  const auto halves = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  return {halves(halves(sum[0], sum[1]), halves(sum[2], sum[3]))};
}
inline bool any_above(F a, F b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_NLE_UQ) != 0; }  // true for NaN

inline I load(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
inline void store(int32_t* p, I a) { _mm512_storeu_si512(p, a.v); }
inline I set1(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline I operator+(I a, I b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline I operator-(I a, I b) { return {_mm512_sub_epi32(a.v, b.v)}; }
inline I operator*(I a, I b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
inline I max(I a, I b) { return {_mm512_max_epi32(a.v, b.v)}; }
inline int32_t hmax(I a) { return _mm512_reduce_max_epi32(a.v); }
inline I operator&(I a, I b) { return {_mm512_and_epi32(a.v, b.v)}; }
inline I shift_left(I a, int n) { return {_mm512_slli_epi32(a.v, unsigned(n))}; }
inline I shift_right(I a, int n) { return {_mm512_srli_epi32(a.v, unsigned(n))}; }  // zeros come in
inline I round(F a) { return {_mm512_cvtps_epi32(a.v)}; }  // to nearest even
inline F to_float(I a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline F as_float(I a) { return {_mm512_castsi512_ps(a.v)}; }
inline I as_int(F a) { return {_mm512_castps_si512(a.v)}; }
inline I magnitude_bits(F a) { return {_mm512_and_epi32(_mm512_castps_si512(a.v), _mm512_set1_epi32(0x7fffffff))}; }

inline F load_bf16(const uint16_t* p) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16))};
}
inline F load_f16(const uint16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
inline void store_bf16(uint16_t* p, F a) {
  const __m512i u = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_epi32(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0))));
}
inline void store_f16(uint16_t* p, F a) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(a.v, 0)); }

// 4 W integers to int8 in order, clamped to low..high.
inline void store_i8(int8_t* p, I a, I b, I c, I d, int low, int high) {
  __m512i bytes = _mm512_packs_epi16(_mm512_packs_epi32(a.v, b.v), _mm512_packs_epi32(c.v, d.v));
  bytes = _mm512_max_epi8(_mm512_min_epi8(bytes, _mm512_set1_epi8(char(high))), _mm512_set1_epi8(char(low)));
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  _mm512_storeu_si512(p, _mm512_permutexvar_epi32(order, bytes));
}

inline int32_t sum_i8(const int8_t* p, int64_t n) {
  __m512i sum = _mm512_setzero_si512();
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), _mm512_loadu_si512(p + i));
  int32_t total = _mm512_reduce_add_epi32(sum);
  for (; i < n; i++) total += p[i];
  return total;
}

inline I operator|(I a, I b) { return {_mm512_or_si512(a.v, b.v)}; }
inline float first(F a) { return _mm512_cvtss_f32(a.v); }
inline F load_i8(const int8_t* p) {
  return to_float(I{_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p))});
}
// 4 W integers to uint8 in order, saturating.
inline void store_u8(uint8_t* p, I a, I b, I c, I d) {
  const __m512i bytes = _mm512_packus_epi16(_mm512_packs_epi32(a.v, b.v), _mm512_packs_epi32(c.v, d.v));
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  _mm512_storeu_si512(p, _mm512_permutexvar_epi32(order, bytes));
}

// The first n lanes of a, the others of b.
inline F first_lanes(F a, int n, F b) { return {_mm512_mask_mov_ps(b.v, __mmask16((1u << n) - 1), a.v)}; }

// One Hadamard butterfly between lanes i and i + S of every 2 S lanes: (a + b, a - b).
template <int S>
inline F butterfly(F a) {
  __m512 swapped;
  if constexpr (S == 1) swapped = _mm512_permute_ps(a.v, 0xB1);
  if constexpr (S == 2) swapped = _mm512_permute_ps(a.v, 0x4E);
  if constexpr (S == 4) swapped = _mm512_shuffle_f32x4(a.v, a.v, 0xB1);
  if constexpr (S == 8) swapped = _mm512_shuffle_f32x4(a.v, a.v, 0x4E);
  constexpr __mmask16 upper = S == 1 ? 0xAAAA : S == 2 ? 0xCCCC : S == 4 ? 0xF0F0 : 0xFF00;
  return {_mm512_mask_sub_ps(_mm512_add_ps(a.v, swapped), upper, swapped, a.v)};
}

}  // namespace
}  // namespace RQ_TIER
