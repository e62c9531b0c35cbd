// The low-rank branch of a linear layer, (x down) up, in float32: the first product beside the quantization of a row,
// which it may take its directions off, the second one in the GEMM's epilogue.
#pragma once

#include <cstdint>
#include <cstring>

#include "rows.h"
#include "silu.h"
#include "tier.h"
#include "vec.h"

namespace RQ_TIER {
namespace {

// V vectors of out = row down. Four sums each: one of them would wait for its last addition.
template <DType T, int V>
inline void project_tile(const float* row, int64_t n, const char* down, int64_t rank, float* out) {
  F sum[4][V];
  for (auto& part : sum)
    for (F& v : part) v = set1(0.0f);
  int64_t k = 0;
  for (; k + 4 <= n; k += 4)
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
#pragma GCC unroll 4
      for (int v = 0; v < V; v++)
        sum[i][v] = fma(set1(row[k + i]), load_as<T>(down, (k + i) * rank + v * W), sum[i][v]);
  for (; k < n; k++)
    for (int v = 0; v < V; v++) sum[0][v] = fma(set1(row[k]), load_as<T>(down, k * rank + v * W), sum[0][v]);
  for (int v = 0; v < V; v++) store(out + v * W, (sum[0][v] + sum[1][v]) + (sum[2][v] + sum[3][v]));
}

template <DType T>
void project(const float* row, int64_t n, const char* down, int64_t rank, float* out) {
#if defined(RQ_AVX2)
  constexpr int V = 2;
#else
  constexpr int V = 4;
#endif
  int64_t r = 0;
  for (; r + V * W <= rank; r += V * W) project_tile<T, V>(row, n, down + r * size_of(T), rank, out + r);
  for (; V > 2 && r + 2 * W <= rank; r += 2 * W) project_tile<T, 2>(row, n, down + r * size_of(T), rank, out + r);
  for (; r + W <= rank; r += W) project_tile<T, 1>(row, n, down + r * size_of(T), rank, out + r);
  if (r == rank) return;
  memset(out + r, 0, size_t(rank - r) * 4);
  for (int64_t k = 0; k < n; k++)
    read(down + (k * rank + r) * size_of(T), T, rank - r, [](int64_t, F) {},
         [&](int64_t i, float a) { out[r + i] += row[k] * a; });
}

// out[rank] = row[n] down
void project_row(const float* row, int64_t n, const LowRank& low_rank, float* out) {
  const char* down = (const char*)low_rank.down;
  if (low_rank.dtype == DType::f32) project<DType::f32>(row, n, down, low_rank.rank, out);
  if (low_rank.dtype == DType::bf16) project<DType::bf16>(row, n, down, low_rank.rank, out);
  if (low_rank.dtype == DType::f16) project<DType::f16>(row, n, down, low_rank.rank, out);
}

// row[n] -= V vectors of z times theirs of downᵀ.
template <DType T, int V>
inline void subtract_tile(float* row, int64_t n, const char* down, int64_t rank, const float* z) {
  F factor[V];
  for (int v = 0; v < V; v++) factor[v] = load(z + v * W);
  const auto along = [&](int64_t k) {
    F sum = factor[0] * load_as<T>(down, k * rank);
#pragma GCC unroll 4
    for (int v = 1; v < V; v++) sum = fma(factor[v], load_as<T>(down, k * rank + v * W), sum);
    return sum;
  };
  int64_t k = 0;
  for (; k + W <= n; k += W) {
    F sums[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; i++) sums[i] = along(k + i);
    store(row + k, load(row + k) - hsums(sums));
  }
  for (; k < n; k++) row[k] -= hsum(along(k));
}

template <DType T>
void subtract(float* row, int64_t n, const char* down, int64_t rank, const float* z) {
  int64_t r = 0;
  for (; r + 4 * W <= rank; r += 4 * W) subtract_tile<T, 4>(row, n, down + r * size_of(T), rank, z + r);
  for (; r + W <= rank; r += W) subtract_tile<T, 1>(row, n, down + r * size_of(T), rank, z + r);
  if (r == rank) return;
  for (int64_t k = 0; k < n; k++)
    read(down + (k * rank + r) * size_of(T), T, rank - r, [](int64_t, F) {},
         [&](int64_t i, float a) { row[k] -= z[r + i] * a; });
}

// row[n] -= z[rank] downᵀ
void subtract_row(float* row, int64_t n, const LowRank& low_rank, const float* z) {
  const char* down = (const char*)low_rank.down;
  if (low_rank.dtype == DType::f32) subtract<DType::f32>(row, n, down, low_rank.rank, z);
  if (low_rank.dtype == DType::bf16) subtract<DType::bf16>(row, n, down, low_rank.rank, z);
  if (low_rank.dtype == DType::f16) subtract<DType::f16>(row, n, down, low_rank.rank, z);
}

constexpr int64_t UP_RANKS = 64;  // rows of `up` that are made float32 at a time

// Asks for what `add_low_rank` reads first: its rows lie far apart, so that nothing else fetches them ahead.
inline void fetch_low_rank(const Gemm& g, int64_t first, int64_t channels) {
  const int64_t rank = g.low_rank.rank < UP_RANKS ? g.low_rank.rank : UP_RANKS, size = size_of(g.low_rank.dtype);
  for (int64_t k = 0; k < rank; k++) {
    const char* up = (const char*)g.low_rank.up + (k * g.weight.rows + first) * size;
    for (int64_t i = 0; i < channels * size; i += 64) __builtin_prefetch(up + i, 0, 2);
  }
}

// R rows of total [.., PANEL] += down up, `up` in float32 [ranks, PANEL].
template <int R>
inline void add_product(const float* down, int64_t rank, const float* up, int64_t ranks, float* total) {
  constexpr int V = 2;
  for (int c = 0; c < PANEL; c += V * W) {
    F sum[R][V];
    for (int r = 0; r < R; r++)
      for (int v = 0; v < V; v++) sum[r][v] = load(total + r * PANEL + c + v * W);
    for (int64_t k = 0; k < ranks; k++) {
      F line[V];
      for (int v = 0; v < V; v++) line[v] = load(up + k * PANEL + c + v * W);
#pragma GCC unroll 4
      for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) sum[r][v] = fma(set1(down[r * rank + k]), line[v], sum[r][v]);
    }
    for (int r = 0; r < R; r++)
      for (int v = 0; v < V; v++) store(total + r * PANEL + c + v * W, sum[r][v]);
  }
}

// total [PANEL] += down[rank] up of one row and a whole panel, from `up` as it is stored.
template <DType T>
inline void add_row(const float* down, int64_t rank, const char* up, int64_t stride, float* total) {
  constexpr int V = PANEL / W < 8 ? PANEL / W : 8;
  for (int c = 0; c < PANEL; c += V * W) {
    F sum[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) sum[v] = load(total + c + v * W);
    for (int64_t k = 0; k < rank; k++) {
      const F factor = set1(down[k]);
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) sum[v] = fma(factor, load_as<T>(up, k * stride + c + v * W), sum[v]);
    }
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) store(total + c + v * W, sum[v]);
  }
}

inline void add_row(const Gemm& g, int64_t m, int64_t first, float* total) {
  const float* down = g.down + m * g.low_rank.rank;
  const char* up = (const char*)g.low_rank.up + first * size_of(g.low_rank.dtype);
  switch (g.low_rank.dtype) {
    case DType::f32: return add_row<DType::f32>(down, g.low_rank.rank, up, g.weight.rows, total);
    case DType::bf16: return add_row<DType::bf16>(down, g.low_rank.rank, up, g.weight.rows, total);
    case DType::f16: return add_row<DType::f16>(down, g.low_rank.rank, up, g.weight.rows, total);
  }
}

// total [m1 - m0, PANEL] += (x down) up of a panel's channels, rank after rank; `memory` is [UP_RANKS, PANEL].
inline void add_low_rank(const Gemm& g, int64_t m0, int64_t m1, int64_t first, int64_t channels, float* total,
                         float* memory) {
  const int64_t rank = g.low_rank.rank, size = size_of(g.low_rank.dtype), count = m1 - m0;
  if (count == 1 && channels == PANEL) return add_row(g, m0, first, total);
  for (int64_t at = 0; at < rank; at += UP_RANKS) {
    const int64_t ranks = rank - at < UP_RANKS ? rank - at : UP_RANKS;
    for (int64_t k = 0; k < ranks; k++) {
      float* up = memory + k * PANEL;
      load_row((const char*)g.low_rank.up + ((at + k) * g.weight.rows + first) * size, g.low_rank.dtype, channels, up);
      memset(up + channels, 0, size_t(PANEL - channels) * 4);
    }
    int64_t m = 0;
    const float* down = g.down + m0 * rank + at;
    for (; m + 4 <= count; m += 4) add_product<4>(down + m * rank, rank, memory, ranks, total + m * PANEL);
    for (; m < count; m++) add_product<1>(down + m * rank, rank, memory, ranks, total + m * PANEL);
  }
}

}  // namespace
}  // namespace RQ_TIER
