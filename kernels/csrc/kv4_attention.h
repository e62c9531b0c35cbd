// Causal attention over pages of 4-bit codes, on integers: softmax(scale q K^T) V in tiles of 128 tokens.
//
// A query is int8 times one scale, so q K^T is an exact integer dot product with K's codes. That adds 1/16 of the
// error that K's own 4 bits made: 1/127 of the largest value against 1/7.5. Softmax weights times V's scales are
// uint8, with one scale per row and tile, rounded with a dither (kv4_softmax.h).
//
// Softmax is online over the tiles of a chunk (kv_chunk tokens), and chunks are merged in order. Tiles and chunks
// start at fixed positions of the sequence and a row never meets another, so the result of a token does not depend
// on batch, blocks of rows or threads. Tiles before the window of every row of a block are skipped; one of which a row
// sees nothing changes none of its bits.
#pragma once

#include <cstdint>
#include <cstring>

#include "kv4_dot.h"
#include "kv4_matrix.h"
#include "kv4_page.h"
#include "kv4_softmax.h"
#include "rows.h"
#include "stages.h"
#include "tier.h"
#include "vec.h"

namespace RQ_TIER {
namespace {

#if defined(RQ_AMX)
constexpr int64_t ROWS = kv_rows;  // most rows that meet a tile at once
#else
constexpr int64_t ROWS = 8;
#endif
constexpr int QUERY = kv_max_dim + 64, WEIGHTS = TILE + 64;  // bytes from row to row; 64 more against cache conflicts

// A block of rows: (token, head of the group) pairs that share one KV head.
struct Block {
  alignas(64) int8_t query[kv_rows * QUERY];
  alignas(64) uint8_t weights[ROWS * WEIGHTS];
  alignas(64) int32_t dots[ROWS * kv_max_dim];
#if defined(RQ_AMX)
  alignas(64) uint8_t codes[MATRIX_CODES];  // of a tile's keys, then of its values, as bytes
#endif
  alignas(64) float row[kv_max_dim], scratch[kv_max_dim], exponents[8 * TILE];
  alignas(64) float chunk[kv_rows * kv_partial(kv_max_dim)], whole[kv_rows * kv_partial(kv_max_dim)];
  float factor[kv_rows];  // of the integer dot products: what makes them exponents of 2
  float sum[kv_rows];  // of the row's integers
  float cap;  // of exponents of 2
  int64_t begin[kv_rows], end[kv_rows];  // positions that the row sees
  const char* from[kv_rows];  // its query
  char* to[kv_rows];  // its result
};

// Streams of tiles for `dot`: subtiles from u on along the dimensions; groups of 16 dimensions along the subtiles.
inline auto keys_of(const Tile& tile, int64_t u) {
  return [&tile, u](int s, int64_t i) -> const uint8_t* { return tile.at[u + s].keys + 128 * i; };
}
inline auto values_of(const Tile& tile, int64_t group) {
  return [&tile, group](int s, int64_t i) -> const uint8_t* { return tile.at[i].values + 128 * (group + s); };
}

inline int64_t within(int64_t place) { return place < 0 ? 0 : place < TILE ? place : TILE; }

// What turns a row's integer dot products with V into its sums.
struct Weights {
  float fade, scale;
  int32_t zeros;
};

// From the dot products of n <= 8 rows with the keys of a tile to their weights as bytes.
inline __attribute__((always_inline)) void weigh_rows(Block& b, const Tile& tile, int64_t row, int n,
                                                      const int32_t* dots, int64_t dim, Softmax& s, uint8_t* codes,
                                                      Weights* w) {
  float found[8];
  Seen seen[8];
  // Three loops, not one: what a row waits for is then hidden behind the other rows.
  for (int r = 0; r < n; r++) {
    seen[r] = {within(b.begin[row + r] - tile.begin), within(b.end[row + r] - tile.begin)};
    found[r] = exponents(dots + r * TILE, tile, seen[r], b.factor[row + r], b.cap, b.sum[row + r],
                         b.exponents + r * TILE);
  }
  for (int r = 0; r < n; r++) {
    float& largest = s.largest[row + r];
    const float before = largest;
    largest = found[r] > before ? found[r] : before;
    w[r].fade = exp2(before - largest);
    w[r].scale = weigh(tile, seen[r], largest, w[r].fade, b.exponents + r * TILE, s.sums + (row + r) * s.columns + dim);
  }
  for (int r = 0; r < n; r++, codes += WEIGHTS) {
    to_bytes(b.exponents + r * TILE, TILE, w[r].scale > 1e-30f ? 255.0f / w[r].scale : 0.0f, DITHER.of, codes);
    w[r].zeros = dot_bytes(codes, tile.value_zero, TILE);
    w[r].scale *= 1 / 255.0f;
  }
}

// To the sums of n rows: their dot products with V.
inline void add_values(int64_t row, int64_t n, const int32_t* dots, int64_t width, int64_t dim, const Weights* w,
                       Softmax& s) {
  for (int64_t r = 0; r < n; r++)
    accumulate(s.sums + (row + r) * s.columns, dots + r * width, dim, w[r].fade, w[r].scale, w[r].zeros);
}

#if defined(RQ_AMX)
// All rows of a block meet a tile by matrix products.
inline void meet_matrix(Block& b, const Tile& tile, const Tile& next, int64_t rows, int64_t dim, Softmax& s) {
  Weights w[kv_rows];
  const int64_t share = register_rows(rows), factors = (dim + 63) / 64;
  unpack_keys(tile, next, dim, b.codes);
  const MatrixRows<int8_t> queries{b.query, QUERY, share, b.dots, TILE};
  multiply_rows(queries, rows, b.codes, factors, factors * FACTOR, tile.subtiles);
  for (int64_t row = 0; row < rows; row += 4) {
    const int n = int(rows - row < 4 ? rows - row : 4);
    keep_awake();
    weigh_rows(b, tile, row, n, b.dots + row * TILE, dim, s, b.weights + row * WEIGHTS, w + row);
  }
  unpack_values(tile, next, dim, b.codes);
  const MatrixRows<uint8_t> weights{b.weights, WEIGHTS, share, b.dots, dim};
  multiply_rows(weights, rows, b.codes, (tile.subtiles + 3) / 4, 2 * FACTOR, dim / 16);
  add_values(0, rows, b.dots, dim, dim, w, s);
}
#endif

// R rows from `row` on meet a tile, while the next one is fetched.
template <int R>
void meet(Block& b, const Tile& tile, const Tile& next, int64_t row, int64_t dim, Softmax& s) {
  constexpr int S = R <= 2 ? 4 : 2;
  for (int64_t u = 0; u < tile.subtiles; u += S)
    dot<R, S, QUERY>(keys_of(tile, u), keys_of(next, u), dim / 16, b.query + row * QUERY, b.dots + 16 * u, TILE);
  Weights w[R];
  weigh_rows(b, tile, row, R, b.dots, dim, s, b.weights, w);
  int64_t group = 0;
  for (; group + S <= dim / 16; group += S)
    dot<R, S, WEIGHTS>(values_of(tile, group), values_of(next, group), tile.subtiles, b.weights, b.dots + 16 * group,
                       kv_max_dim);
  for (; group < dim / 16; group++)
    dot<R, 1, WEIGHTS>(values_of(tile, group), values_of(next, group), tile.subtiles, b.weights, b.dots + 16 * group,
                       kv_max_dim);
  add_values(row, R, b.dots, kv_max_dim, dim, w, s);
}

inline void meet_rows(Block& b, const Tile& tile, const Tile& next, int64_t rows, int64_t dim, Softmax& s) {
#if defined(RQ_AMX)
  if (rows >= MANY_ROWS) return meet_matrix(b, tile, next, rows, dim, s);
#endif
  static constexpr decltype(&meet<1>) by_rows[] = {meet<1>, meet<2>, meet<3>, meet<4>,
                                                       meet<5>, meet<6>, meet<7>, meet<8>};
  constexpr int64_t few = sizeof(by_rows) / sizeof(*by_rows);
  const int64_t passes = (rows + few - 1) / few, most = (rows + passes - 1) / passes;
  for (int64_t row = 0; row < rows; row += most)
    by_rows[(rows - row < most ? rows - row : most) - 1](b, tile, next, row, dim, s);
}

// Finds the rows of a block, which lie apart, and calls for them.
inline void find_rows(Block& b, const KVQuery& q, const KVItem& item) {
  const int64_t size = size_of(q.dtype), bytes = q.pages.head_dim * size, first = item.kv_head * q.group;
  int64_t token = item.row / q.group, head = item.row % q.group;
  for (int64_t r = 0; r < item.rows; r++) {
    b.from[r] = (const char*)q.query + ((item.first + token) * q.query_token + (first + head) * q.query_head) * size;
    b.to[r] = (char*)q.out + ((item.first + token) * q.out_token + (first + head) * q.out_head) * size;
    for (int64_t i = 0; i < bytes; i += 64) {
      __builtin_prefetch(b.from[r] + i);
      __builtin_prefetch(b.to[r] + i, 1);
    }
    b.end[r] = item.length - item.tokens + token + 1;
    b.begin[r] = q.begin(b.end[r] - 1);
    if (++head == q.group) head = 0, token++;
  }
}

// Rotates the queries of a block and makes them integers.
inline void load_queries(Block& b, const KVQuery& q, const KVItem& item) {
  find_rows(b, q, item);
  const int64_t dim = q.pages.head_dim, padded = (dim + 63) / 64 * 64;
  const Transform rotation{Transform::hadamard, q.rotate, nullptr};
  b.cap = q.cap * 1.44269504f;
  memset(b.row + dim, 0, size_t(padded - dim) * 4);
  for (int64_t r = 0; r < item.rows; r++) {
    load_row(b.from[r], q.dtype, dim, b.row);
    if (q.rotate) transform_row(b.row, dim, rotation, b.scratch);
    const Range range = range_of(b.row, dim, true);
    const float largest = range.finite ? range.most : float_of(0x7fc00000u);
    int8_t* codes = b.query + r * QUERY;
    to_bytes(b.row, padded, largest > 1e-30f ? 127.0f / largest : 0.0f, nullptr, codes);
    b.sum[r] = float(sum_i8(codes, dim));
    b.factor[r] = largest / 127.0f * (q.scale * 1.44269504f);
  }
}

// Positions that rows of a block see, from the first row's first to the last row's last.
inline int64_t begin_of(const KVQuery& q, const KVItem& item) {
  return q.begin(item.length - item.tokens + item.row / q.group);
}
inline int64_t end_of(const KVQuery& q, const KVItem& item) {
  return item.length - item.tokens + (item.row + item.rows - 1) / q.group + 1;
}

inline void attend_chunk(Block& b, const KVQuery& q, const KVItem& item, int64_t chunk, Softmax& s) {
  const int64_t seen = end_of(q, item), last = (chunk + 1) * kv_chunk, end = seen < last ? seen : last;
  const int64_t first = begin_of(q, item);
  const auto find = [&](int64_t begin, Tile& tile) {
    find_tile(q.pages, item, begin, first, end < begin + TILE ? end : begin + TILE, tile);
  };
  Tile tiles[2];
  const MatrixUnit unit(item.rows);
  s.clear(item.rows);
  int64_t begin = chunk * kv_chunk;
  if (first > begin) begin = first / TILE * TILE;
  if (begin < end) find(begin, tiles[0]);
  for (int i = 0; begin < end; i ^= 1, begin += TILE) {
    const bool more = begin + TILE < end;
    Tile &tile = tiles[i], &next = tiles[more ? i ^ 1 : i];
    load_scales(tile, q.pages.symmetric);
    if (more) find(begin + TILE, next);
    meet_rows(b, tile, next, item.rows, q.pages.head_dim, s);
  }
}

inline void finish(Block& b, const KVQuery& q, const KVItem& item, const Softmax& s) {
  const int64_t dim = q.pages.head_dim;
  for (int64_t r = 0; r < item.rows; r++) {
    const float* sums = s.sums + r * s.columns;
    F total = set1(0.0f);
    for (int64_t i = dim; i < dim + 16; i += W) total = total + load(sums + i);
    const F share = set1(1.0f / hsum(total));
    for (int64_t i = 0; i < dim; i += W) store(b.row + i, load(sums + i) * share);
    write(b.to[r], q.dtype, dim, b.row);
  }
}

// A whole block of rows.
void kv4_attend(const KVQuery& q, const KVItem& item, void* scratch) {
  Block& b = *(Block*)scratch;
  const int64_t dim = q.pages.head_dim;
  Softmax chunk(b.chunk, item.rows, dim), whole(b.whole, item.rows, dim);
  load_queries(b, q, item);
  int64_t c = begin_of(q, item) / kv_chunk;
  attend_chunk(b, q, item, c, whole);
  while (++c * kv_chunk < end_of(q, item)) {
    attend_chunk(b, q, item, c, chunk);
    merge(whole, chunk, item.rows);
  }
  finish(b, q, item, whole);
}

// One chunk of a block, into `partial`, rows * kv_partial(head_dim) floats.
void kv4_attend_chunk(const KVQuery& q, const KVItem& item, int64_t chunk, float* partial, void* scratch) {
  Block& b = *(Block*)scratch;
  Softmax s(partial, item.rows, q.pages.head_dim);
  load_queries(b, q, item);
  attend_chunk(b, q, item, chunk, s);
}

// A block from its chunks, which lie one after the other.
void kv4_merge(const KVQuery& q, const KVItem& item, int64_t chunks, float* partials, void* scratch) {
  const int64_t dim = q.pages.head_dim;
  Block& b = *(Block*)scratch;
  Softmax whole(partials, item.rows, dim);
  for (int64_t c = 1; c < chunks; c++)
    merge(whole, Softmax(partials + c * item.rows * kv_partial(dim), item.rows, dim), item.rows);
  find_rows(b, q, item);
  finish(b, q, item, whole);
}

}  // namespace
}  // namespace RQ_TIER
