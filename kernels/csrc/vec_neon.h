// The vector of the tier NEON: 4 lanes; what it has to offer is the same in every tier (vec.h).
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

#include "half.h"

namespace RQ_TIER {
namespace {

constexpr int W = 4;
struct F { float32x4_t v; };
struct I { int32x4_t v; };

inline F load(const float* p) { return {vld1q_f32(p)}; }
inline void store(float* p, F a) { vst1q_f32(p, a.v); }
inline F set1(float x) { return {vdupq_n_f32(x)}; }
inline F operator+(F a, F b) { return {vaddq_f32(a.v, b.v)}; }
inline F operator-(F a, F b) { return {vsubq_f32(a.v, b.v)}; }
inline F operator*(F a, F b) { return {vmulq_f32(a.v, b.v)}; }
inline F operator/(F a, F b) { return {vdivq_f32(a.v, b.v)}; }
inline F fma(F a, F b, F c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
// b where one of them is NaN, as in every tier; the instructions of that name would be NaN.
inline F max(F a, F b) { return {vbslq_f32(vcgtq_f32(a.v, b.v), a.v, b.v)}; }
inline F min(F a, F b) { return {vbslq_f32(vcltq_f32(a.v, b.v), a.v, b.v)}; }
inline F abs(F a) { return {vabsq_f32(a.v)}; }
inline float hmax(F a) {
  float x[4];
  vst1q_f32(x, a.v);
  for (int i = 1; i < 4; i++) x[0] = x[i] > x[0] ? x[i] : x[0];
  return x[0];
}
inline float hmin(F a) {
  float x[4];
  vst1q_f32(x, a.v);
  for (int i = 1; i < 4; i++) x[0] = x[i] < x[0] ? x[i] : x[0];
  return x[0];
}
inline float hsum(F a) { return vaddvq_f32(a.v); }
// Lane i: the sum of v[i]'s lanes.
inline F hsums(const F* v) {
  return {vpaddq_f32(vpaddq_f32(v[0].v, v[1].v), vpaddq_f32(v[2].v, v[3].v))};
}
inline bool any_above(F a, F b) { return vminvq_u32(vcleq_f32(a.v, b.v)) == 0; }  // true for NaN

inline I load(const int32_t* p) { return {vld1q_s32(p)}; }
inline void store(int32_t* p, I a) { vst1q_s32(p, a.v); }
inline I set1(int32_t x) { return {vdupq_n_s32(x)}; }
inline I operator+(I a, I b) { return {vaddq_s32(a.v, b.v)}; }
inline I operator-(I a, I b) { return {vsubq_s32(a.v, b.v)}; }
inline I operator*(I a, I b) { return {vmulq_s32(a.v, b.v)}; }
inline I max(I a, I b) { return {vmaxq_s32(a.v, b.v)}; }
inline int32_t hmax(I a) { return vmaxvq_s32(a.v); }
inline I operator&(I a, I b) { return {vandq_s32(a.v, b.v)}; }
inline I operator|(I a, I b) { return {vorrq_s32(a.v, b.v)}; }
inline I shift_left(I a, int n) { return {vshlq_s32(a.v, vdupq_n_s32(n))}; }
inline I shift_right(I a, int n) {  // zeros come in
  return {vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(a.v), vdupq_n_s32(-n)))};
}
inline I round(F a) { return {vcvtnq_s32_f32(a.v)}; }  // to nearest even
inline F to_float(I a) { return {vcvtq_f32_s32(a.v)}; }
inline F as_float(I a) { return {vreinterpretq_f32_s32(a.v)}; }
inline I as_int(F a) { return {vreinterpretq_s32_f32(a.v)}; }
inline I magnitude_bits(F a) { return {vandq_s32(vreinterpretq_s32_f32(a.v), vdupq_n_s32(0x7fffffff))}; }

inline F load_bf16(const uint16_t* p) { return {vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16))}; }
inline F load_f16(const uint16_t* p) { return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)))}; }
inline void store_bf16(uint16_t* p, F a) {
  const uint32x4_t u = vreinterpretq_u32_f32(a.v), odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
  const uint16x4_t rounded = vshrn_n_u32(vaddq_u32(vaddq_u32(u, vdupq_n_u32(0x7fff)), odd), 16);
  vst1_u16(p, vbsl_u16(vmovn_u32(vceqq_f32(a.v, a.v)), rounded, vdup_n_u16(0x7fc0)));
}
inline void store_f16(uint16_t* p, F a) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(a.v))); }

// 4 W integers to int8 in order, clamped to low..high.
inline void store_i8(int8_t* p, I a, I b, I c, I d, int low, int high) {
  const int16x8_t front = vcombine_s16(vqmovn_s32(a.v), vqmovn_s32(b.v));
  const int16x8_t back = vcombine_s16(vqmovn_s32(c.v), vqmovn_s32(d.v));
  const int8x16_t bytes = vcombine_s8(vqmovn_s16(front), vqmovn_s16(back));
  vst1q_s8(p, vmaxq_s8(vminq_s8(bytes, vdupq_n_s8(int8_t(high))), vdupq_n_s8(int8_t(low))));
}
// 4 W integers to uint8 in order, saturating.
inline void store_u8(uint8_t* p, I a, I b, I c, I d) {
  const int16x8_t front = vcombine_s16(vqmovn_s32(a.v), vqmovn_s32(b.v));
  const int16x8_t back = vcombine_s16(vqmovn_s32(c.v), vqmovn_s32(d.v));
  vst1q_u8(p, vcombine_u8(vqmovun_s16(front), vqmovun_s16(back)));
}

inline int32_t sum_i8(const int8_t* p, int64_t n) {
  int32x4_t sum = vdupq_n_s32(0);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) sum = vdotq_s32(sum, vld1q_s8(p + i), vdupq_n_s8(1));
  int32_t total = vaddvq_s32(sum);
  for (; i < n; i++) total += p[i];
  return total;
}

inline float first(F a) { return vgetq_lane_f32(a.v, 0); }
inline F load_i8(const int8_t* p) {
  int32_t four;
  memcpy(&four, p, 4);
  const int8x8_t bytes = vreinterpret_s8_s32(vdup_n_s32(four));
  return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(bytes))))};
}

// The first n lanes of a, the others of b.
inline F first_lanes(F a, int n, F b) {
  constexpr int32_t lane[4] = {0, 1, 2, 3};
  return {vbslq_f32(vcgtq_s32(vdupq_n_s32(n), vld1q_s32(lane)), a.v, b.v)};
}

// One Hadamard butterfly between lanes i and i + S of every 2 S lanes: (a + b, a - b).
template <int S>
inline F butterfly(F a) {
  constexpr uint32_t upper[4] = {0, S == 1 ? ~0u : 0, S == 2 ? ~0u : 0, ~0u};
  float32x4_t swapped;
  if constexpr (S == 1) swapped = vrev64q_f32(a.v);
  if constexpr (S == 2) swapped = vextq_f32(a.v, a.v, 2);
  return {vbslq_f32(vld1q_u32(upper), vsubq_f32(swapped, a.v), vaddq_f32(a.v, swapped))};
}

}  // namespace
}  // namespace RQ_TIER
