// Softmax over one tile of 4-bit K and V, for one row: exponents of 2, weights, their sums. See kv4_attention.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "kv4_page.h"
#include "tier.h"
#include "vec.h"

namespace RQ_TIER {
namespace {

constexpr int64_t TILE = 128, SUBTILES = TILE / 16;  // tokens
constexpr float LOWEST = -3.4028234e38f;

// Added to the weights of a tile before they are rounded, -1/2 to 1/2, spread evenly over any stretch of tokens
// (position with its bits reversed). Plain rounding would drop all weights below 1/510 of the largest, though many
// of them may add up to much; with the dither some are rounded up, so that their sum is kept.
struct Dither {
  alignas(64) float of[TILE];
  constexpr Dither() : of() {
    for (int i = 0; i < TILE; i++) {
      int reversed = 0;
      for (int bit = 1, other = TILE / 2; bit < TILE; bit *= 2, other /= 2) reversed += i & bit ? other : 0;
      of[i] = (float(reversed) + 0.5f) / float(TILE) - 0.5f;
    }
  }
};
constexpr Dither DITHER;

// 2^x for x <= 0 to 3e-6 relative, 2^-100 below that; exact for 0, NaN for NaN.
inline F exp2(F x) {
  const F magic = set1(12582912.0f);  // 1.5 * 2^23: the integer part of x lands in the low bits of the sum
  x = max(set1(-100.0f), x);
  const F shifted = x + magic, f = x - (shifted - magic);
  F y = fma(set1(0.0095828520f), f, set1(0.0559064262f));
  y = fma(y, f, set1(0.2402409911f));
  y = fma(y, f, set1(0.6931241751f));
  y = fma(y, f, set1(1.0f));
  return as_float(as_int(y) + shift_left(as_int(shifted), 23));
}

inline float exp2(float x) { return first(exp2(set1(x))); }

// 128 tokens of one sequence and KV head.
struct Tile {
  int64_t begin, subtiles;
  Subtile at[SUBTILES];
  alignas(64) float key_scale[TILE], value_scale[TILE];
  alignas(64) float key_zero[TILE];
  alignas(64) int8_t value_zero[TILE];
};

// Points at the tile of positions begin to end and calls for its scales. Subtiles whose positions all lie before
// `first` or behind the end repeat the nearest that does not: their pages may be gone.
inline void find_tile(const KVPages& pages, const KVItem& item, int64_t begin, int64_t first, int64_t end, Tile& tile) {
  tile.begin = begin;
  tile.subtiles = (end - begin + 15) / 16;
  const int64_t skipped = first > begin ? (first - begin) / 16 : 0, start = begin + 16 * skipped;
  int64_t page = start / pages.tokens, place = start % pages.tokens;
  for (int64_t u = 0; u < SUBTILES; u++) {
    tile.at[u] = subtile_of(pages, item.blocks[page], item.kv_head, place);
    if (u >= skipped && u + 1 < tile.subtiles && (place += 16) == pages.tokens) {
      place = 0;
      page++;
    }
    __builtin_prefetch(tile.at[u].key_scale);
    __builtin_prefetch(tile.at[u].value_scale);
    __builtin_prefetch(tile.at[u].zeros);
  }
}

// Zero points of 16 tokens' stored codes.
inline void load_zeros(const uint8_t* from, bool symmetric, int8_t* key, int8_t* value) {
  const uint64_t low = 0x0f0f0f0f0f0f0f0fu;
  uint64_t both[2] = {0x8888888888888888u, 0x8888888888888888u};
  if (!symmetric) memcpy(both, from, 16);
  for (int i = 0; i < 2; i++) {
    const uint64_t keys = both[i] & low, values = both[i] >> 4 & low;
    memcpy(key + 8 * i, &keys, 8);
    memcpy(value + 8 * i, &values, 8);
  }
}

inline void load_scales(Tile& tile, bool symmetric) {
  for (int64_t u = 0; u < tile.subtiles; u++) {
    const Subtile& from = tile.at[u];
    alignas(16) int8_t key_zero[16];
    load_zeros(from.zeros, symmetric, key_zero, tile.value_zero + 16 * u);
    for (int64_t i = 0; i < 16; i += W) {
      store(tile.key_zero + 16 * u + i, load_i8(key_zero + i));
      store(tile.key_scale + 16 * u + i, load_f16((const uint16_t*)from.key_scale + i));
      store(tile.value_scale + 16 * u + i, abs(load_f16((const uint16_t*)from.value_scale + i)));  // a NaN too
    }
  }
}

// Places of a tile that a row sees: from `first` up to and not including `last`.
struct Seen {
  int64_t first, last;

  bool whole() const { return first == 0 && last == TILE; }
  int64_t start() const { return first / W * W; }
  // x at the places from i on that are seen, `other` at the rest.
  F keep(F x, int64_t i, F other) const {
    if (last - i < W) x = first_lanes(x, int(last - i), other);
    return i < first ? first_lanes(other, int(first - i), x) : x;
  }
};

// cap tanh(x / cap), to 3e-6 of cap; NaN for NaN.
inline F capped(F x, float cap) {
  const F e = exp2(abs(x) * set1(-2.88539008f / cap)), size = set1(cap) * (set1(1.0f) - e) / (set1(1.0f) + e);
  return as_float(as_int(size) | (as_int(x) & set1(int32_t(0x80000000))));
}

// Exponents of a row from its integer dot products with the keys that it sees; returns the largest. cap: of the
// exponents, 0 for none. WHOLE: all of the tile is seen.
template <bool WHOLE>
inline float exponents_of(const int32_t* dots, const Tile& tile, Seen seen, float factor, float cap, float sum, float* x) {
  F largest = set1(LOWEST);
  const int64_t start = WHOLE ? 0 : seen.start(), last = WHOLE ? TILE : seen.last;
  for (int64_t i = start; i < last; i += W) {
    F v = fma(load(tile.key_zero + i), set1(-sum), to_float(load(dots + i)));  // exact: all below 2^24
    v = v * load(tile.key_scale + i) * set1(factor);
    if (cap > 0) v = capped(v, cap);
    if (!WHOLE) v = seen.keep(v, i, set1(LOWEST));
    store(x + i, v);
    largest = max(largest, v);
  }
  return hmax(largest);
}

inline float exponents(const int32_t* dots, const Tile& tile, Seen seen, float factor, float cap, float sum, float* x) {
  if (seen.whole() && cap == 0) return exponents_of<true>(dots, tile, seen, factor, 0, sum, x);
  return exponents_of<false>(dots, tile, seen, factor, cap, sum, x);
}

// Turns exponents into weights times V's scales, 0 where nothing is seen, in place. The weights are added to
// sums[0..15], which first fade. Returns the largest weight times scale.
template <bool WHOLE>
inline float weigh_by(const Tile& tile, Seen seen, float largest, float fade, float* x, float* sums) {
  F sum = set1(0.0f);
  I most = set1(0);  // compared as integers: NaN is the largest
  const int64_t start = WHOLE ? 0 : seen.start(), last = WHOLE ? TILE : seen.last;
  for (int64_t i = 0; i < start; i += W) store(x + i, set1(0.0f));
  for (int64_t i = start; i < last; i += W) {
    F p = exp2(load(x + i) - set1(largest)), w = p * load(tile.value_scale + i);
    if (!WHOLE) {
      p = seen.keep(p, i, set1(0.0f));
      w = seen.keep(w, i, set1(0.0f));
    }
    store(x + i, w);
    sum = sum + p;
    most = max(most, as_int(w));
  }
  for (int64_t i = (last + W - 1) / W * W; i < TILE; i += W) store(x + i, set1(0.0f));
  store(sums, fma(load(sums), set1(fade), sum));
  return float_of(uint32_t(hmax(most)));
}

inline float weigh(const Tile& tile, Seen seen, float largest, float fade, float* x, float* sums) {
  if (seen.whole()) return weigh_by<true>(tile, seen, largest, fade, x, sums);
  return weigh_by<false>(tile, seen, largest, fade, x, sums);
}

inline void store_bytes(int8_t* p, const I* q) { store_i8(p, q[0], q[1], q[2], q[3], -127, 127); }
inline void store_bytes(uint8_t* p, const I* q) { store_u8(p, q[0], q[1], q[2], q[3]); }

// round(x * factor + dither) as bytes; n is a multiple of 4 W.
template <class Byte>
inline void to_bytes(const float* x, int64_t n, float factor, const float* dither, Byte* bytes) {
  for (int64_t i = 0; i < n; i += 4 * W) {
    I q[4];
    for (int j = 0; j < 4; j++) {
      const int64_t at = i + j * W;
      q[j] = round(fma(load(x + at), set1(factor), dither ? load(dither + at) : set1(0.0f)));
    }
    store_bytes(bytes + i, q);
  }
}

// sums = sums * fade + scale * (dots - zeros)
inline void accumulate(float* sums, const int32_t* dots, int64_t dim, float fade, float scale, int32_t zeros) {
  const F zero = set1(-scale * float(zeros));
  for (int64_t i = 0; i < dim; i += W)
    store(sums + i, fma(set1(scale), to_float(load(dots + i)), fma(load(sums + i), set1(fade), zero)));
}

// Softmax so far of the rows of a block: the largest exponent, and columns that weights were summed into, those
// of V and then 16 of 1, whose sum is the sum of the weights.
struct Softmax {
  float *largest, *sums;
  int64_t columns;

  Softmax(float* memory, int64_t rows, int64_t dim) : largest(memory), sums(memory + rows), columns(dim + 16) {}
  void clear(int64_t rows) {
    for (int64_t r = 0; r < rows; r++) largest[r] = LOWEST;
    memset(sums, 0, size_t(rows * columns) * 4);
  }
};

inline void merge(Softmax& whole, const Softmax& chunk, int64_t rows) {
  for (int64_t r = 0; r < rows; r++) {
    const float largest = chunk.largest[r] > whole.largest[r] ? chunk.largest[r] : whole.largest[r];
    const float fade = exp2(whole.largest[r] - largest), part = exp2(chunk.largest[r] - largest);
    whole.largest[r] = largest;
    for (int64_t i = r * whole.columns; i < (r + 1) * whole.columns; i += W)
      store(whole.sums + i, load(whole.sums + i) * set1(fade) + load(chunk.sums + i) * set1(part));
  }
}

}  // namespace
}  // namespace RQ_TIER
