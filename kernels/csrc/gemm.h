// The integer GEMM on packed weights. Specification: reference.int_linear.
//
// Layout "P64". A panel is 64 output channels; the last one is filled up with zeros. Each scale group of
// inputs is filled up to a multiple of 8. 4 bits, per 8 inputs k: four lines of 64 bytes; line j holds the
// channels 16 j ... 16 j + 15, byte 4 c + t the codes + 8 of the inputs k + t (low nibble) and k + 4 + t
// (high nibble). 8 bits, per 4 inputs: four lines, byte 4 c + t the code + 128 of the input k + t.
// Unsigned weights times signed activations is what the integer units multiply; the offset comes back
// from the sums of the activations: sum a (w + o) - o sum a = sum a w.
#pragma once

#include <cstdint>
#include <cstring>

#include "low_rank.h"
#include "rows.h"
#include "tier.h"
#include "vec.h"

#if defined(RQ_AMX)
#include "tile_amx.h"
#elif defined(RQ_AVX512)
#include "tile_avx512.h"
#elif defined(RQ_AVX2)
#include "tile_avx2.h"
#elif defined(RQ_I8MM)
#include "tile_i8mm.h"
#elif defined(RQ_NEON)
#include "tile_neon.h"
#else
#include "tile_scalar.h"
#endif

namespace RQ_TIER {
namespace {

// Of these rows a multiple is taken best: two tiles of the matrix unit.
#if defined(RQ_AMX)
constexpr int64_t PANEL_ROWS = 32;
#else
constexpr int64_t PANEL_ROWS = TILE_ROWS;
#endif

// Of a panel and at most GEMM_ROWS rows.
struct PanelScratch {
  alignas(64) uint8_t bytes[BLOCK_STEPS * 512];
  alignas(64) int32_t acc[GEMM_ROWS * PANEL];
  alignas(64) float total[GEMM_ROWS * PANEL];
  alignas(64) float bias[PANEL];
  alignas(64) float up[UP_RANKS * PANEL];
};
static_assert(sizeof(PanelScratch) <= GEMM_SCRATCH);

// acc = codes times the stored weights of one group, `steps` times 8 inputs. Several tiles of rows share a block of
// weights, whose nibbles are unpacked once where that pays.
inline void multiply(const Gemm& g, int64_t m0, int64_t m1, int64_t at, int64_t steps, const uint8_t* w,
                     PanelScratch& s) {
  const int64_t count = m1 - m0, tiles = (count + TILE_ROWS - 1) / TILE_ROWS, lda = g.lda;
  const int64_t block = tiles <= 1 ? steps : block_steps(tiles);
  const bool nibbles = g.weight.bits == 4, unpacked = nibbles && UNPACK_ONCE && count > TILE_ROWS;
  const int8_t* a = g.codes + m0 * lda + at;
  const int64_t done = matrix(w, nibbles, a, lda, count, steps, s.bytes, s.acc);
  if (!done) memset(s.acc, 0, size_t(count * PANEL) * 4);
  steps -= done, w += done * (nibbles ? 256 : 512), a += 8 * done;
  for (int64_t k = 0; k < steps; k += block, w += block * (nibbles ? 256 : 512), a += 8 * block) {
    const int64_t part = steps - k < block ? steps - k : block;
    if (unpacked) unpack(w, part, s.bytes);
    const uint8_t* bytes = unpacked ? s.bytes : w;
    // While this block is multiplied the next one is fetched, a share with every tile: a step has 4 lines of nibbles.
    Ahead ahead{w + 256 * part, unpacked ? (32 + tiles - 1) / tiles : 0};
    for (int64_t r = 0; r < count; r += TILE_ROWS, ahead.at += 8 * part * ahead.lines) {
      const int many = int(count - r < TILE_ROWS ? count - r : TILE_ROWS);
      const int8_t* rest = a + r * lda;
      if (nibbles && !unpacked)
        rows<true>(w, rest, lda, many, part, g.act_bits, ahead, s.acc + r * PANEL);
      else
        rows<false>(bytes, rest, lda, many, part, g.act_bits, ahead, s.acc + r * PANEL);
    }
  }
}

// A group of a panel on its way out of the integers: vectors of its channels.
struct Group {
  static constexpr int V = PANEL / W;
  F scale[V];
  I weight_sums[V];
  bool more;  // groups were before
  int64_t index;
  int offset;

  Group(const Gemm& g, int64_t first, int64_t channels, int64_t panel, int64_t group)
      : more(group > 0), index(group), offset(weight_offset(g.weight.bits)) {
    float scales[PANEL];
    for (int64_t c = 0; c < PANEL; c++)
      scales[c] = c < channels ? g.weight.scale[(first + c) * g.weight.groups + group] : 0.0f;
    for (int v = 0; v < V; v++) {
      scale[v] = load(scales + v * W);
      weight_sums[v] = load(g.weight.sums + (panel * g.weight.groups + group) * PANEL + v * W);
    }
  }

  // What the sums of row m have too much of: offset sum a, and zero (of sum w).
  struct Row {
    I base, zero;
    bool asymmetric;
    F scale;
  };
  Row row(const Gemm& g, int64_t m) const {
    const QuantRow q = g.quant[m];
    return {set1(offset * g.sums[m * g.weight.groups + index]), set1(q.zero), q.zero != 0, set1(q.scale)};
  }

  // Vector v of a row's sums up to this group, in units of the row's scale:
  // total + s_w (sum a (w + offset) - offset sum a - zero sum w)
  F sum(const Row& row, int v, const int32_t* acc, const float* total) const {
    I whole = load(acc + v * W) - row.base;
    if (row.asymmetric) whole = whole - row.zero * weight_sums[v];
    const F scaled = to_float(whole) * scale[v];
    return more ? load(total + v * W) + scaled : scaled;
  }
};

// total = the rows' sums up to a group; with `last` times s_x.
inline void add_group(const Gemm& g, int64_t m0, int64_t m1, const Group& sums, bool last, PanelScratch& s) {
  for (int64_t m = m0; m < m1; m++) {
    const int64_t at = (m - m0) * PANEL;
    const Group::Row row = sums.row(g, m);
    const F x = last ? row.scale : set1(1.0f);
    for (int v = 0; v < Group::V; v++) store(s.total + at + v * W, sums.sum(row, v, s.acc + at, s.total + at) * x);
  }
}

// out = total s_x + bias of whole panels, in registers.
template <DType T>
inline void finish_whole(const Gemm& g, int64_t m0, int64_t m1, int64_t first, const Group& last, const PanelScratch& s) {
  const int64_t stride = g.weight.rows;
  const bool biased = g.bias;
  void* const out = g.out;
  F bias[Group::V];
  for (int v = 0; v < Group::V; v++) bias[v] = load(s.bias + v * W);
  for (int64_t m = m0; m < m1; m++) {
    const int64_t at = (m - m0) * PANEL;
    const Group::Row row = last.row(g, m);
#pragma GCC unroll 4
    for (int v = 0; v < Group::V; v++) {
      const F sum = last.sum(row, v, s.acc + at, s.total + at) * row.scale;
      store_as<T>(out, m * stride + first + v * W, biased ? sum + bias[v] : sum);
    }
  }
}

// The same with a low-rank branch, out = total s_x + (x down) up + bias, and for a panel that is not whole.
inline void finish_part(const Gemm& g, int64_t m0, int64_t m1, int64_t first, int64_t channels, const Group& last,
                        PanelScratch& s) {
  add_group(g, m0, m1, last, true, s);
  if (g.low_rank.rank) add_low_rank(g, m0, m1, first, channels, s.total, s.up);
  for (int64_t m = m0; m < m1; m++) {
    float* total = s.total + (m - m0) * PANEL;
    if (g.bias)
      for (int c = 0; c < PANEL; c += W) store(total + c, load(total + c) + load(s.bias + c));
    write((char*)g.out + (m * g.weight.rows + first) * size_of(g.out_dtype), g.out_dtype, channels, total);
  }
}

inline void finish(const Gemm& g, int64_t m0, int64_t m1, int64_t first, int64_t channels, const Group& last,
                   PanelScratch& s) {
  memset(s.bias, 0, sizeof(s.bias));
  if (g.bias) load_row((const char*)g.bias + first * size_of(g.bias_dtype), g.bias_dtype, channels, s.bias);
  if (channels < PANEL || g.low_rank.rank) return finish_part(g, m0, m1, first, channels, last, s);
  switch (g.out_dtype) {
    case DType::f32: return finish_whole<DType::f32>(g, m0, m1, first, last, s);
    case DType::bf16: return finish_whole<DType::bf16>(g, m0, m1, first, last, s);
    case DType::f16: return finish_whole<DType::f16>(g, m0, m1, first, last, s);
  }
}

void gemm_panel(const Gemm& g, int64_t m0, int64_t m1, int64_t panel, void* memory) {
  PanelScratch& s = *(PanelScratch*)memory;
  const Weight& w = g.weight;
  const int64_t padded = w.padded(), group_bytes = padded * PANEL * w.bits / 8;
  const int64_t first = panel * PANEL, channels = w.rows - first < PANEL ? w.rows - first : PANEL;
  fetch_low_rank(g, first, channels);
  for (int64_t group = 0; group < w.groups; group++) {
    multiply(g, m0, m1, group * padded, padded / 8, w.panels + (panel * w.groups + group) * group_bytes, s);
    const Group sums(g, first, channels, panel, group);
    if (group + 1 == w.groups) return finish(g, m0, m1, first, channels, sums, s);
    add_group(g, m0, m1, sums, false, s);
  }
}

}  // namespace
}  // namespace RQ_TIER
