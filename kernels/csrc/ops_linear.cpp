// torch ops of linear layers: online_stage, quantize_rows, pack_weight, int_linear. Specification: reference.py.
#include <array>
#include <vector>

#include "linear.h"
#include "memory.h"

namespace rotquant {
namespace {

// reference.online_stage
Tensor reference_stage(const Tensor& x, const std::string& kind, int64_t block, const std::optional<Tensor>& tensor) {
  using torch::stable::detail::from;
  std::array<StableIValue, 4> stack{from(x), from(kind), from(block), from(tensor)};
  const auto code = torch_call_dispatcher("rotquant::reference_stage", "", stack.data(), TORCH_ABI_VERSION);
  REQUIRE(code == TORCH_SUCCESS, "no online transform '", kind, "' of block ", block, " with this tensor");
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// x in float32 after one stage. What has no kernel here, a kind or float64, runs as the reference says.
Tensor online_stage(const Tensor& x, const std::string& kind, int64_t block, const std::optional<Tensor>& tensor) {
  if (!stage_of(kind) || x.scalar_type() == ScalarType::Double) return reference_stage(x, kind, block, tensor);
  const Rows rows = rows_of(x);
  const HeldTransform t = transform_of(kind, block, tensor, rows.columns);
  Tensor out = torch::stable::new_empty(x, x.sizes(), ScalarType::Float);
  float* to = (float*)out.mutable_data_ptr();
  parallel(rows.count, worth_threads(rows.count * rows.columns), [&](int64_t m) {
    memcpy(to + m * rows.columns, transformed(rows, m, t), size_t(rows.columns) * 4);
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> quantize_rows(const Tensor& x, const std::string& transform, int64_t block,
                                                 const std::optional<Tensor>& matrix, int64_t bits, bool symmetric,
                                                 double clip, bool silu_mul) {
  const Rows rows = rows_of(x, silu_mul);
  const HeldTransform t = transform_of(transform, block, matrix, rows.columns);
  const ActFormat format = act_format(bits, symmetric, clip);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end()), one = shape;
  shape.back() = rows.columns;
  one.back() = 1;
  Tensor codes = torch::stable::new_empty(x, shape, ScalarType::Char);
  Tensor scale = torch::stable::new_empty(x, one, ScalarType::Float);
  Tensor zero = torch::stable::new_empty(x, one, ScalarType::Int);
  int8_t* to = (int8_t*)codes.mutable_data_ptr();
  float* scales = (float*)scale.mutable_data_ptr();
  int32_t* zeros = (int32_t*)zero.mutable_data_ptr();
  parallel(rows.count, worth_threads(rows.count * rows.columns), [&](int64_t m) {
    int32_t sum;
    const QuantRow q = tier().quantize_row(transformed(rows, m, t), rows.columns, 1, rows.columns, format,
                                           to + m * rows.columns, &sum);
    scales[m] = q.scale;
    zeros[m] = q.zero;
  });
  return {codes, scale, zero};
}

// ---- weights -------------------------------------------------------------------------------------------

// One panel of one group, layout P64 (gemm.h), and the sums of its channels.
void pack_group(const uint8_t* from, int64_t row_bytes, int64_t channels, int64_t begin, int64_t group, int64_t padded,
                int64_t bits, uint8_t* to, int32_t* sums) {
  const int offset = weight_offset(bits);
  std::vector<uint8_t> codes(size_t(PANEL * padded), uint8_t(offset));
  for (int64_t c = 0; c < channels; c++) {
    const uint8_t* row = from + c * row_bytes;
    int32_t sum = 0;
    for (int64_t k = 0; k < group; k++) {
      const int64_t i = begin + k;
      const uint8_t code = bits == 8 ? row[i] : uint8_t(i & 1 ? row[i / 2] >> 4 : row[i / 2] & 15);
      codes[size_t(c * padded + k)] = code;
      sum += int(code) - offset;
    }
    sums[c] = sum;
  }
  for (int64_t c = channels; c < PANEL; c++) sums[c] = 0;
  const int64_t step = bits == 4 ? 8 : 4;
  for (int64_t k = 0; k < padded; k += step)
    for (int64_t c = 0; c < PANEL; c++)
      for (int64_t t = 0; t < 4; t++) {
        const uint8_t* code = &codes[size_t(c * padded + k + t)];
        *to++ = bits == 8 ? code[0] : uint8_t(code[0] | code[4] << 4);
      }
}

// [N, words], or a stack of weights [E, N, words] in memory of one piece.
Tensor pack_weight(const Tensor& packed, int64_t bits, int64_t columns, int64_t groups) {
  check_dense(packed, ScalarType::Int, "packed weight");
  const bool stacked = packed.dim() == 3;
  REQUIRE((stacked || packed.dim() == 2) && columns > 0 && packed.size(-1) == (columns * bits + 31) / 32,
                  "packed weight does not hold ", columns, " columns of ", bits, " bits");
  const int64_t count = stacked ? packed.size(0) : 1, rows = packed.size(-2), row_bytes = packed.size(-1) * 4;
  const PackedSize size = packed_size(rows, columns, groups, bits);
  std::vector<int64_t> shape{count, size.bytes};
  if (!stacked) shape = {size.bytes};
  Tensor out = torch::stable::new_empty(packed, shape, ScalarType::Byte);
  uint8_t* first = (uint8_t*)out.mutable_data_ptr();
  const int64_t parts = size.panels * groups;
  parallel(count * parts, true, [&](int64_t item) {
    const int64_t e = item / parts, i = item % parts, panel = i / groups, group = i % groups, length = columns / groups;
    const int64_t channels = rows - panel * PANEL < PANEL ? rows - panel * PANEL : PANEL;
    const uint8_t* from = (const uint8_t*)packed.const_data_ptr() + e * rows * row_bytes;
    uint8_t* to = first + e * size.bytes;
    int32_t* sums = (int32_t*)(to + size.data);
    pack_group(from + panel * PANEL * row_bytes, row_bytes, channels, group * length, length, size.padded, bits,
               to + i * size.group_bytes, sums + i * PANEL);
  });
  ask_large_weight(first, count * size.bytes);
  return out;
}

// ---- int_linear ----------------------------------------------------------------------------------------

LowRank low_rank_of(const std::optional<Tensor>& down, const std::optional<Tensor>& up, bool subtracts, int64_t columns,
                    int64_t rows) {
  if (!down.has_value() && !up.has_value()) return {0, nullptr, nullptr, DType::f32, false};
  REQUIRE(down.has_value() && up.has_value(), "low_rank_down and low_rank_up come together");
  const int64_t rank = up->size(0);
  REQUIRE(down->dim() == 2 && up->dim() == 2 && down->size(0) == columns && down->size(1) == rank &&
                      up->size(1) == rows && down->is_contiguous() && up->is_contiguous() &&
                      down->scalar_type() == up->scalar_type(),
                  "low_rank_down must be [K, r] and low_rank_up [r, N], contiguous and of one dtype");
  return {rank, down->const_data_ptr(), up->const_data_ptr(), dtype_of(*down, "low_rank_down"), subtracts};
}

// What quantize_row and project_row leave for the GEMM, one buffer of the calling thread.
void quantize_all(const Rows& x, const Transform& transform, const ActFormat& format, Gemm& g) {
  const int64_t group = x.columns / g.weight.groups, padded = g.weight.padded(), lda = codes_stride(padded * g.weight.groups);
  const int64_t rank = g.low_rank.rank, m = x.count, groups = g.weight.groups;
  char* memory = (char*)scratch(1, size_t(m * (lda + 8 + int64_t(sizeof(QuantRow)) + 4 * groups + 4 * rank) + 64));
  int8_t* codes = (int8_t*)memory;
  QuantRow* quant = (QuantRow*)(memory + (m * lda + 7) / 8 * 8);
  int32_t* sums = (int32_t*)(quant + m);
  float* down = (float*)(sums + m * groups);
  parallel(m, worth_threads(m * x.columns), [&](int64_t i) {
    float* row = transformed(x, i, transform);
    if (rank) tier().project_row(row, x.columns, g.low_rank, down + i * rank);
    if (g.low_rank.subtracts) tier().subtract_row(row, x.columns, g.low_rank, down + i * rank);
    quant[i] = tier().quantize_row(row, group, groups, padded, format, codes + i * lda, sums + i * groups);
  });
  g.codes = codes;
  g.lda = lda;
  g.quant = quant;
  g.sums = sums;
  g.down = down;
}

Tensor int_linear(const Tensor& x, const Tensor& weight, const Tensor& weight_scale, const std::optional<Tensor>& bias,
                  int64_t weight_bits, const std::string& transform, int64_t block, const std::optional<Tensor>& matrix,
                  int64_t act_bits, bool act_symmetric, double act_clip, const std::optional<Tensor>& low_rank_down,
                  const std::optional<Tensor>& low_rank_up, bool silu_mul, bool low_rank_subtracts) {
  const Rows rows = rows_of(x, silu_mul);
  Gemm g{};
  g.weight = weight_of(weight, weight_scale, weight_bits, rows.columns);
  g.low_rank = low_rank_of(low_rank_down, low_rank_up, low_rank_subtracts, rows.columns, g.weight.rows);
  if (bias.has_value()) {
    REQUIRE(bias->is_contiguous() && bias->numel() == g.weight.rows, "bias must be [N]");
    g.bias = bias->const_data_ptr();
    g.bias_dtype = dtype_of(*bias, "bias");
  }
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = g.weight.rows;
  Tensor out = torch::stable::new_empty(x, shape);
  g.out = out.mutable_data_ptr();
  g.out_dtype = rows.dtype;
  g.rows = rows.count;
  g.act_bits = int(act_bits);
  REQUIRE(act_bits == 4 || act_bits == 8, "activations of ", act_bits, " bits are not supported");
  const HeldTransform held = transform_of(transform, block, matrix, rows.columns);
  quantize_all(rows, held, act_format(act_bits, act_symmetric, act_clip), g);

  const int64_t panels = (g.weight.rows + PANEL - 1) / PANEL, blocks = (g.rows + GEMM_ROWS - 1) / GEMM_ROWS;
  const Tier& t = tier();
  const int64_t height = blocks ? block_rows(g.rows, blocks, t.tile_rows) : 0;
  parallel(blocks * panels, worth_threads(g.rows * g.weight.rows * g.weight.columns / 4), [&](int64_t i) {
    const int64_t m0 = i / panels * height, m1 = m0 + height < g.rows ? m0 + height : g.rows;
    if (m0 < m1) t.gemm_panel(g, m0, m1, i % panels, scratch(2, GEMM_SCRATCH));
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(rotquant, m) { m.def("native_stages() -> str"); }
STABLE_TORCH_LIBRARY_IMPL(rotquant, CompositeExplicitAutograd, m) { m.impl("native_stages", TORCH_BOX(&native_stages)); }

STABLE_TORCH_LIBRARY_IMPL(rotquant, CPU, m) {
  m.impl("online_stage", TORCH_BOX(&online_stage));
  m.impl("quantize_rows", TORCH_BOX(&quantize_rows));
  m.impl("pack_weight", TORCH_BOX(&pack_weight));
  m.impl("int_linear", TORCH_BOX(&int_linear));
}

}  // namespace rotquant
