// The vector of the tier AVX2: 8 lanes; what it has to offer is the same in every tier (vec.h).
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "half.h"

namespace RQ_TIER {
namespace {

constexpr int W = 8;
struct F { __m256 v; };
struct I { __m256i v; };

inline F load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline void store(float* p, F a) { _mm256_storeu_ps(p, a.v); }
inline F set1(float x) { return {_mm256_set1_ps(x)}; }
inline F operator+(F a, F b) { return {_mm256_add_ps(a.v, b.v)}; }
inline F operator-(F a, F b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline F operator*(F a, F b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline F operator/(F a, F b) { return {_mm256_div_ps(a.v, b.v)}; }
inline F fma(F a, F b, F c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline F max(F a, F b) { return {_mm256_max_ps(a.v, b.v)}; }
inline F min(F a, F b) { return {_mm256_min_ps(a.v, b.v)}; }
inline F abs(F a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
inline float hmax(F a) {
  alignas(32) float x[8];
  _mm256_store_ps(x, a.v);
  for (int i = 1; i < 8; i++) x[0] = x[i] > x[0] ? x[i] : x[0];
  return x[0];
}
inline float hmin(F a) {
  alignas(32) float x[8];
  _mm256_store_ps(x, a.v);
  for (int i = 1; i < 8; i++) x[0] = x[i] < x[0] ? x[i] : x[0];
  return x[0];
}
inline float hsum(F a) {
  alignas(32) float x[8];
  _mm256_store_ps(x, a.v);
  return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
}
// Lane i: the sum of v[i]'s lanes.
inline F hsums(const F* v) {
  const __m256 low = _mm256_hadd_ps(_mm256_hadd_ps(v[0].v, v[1].v), _mm256_hadd_ps(v[2].v, v[3].v));
  const __m256 high = _mm256_hadd_ps(_mm256_hadd_ps(v[4].v, v[5].v), _mm256_hadd_ps(v[6].v, v[7].v));
  return {_mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31))};
}
inline bool any_above(F a, F b) { return _mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_NLE_UQ)) != 0; }

inline I load(const int32_t* p) { return {_mm256_loadu_si256((const __m256i*)p)}; }
inline void store(int32_t* p, I a) { _mm256_storeu_si256((__m256i*)p, a.v); }
inline I set1(int32_t x) { return {_mm256_set1_epi32(x)}; }
inline I operator+(I a, I b) { return {_mm256_add_epi32(a.v, b.v)}; }
inline I operator-(I a, I b) { return {_mm256_sub_epi32(a.v, b.v)}; }
inline I operator*(I a, I b) { return {_mm256_mullo_epi32(a.v, b.v)}; }
inline I max(I a, I b) { return {_mm256_max_epi32(a.v, b.v)}; }
inline int32_t hmax(I a) {
  alignas(32) int32_t x[8];
  _mm256_store_si256((__m256i*)x, a.v);
  for (int i = 1; i < 8; i++) x[0] = x[i] > x[0] ? x[i] : x[0];
  return x[0];
}
inline I operator&(I a, I b) { return {_mm256_and_si256(a.v, b.v)}; }
inline I shift_left(I a, int n) { return {_mm256_slli_epi32(a.v, n)}; }
inline I shift_right(I a, int n) { return {_mm256_srli_epi32(a.v, n)}; }
inline I round(F a) { return {_mm256_cvtps_epi32(a.v)}; }
inline F to_float(I a) { return {_mm256_cvtepi32_ps(a.v)}; }
inline F as_float(I a) { return {_mm256_castsi256_ps(a.v)}; }
inline I as_int(F a) { return {_mm256_castps_si256(a.v)}; }
inline I magnitude_bits(F a) { return {_mm256_and_si256(_mm256_castps_si256(a.v), _mm256_set1_epi32(0x7fffffff))}; }

inline F load_bf16(const uint16_t* p) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16))};
}
inline F load_f16(const uint16_t* p) { return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p))}; }
inline void store_bf16(uint16_t* p, F a) {
  alignas(32) float x[8];
  _mm256_store_ps(x, a.v);
  for (int i = 0; i < 8; i++) p[i] = float_to_bf16(x[i]);
}
inline void store_f16(uint16_t* p, F a) { _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(a.v, 0)); }

inline void store_i8(int8_t* p, I a, I b, I c, I d, int low, int high) {
  __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(a.v, b.v), _mm256_packs_epi32(c.v, d.v));
  bytes = _mm256_max_epi8(_mm256_min_epi8(bytes, _mm256_set1_epi8(char(high))), _mm256_set1_epi8(char(low)));
  _mm256_storeu_si256((__m256i*)p, _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
}

inline int32_t sum_i8(const int8_t* p, int64_t n) {
  const __m256i ones = _mm256_set1_epi8(1), ones16 = _mm256_set1_epi16(1);
  I sum = set1(0);
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    const __m256i pairs = _mm256_maddubs_epi16(ones, _mm256_loadu_si256((const __m256i*)(p + i)));
    sum = sum + I{_mm256_madd_epi16(pairs, ones16)};
  }
  alignas(32) int32_t x[8];
  _mm256_store_si256((__m256i*)x, sum.v);
  int32_t total = 0;
  for (int32_t v : x) total += v;
  for (; i < n; i++) total += p[i];
  return total;
}

inline I operator|(I a, I b) { return {_mm256_or_si256(a.v, b.v)}; }
inline float first(F a) { return _mm256_cvtss_f32(a.v); }
inline F load_i8(const int8_t* p) {
  return to_float(I{_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p))});
}
inline int32_t hsum(I a) {
  const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(a.v), _mm256_extracti128_si256(a.v, 1));
  const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4E));
  return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xB1)));
}
inline void store_u8(uint8_t* p, I a, I b, I c, I d) {
  const __m256i bytes = _mm256_packus_epi16(_mm256_packs_epi32(a.v, b.v), _mm256_packs_epi32(c.v, d.v));
  _mm256_storeu_si256((__m256i*)p, _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
}
inline F first_lanes(F a, int n, F b) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return {_mm256_blendv_ps(b.v, a.v, _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane)))};
}

template <int S>
inline F butterfly(F a) {
  __m256 swapped;
  if constexpr (S == 1) swapped = _mm256_permute_ps(a.v, 0xB1);
  if constexpr (S == 2) swapped = _mm256_permute_ps(a.v, 0x4E);
  if constexpr (S == 4) swapped = _mm256_permute2f128_ps(a.v, a.v, 1);
  constexpr int upper = S == 1 ? 0xAA : S == 2 ? 0xCC : 0xF0;
  return {_mm256_blend_ps(_mm256_add_ps(a.v, swapped), _mm256_sub_ps(swapped, a.v), upper)};
}

}  // namespace
}  // namespace RQ_TIER
