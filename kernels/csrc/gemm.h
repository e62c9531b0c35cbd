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

// Of a panel and at most GEMM_ROWS rows.
struct PanelScratch {
  alignas(64) uint8_t bytes[BLOCK_STEPS * 512];
  alignas(64) int32_t acc[GEMM_ROWS * PANEL];
  alignas(64) float total[GEMM_ROWS * PANEL];
  alignas(64) float scale[PANEL], bias[PANEL];
  alignas(64) float up[UP_RANKS * PANEL];
};
static_assert(sizeof(PanelScratch) <= GEMM_SCRATCH);

// acc = -offset sum(a) - zero sum(w)
inline void start(const Gemm& g, int64_t m0, int64_t m1, const int32_t* weight_sums, int64_t group, int32_t* acc) {
  const int offset = weight_offset(g.weight.bits);
  for (int64_t m = m0; m < m1; m++, acc += PANEL) {
    const I base = set1(-offset * g.sums[m * g.weight.groups + group]), zero = set1(g.quant[m].zero);
    if (g.quant[m].zero == 0)
      for (int c = 0; c < PANEL; c += W) store(acc + c, base);
    else
      for (int c = 0; c < PANEL; c += W) store(acc + c, base - zero * load(weight_sums + c));
  }
}

// acc += codes times the weights of one group, `steps` times 8 inputs. Several tiles of rows share a block of weights,
// whose nibbles are unpacked once where that pays.
inline void multiply(const Gemm& g, int64_t m0, int64_t m1, int64_t at, int64_t steps, const uint8_t* w,
                     PanelScratch& s) {
  const int64_t count = m1 - m0, tiles = (count + TILE_ROWS - 1) / TILE_ROWS, lda = g.lda;
  const int64_t block = tiles <= 1 ? steps : block_steps(tiles);
  const bool nibbles = g.weight.bits == 4, unpacked = nibbles && UNPACK_ONCE && count > TILE_ROWS;
  const int8_t* a = g.codes + m0 * lda + at;
  const int64_t done = matrix(w, nibbles, a, lda, count, steps, s.bytes, s.acc);
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

inline void load_scales(const Gemm& g, int64_t first, int64_t channels, int64_t group, PanelScratch& s) {
  for (int64_t c = 0; c < PANEL; c++)
    s.scale[c] = c < channels ? g.weight.scale[(first + c) * g.weight.groups + group] : 0.0f;
}

// total = (total + acc s_w) s_x of one row; without `more` no group was before, with `last` none comes.
inline void add_row(const int32_t* acc, const float* scale, bool more, bool last, float row_scale, float* total) {
  const F x = set1(row_scale);
  for (int c = 0; c < PANEL; c += W) {
    F sum = to_float(load(acc + c)) * load(scale + c);
    if (more) sum = load(total + c) + sum;
    store(total + c, last ? sum * x : sum);
  }
}

// out = total s_x + (x down) up + bias, where the groups' sums come in their order, the last one here
inline void finish(const Gemm& g, int64_t m0, int64_t m1, int64_t first, int64_t channels, PanelScratch& s) {
  memset(s.bias, 0, sizeof(s.bias));
  if (g.bias) load_row((const char*)g.bias + first * size_of(g.bias_dtype), g.bias_dtype, channels, s.bias);
  const auto put = [&](int64_t m, float* total) {
    if (g.bias)
      for (int c = 0; c < PANEL; c += W) store(total + c, load(total + c) + load(s.bias + c));
    write((char*)g.out + (m * g.weight.rows + first) * size_of(g.out_dtype), g.out_dtype, channels, total);
  };
  const bool more = g.weight.groups > 1;
  for (int64_t m = m0; m < m1; m++) {
    float* total = s.total + (m - m0) * PANEL;
    add_row(s.acc + (m - m0) * PANEL, s.scale, more, true, g.quant[m].scale, total);
    if (!g.low_rank.rank) put(m, total);
  }
  if (!g.low_rank.rank) return;
  add_low_rank(g, m0, m1, first, channels, s.total, s.up);
  for (int64_t m = m0; m < m1; m++) put(m, s.total + (m - m0) * PANEL);
}

void gemm_panel(const Gemm& g, int64_t m0, int64_t m1, int64_t panel, void* memory) {
  PanelScratch& s = *(PanelScratch*)memory;
  const Weight& w = g.weight;
  const int64_t padded = w.padded();
  const int64_t first = panel * PANEL, channels = w.rows - first < PANEL ? w.rows - first : PANEL;
  const int64_t group_bytes = padded * PANEL * w.bits / 8;
  for (int64_t group = 0; group < w.groups; group++) {
    const int64_t at = panel * w.groups + group;
    start(g, m0, m1, w.sums + at * PANEL, group, s.acc);
    multiply(g, m0, m1, group * padded, padded / 8, w.panels + at * group_bytes, s);
    load_scales(g, first, channels, group, s);
    if (group + 1 < w.groups)
      for (int64_t i = 0; i < (m1 - m0) * PANEL; i += PANEL)
        add_row(s.acc + i, s.scale, group > 0, false, 1.0f, s.total + i);
  }
  finish(g, m0, m1, first, channels, s);
}

}  // namespace
}  // namespace RQ_TIER
