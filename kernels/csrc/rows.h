// Rows of activations: Hadamard transform, absmax, quantization, sums. Specification: reference.quantize_rows.
#pragma once

#include <cstdint>
#include <cstring>

#include "tier.h"
#include "vec.h"

namespace RQ_TIER {
namespace {

using namespace rotquant;

// n numbers of any dtype, whole vectors and tail, given to f(position, F) / g(position, float).
template <class Vector, class Scalar>
inline void read(const void* x, DType dtype, int64_t n, Vector f, Scalar g) {
  int64_t i = 0;
  if (dtype == DType::f32) {
    const float* p = (const float*)x;
    for (; i + W <= n; i += W) f(i, load(p + i));
    for (; i < n; i++) g(i, p[i]);
  } else if (dtype == DType::bf16) {
    const uint16_t* p = (const uint16_t*)x;
    for (; i + W <= n; i += W) f(i, load_bf16(p + i));
    for (; i < n; i++) g(i, bf16_to_float(p[i]));
  } else {
    const uint16_t* p = (const uint16_t*)x;
    for (; i + W <= n; i += W) f(i, load_f16(p + i));
    for (; i < n; i++) g(i, f16_to_float(p[i]));
  }
}

inline void write(void* x, DType dtype, int64_t n, const float* from) {
  int64_t i = 0;
  if (dtype == DType::f32) {
    memcpy(x, from, size_t(n) * 4);
  } else if (dtype == DType::bf16) {
    uint16_t* p = (uint16_t*)x;
    for (; i + W <= n; i += W) store_bf16(p + i, load(from + i));
    for (; i < n; i++) p[i] = float_to_bf16(from[i]);
  } else {
    uint16_t* p = (uint16_t*)x;
    for (; i + W <= n; i += W) store_f16(p + i, load(from + i));
    for (; i < n; i++) p[i] = float_to_f16(from[i]);
  }
}

void load_row(const void* x, DType dtype, int64_t n, float* row) {
  read(x, dtype, n, [&](int64_t i, F v) { store(row + i, v); }, [&](int64_t i, float v) { row[i] = v; });
}

// ---- Walsh-Hadamard: butterflies of stride 1, 2, 4, ... below `block`, in this order --------------------

template <int S, int COUNT>
inline void lanes(F* v, int64_t block) {
  if constexpr (S < W) {
    if (S >= block) return;
#pragma GCC unroll 16
    for (int r = 0; r < COUNT; r++) v[r] = butterfly<S>(v[r]);
    lanes<2 * S, COUNT>(v, block);
  }
}

// Strides of `count` vectors among themselves, up to `reach` of them.
template <int COUNT, int S = 1>
inline void vectors(F* v, int reach = COUNT) {
  if constexpr (S < COUNT) {
    if (S >= reach) return;
#pragma GCC unroll 16
    for (int r = 0; r < COUNT; r++)
      if (!(r & S)) {
        const F a = v[r], b = v[r + S];
        v[r] = a + b;
        v[r + S] = a - b;
      }
    vectors<COUNT, 2 * S>(v, reach);
  }
}

// All strides below COUNT * W (and below block) of COUNT * W numbers.
template <int COUNT>
inline void first_strides(float* row, int64_t block, F norm) {
  F v[COUNT];
#pragma GCC unroll 16
  for (int r = 0; r < COUNT; r++) v[r] = load(row + r * W);
  lanes<1, COUNT>(v, block);
  if (block >= COUNT * W)
    vectors<COUNT>(v);
  else if (block > W)
    vectors<COUNT>(v, int(block / W));
#pragma GCC unroll 16
  for (int r = 0; r < COUNT; r++) store(row + r * W, v[r] * norm);
}

// Strides s, 2 s, ..., s COUNT / 2 of s * COUNT numbers; W divides s.
template <int COUNT>
inline void later_strides(float* row, int64_t s, F norm) {
  for (int64_t i = 0; i < s; i += W) {
    F v[COUNT];
#pragma GCC unroll 16
    for (int r = 0; r < COUNT; r++) v[r] = load(row + r * s + i);
    vectors<COUNT>(v);
#pragma GCC unroll 16
    for (int r = 0; r < COUNT; r++) store(row + r * s + i, v[r] * norm);
  }
}

inline void butterflies_of_tail(float* x, int64_t n, int64_t block, float norm) {
  for (int64_t s = 1; s < block; s *= 2)
    for (int64_t i = 0; i < n; i++)
      if (!(i & s)) {
        const float a = x[i], b = x[i + s];
        x[i] = a + b;
        x[i + s] = a - b;
      }
  for (int64_t i = 0; i < n; i++) x[i] *= norm;
}

void hadamard(float* row, int64_t n, int64_t block) {
  constexpr int64_t CHUNK = 16 * W;
  const float norm = float(1.0 / __builtin_sqrt(double(block)));
  const F one = set1(1.0f), last = set1(norm);  // the last pass over a number multiplies it
  int64_t i = 0;
  for (; i + CHUNK <= n; i += CHUNK) first_strides<16>(row + i, block, block > CHUNK ? one : last);
  for (; i + W <= n && block <= W; i += W) first_strides<1>(row + i, block, last);
  for (; i + 8 * W <= n && block == 8 * W; i += 8 * W) first_strides<8>(row + i, block, last);
  for (; i + 4 * W <= n && block == 4 * W; i += 4 * W) first_strides<4>(row + i, block, last);
  // Blocks between W and CHUNK may lie behind the last chunk.
  for (; i < n && block > W; i += block) {
    for (int64_t j = 0; j < block; j += W) first_strides<1>(row + i + j, W, one);
    for (int64_t s = W; s < block; s *= 2)
      for (int64_t j = 0; j < block; j += 2 * s) later_strides<2>(row + i + j, s, 2 * s < block ? one : last);
  }
  if (i < n) butterflies_of_tail(row + i, n - i, block, norm);
  for (int64_t s = CHUNK; s < block;) {
    const int count = block / s >= 16 ? 16 : int(block / s);
    const F factor = s * count < block ? one : last;
    for (int64_t j = 0; j < n; j += s * count) {
      if (count == 16) later_strides<16>(row + j, s, factor);
      if (count == 8) later_strides<8>(row + j, s, factor);
      if (count == 4) later_strides<4>(row + j, s, factor);
      if (count == 2) later_strides<2>(row + j, s, factor);
    }
    s *= count;
  }
}

// ---- quantization -------------------------------------------------------------------------------------

struct Range {
  float low, high, most;  // smallest, largest, largest magnitude
  bool finite;
};

inline Range range_of(const float* row, int64_t n, bool symmetric) {
  I bits = set1(0);
  F low = set1(0.0f), high = set1(0.0f);
  int64_t i = 0;
  if (symmetric) {
    I more = set1(0);
    for (; i + 2 * W <= n; i += 2 * W) {
      bits = max(bits, magnitude_bits(load(row + i)));
      more = max(more, magnitude_bits(load(row + i + W)));
    }
    bits = max(bits, more);
  }
  for (; i + W <= n; i += W) {
    const F x = load(row + i);
    bits = max(bits, magnitude_bits(x));
    low = min(x, low);
    high = max(x, high);
  }
  int32_t most = hmax(bits);
  Range range{hmin(low), hmax(high), 0, true};
  for (; i < n; i++) {
    const int32_t m = int32_t(bits_of(row[i]) & 0x7fffffffu);
    most = m > most ? m : most;
    range.low = row[i] < range.low ? row[i] : range.low;
    range.high = row[i] > range.high ? row[i] : range.high;
  }
  range.finite = most < 0x7f800000;  // magnitudes order as integers; infinity and NaN are the largest
  range.most = float_of(uint32_t(most));
  return range;
}

inline float round_half_even(float x) {
  if (!(x > -4194304.0f && x < 4194304.0f)) return x;
  return x >= 0 ? (x + 8388608.0f) - 8388608.0f : (x - 8388608.0f) + 8388608.0f;
}

inline float clamp(float x, float low, float high) { return x < low ? low : x > high ? high : x; }

constexpr float EPSILON = 0x1p-23f;

// convention.zero_point
inline int32_t zero_point(float smallest, float scale, int bits) {
  const float lowest = -float(1 << (bits - 1)), highest = -lowest - 1;
  return int32_t(round_half_even(clamp(lowest - smallest / scale, lowest, highest)));
}

// convention.qparams, in its order of operations. A row that is not finite has the scale NaN and the codes
// 0, so that whatever is made from it is NaN and never passes for a number.
inline QuantRow qparams(const Range& range, const ActFormat& format) {
  const float levels = float((1 << format.bits) - 1);
  const QuantRow none{float_of(0x7fc00000u), 0};
  if (!range.finite) return none;
  if (format.symmetric) {
    const float scale = range.most * format.clip / (levels / 2);
    return {scale == 0 ? EPSILON : scale, 0};
  }
  const float low = range.low * format.clip, high = range.high * format.clip;
  float scale = (high - low) / levels;
  if (bits_of(scale) == 0x7f800000u) return none;
  scale = scale == 0 ? EPSILON : scale;
  return {scale, zero_point(low, scale, format.bits)};
}

// Codes of n numbers, by true division as the convention says. Multiplying by 1 / scale is several times
// faster and differs by less than 2^-16 (4 bits) or 2^-12 (8 bits) of a step, below the ends of the range:
// it decides every number that is not as near as that to a tie between two codes.
inline void codes_of(const float* row, int64_t n, QuantRow q, const ActFormat& format, int8_t* codes) {
  const int low = -(1 << (format.bits - 1)), high = -low - 1;
  const float inverse = 1.0f / q.scale, zero = float(q.zero);
  const F times = set1(inverse), scale = set1(q.scale), offset = set1(zero);
  const F safe = set1(0.5f - (format.bits == 4 ? 0x1p-16f : 0x1p-12f));
  int64_t i = 0;
  // Below this clip quotients may be too large for `round`, and a tiny scale has no inverse.
  const bool vectors = format.clip > 0x1p-10f && inverse < 0x1p126f;
  for (; vectors && i + 4 * W <= n; i += 4 * W) {
    I code[4];
    F distance[4];
    for (int v = 0; v < 4; v++) {
      const F t = fma(load(row + i + v * W), times, offset);
      code[v] = round(t);
      distance[v] = abs(t - to_float(code[v]));
    }
    if (any_above(max(max(distance[0], distance[1]), max(distance[2], distance[3])), safe))
      for (int v = 0; v < 4; v++) code[v] = round(load(row + i + v * W) / scale + offset);
    store_i8(codes + i, code[0], code[1], code[2], code[3], low, high);
  }
  for (; i < n; i++) codes[i] = int8_t(clamp(round_half_even(row[i] / q.scale + zero), float(low), float(high)));
}

QuantRow quantize_row(const float* row, int64_t group, int64_t groups, int64_t padded, const ActFormat& format,
                      int8_t* codes, int32_t* sums) {
  const QuantRow q = qparams(range_of(row, group * groups, format.symmetric), format);
  for (int64_t g = 0; g < groups; g++, codes += padded) {
    if (q.scale == q.scale)
      codes_of(row + g * group, group, q, format, codes);
    else
      memset(codes, 0, size_t(group));
    memset(codes + group, 0, size_t(padded - group));
    sums[g] = sum_i8(codes, group);
  }
  return q;
}

}  // namespace
}  // namespace RQ_TIER
