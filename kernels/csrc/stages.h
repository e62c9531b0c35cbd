// Online transforms of a row. Specification: stages; sums of products here are in an order of their own.
#pragma once

#include <cstdint>
#include <cstring>

#include "rows.h"
#include "tier.h"
#include "vec.h"

namespace RQ_TIER {
namespace {

// A tile of a product: as many rows, and vectors of columns, as the registers hold sums of.
constexpr int PRODUCT_ROWS = 6;
#if defined(RQ_AVX2)
constexpr int PRODUCT_VECTORS = 2;
#else
constexpr int PRODUCT_VECTORS = 4;
#endif

// A factor whose number of row i and step k lies at data[i * row + k * step].
struct Factor {
  const float* data;
  int64_t row, step;
};

// R rows and V vectors of out = a b; `width` is that of b and out, which start at the first column.
template <int R, int V>
inline void product_tile(const Factor& a, int64_t steps, const float* b, int64_t width, float* out) {
  F sum[R][V];
  for (auto& row : sum)
    for (F& v : row) v = set1(0.0f);
  for (int64_t k = 0; k < steps; k++) {
    F line[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) line[v] = load(b + k * width + v * W);
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) {
      const F x = set1(a.data[r * a.row + k * a.step]);
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) sum[r][v] = fma(x, line[v], sum[r][v]);
    }
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) store(out + r * width + v * W, sum[r][v]);
}

// R rows of out = a b [steps, width]. The last vector may overlap the one before it, whose numbers it finds again.
template <int R>
void product_rows(const Factor& a, int64_t steps, const float* b, int64_t width, float* out) {
  constexpr int64_t wide = PRODUCT_VECTORS * W;
  int64_t j = 0;
  for (; j + wide <= width; j += wide) product_tile<R, PRODUCT_VECTORS>(a, steps, b + j, width, out + j);
  for (; j + W <= width; j += W) product_tile<R, 1>(a, steps, b + j, width, out + j);
  if (j < width && width >= W) return product_tile<R, 1>(a, steps, b + width - W, width, out + width - W);
  for (; j < width; j++)
    for (int r = 0; r < R; r++) {
      float sum = 0;
      for (int64_t k = 0; k < steps; k++) sum += a.data[r * a.row + k * a.step] * b[k * width + j];
      out[r * width + j] = sum;
    }
}

// out [rows, width] = a [rows, steps] b [steps, width]
void product(Factor a, int64_t rows, int64_t steps, const float* b, int64_t width, float* out) {
  static constexpr decltype(&product_rows<1>) by_rows[PRODUCT_ROWS] = {
      product_rows<1>, product_rows<2>, product_rows<3>, product_rows<4>, product_rows<5>, product_rows<6>};
  for (int64_t i = 0; i < rows; i += PRODUCT_ROWS, a.data += PRODUCT_ROWS * a.row) {
    const int64_t count = rows - i < PRODUCT_ROWS ? rows - i : PRODUCT_ROWS;
    by_rows[count - 1](a, steps, b, width, out + i * width);
  }
}

// y = x (I (x) T): the blocks of x are the rows of a product.
inline void dense(const float* x, int64_t n, int64_t block, const float* matrix, float* y) {
  product({x, block, 1}, n / block, block, matrix, block, y);
}

// P' X Q, X [n / block, block] in place; the tensor is P then Q.
inline void kronecker(float* x, int64_t n, int64_t block, const float* tensor, float* scratch) {
  const int64_t outer = n / block;
  dense(x, n, block, tensor + outer * outer, scratch);
  product({tensor, 1, outer}, outer, outer, scratch, block, x);
}

// x - 2 (x . v) v for each block
inline void reflect(float* x, int64_t n, int64_t block, const float* v) {
  for (int64_t at = 0; at < n; at += block, x += block) {
    F sums[4] = {set1(0.0f), set1(0.0f), set1(0.0f), set1(0.0f)};
    int64_t i = 0;
    for (; i + 4 * W <= block; i += 4 * W)
      for (int j = 0; j < 4; j++) sums[j] = fma(load(x + i + j * W), load(v + i + j * W), sums[j]);
    float dot = hsum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (; i < block; i++) dot += x[i] * v[i];
    const float twice = 2 * dot;
    i = 0;
    for (; i + W <= block; i += W) store(x + i, load(x + i) - set1(twice) * load(v + i));
    for (; i < block; i++) x[i] -= twice * v[i];
  }
}

inline void shift(float* x, int64_t n, const float* by) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(x + i, load(x + i) - load(by + i));
  for (; i < n; i++) x[i] -= by[i];
}

// In place; scratch holds n floats.
void transform_row(float* row, int64_t n, const Transform& transform, float* scratch) {
  switch (transform.kind) {
    case Transform::none: return;
    case Transform::hadamard:
      if (transform.block > 1) hadamard(row, n, transform.block);
      return;
    case Transform::dense:
      memcpy(scratch, row, size_t(n) * 4);
      return dense(scratch, n, transform.block, transform.matrix, row);
    case Transform::kronecker: return kronecker(row, n, transform.block, transform.matrix, scratch);
    case Transform::permutation:
      memcpy(scratch, row, size_t(n) * 4);
      for (int64_t i = 0; i < n; i++) row[i] = scratch[transform.order[i]];
      return;
    case Transform::reflection: return reflect(row, n, transform.block, transform.matrix);
    case Transform::shift: return shift(row, n, transform.matrix);
  }
}

}  // namespace
}  // namespace RQ_TIER
