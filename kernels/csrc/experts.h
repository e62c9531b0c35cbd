// What the experts of a token add up to. Specification: experts.moe_experts.
#pragma once

#include <cstdint>

#include "rows.h"
#include "silu.h"
#include "tier.h"
#include "vec.h"

namespace RQ_TIER {
namespace {

// Numbers at .. at + COUNT W of the sum, in registers.
template <DType T, int COUNT>
inline void add_part(const void* const* rows, const float* weights, int64_t count, int64_t at, float* total) {
  F sum[COUNT];
  for (F& s : sum) s = set1(0.0f);
  for (int64_t i = 0; i < count; i++) {
    if (!rows[i]) continue;
    const F weight = set1(weights[i]);
    for (int v = 0; v < COUNT; v++) sum[v] = sum[v] + load_as<T>(rows[i], at + v * W) * weight;
  }
  for (int v = 0; v < COUNT; v++) store(total + v * W, sum[v]);
}

template <DType T>
void add_rows_of(const void* const* rows, const float* weights, int64_t count, int64_t n, void* out) {
  constexpr int COUNT = 4;
  float total[COUNT * W];
  int64_t at = 0;
  for (; at + COUNT * W <= n; at += COUNT * W) {
    add_part<T, COUNT>(rows, weights, count, at, total);
    write((char*)out + at * size_of(T), T, COUNT * W, total);
  }
  for (; at < n; at++) {
    float one = 0, row;
    for (int64_t i = 0; i < count; i++) {
      if (!rows[i]) continue;
      load_row((const char*)rows[i] + at * size_of(T), T, 1, &row);
      one += row * weights[i];
    }
    write((char*)out + at * size_of(T), T, 1, &one);
  }
}

// out[n] = sum of weights[i] * rows[i], in float32 in their order, rounded once. A row that is null adds nothing.
void add_rows(const void* const* rows, const float* weights, int64_t count, DType dtype, int64_t n, void* out) {
  if (dtype == DType::f32) add_rows_of<DType::f32>(rows, weights, count, n, out);
  if (dtype == DType::bf16) add_rows_of<DType::bf16>(rows, weights, count, n, out);
  if (dtype == DType::f16) add_rows_of<DType::f16>(rows, weights, count, n, out);
}

}  // namespace
}  // namespace RQ_TIER
