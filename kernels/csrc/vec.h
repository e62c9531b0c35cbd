// A small vector of float32 in three tiers: AVX-512 (16 lanes), AVX2 (8), scalar (1, any machine).
//
// Each tier compiles the kernels once more, in a file and a namespace of its own (tier_*.cpp defines
// RQ_TIER and one of RQ_AVX512, RQ_AVX2, RQ_SCALAR). Nothing here may be an inline function of another
// library: the linker would be free to keep the copy that needs AVX-512.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(RQ_AVX512) || defined(RQ_AVX2)
#include <immintrin.h>
#endif

namespace RQ_TIER {
namespace {

inline float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

inline float bf16_to_float(uint16_t x) { return float_of(uint32_t(x) << 16); }

// Round to nearest even, NaN to the quiet NaN that torch writes.
inline uint16_t float_to_bf16(float x) {
  const uint32_t u = bits_of(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  return uint16_t((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}

inline float f16_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000u) << 16, exponent = (h >> 10) & 31, mantissa = h & 0x3ffu;
  if (exponent == 31) return float_of(sign | 0x7f800000u | mantissa << 13);
  if (exponent) return float_of(sign | (exponent + 112) << 23 | mantissa << 13);
  const float tiny = float(mantissa) * 0x1p-24f;  // exact: 10 bits
  return sign ? -tiny : tiny;
}

inline uint16_t float_to_f16(float x) {
  const uint32_t u = bits_of(x), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return uint16_t(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // rounds to infinity
  if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 leaves the rounded mantissa in the low bits
    return uint16_t(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u));
  }
  return uint16_t(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1)) >> 13));
}

#if defined(RQ_AVX512)

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

#elif defined(RQ_AVX2)

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

template <int S>
inline F butterfly(F a) {
  __m256 swapped;
  if constexpr (S == 1) swapped = _mm256_permute_ps(a.v, 0xB1);
  if constexpr (S == 2) swapped = _mm256_permute_ps(a.v, 0x4E);
  if constexpr (S == 4) swapped = _mm256_permute2f128_ps(a.v, a.v, 1);
  constexpr int upper = S == 1 ? 0xAA : S == 2 ? 0xCC : 0xF0;
  return {_mm256_blend_ps(_mm256_add_ps(a.v, swapped), _mm256_sub_ps(swapped, a.v), upper)};
}

#else

constexpr int W = 1;
struct F { float v; };
struct I { int32_t v; };

inline F load(const float* p) { return {*p}; }
inline void store(float* p, F a) { *p = a.v; }
inline F set1(float x) { return {x}; }
inline F operator+(F a, F b) { return {a.v + b.v}; }
inline F operator-(F a, F b) { return {a.v - b.v}; }
inline F operator*(F a, F b) { return {a.v * b.v}; }
inline F operator/(F a, F b) { return {a.v / b.v}; }
inline F fma(F a, F b, F c) { return {a.v * b.v + c.v}; }
inline F max(F a, F b) { return {a.v > b.v ? a.v : b.v}; }
inline F min(F a, F b) { return {a.v < b.v ? a.v : b.v}; }
inline F abs(F a) { return {float_of(bits_of(a.v) & 0x7fffffffu)}; }
inline float hmax(F a) { return a.v; }
inline float hmin(F a) { return a.v; }
inline float hsum(F a) { return a.v; }
inline bool any_above(F a, F b) { return !(a.v <= b.v); }

// Integers wrap around as vectors do.
inline I load(const int32_t* p) { return {*p}; }
inline void store(int32_t* p, I a) { *p = a.v; }
inline I set1(int32_t x) { return {x}; }
inline I operator+(I a, I b) { return {int32_t(uint32_t(a.v) + uint32_t(b.v))}; }
inline I operator-(I a, I b) { return {int32_t(uint32_t(a.v) - uint32_t(b.v))}; }
inline I operator*(I a, I b) { return {int32_t(uint32_t(a.v) * uint32_t(b.v))}; }
inline I max(I a, I b) { return {a.v > b.v ? a.v : b.v}; }
inline int32_t hmax(I a) { return a.v; }
inline I operator&(I a, I b) { return {a.v & b.v}; }
inline I shift_left(I a, int n) { return {int32_t(uint32_t(a.v) << n)}; }
inline I shift_right(I a, int n) { return {int32_t(uint32_t(a.v) >> n)}; }
// To nearest even, for |a| < 2^22: adding 1.5 * 2^23 leaves the integer in the low bits.
inline I round(F a) { return {int32_t(bits_of(a.v + 12582912.0f) - bits_of(12582912.0f))}; }
inline F to_float(I a) { return {float(a.v)}; }
inline F as_float(I a) { return {float_of(uint32_t(a.v))}; }
inline I as_int(F a) { return {int32_t(bits_of(a.v))}; }
inline I magnitude_bits(F a) { return {int32_t(bits_of(a.v) & 0x7fffffffu)}; }

inline F load_bf16(const uint16_t* p) { return {bf16_to_float(*p)}; }
inline F load_f16(const uint16_t* p) { return {f16_to_float(*p)}; }
inline void store_bf16(uint16_t* p, F a) { *p = float_to_bf16(a.v); }
inline void store_f16(uint16_t* p, F a) { *p = float_to_f16(a.v); }

inline int8_t clamped(I a, int low, int high) { return int8_t(a.v < low ? low : a.v > high ? high : a.v); }
inline void store_i8(int8_t* p, I a, I b, I c, I d, int low, int high) {
  p[0] = clamped(a, low, high);
  p[1] = clamped(b, low, high);
  p[2] = clamped(c, low, high);
  p[3] = clamped(d, low, high);
}

inline int32_t sum_i8(const int8_t* p, int64_t n) {
  int32_t total = 0;
  for (int64_t i = 0; i < n; i++) total += p[i];
  return total;
}

template <int S>
inline F butterfly(F a) {
  return a;
}

#endif

}  // namespace
}  // namespace RQ_TIER
