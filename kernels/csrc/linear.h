// Shared by the ops that multiply quantized rows with packed weights: checked views of what they are given.
#pragma once

#include <optional>
#include <string>

#include "binding.h"

namespace rotquant {

// The rows of a tensor, [..., K] or, for silu_mul, [gate, up] [..., 2 K]: any distance between rows, numbers of a row
// side by side.
struct Rows {
  Tensor held;
  const char* data;
  DType dtype;
  int64_t count, columns, stride;  // K; stride in bytes
  bool silu_mul;

  const void* row(int64_t m) const { return data + m * stride; }
};

inline Rows rows_of(const Tensor& x, bool silu_mul = false) {
  REQUIRE(x.dim() >= 1 && x.size(-1) > 0, "x must have at least one column");
  REQUIRE(!silu_mul || x.size(-1) % 2 == 0, "x must hold gate and up, not ", x.size(-1), " columns");
  const DType dtype = dtype_of(x, "x");
  const int64_t width = x.size(-1), count = x.numel() / width;
  const bool strided = x.dim() == 2 && x.stride(1) == 1;
  const Tensor held = strided ? x : torch::stable::contiguous(x);
  const int64_t stride = (strided ? x.stride(0) : width) * size_of(dtype), columns = silu_mul ? width / 2 : width;
  return {held, (const char*)held.const_data_ptr(), dtype, count, columns, stride, silu_mul};
}

// The online transforms that have a kernel, by their names in stages.
struct NamedStage {
  const char* name;
  Transform::Kind kind;
};
constexpr NamedStage STAGES[] = {
    {"hadamard", Transform::hadamard},       {"dense", Transform::dense},           {"kronecker", Transform::kronecker},
    {"permutation", Transform::permutation}, {"reflection", Transform::reflection}, {"shift", Transform::shift}};

inline std::optional<Transform::Kind> stage_of(const std::string& name) {
  for (const NamedStage& stage : STAGES)
    if (name == stage.name) return stage.kind;
  return {};
}

// Their names, with spaces between them.
inline std::string native_stages() {
  std::string names;
  for (const NamedStage& stage : STAGES) names += (names.empty() ? "" : " ") + std::string(stage.name);
  return names;
}

// An op's transform; holds the tensor.
struct HeldTransform : Transform {
  std::optional<Tensor> held;
};

// Numbers of a kind's tensor; 0 for a kind without one.
inline int64_t numbers_of(Transform::Kind kind, int64_t block, int64_t columns) {
  switch (kind) {
    case Transform::dense: return block * block;
    case Transform::kronecker: return columns / block * (columns / block) + block * block;
    case Transform::reflection: return block;
    case Transform::permutation:
    case Transform::shift: return columns;
    default: return 0;
  }
}

inline HeldTransform transform_of(const std::string& name, int64_t block, const std::optional<Tensor>& tensor, int64_t columns) {
  if (name == "none") return {{Transform::none, 1}, {}};
  const std::optional<Transform::Kind> kind = stage_of(name);
  REQUIRE(kind.has_value(), "unknown transform ", name);
  const bool order = *kind == Transform::permutation;
  if (!order && *kind != Transform::shift)
    REQUIRE(block > 0 && columns % block == 0, "transform block ", block, " does not divide ", columns, " columns");
  if (*kind == Transform::hadamard) {
    REQUIRE((block & (block - 1)) == 0, "Hadamard block ", block, " is not a power of two");
    return {{*kind, block}, {}};
  }
  REQUIRE(tensor.has_value(), "a ", name, " transform needs its tensor");
  const int64_t numbers = numbers_of(*kind, block, columns);
  REQUIRE(tensor->scalar_type() == (order ? ScalarType::Int : ScalarType::Float) && tensor->numel() == numbers,
          "the tensor of a ", name, " transform must hold ", numbers, order ? " int32" : " float32");
  const Tensor held = torch::stable::contiguous(*tensor);
  if (!order) return {{*kind, block, (const float*)held.const_data_ptr()}, held};
  const int32_t* places = (const int32_t*)held.const_data_ptr();
  for (int64_t i = 0; i < columns; i++)
    REQUIRE(places[i] >= 0 && places[i] < columns, "place ", places[i], " of a permutation is not below ", columns);
  return {{*kind, block, nullptr, places}, held};
}

inline ActFormat act_format(int64_t bits, bool symmetric, double clip) {
  REQUIRE(bits >= 2 && bits <= 8, "activations of ", bits, " bits are not supported");
  REQUIRE(clip > 0 && clip <= 1, "clip must be in (0, 1]");
  return {int(bits), symmetric, float(clip)};
}

// Row m in float32 after its transform; valid until this thread's next row.
inline float* transformed(const Rows& x, int64_t m, const Transform& transform) {
  float* row = (float*)scratch(0, size_t(x.columns) * 8);
  (x.silu_mul ? tier().load_silu_mul : tier().load_row)(x.row(m), x.dtype, x.columns, row);
  tier().transform_row(row, x.columns, transform, row + x.columns);
  return row;
}

inline bool worth_threads(int64_t work) { return work > (1 << 16); }

// Rows of one of `blocks` blocks of `rows` rows, in whole tiles; GEMM_ROWS is a multiple of every tier's.
inline int64_t block_rows(int64_t rows, int64_t blocks, int64_t tile) {
  return ((rows + blocks - 1) / blocks + tile - 1) / tile * tile;
}

struct PackedSize {
  int64_t panels, padded, group_bytes, data, bytes;
};

inline PackedSize packed_size(int64_t rows, int64_t columns, int64_t groups, int64_t bits) {
  REQUIRE(bits == 4 || bits == 8, "weights of ", bits, " bits are not supported");
  REQUIRE(groups > 0 && columns % groups == 0, groups, " scale groups do not divide ", columns, " columns");
  const int64_t panels = (rows + PANEL - 1) / PANEL, padded = padded_group(columns, groups);
  const int64_t group_bytes = padded * PANEL * bits / 8, data = panels * groups * group_bytes;
  return {panels, padded, group_bytes, data, data + panels * groups * PANEL * 4};
}

// The weight at `data`, [N, K] with scales float32 [N, groups] at `scale`, in layout P64.
inline Weight weight_at(const uint8_t* data, const float* scale, int64_t bits, int64_t rows, int64_t columns,
                        int64_t groups) {
  const PackedSize size = packed_size(rows, columns, groups, bits);
  return {data, (const int32_t*)(data + size.data), scale, int(bits), rows, columns, groups};
}

inline Weight weight_of(const Tensor& weight, const Tensor& scale, int64_t bits, int64_t columns) {
  check_dense(scale, ScalarType::Float, "weight_scale");
  REQUIRE(scale.dim() == 2, "weight_scale must be [N, groups]");
  const PackedSize size = packed_size(scale.size(0), columns, scale.size(1), bits);
  REQUIRE(weight.scalar_type() == ScalarType::Byte && weight.is_contiguous() && weight.numel() == size.bytes,
                  "weight is not in the layout of this kernel for ", scale.size(0), " x ", columns, " at ", bits,
                  " bits; prepare_weight makes it");
  return weight_at((const uint8_t*)weight.const_data_ptr(), (const float*)scale.const_data_ptr(), bits, scale.size(0),
                   columns, scale.size(1));
}

}  // namespace rotquant
