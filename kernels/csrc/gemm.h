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

#include "rows.h"
#include "tier.h"
#include "vec.h"

namespace RQ_TIER {
namespace {

// Packed weights that are wanted after those of a tile: cache lines fetched every 8 steps, from `at` on.
struct Ahead {
  const uint8_t* at;
  int64_t lines;
};

// acc[r][c] += sum_k a[r][k] w[c][k] for `steps` times 8 inputs and the 64 channels of a panel, tier by
// tier; `Packed` weights are nibbles, others bytes.

#if defined(RQ_AVX512)

constexpr int TILE_ROWS = 6;  // rows; 6 x 4 accumulators leave registers for the weights
constexpr bool UNPACK_ONCE = true;
// Steps of a block of weights that `tiles` tiles of rows share. For many, its 128 KiB lie in the second cache level,
// which feeds a tile fast enough, and accumulators move less often; for few, they are used before they leave the first.
constexpr int64_t BLOCK_STEPS = 256;
inline int64_t block_steps(int64_t tiles) { return tiles < 8 ? 32 : BLOCK_STEPS; }

template <int R, bool Packed>
inline void tile(const uint8_t* w, const int8_t* a, int64_t lda, int64_t steps, Ahead ahead, int32_t* acc) {
  __m512i sum[R][4];
#pragma GCC unroll 6
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) sum[r][j] = _mm512_loadu_si512(acc + r * PANEL + 16 * j);
  const __m512i low = _mm512_set1_epi8(15);
  for (int64_t k = 0; k < steps; k++, a += 8) {
    if constexpr (Packed) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) {
        // The hardware follows a stream only to the end of its 4 KiB page.
        _mm_prefetch((const char*)w + 8192 + 64 * j, _MM_HINT_T0);
        const __m512i both = _mm512_loadu_si512(w + 64 * j);
        const __m512i first = _mm512_and_si512(both, low);
        const __m512i second = _mm512_and_si512(_mm512_srli_epi32(both, 4), low);
#pragma GCC unroll 6
        for (int r = 0; r < R; r++) {
          int32_t a0, a1;
          memcpy(&a0, a + r * lda, 4);
          memcpy(&a1, a + r * lda + 4, 4);
          sum[r][j] = _mm512_dpbusd_epi32(sum[r][j], first, _mm512_set1_epi32(a0));
          sum[r][j] = _mm512_dpbusd_epi32(sum[r][j], second, _mm512_set1_epi32(a1));
        }
      }
      w += 256;
    } else {
      if (k % 8 == 0)
        for (int64_t i = 0; i < ahead.lines; i++, ahead.at += 64) _mm_prefetch((const char*)ahead.at, _MM_HINT_T1);
#pragma GCC unroll 2
      for (int half = 0; half < 2; half++, w += 256) {
        __m512i line[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) line[j] = _mm512_loadu_si512(w + 64 * j);
#pragma GCC unroll 6
        for (int r = 0; r < R; r++) {
          int32_t x;
          memcpy(&x, a + r * lda + 4 * half, 4);
          const __m512i all = _mm512_set1_epi32(x);
#pragma GCC unroll 4
          for (int j = 0; j < 4; j++) sum[r][j] = _mm512_dpbusd_epi32(sum[r][j], line[j], all);
        }
      }
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) _mm512_storeu_si512(acc + r * PANEL + 16 * j, sum[r][j]);
}

template <bool Packed>
inline void rows(const uint8_t* w, const int8_t* a, int64_t lda, int count, int64_t steps, int, Ahead ahead,
                 int32_t* acc) {
  switch (count) {
    case 1: return tile<1, Packed>(w, a, lda, steps, ahead, acc);
    case 2: return tile<2, Packed>(w, a, lda, steps, ahead, acc);
    case 3: return tile<3, Packed>(w, a, lda, steps, ahead, acc);
    case 4: return tile<4, Packed>(w, a, lda, steps, ahead, acc);
    case 5: return tile<5, Packed>(w, a, lda, steps, ahead, acc);
    default: return tile<6, Packed>(w, a, lda, steps, ahead, acc);
  }
}

// Nibble lines to byte lines, 256 to 512 bytes a step.
inline void unpack(const uint8_t* w, int64_t steps, uint8_t* to) {
  const __m512i low = _mm512_set1_epi8(15);
  for (int64_t k = 0; k < steps; k++, w += 256, to += 512)
    for (int j = 0; j < 4; j++) {
      const __m512i both = _mm512_loadu_si512(w + 64 * j);
      _mm512_store_si512(to + 64 * j, _mm512_and_si512(both, low));
      _mm512_store_si512(to + 256 + 64 * j, _mm512_and_si512(_mm512_srli_epi32(both, 4), low));
    }
}

#elif defined(RQ_AVX2)

constexpr int TILE_ROWS = 4;
constexpr bool UNPACK_ONCE = false;
constexpr int64_t BLOCK_STEPS = 32;  // 8 KiB of nibbles, which stay in the first cache level
inline int64_t block_steps(int64_t) { return BLOCK_STEPS; }

// R rows and H half lines (8 channels each) with R H = 8. Products of nibbles are added in int16 as long as
// they cannot overflow: a step adds at most 4 * 15 * 2^(act_bits - 1).
template <int R, int H>
inline void nibble_tile(const uint8_t* w, const int8_t* a, int64_t lda, int64_t steps, int act_bits, int32_t* acc) {
  const __m256i low = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  const int64_t safe = act_bits == 4 ? 64 : 4;
  for (int64_t begin = 0; begin < steps; begin += safe) {
    const int64_t end = begin + safe < steps ? begin + safe : steps;
    __m256i sum[R][H];
    for (auto& row : sum)
      for (__m256i& v : row) v = _mm256_setzero_si256();
    for (int64_t k = begin; k < end; k++) {
      __m256i a0[R], a1[R];
      for (int r = 0; r < R; r++) {
        int32_t x0, x1;
        memcpy(&x0, a + r * lda + 8 * k, 4);
        memcpy(&x1, a + r * lda + 8 * k + 4, 4);
        a0[r] = _mm256_set1_epi32(x0);
        a1[r] = _mm256_set1_epi32(x1);
      }
      for (int h = 0; h < H; h++) {
        const __m256i both = _mm256_loadu_si256((const __m256i*)(w + 256 * k + 32 * h));
        const __m256i first = _mm256_and_si256(both, low), second = _mm256_and_si256(_mm256_srli_epi32(both, 4), low);
        for (int r = 0; r < R; r++) {
          const __m256i pair = _mm256_add_epi16(_mm256_maddubs_epi16(first, a0[r]), _mm256_maddubs_epi16(second, a1[r]));
          sum[r][h] = _mm256_add_epi16(sum[r][h], pair);
        }
      }
    }
    for (int r = 0; r < R; r++)
      for (int h = 0; h < H; h++) {
        int32_t* to = acc + r * PANEL + 8 * h;
        store(to, load(to) + I{_mm256_madd_epi16(sum[r][h], ones)});
      }
  }
}

// Bytes need 16 bits a factor: 4 channels of 4 inputs at a time.
inline void byte_row(const uint8_t* w, const int8_t* a, int64_t steps, int32_t* acc) {
  for (int c = 0; c < PANEL; c += 4) {
    __m256i sum = _mm256_setzero_si256();
    for (int64_t k = 0; k < 2 * steps; k++) {
      int32_t x;
      memcpy(&x, a + 4 * k, 4);
      const __m256i all = _mm256_cvtepi8_epi16(_mm_set1_epi32(x));
      const __m256i line = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)(w + 256 * k + 4 * c)));
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(line, all));
    }
    alignas(32) int32_t halves[8];
    _mm256_store_si256((__m256i*)halves, sum);
    for (int i = 0; i < 4; i++) acc[c + i] += halves[2 * i] + halves[2 * i + 1];
  }
}

template <bool Packed>
inline void rows(const uint8_t* w, const int8_t* a, int64_t lda, int count, int64_t steps, int act_bits, Ahead,
                 int32_t* acc) {
  if constexpr (!Packed) {
    for (int r = 0; r < count; r++) byte_row(w, a + r * lda, steps, acc + r * PANEL);
  } else {
    int r = 0;
    for (; r + 4 <= count; r += 4)
      for (int h = 0; h < 8; h += 2)
        nibble_tile<4, 2>(w + 32 * h, a + r * lda, lda, steps, act_bits, acc + r * PANEL + 8 * h);
    for (; r + 2 <= count; r += 2)
      for (int h = 0; h < 8; h += 4)
        nibble_tile<2, 4>(w + 32 * h, a + r * lda, lda, steps, act_bits, acc + r * PANEL + 8 * h);
    if (r < count) nibble_tile<1, 8>(w, a + r * lda, lda, steps, act_bits, acc + r * PANEL);
  }
}

#else

constexpr int TILE_ROWS = 4;
constexpr bool UNPACK_ONCE = false;
constexpr int64_t BLOCK_STEPS = 32;  // 8 KiB of nibbles, which stay in the first cache level
inline int64_t block_steps(int64_t) { return BLOCK_STEPS; }

template <bool Packed>
inline void rows(const uint8_t* w, const int8_t* a, int64_t lda, int count, int64_t steps, int, Ahead, int32_t* acc) {
  for (int r = 0; r < count; r++, a += lda, acc += PANEL)
    for (int64_t k = 0; k < steps; k++) {
      const int8_t* x = a + 8 * k;
      const uint8_t* line = w + k * (Packed ? 256 : 512);
      for (int c = 0; c < PANEL; c++) {
        int32_t sum = 0;
        for (int t = 0; t < 4; t++) {
          const int both = line[4 * c + t], next = Packed ? both >> 4 : line[256 + 4 * c + t];
          sum += (Packed ? both & 15 : both) * x[t] + next * x[4 + t];
        }
        acc[c] += sum;
      }
    }
}

#endif

#if !defined(RQ_AVX512)
inline void unpack(const uint8_t*, int64_t, uint8_t*) {}
#endif

// ---- one panel, all tiers ------------------------------------------------------------------------------

// Of a panel and at most GEMM_ROWS rows.
struct PanelScratch {
  alignas(64) uint8_t bytes[BLOCK_STEPS * 512];
  alignas(64) int32_t acc[GEMM_ROWS * PANEL];
  alignas(64) float total[GEMM_ROWS * PANEL];
  alignas(64) float scale[PANEL], bias[PANEL];
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
inline void multiply(const Gemm& g, int64_t m0, int64_t m1, int64_t at, int64_t lda, int64_t steps, const uint8_t* w,
                     PanelScratch& s) {
  const int64_t count = m1 - m0, tiles = (count + TILE_ROWS - 1) / TILE_ROWS;
  const int64_t block = tiles <= 1 ? steps : block_steps(tiles);
  const bool nibbles = g.weight.bits == 4, unpacked = nibbles && UNPACK_ONCE && count > TILE_ROWS;
  const int8_t* a = g.codes + m0 * lda + at;
  for (int64_t k = 0; k < steps; k += block, w += block * (nibbles ? 256 : 512), a += 8 * block) {
    const int64_t part = steps - k < block ? steps - k : block;
    if (unpacked) unpack(w, part, s.bytes);
    // While this block is multiplied the next one is fetched, a share with every tile: a step has 4 lines of nibbles.
    Ahead ahead{w + 256 * part, unpacked ? (32 + tiles - 1) / tiles : 0};
    for (int64_t r = 0; r < count; r += TILE_ROWS, ahead.at += 8 * part * ahead.lines) {
      const int many = int(count - r < TILE_ROWS ? count - r : TILE_ROWS);
      if (nibbles && !unpacked)
        rows<true>(w, a + r * lda, lda, many, part, g.act_bits, ahead, s.acc + r * PANEL);
      else
        rows<false>(unpacked ? s.bytes : w, a + r * lda, lda, many, part, g.act_bits, ahead, s.acc + r * PANEL);
    }
  }
}

// total += acc s_w, the groups in their order
inline void add_group(const Gemm& g, int64_t count, int64_t first, int64_t channels, int64_t group, PanelScratch& s) {
  for (int64_t c = 0; c < PANEL; c++)
    s.scale[c] = c < channels ? g.weight.scale[(first + c) * g.weight.groups + group] : 0.0f;
  for (int c = 0; c < PANEL; c += W) {
    const F scale = load(s.scale + c);
    for (int64_t i = c; i < count * PANEL; i += PANEL) {
      const F scaled = to_float(load(s.acc + i)) * scale;
      store(s.total + i, group ? load(s.total + i) + scaled : scaled);
    }
  }
}

// out = total s_x + (x down) up + bias
inline void finish(const Gemm& g, int64_t m0, int64_t m1, int64_t first, int64_t channels, PanelScratch& s) {
  memset(s.bias, 0, sizeof(s.bias));
  if (g.bias) load_row((const char*)g.bias + first * size_of(g.bias_dtype), g.bias_dtype, channels, s.bias);
  const int64_t rank = g.low_rank.rank, up_size = size_of(g.low_rank.dtype);
  for (int64_t m = m0; m < m1; m++) {
    float* total = s.total + (m - m0) * PANEL;
    const F scale = set1(g.quant[m].scale);
    for (int c = 0; c < PANEL; c += W) store(total + c, load(total + c) * scale);
    for (int64_t r = 0; r < rank; r++) {
      const float x = g.down[m * rank + r];
      const char* up = (const char*)g.low_rank.up + (r * g.weight.rows + first) * up_size;
      read(up, g.low_rank.dtype, channels, [&](int64_t c, F u) { store(total + c, fma(set1(x), u, load(total + c))); },
           [&](int64_t c, float u) { total[c] += x * u; });
    }
    if (g.bias)
      for (int c = 0; c < PANEL; c += W) store(total + c, load(total + c) + load(s.bias + c));
    write((char*)g.out + (m * g.weight.rows + first) * size_of(g.out_dtype), g.out_dtype, channels, total);
  }
}

void gemm_panel(const Gemm& g, int64_t m0, int64_t m1, int64_t panel, void* memory) {
  PanelScratch& s = *(PanelScratch*)memory;
  const Weight& w = g.weight;
  const int64_t padded = w.padded(), lda = padded * w.groups;
  const int64_t first = panel * PANEL, channels = w.rows - first < PANEL ? w.rows - first : PANEL;
  const int64_t group_bytes = padded * PANEL * w.bits / 8;
  for (int64_t group = 0; group < w.groups; group++) {
    const int64_t at = panel * w.groups + group;
    start(g, m0, m1, w.sums + at * PANEL, group, s.acc);
    multiply(g, m0, m1, group * padded, lda, padded / 8, w.panels + at * group_bytes, s);
    add_group(g, m1 - m0, first, channels, group, s);
  }
  finish(g, m0, m1, first, channels, s);
}

}  // namespace
}  // namespace RQ_TIER
