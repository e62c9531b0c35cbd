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
// Tiles of a block of weights, which is unpacked while the one before is multiplied: small blocks for few rows, since nothing
// hides the first one; large ones for many, whose sums then move less often.
constexpr int64_t FEW_TILES = 4, MATRIX_TILES = 16, MATRIX_BYTES = MATRIX_TILES * MATRIX_STEPS * 512;
inline int64_t block_tiles(int64_t count) { return count <= 64 ? FEW_TILES : MATRIX_TILES; }

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

// Weights of the next block on their way from nibbles to bytes, a share with every 64 inputs that are multiplied. A unit
// that has had nothing to do for a microsecond sleeps, and takes half of one to wake: so memory is waited for meanwhile.
struct Unpacking {
  const uint8_t* from;
  uint8_t* to;
  int64_t left, share;  // steps

  void next() {
    const int64_t now = left < share ? left : share;
    unpack(from, now, to);
    from += 256 * now, to += 512 * now, left -= now;
  }
};

// At most 16 rows times 64 channels: four sums, since one waits for its last addition.
inline void no_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

inline void load_sums(const int32_t* acc) {
  _tile_loadd(0, acc, LINE);
  _tile_loadd(1, acc + 16, LINE);
  _tile_loadd(2, acc + 32, LINE);
  _tile_loadd(3, acc + 48, LINE);
}

inline void store_sums(int32_t* acc) {
  _tile_stored(0, acc, LINE);
  _tile_stored(1, acc + 16, LINE);
  _tile_stored(2, acc + 32, LINE);
  _tile_stored(3, acc + 48, LINE);
}

// To the sums: 64 inputs, weights as bytes.
inline void add_tile(const uint8_t* w, const int8_t* a, int64_t lda) {
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

// acc += at most 16 rows times 64 channels, `tiles` times 64 inputs; without `more` acc holds nothing yet.
inline void tile16(const uint8_t* w, const int8_t* a, int64_t lda, int64_t tiles, bool more, Unpacking& ahead,
                   int32_t* acc) {
  more ? load_sums(acc) : no_sums();
  for (int64_t k = 0; k < tiles; k++, w += 16 * LINE, a += 64) {
    add_tile(w, a, lda);
    ahead.next();
  }
  store_sums(acc);
}

// The same for 17 to 32 rows and 32 channels.
inline void tile32(const uint8_t* w, const int8_t* a, int64_t lda, int64_t tiles, bool more, Unpacking& ahead,
                   int32_t* acc) {
  if (more) {
    _tile_loadd(0, acc, LINE);
    _tile_loadd(1, acc + 16, LINE);
    _tile_loadd(2, acc + 16 * PANEL, LINE);
    _tile_loadd(3, acc + 16 * PANEL + 16, LINE);
  } else {
    no_sums();
  }
  for (int64_t k = 0; k < tiles; k++) {
    _tile_loadd(6, w + 16 * LINE * k, LINE);
    _tile_loadd(5, a + 64 * k, lda);
    _tile_dpbsud(0, 5, 6);
    _tile_loadd(7, w + 16 * LINE * k + 64, LINE);
    _tile_dpbsud(1, 5, 7);
    _tile_loadd(4, a + 16 * lda + 64 * k, lda);
    _tile_dpbsud(2, 4, 6);
    _tile_dpbsud(3, 4, 7);
    ahead.next();
  }
  _tile_stored(0, acc, LINE);
  _tile_stored(1, acc + 16, LINE);
  _tile_stored(2, acc + 16 * PANEL, LINE);
  _tile_stored(3, acc + 16 * PANEL + 16, LINE);
}

// At most 16 rows: sums stay in their registers, weights pass through a ring of tiles. They are unpacked three tiles early,
// since a tile is loaded from the cache alone, never from stores on their way there.
inline void few_rows(const uint8_t* w, bool nibbles, const int8_t* a, int64_t lda, int64_t tiles, uint8_t* ring,
                     int32_t* acc) {
  constexpr int64_t tile = 16 * LINE, early = 3;
  const auto fill = [&](int64_t k) {
    if (nibbles && k < tiles) unpack(w + k * tile / 2, MATRIX_STEPS, ring + k % 4 * tile);
  };
  for (int64_t k = 0; k < early; k++) fill(k);
  no_sums();
  for (int64_t k = 0; k < tiles; k++, a += 64) {
    const uint8_t* bytes = nibbles ? ring + k % 4 * tile : w + k * tile;
    add_tile(bytes, a, lda);
    fill(k + early);
  }
  store_sums(acc);
}

// A block of weights as bytes times `count` rows, more than 16.
inline void matrix_block(const uint8_t* w, const int8_t* a, int64_t lda, int64_t count, int64_t tiles, bool more,
                         Unpacking& ahead, int32_t* acc) {
  const int64_t whole = count / 32 * 32;
  const int rest = int(count - whole), second = rest - 16;
  if (whole) {
    static const TileConfig full({16, 16, 16, 16, 16, 16, 16, 16});
    _tile_loadconfig(&full);
    for (int half = 0; half < 2; half++)
      for (int64_t r = 0; r < whole; r += 32)
        tile32(w + 128 * half, a + r * lda, lda, tiles, more, ahead, acc + r * PANEL + 32 * half);
  }
  a += whole * lda;
  acc += whole * PANEL;
  if (second > 0) {
    const TileConfig part({16, 16, second, second, second, 16, 16, 16});
    _tile_loadconfig(&part);
    for (int half = 0; half < 2; half++) tile32(w + 128 * half, a, lda, tiles, more, ahead, acc + 32 * half);
  } else if (rest) {
    const TileConfig part({rest, rest, rest, rest, 16, rest, 16, 16});
    _tile_loadconfig(&part);
    tile16(w, a, lda, tiles, more, ahead, acc);
  }
}

// acc = `count` rows times `steps` times 8 inputs; how many of the steps it has done. `bytes`: 2 MATRIX_BYTES.
inline int64_t matrix(const uint8_t* w, bool nibbles, const int8_t* a, int64_t lda, int64_t count, int64_t steps,
                      uint8_t* bytes, int32_t* acc) {
  const int64_t tiles = steps / MATRIX_STEPS;
  if (count < MATRIX_ROWS || !tiles) return 0;
  if (count <= 16) {
    const int rows = int(count);
    const TileConfig config({rows, rows, rows, rows, 16, rows, 16, 16});
    _tile_loadconfig(&config);
    few_rows(w, nibbles, a, lda, tiles, bytes, acc);
  } else {
    const int64_t jobs = count / 32 * 2 + (count % 32 > 16 ? 2 : count % 32 > 0);
    const int64_t block = block_tiles(count);
    const auto steps_of = [&](int64_t t) { return MATRIX_STEPS * (tiles - t < block ? tiles - t : block); };
    uint8_t* next = bytes + MATRIX_BYTES;
    if (nibbles) unpack(w, steps_of(0), bytes);
    for (int64_t t = 0; t < tiles; t += block) {
      const int64_t some = steps_of(t) / MATRIX_STEPS, after = nibbles && t + some < tiles ? steps_of(t + some) : 0;
      Unpacking ahead{w + 16 * LINE / 2 * (t + some), next, after, (after + jobs * some - 1) / (jobs * some)};
      matrix_block(nibbles ? bytes : w + 16 * LINE * t, a + 64 * t, lda, count, some, t > 0, ahead, acc);
      uint8_t* const done = bytes;
      bytes = next, next = done;
    }
  }
  _tile_release();
  return tiles * MATRIX_STEPS;
}

}  // namespace
}  // namespace RQ_TIER
