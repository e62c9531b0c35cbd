// What a tier offers: plain functions over plain memory, no torch. ops_*.cpp check tensors and call them.
//
// Files of all tiers include this. A function here is static, or always inlined: of an `inline` one the linker keeps one
// copy for all, which may be that of a tier that this processor lacks.
#pragma once

#include <cstdint>

namespace rotquant {

enum class DType { f32, bf16, f16 };

static inline int64_t size_of(DType t) { return t == DType::f32 ? 4 : 2; }

// A stage of a chain of online transforms (stages): its block, and its tensor, numbers or, of a permutation, places.
struct Transform {
  enum Kind { none, hadamard, dense, kronecker, permutation, reflection, shift } kind;
  int64_t block;
  const float* matrix = nullptr;
  const int32_t* order = nullptr;
};

// convention.py: 4 or 8 bits, symmetric or not, clip in (0, 1].
struct ActFormat {
  int bits;
  bool symmetric;
  float clip;
};

// One row of quantized activations; a row with NaN or infinity has the scale NaN.
struct QuantRow {
  float scale;
  int32_t zero;
};

struct LowRank {
  int64_t rank;  // 0: no low-rank branch
  const void* down;  // [K, rank]
  const void* up;  // [rank, N]
  DType dtype;
  bool subtracts;  // (x down) downᵀ is taken off a row before it is quantized
};

// Layout P64 of packed weights (gemm.h): channels of a panel, inputs that a scale group is filled up to, and what is
// added to a code so that it is stored unsigned.
constexpr int64_t PANEL = 64;
static constexpr int64_t padded_group(int64_t columns, int64_t groups) { return (columns / groups + 7) / 8 * 8; }
static constexpr int weight_offset(int64_t bits) { return 1 << (bits - 1); }

// Bytes from a row of codes to the next: whole cache lines, and not a multiple of 512, so that the same inputs of 16
// rows do not fall into the same few sets of a cache.
static constexpr int64_t codes_stride(int64_t bytes) {
  const int64_t lines = (bytes + 63) / 64 * 64;
  return lines % 512 == 0 ? lines + 64 : lines;
}

constexpr int64_t GEMM_ROWS = 192;  // rows of one call of gemm_panel at most
constexpr int64_t GEMM_SCRATCH = 1 << 18;  // bytes

// Packed weights, layout P64.
struct Weight {
  const uint8_t* panels;
  const int32_t* sums;  // [panels, groups, 64], sum of each channel's codes over a group
  const float* scale;  // [N, groups]
  int bits;
  int64_t rows, columns, groups;  // N, K, G

  [[gnu::always_inline]] int64_t padded() const { return padded_group(columns, groups); }
};

struct Gemm {
  Weight weight;
  LowRank low_rank;
  const int8_t* codes;  // [M, lda], of which groups * padded group are set, zeros in the padding
  int64_t lda;  // codes_stride
  const QuantRow* quant;  // [M]
  const int32_t* sums;  // [M, groups], sum of each row's codes over a group
  const float* down;  // [M, rank], x down
  const void* bias;  // [N] or null
  DType bias_dtype;
  void* out;  // [M, N]
  DType out_dtype;
  int64_t rows;  // M
  int act_bits;
};

// Pages of the 4-bit KV cache; see reference.py, kv_planes.
struct KVPages {
  uint8_t* data;
  int64_t block_stride, head_stride;  // bytes
  int64_t tokens, head_dim;  // tokens of a page, a multiple of 16; head_dim a multiple of 16
  bool symmetric;
};

// Most dimensions of a head; tokens that are attended over before results are merged; most rows of a work item.
constexpr int64_t kv_max_dim = 512, kv_chunk = 2048, kv_rows = 32;

// Floats of a row's result over one chunk: the largest exponent, sums for each dimension, 16 parts of the weights' sum.
static constexpr int64_t kv_partial(int64_t head_dim) { return 17 + head_dim; }

// K and V of one step on their way into the pages. Distances between tokens and between heads in elements.
struct KVWrite {
  KVPages pages;
  const void *key, *value;
  DType dtype;
  int64_t key_token, key_head, value_token, value_head;
  const int64_t* slots;  // of each token, negative for none
  int64_t tokens;
  int64_t rotate;  // block of R3, 0 for none
  float key_clip, value_clip;
  const float* feedback;  // of keys, [heads, d, d], read above the diagonal; null for none
};

// What all work items of one attention call share.
struct KVQuery {
  KVPages pages;
  const void* query;
  void* out;
  DType dtype;
  int64_t query_token, query_head, out_token, out_head;  // distances in elements
  int64_t group;  // query heads of one KV head
  int64_t rotate;
  int64_t window;  // positions that a token sees at most, its own among them; 0 for all
  float scale;
  float cap;  // scores s become cap tanh(s / cap); 0 for none

  // The first position that the token at `position` sees.
  [[gnu::always_inline]] int64_t begin(int64_t position) const {
    return window && position >= window ? position + 1 - window : 0;
  }
};

// At most kv_rows rows of one sequence and KV head; row r is token r / group, head r % group of the group.
struct KVItem {
  const int32_t* blocks;  // the sequence's block table
  int64_t kv_head;
  int64_t first;  // row of `query` of the sequence's first new token
  int64_t tokens, length;  // new tokens; tokens in the cache, the new ones included
  int64_t row, rows;
};

struct Tier {
  const char* name;
  // Row of n numbers to float32.
  void (*load_row)(const void* x, DType dtype, int64_t n, float* row);
  // silu(gate) * up of x = [gate, up], 2 n numbers, to float32.
  void (*load_silu_mul)(const void* x, DType dtype, int64_t n, float* row);
  void (*transform_row)(float* row, int64_t n, const Transform& transform, float* scratch);
  // Codes [groups * padded] and their sums [groups] of a row of n numbers; n = groups * group.
  QuantRow (*quantize_row)(const float* row, int64_t group, int64_t groups, int64_t padded, const ActFormat& format,
                           int8_t* codes, int32_t* sums);
  // out[rank] = row[n] down
  void (*project_row)(const float* row, int64_t n, const LowRank& low_rank, float* out);
  // row[n] -= z[rank] downᵀ
  void (*subtract_row)(float* row, int64_t n, const LowRank& low_rank, const float* z);
  // Panel `panel` (64 channels) of at most GEMM_ROWS rows m0..m1; scratch holds GEMM_SCRATCH bytes.
  void (*gemm_panel)(const Gemm& gemm, int64_t m0, int64_t m1, int64_t panel, void* scratch);
  int64_t tile_rows;  // of which gemm_panel takes a multiple best

  // out[n] = sum of weights[i] rows[i] over `count` rows, those that are null left out.
  void (*add_rows)(const void* const* rows, const float* weights, int64_t count, DType dtype, int64_t n, void* out);

  // 4-bit KV cache. `scratch` is kv_scratch bytes, aligned to 64.
  void (*kv4_write)(const KVWrite& write, int64_t head, int64_t part, int64_t parts);
  void (*kv4_attend)(const KVQuery& query, const KVItem& item, void* scratch);
  void (*kv4_attend_chunk)(const KVQuery& query, const KVItem& item, int64_t chunk, float* partial, void* scratch);
  void (*kv4_merge)(const KVQuery& query, const KVItem& item, int64_t chunks, float* partials, void* scratch);
  int64_t kv_scratch;
};

extern const Tier tier_amx, tier_avx512, tier_avxvnni, tier_avx2, tier_i8mm, tier_neon, tier_scalar;

}  // namespace rotquant
