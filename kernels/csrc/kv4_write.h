// Stores K and V in pages of 4-bit codes; bit for bit reference.kv4_write.
#pragma once

#include <cstdint>
#include <cstring>

#include "kv4_page.h"
#include "rows.h"
#include "stages.h"
#include "tier.h"
#include "vec.h"

namespace RQ_TIER {
namespace {

struct Coded {
  uint16_t scale;  // float16
  int8_t zero;
};

// convention.kv_qparams: scale of a row rounded to float16, zero point made with the rounded scale.
inline Coded kv_qparams(const float* x, int64_t n, bool symmetric, float clip) {
  const Range range = range_of(x, n, symmetric);
  const float raw = qparams(range, {4, symmetric, clip}).scale;
  if (raw != raw) return {0x7e00, 0};
  const uint16_t scale = float_to_f16(clamp(raw, 0x1p-14f, 65504.0f));
  if (symmetric) return {scale, 0};
  return {scale, int8_t(zero_point(range.low * clip, f16_to_float(scale), 4))};
}

// Codes + 8 of a row, 0 to 15; all 8 where there is no scale.
inline void kv_codes(const float* x, int64_t n, Coded q, int32_t* codes) {
  const bool finite = q.scale != 0x7e00;
  const F scale = set1(finite ? f16_to_float(q.scale) : 1.0f), zero = set1(float(q.zero));
  for (int64_t i = 0; i < n; i += W) {
    const F v = min(max(load(x + i) / scale + zero, set1(-8.0f)), set1(7.0f));
    store(codes + i, finite ? round(v) + set1(8) : set1(8));
  }
}

// A key on its way to a page: its row behind R3, which error feedback uses up.
struct Key {
  alignas(64) float row[kv_max_dim];
  Coded coded;
  Subtile to;
  int64_t token;
};

constexpr int64_t key_rows = 4;  // whose steps of error feedback, each of which waits for the one before, overlap

// x[k] -= errors[i] passed[i, k], one i after the other, for k from `first` to `last`.
inline void pass_on(float* x, const float* errors, const float* passed, int64_t rows, int64_t n, int64_t first,
                    int64_t last) {
  for (int64_t k = first; k < last; k += W) {
    F left = load(x + k);
    for (int64_t i = 0; i < rows; i++) left = left - set1(errors[i]) * load(passed + i * n + k);
    store(x + k, left);
  }
}

// `kv_codes` of `count` keys with error feedback: what channel j loses is taken from those behind it, see
// formats/feedback.py. Numbers of a row before channel j may become anything.
template <int64_t count>
void kv_codes_fed_back(Key* keys, int64_t n, const float* feedback, int32_t (*codes)[kv_max_dim]) {
  float scale[count], zero[count];
  for (int64_t r = 0; r < count; r++) {
    const bool finite = keys[r].coded.scale != 0x7e00;
    if (!finite) memset(keys[r].row, 0, size_t(n) * 4);
    scale[r] = finite ? f16_to_float(keys[r].coded.scale) : 1.0f, zero[r] = float(keys[r].coded.zero);
  }
  for (int64_t start = 0; start < n; start += 16) {  // what 16 channels lose reaches those behind them all at once
    float errors[count][16];
    for (int64_t j = start; j < start + 16; j++) {
      const float* passed = feedback + j * n;
      for (int64_t r = 0; r < count; r++) {
        const float x = keys[r].row[j], most = 8.0f * scale[r];
        const float code = (clamp(x / scale[r] + zero[r], -8.0f, 7.0f) + 12582912.0f) - 12582912.0f;  // half to even
        const float error = clamp(x - (code - zero[r]) * scale[r], -most, most);
        codes[r][j] = int32_t(code) + 8, errors[r][j - start] = error;
        pass_on(keys[r].row, &error, passed, 1, n, (j + 1) / W * W, start + 16);
      }
    }
    for (int64_t r = 0; r < count; r++) pass_on(keys[r].row, errors[r], feedback + start * n, 16, n, start + 16, n);
  }
}

inline void store_key(uint8_t* subtile, int64_t token, const int32_t* codes, int64_t n) {
  for (int64_t i = 0; i < n; i += 8) {
    uint32_t word = 0;
    for (int t = 0; t < 4; t++) word |= uint32_t(codes[i + t] | codes[i + 4 + t] << 4) << (8 * t);
    memcpy(subtile + 8 * i + 4 * token, &word, 4);
  }
}

// Byte 4c + token % 4 of a line belongs to two tokens: this one's nibble is changed, as words of 4 bytes.
inline void store_value(uint8_t* subtile, int64_t token, const int32_t* codes, int64_t n) {
  const int shift = int(8 * (token % 4) + 4 * (token / 4 % 2));
  const I others = set1(int32_t(~(15u << shift)));
  for (int64_t i = 0; i < n; i += W) {
    int32_t* words = (int32_t*)(subtile + 8 * (i / 16 * 16) + 64 * (token / 8)) + i % 16;
    store(words, (load(words) & others) | shift_left(load(codes + i), shift));
  }
}

// The codes of keys of one head, and these and their scales to the pages; feedback: the head's, null for none.
inline void store_keys(Key* keys, int64_t count, int64_t n, const float* feedback) {
  alignas(64) int32_t codes[key_rows][kv_max_dim];
  if (feedback && count == key_rows)
    kv_codes_fed_back<key_rows>(keys, n, feedback, codes);
  else
    for (int64_t r = 0; r < count; r++)
      feedback ? kv_codes_fed_back<1>(keys + r, n, feedback, codes + r)
               : kv_codes(keys[r].row, n, keys[r].coded, codes[r]);
  for (int64_t r = 0; r < count; r++) {
    store_key(keys[r].to.keys, keys[r].token, codes[r], n);
    memcpy(keys[r].to.key_scale + 2 * keys[r].token, &keys[r].coded.scale, 2);
  }
}

// Tokens of one head whose 16-token subtile has a number that is `part` modulo `parts`: two threads never
// share a byte, and the pages do not depend on the number of threads.
void kv4_write(const KVWrite& w, int64_t head, int64_t part, int64_t parts) {
  const KVPages& pages = w.pages;
  const int64_t dim = pages.head_dim, size = size_of(w.dtype);
  const Transform rotation{Transform::hadamard, w.rotate, nullptr};
  const float* feedback = w.feedback ? w.feedback + head * dim * dim : nullptr;
  alignas(64) float row[kv_max_dim], scratch[kv_max_dim];
  alignas(64) int32_t codes[kv_max_dim];
  Key keys[key_rows];
  int64_t waiting = 0;
  for (int64_t t = 0; t < w.tokens; t++) {
    const int64_t slot = w.slots[t];
    if (slot < 0 || (parts > 1 && slot / 16 % parts != part)) continue;
    const int64_t place = slot % pages.tokens, token = place % 16;
    const Subtile to = subtile_of(pages, slot / pages.tokens, head, place - token);

    Key& key = keys[waiting++];
    key.to = to, key.token = token;
    load_row((const char*)w.key + (t * w.key_token + head * w.key_head) * size, w.dtype, dim, key.row);
    if (w.rotate) transform_row(key.row, dim, rotation, scratch);
    key.coded = kv_qparams(key.row, dim, pages.symmetric, w.key_clip);

    load_row((const char*)w.value + (t * w.value_token + head * w.value_head) * size, w.dtype, dim, row);
    const Coded value = kv_qparams(row, dim, pages.symmetric, w.value_clip);
    kv_codes(row, dim, value, codes);
    store_value(to.values, token, codes, dim);
    memcpy(to.value_scale + 2 * token, &value.scale, 2);
    if (!pages.symmetric) to.zeros[token] = uint8_t((key.coded.zero + 8) | (value.zero + 8) << 4);

    if (waiting == key_rows) store_keys(keys, waiting, dim, feedback), waiting = 0;
  }
  store_keys(keys, waiting, dim, feedback);
}

}  // namespace
}  // namespace RQ_TIER
