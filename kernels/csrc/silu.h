// silu(gate) * up in front of a row: convention.silu_mul, bit for bit.
#pragma once

#include <cstdint>
#include <cstring>

#include "rows.h"
#include "tier.h"
#include "vec.h"

namespace RQ_TIER {
namespace {

constexpr float EXP[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                         4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};

// convention.exp: its products and sums in its order, none of them fused. Of several vectors at once, step by step:
// each step has to wait for the one before, and another vector fills the time.
template <int COUNT>
inline void exp(F* x) {
  F n[COUNT], r[COUNT], y[COUNT];
  for (int v = 0; v < COUNT; v++) x[v] = max(set1(-80.0f), min(set1(89.0f), x[v]));
  for (int v = 0; v < COUNT; v++) n[v] = to_float(round(x[v] * set1(1.44269504f)));
  for (int v = 0; v < COUNT; v++) r[v] = x[v] - n[v] * set1(0.693359375f);
  for (int v = 0; v < COUNT; v++) r[v] = r[v] - n[v] * set1(-2.12194440e-4f);
  for (int v = 0; v < COUNT; v++) y[v] = set1(EXP[0]);
#pragma GCC unroll 5
  for (int i = 1; i < 6; i++)
    for (int v = 0; v < COUNT; v++) y[v] = y[v] * r[v] + set1(EXP[i]);
  for (int v = 0; v < COUNT; v++) y[v] = y[v] * (r[v] * r[v]) + r[v] + set1(1.0f);
  for (int v = 0; v < COUNT; v++)
    x[v] = y[v] * as_float(shift_left(round(n[v]) + set1(126), 23)) * set1(2.0f);
}

template <DType T>
inline F load_as(const void* x, int64_t i) {
  if constexpr (T == DType::f32) return load((const float*)x + i);
  if constexpr (T == DType::bf16) return load_bf16((const uint16_t*)x + i);
  if constexpr (T == DType::f16) return load_f16((const uint16_t*)x + i);
}

template <DType T>
inline void store_as(void* x, int64_t i, F a) {
  if constexpr (T == DType::f32) store((float*)x + i, a);
  if constexpr (T == DType::bf16) store_bf16((uint16_t*)x + i, a);
  if constexpr (T == DType::f16) store_f16((uint16_t*)x + i, a);
}

// To the numbers of T, half to even. A NaN stays one: its last 16 bits are 0, as those of T's own NaNs are.
template <DType T>
inline F rounded(F a) {
  uint16_t half[W];
  if constexpr (T == DType::bf16) {
    const I odd = shift_right(as_int(a), 16) & set1(1);
    return as_float((as_int(a) + odd + set1(0x7fff)) & set1(-0x10000));
  }
  if constexpr (T == DType::f16) return store_f16(half, a), load_f16(half);
  return a;
}

// silu(gate) * up of COUNT vectors.
template <DType T, int COUNT>
inline void silu_mul(const void* gates, const void* ups, int64_t at, float* row) {
  F gate[COUNT], x[COUNT];
  for (int v = 0; v < COUNT; v++) gate[v] = load_as<T>(gates, at + v * W);
  for (int v = 0; v < COUNT; v++) x[v] = set1(0.0f) - gate[v];
  exp<COUNT>(x);
  for (int v = 0; v < COUNT; v++) x[v] = rounded<T>(gate[v] / (set1(1.0f) + x[v]));
  for (int v = 0; v < COUNT; v++) store(row + at + v * W, rounded<T>(x[v] * load_as<T>(ups, at + v * W)));
}

template <DType T>
void silu_mul_row(const void* x, int64_t n, float* row) {
  constexpr int COUNT = 4;
  const int64_t size = size_of(T);
  const char *gate = (const char*)x, *up = gate + n * size;
  int64_t i = 0;
  for (; i + COUNT * W <= n; i += COUNT * W) silu_mul<T, COUNT>(gate, up, i, row);
  for (; i + W <= n; i += W) silu_mul<T, 1>(gate, up, i, row);
  if (i < n) {  // the tail as a vector of its own, so that all numbers go the same way
    char tail[2][W * 4] = {};
    float y[W];
    memcpy(tail[0], gate + i * size, size_t((n - i) * size));
    memcpy(tail[1], up + i * size, size_t((n - i) * size));
    silu_mul<T, 1>(tail[0], tail[1], 0, y);
    memcpy(row + i, y, size_t(n - i) * 4);
  }
}

// Row of n numbers from gate [n] and, behind it, up [n].
void load_silu_mul(const void* x, DType dtype, int64_t n, float* row) {
  if (dtype == DType::f32) silu_mul_row<DType::f32>(x, n, row);
  if (dtype == DType::bf16) silu_mul_row<DType::bf16>(x, n, row);
  if (dtype == DType::f16) silu_mul_row<DType::f16>(x, n, row);
}

}  // namespace
}  // namespace RQ_TIER
