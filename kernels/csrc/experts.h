// What the experts of a token add up to. Specification: experts.moe_experts.
#pragma once

#include <cstdint>
#include <cstring>

#include "rows.h"
#include "tier.h"
#include "vec.h"

namespace RQ_TIER {
namespace {

// out[n] = sum of weights[i] * rows[i], in float32 in their order, rounded once. A row that is null adds nothing.
void add_rows(const void* const* rows, const float* weights, int64_t count, DType dtype, int64_t n, void* out,
              float* memory) {
  float *total = memory, *row = memory + n;
  memset(total, 0, size_t(n) * 4);
  for (int64_t i = 0; i < count; i++) {
    if (!rows[i]) continue;
    load_row(rows[i], dtype, n, row);
    const F weight = set1(weights[i]);
    int64_t k = 0;
    for (; k + W <= n; k += W) store(total + k, load(total + k) + load(row + k) * weight);
    for (; k < n; k++) total[k] += row[k] * weights[i];
  }
  write(out, dtype, n, total);
}

}  // namespace
}  // namespace RQ_TIER
