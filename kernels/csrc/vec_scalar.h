// The vector of the tier for any machine: one lane; what it has to offer is the same in every tier (vec.h).
#pragma once

#include <cstdint>

#include "half.h"

namespace RQ_TIER {
namespace {

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
// Lane i: the sum of v[i]'s lanes.
inline F hsums(const F* v) { return v[0]; }
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

inline I operator|(I a, I b) { return {a.v | b.v}; }
inline float first(F a) { return a.v; }
inline F load_i8(const int8_t* p) { return {float(*p)}; }
inline F first_lanes(F a, int n, F b) { return n > 0 ? a : b; }
inline void store_u8(uint8_t* p, I a, I b, I c, I d) {
  const int32_t values[4] = {a.v, b.v, c.v, d.v};
  for (int i = 0; i < 4; i++) p[i] = uint8_t(values[i] < 0 ? 0 : values[i] > 255 ? 255 : values[i]);
}

template <int S>
inline F butterfly(F a) {
  return a;
}

}  // namespace
}  // namespace RQ_TIER
