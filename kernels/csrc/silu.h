// silu(gate) * up in front of a row: convention.silu_mul, bit for bit.
#pragma once

#include "rows.h"

namespace RQ_TIER {
namespace {

constexpr float EXP[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                         4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};

// convention.exp: its products and sums in its order, none of them fused.
inline F exp(F x) {
  x = max(set1(-80.0f), min(set1(89.0f), x));
  const I n = round(x * set1(1.44269504f));
  const F r = x - to_float(n) * set1(0.693359375f) - to_float(n) * set1(-2.12194440e-4f);
  F y = set1(EXP[0]);
#pragma GCC unroll 5
  for (int i = 1; i < 6; i++) y = y * r + set1(EXP[i]);
  y = y * (r * r) + r + set1(1.0f);
  return y * as_float(shift_left(n + set1(126), 23)) * set1(2.0f);
}

template <DType T>
inline F load_as(const void* x, int64_t i) {
  if constexpr (T == DType::f32) return load((const float*)x + i);
  if constexpr (T == DType::bf16) return load_bf16((const uint16_t*)x + i);
  if constexpr (T == DType::f16) return load_f16((const uint16_t*)x + i);
}

template <DType T>
inline F rounded(F a) {
  uint16_t x[W];
  if constexpr (T == DType::bf16) return store_bf16(x, a), load_bf16(x);
  if constexpr (T == DType::f16) return store_f16(x, a), load_f16(x);
  return a;
}

template <DType T>
inline F silu_mul(F gate, F up) {
  return rounded<T>(rounded<T>(gate / (set1(1.0f) + exp(set1(0.0f) - gate))) * up);
}

template <DType T>
void silu_mul_row(const void* x, int64_t n, float* row) {
  const int64_t size = size_of(T);
  const char *gate = (const char*)x, *up = gate + n * size;
  int64_t i = 0;
  for (; i + W <= n; i += W) store(row + i, silu_mul<T>(load_as<T>(gate, i), load_as<T>(up, i)));
  if (i < n) {  // the tail as a vector of its own, so that all numbers go the same way
    char tail[2][W * 4] = {};
    float y[W];
    memcpy(tail[0], gate + i * size, size_t((n - i) * size));
    memcpy(tail[1], up + i * size, size_t((n - i) * size));
    store(y, silu_mul<T>(load_as<T>(tail[0], 0), load_as<T>(tail[1], 0)));
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
