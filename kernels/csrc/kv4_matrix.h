// The dot products of the 4-bit cache by AMX, for blocks of several rows: as exact as those of kv4_dot.h.
//
// A line of a tile of codes (kv4_dot.h) as bytes is two rows of the unit's second factor as they stand, 16 channels times
// 4 steps each: 16 rows are 64 steps. Codes are unpacked once for all rows of a block.
#pragma once

#include "kv4_dot.h"
#include "kv4_softmax.h"

namespace RQ_TIER {
namespace {

#if defined(RQ_AMX)

constexpr int64_t MANY_ROWS = 9;  // from which the unit is faster than VNNI
constexpr int64_t FACTOR = 1024;  // bytes of 64 steps x 16 channels
constexpr int64_t MATRIX_CODES = SUBTILES * kv_max_dim / 64 * FACTOR;
static_assert(kv_rows == 32);  // two registers

// Rows of each of the registers that share the rows of a block.
constexpr int64_t register_rows(int64_t rows) { return rows <= 16 ? rows : (rows + 1) / 2; }

// Holds the tile registers while a block of rows needs them: 0 to 3 are sums, 4 and 5 rows, 6 and 7 codes.
class MatrixUnit {
 public:
  explicit MatrixUnit(int64_t rows) : used(rows >= MANY_ROWS) {
    if (!used) return;
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {0, 0, 0, 0, 0, 0, 16, 16};
    } config;
    for (int i = 0; i < 6; i++) config.rows[i] = uint8_t(register_rows(rows));
    _tile_loadconfig(&config);
  }
  ~MatrixUnit() {
    if (used) _tile_release();
  }
  MatrixUnit(const MatrixUnit&) = delete;

 private:
  const bool used;
};

// A unit without work for half a microsecond sleeps, and takes as long to wake.
inline void keep_awake() { _tile_dpbuud(0, 4, 6); }

// 128 bytes of nibbles to 256 bytes.
inline void unpack_tile(const uint8_t* tile, uint8_t* bytes) {
  const __m512i mask = _mm512_set1_epi8(15);
  for (int s = 0; s < 2; s++) {
    const __m512i line = _mm512_loadu_si512(tile + 64 * s);
    _mm512_storeu_si512(bytes + 128 * s, _mm512_and_si512(line, mask));
    _mm512_storeu_si512(bytes + 128 * s + 64, _mm512_and_si512(_mm512_srli_epi16(line, 4), mask));
  }
}

// Channels are tokens, steps dimensions, of which the last 64 are filled up with anything: the query's are 0 there.
inline void unpack_keys(const Tile& tile, const Tile& ahead, int64_t dim, uint8_t* bytes) {
  const int64_t factors = (dim + 63) / 64;
  for (int64_t u = 0; u < tile.subtiles; u++)
    for (int64_t i = 0; i < dim / 16; i++) {
      fetch(ahead.at[u].keys + 128 * i);
      unpack_tile(tile.at[u].keys + 128 * i, bytes + factors * u * FACTOR + 256 * i);
    }
}

// Channels are dimensions, steps tokens, of which those behind the last subtile are anything: the weights are 0 there.
inline void unpack_values(const Tile& tile, const Tile& ahead, int64_t dim, uint8_t* bytes) {
  for (int64_t u = 0; u < tile.subtiles; u++)
    for (int64_t group = 0; group < dim / 16; group++) {
      fetch(ahead.at[u].values + 128 * group);
      unpack_tile(tile.at[u].values + 128 * group, bytes + (2 * group + u / 4) * FACTOR + u % 4 * 256);
    }
}

// A block of rows, its numbers stride apart, its results width.
template <class A>
struct MatrixRows {
  const A* from;
  int64_t stride, rows;  // rows of a register
  int32_t* to;
  int64_t width;
};

// Adds the product of a register of rows and one of codes to one of sums; they have to be literals.
#define RQ_ADD(sum, rows, codes)      \
  if constexpr (std::is_signed_v<A>)  \
    _tile_dpbsud(sum, rows, codes);   \
  else                                \
    _tile_dpbuud(sum, rows, codes)

// One register of rows or two, times one group of 16 channels or two, `factors` times 64 steps.
template <bool TWO, bool MORE, class A>
inline void multiply(const MatrixRows<A>& m, const uint8_t* codes, int64_t factors, int64_t apart, int32_t* to) {
  const int64_t size = 4 * m.width;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t i = 0; i < factors; i++, codes += FACTOR) {
    _tile_loadd(6, codes, 64);
    _tile_loadd(4, m.from + 64 * i, m.stride);
    RQ_ADD(0, 4, 6);
    if constexpr (MORE) {
      _tile_loadd(7, codes + apart, 64);
      RQ_ADD(1, 4, 7);
    }
    if constexpr (TWO) {
      _tile_loadd(5, m.from + m.rows * m.stride + 64 * i, m.stride);
      RQ_ADD(2, 5, 6);
      if constexpr (MORE) RQ_ADD(3, 5, 7);
    }
  }
  _tile_stored(0, to, size);
  if constexpr (MORE) _tile_stored(1, to + 16, size);
  if constexpr (TWO) {
    _tile_stored(2, to + m.rows * m.width, size);
    if constexpr (MORE) _tile_stored(3, to + m.rows * m.width + 16, size);
  }
}

#undef RQ_ADD

// to[r][16 c + channel] for any number of groups c of channels, whose codes lie `apart`.
template <bool TWO, class A>
inline void multiply_groups(const MatrixRows<A>& m, const uint8_t* codes, int64_t factors, int64_t apart,
                            int64_t groups) {
  int64_t c = 0;
  for (; c + 2 <= groups; c += 2) multiply<TWO, true>(m, codes + c * apart, factors, apart, m.to + 16 * c);
  if (c < groups) multiply<TWO, false>(m, codes + c * apart, factors, apart, m.to + 16 * c);
}
template <class A>
inline void multiply_rows(const MatrixRows<A>& m, int64_t rows, const uint8_t* codes, int64_t factors, int64_t apart,
                          int64_t groups) {
  if (rows > m.rows)
    multiply_groups<true>(m, codes, factors, apart, groups);
  else
    multiply_groups<false>(m, codes, factors, apart, groups);
}

#else

struct MatrixUnit {
  explicit MatrixUnit(int64_t) {}
};

#endif

}  // namespace
}  // namespace RQ_TIER
