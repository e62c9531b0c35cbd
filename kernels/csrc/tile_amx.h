// Tiles of the GEMM by AMX: 16 rows, 16 channels and 64 inputs an instruction.
//
// A line of layout P64 as bytes, channels times 4 inputs, is a row of the unit's second factor as it stands: 16 lines
// j, 256 bytes apart, are the channels 16 j ... 16 j + 15 of 64 inputs. What is left of a group's inputs, and few rows,
// go through VNNI (tile_avx512.h). The kernel of Linux must have granted the tile registers (dispatch.cpp).
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "tile_avx512.h"

namespace RQ_TIER {
namespace {

constexpr int64_t MATRIX_ROWS = 7;  // from which the unit is faster than VNNI, unpacking included
constexpr int64_t MATRIX_STEPS = 8;  // of 8 inputs, what one instruction takes

// Of the eight tile registers 0 to 3 hold sums, 5 rows, 6 and 7 weights, and 4 rows or weights.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {};

  explicit TileConfig(const int (&counts)[8]) {
    for (int i = 0; i < 8; i++) rows[i] = uint8_t(counts[i]);
  }
};

constexpr int64_t LINE = 4 * PANEL;  // bytes of 4 inputs of a panel; of a row's sums

inline void fetch(Ahead& ahead) {
  for (int64_t i = 0; i < ahead.lines; i++, ahead.at += 64) _mm_prefetch((const char*)ahead.at, _MM_HINT_T1);
}

// acc += at most 16 rows times 64 channels, `tiles` times 64 inputs. Four sums, since one waits for its last addition.
inline void tile16(const uint8_t* w, const int8_t* a, int64_t lda, int64_t tiles, Ahead& ahead, int32_t* acc) {
  _tile_loadd(0, acc, LINE);
  _tile_loadd(1, acc + 16, LINE);
  _tile_loadd(2, acc + 32, LINE);
  _tile_loadd(3, acc + 48, LINE);
  for (int64_t k = 0; k < tiles; k++, w += 16 * LINE, a += 64) {
    fetch(ahead);
    _tile_loadd(5, a, lda);
    _tile_loadd(6, w, LINE);
    _tile_dpbsud(0, 5, 6);
    _tile_loadd(7, w + 64, LINE);
    _tile_dpbsud(1, 5, 7);
    _tile_loadd(4, w + 128, LINE);
    _tile_dpbsud(2, 5, 4);
    _tile_loadd(6, w + 192, LINE);
    _tile_dpbsud(3, 5, 6);
  }
  _tile_stored(0, acc, LINE);
  _tile_stored(1, acc + 16, LINE);
  _tile_stored(2, acc + 32, LINE);
  _tile_stored(3, acc + 48, LINE);
}

// The same for 17 to 32 rows, 32 channels at a time.
inline void tile32(const uint8_t* w, const int8_t* a, int64_t lda, int64_t tiles, Ahead& ahead, int32_t* acc) {
  for (int half = 0; half < 2; half++, w += 128, acc += 32) {
    _tile_loadd(0, acc, LINE);
    _tile_loadd(1, acc + 16, LINE);
    _tile_loadd(2, acc + 16 * PANEL, LINE);
    _tile_loadd(3, acc + 16 * PANEL + 16, LINE);
    for (int64_t k = 0; k < tiles; k++) {
      fetch(ahead);
      _tile_loadd(6, w + 16 * LINE * k, LINE);
      _tile_loadd(5, a + 64 * k, lda);
      _tile_dpbsud(0, 5, 6);
      _tile_loadd(7, w + 16 * LINE * k + 64, LINE);
      _tile_dpbsud(1, 5, 7);
      _tile_loadd(4, a + 16 * lda + 64 * k, lda);
      _tile_dpbsud(2, 4, 6);
      _tile_dpbsud(3, 4, 7);
    }
    _tile_stored(0, acc, LINE);
    _tile_stored(1, acc + 16, LINE);
    _tile_stored(2, acc + 16 * PANEL, LINE);
    _tile_stored(3, acc + 16 * PANEL + 16, LINE);
  }
}

// acc += `count` rows times `steps` times 8 inputs of weights as bytes; how many of the steps it has done.
// Meanwhile what follows the block's nibbles is fetched, from `next` on: on its own a core waits for each line.
inline int64_t matrix_block(const uint8_t* w, const int8_t* a, int64_t lda, int64_t count, int64_t steps,
                            const uint8_t* next, int32_t* acc) {
  if (count < MATRIX_ROWS || steps < MATRIX_STEPS) return 0;
  const int64_t tiles = steps / MATRIX_STEPS, whole = count / 32 * 32;
  const int64_t rounds = tiles * (count <= 16 ? 1 : (count + 31) / 32 * 2);
  Ahead ahead{next, next ? (4 * steps + rounds - 1) / rounds : 0};  // a step has 4 lines of nibbles
  const int rest = int(count - whole), more = rest - 16;
  if (whole) {
    static const TileConfig full({16, 16, 16, 16, 16, 16, 16, 16});
    _tile_loadconfig(&full);
    for (int64_t r = 0; r < whole; r += 32) tile32(w, a + r * lda, lda, tiles, ahead, acc + r * PANEL);
  }
  a += whole * lda;
  acc += whole * PANEL;
  if (more > 0) {
    const TileConfig part({16, 16, more, more, more, 16, 16, 16});
    _tile_loadconfig(&part);
    tile32(w, a, lda, tiles, ahead, acc);
  } else if (rest) {
    const TileConfig part({rest, rest, rest, rest, 16, rest, 16, 16});
    _tile_loadconfig(&part);
    tile16(w, a, lda, tiles, ahead, acc);
  }
  _tile_release();
  return tiles * MATRIX_STEPS;
}

}  // namespace
}  // namespace RQ_TIER
