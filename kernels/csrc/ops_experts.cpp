// torch op of a mixture of experts: moe_experts. Specification: experts.py.
//
// Pairs of a token and one of its experts are sorted by expert, so that an expert's weights are read once for all its
// tokens. A row of x is quantized once, whatever the number of its experts.
#include <numeric>
#include <vector>

#include "linear.h"

namespace rotquant {
namespace {

// The pairs of a token and an expert of this process, expert after expert and tokens in their order.
struct Pairs {
  std::vector<int64_t> token;  // of each pair
  std::vector<int64_t> place;  // [T, k] -> its pair, or -1
  std::vector<int64_t> first;  // of each expert, and the number of all
};

template <class Index>
Pairs sorted_pairs(const Index* chosen, int64_t tokens, int64_t top_k, const int32_t* map, int64_t mapped,
                   int64_t experts) {
  Pairs pairs;
  pairs.place.assign(size_t(tokens * top_k), -1);
  pairs.first.assign(size_t(experts + 1), 0);
  std::vector<int64_t> local(size_t(tokens * top_k));
  for (int64_t i = 0; i < tokens * top_k; i++) {
    int64_t expert = int64_t(chosen[i]);
    if (map && expert >= 0) {
      REQUIRE(expert < mapped, "expert ", expert, " is none of ", mapped);
      expert = map[expert];
    }
    REQUIRE(expert < experts, "expert ", expert, " is none of ", experts);
    local[size_t(i)] = expert;
    if (expert >= 0) pairs.first[size_t(expert + 1)]++;
  }
  std::partial_sum(pairs.first.begin(), pairs.first.end(), pairs.first.begin());
  pairs.token.resize(size_t(pairs.first.back()));
  std::vector<int64_t> next(pairs.first.begin(), pairs.first.end() - 1);
  for (int64_t i = 0; i < tokens * top_k; i++) {
    if (local[size_t(i)] < 0) continue;
    const int64_t pair = next[size_t(local[size_t(i)])]++;
    pairs.token[size_t(pair)] = i / top_k;
    pairs.place[size_t(i)] = pair;
  }
  return pairs;
}

// Quantized rows in memory of their own.
struct Quantized {
  Quantized(int64_t rows, const Weight& w)
      : lda(codes_stride(w.padded() * w.groups)), groups(w.groups), codes(size_t(rows * lda)), quant(size_t(rows)),
        sums(size_t(rows * groups)) {}

  int64_t lda, groups;
  std::vector<int8_t> codes;
  std::vector<QuantRow> quant;
  std::vector<int32_t> sums;

  void quantize(int64_t i, const float* row, const Weight& w, const ActFormat& format) {
    quant[size_t(i)] = tier().quantize_row(row, w.columns / groups, groups, w.padded(), format, &codes[size_t(i * lda)],
                                           &sums[size_t(i * groups)]);
  }
};

// All experts' weights of one kind, [experts, ...] in layout P64 each.
struct Stack {
  const uint8_t* data;
  const float* scale;
  int64_t count, rows, columns, groups, bits, bytes;

  Weight of(int64_t expert) const {
    return weight_at(data + expert * bytes, scale + expert * rows * groups, bits, rows, columns, groups);
  }
};

Stack stack_of(const Tensor& weight, const Tensor& scale, int64_t bits, int64_t columns, const char* what) {
  check_dense(scale, ScalarType::Float, what);
  REQUIRE(scale.dim() == 3 && scale.size(0) > 0, what, ": scales must be [experts, N, groups]");
  const PackedSize size = packed_size(scale.size(1), columns, scale.size(2), bits);
  REQUIRE(weight.scalar_type() == ScalarType::Byte && weight.is_contiguous() && weight.dim() == 2 &&
                  weight.size(0) == scale.size(0) && weight.size(1) == size.bytes,
                  what, " is not in the layout of this kernel; prepare_experts makes it");
  return {(const uint8_t*)weight.const_data_ptr(), (const float*)scale.const_data_ptr(), scale.size(0), scale.size(1),
          columns, scale.size(2), bits, size.bytes};
}

// out[pair] = the expert's weights times the pair's row: threads share out experts, blocks of rows and panels.
void multiply(const Stack& stack, const Pairs& pairs, const Quantized& rows, int act_bits, DType dtype, void* out) {
  struct Task {
    int64_t expert, begin, end;
  };
  std::vector<Task> tasks;
  for (int64_t e = 0; e < stack.count; e++) {
    const int64_t begin = pairs.first[size_t(e)], count = pairs.first[size_t(e + 1)] - begin;
    const int64_t blocks = (count + GEMM_ROWS - 1) / GEMM_ROWS;
    const int64_t height = blocks ? block_rows(count, blocks, tier().tile_rows) : 0;
    for (int64_t m = 0; m < count; m += height)
      tasks.push_back({e, begin + m, begin + (m + height < count ? m + height : count)});
  }
  const int64_t panels = (stack.rows + PANEL - 1) / PANEL, work = pairs.first.back() * stack.rows * stack.columns / 4;
  parallel(int64_t(tasks.size()) * panels, worth_threads(work), [&](int64_t i) {
    const Task& task = tasks[size_t(i / panels)];
    Gemm g{};
    g.weight = stack.of(task.expert);
    g.codes = rows.codes.data();
    g.lda = rows.lda;
    g.quant = rows.quant.data();
    g.sums = rows.sums.data();
    g.out = out;
    g.out_dtype = dtype;
    g.rows = pairs.first.back();
    g.act_bits = act_bits;
    tier().gemm_panel(g, task.begin, task.end, i % panels, scratch(2, GEMM_SCRATCH));
  });
}

Tensor moe_experts(const Tensor& x, const Tensor& chosen, const Tensor& weights, const std::optional<Tensor>& expert_map,
                   const Tensor& up, const Tensor& up_scale, const Tensor& down, const Tensor& down_scale,
                   int64_t weight_bits, int64_t block, int64_t act_bits, bool act_symmetric, double up_clip,
                   double down_clip) {
  const Rows rows = rows_of(x);
  const int64_t hidden = rows.columns, tokens = rows.count;
  REQUIRE(up_scale.dim() == 3 && up_scale.size(1) % 2 == 0, "up must hold gate and up");
  const int64_t width = up_scale.size(1) / 2;
  const Stack first = stack_of(up, up_scale, weight_bits, hidden, "up");
  const Stack second = stack_of(down, down_scale, weight_bits, width, "down");
  REQUIRE(second.count == first.count && second.rows == hidden, "down must be [experts, hidden, width]");
  REQUIRE(act_bits == 4 || act_bits == 8, "activations of ", act_bits, " bits are not supported");
  REQUIRE(x.dim() == 2 && chosen.dim() == 2 && chosen.size(0) == tokens && chosen.is_contiguous(),
                  "chosen must be [T, k], contiguous");
  check_dense(weights, ScalarType::Float, "weights");
  REQUIRE(weights.numel() == chosen.numel(), "weights must be [T, k]");
  const int64_t top_k = chosen.size(1);
  const int32_t* map = nullptr;
  if (expert_map.has_value()) {
    check_dense(*expert_map, ScalarType::Int, "expert_map");
    map = (const int32_t*)expert_map->const_data_ptr();
  }
  const int64_t mapped = map ? expert_map->numel() : 0;
  REQUIRE(chosen.scalar_type() == ScalarType::Long || chosen.scalar_type() == ScalarType::Int,
                  "chosen must be int32 or int64");
  const Pairs pairs =
      chosen.scalar_type() == ScalarType::Long
          ? sorted_pairs((const int64_t*)chosen.const_data_ptr(), tokens, top_k, map, mapped, first.count)
          : sorted_pairs((const int32_t*)chosen.const_data_ptr(), tokens, top_k, map, mapped, first.count);
  const int64_t count = pairs.first.back(), element = size_of(rows.dtype);
  const HeldTransform none = transform_of("none", 0, {}, hidden);
  const HeldTransform r4 = transform_of(block ? "hadamard" : "none", block, {}, width);

  Quantized once(tokens, first.of(0)), sorted(count, first.of(0));
  const ActFormat up_format = act_format(act_bits, act_symmetric, up_clip);
  parallel(tokens, worth_threads(tokens * hidden), [&](int64_t i) {
    once.quantize(i, transformed(rows, i, none), first.of(0), up_format);
  });
  parallel(count, worth_threads(count * hidden), [&](int64_t i) {
    const int64_t t = pairs.token[size_t(i)];
    memcpy(&sorted.codes[size_t(i * sorted.lda)], &once.codes[size_t(t * once.lda)], size_t(once.lda));
    memcpy(&sorted.sums[size_t(i * once.groups)], &once.sums[size_t(t * once.groups)], size_t(once.groups) * 4);
    sorted.quant[size_t(i)] = once.quant[size_t(t)];
  });
  Tensor gate_up = torch::stable::new_empty(x, {count, 2 * width});
  multiply(first, pairs, sorted, int(act_bits), rows.dtype, gate_up.mutable_data_ptr());

  const Rows inside = rows_of(gate_up, true);
  Quantized between(count, second.of(0));
  const ActFormat down_format = act_format(act_bits, act_symmetric, down_clip);
  parallel(count, worth_threads(count * width), [&](int64_t i) {
    between.quantize(i, transformed(inside, i, r4), second.of(0), down_format);
  });
  Tensor y = torch::stable::new_empty(x, {count, hidden});
  multiply(second, pairs, between, int(act_bits), rows.dtype, y.mutable_data_ptr());

  Tensor out = torch::stable::new_empty(x, {tokens, hidden});
  const char* from = (const char*)y.const_data_ptr();
  char* to = (char*)out.mutable_data_ptr();
  const float* share = (const float*)weights.const_data_ptr();
  parallel(tokens, worth_threads(tokens * top_k * hidden), [&](int64_t t) {
    const size_t pointers = size_t(top_k) * sizeof(void*);
    char* memory = (char*)scratch(0, pointers + size_t(hidden) * 8);
    const void** parts = (const void**)memory;
    for (int64_t s = 0; s < top_k; s++) {
      const int64_t pair = pairs.place[size_t(t * top_k + s)];
      parts[s] = pair < 0 ? nullptr : from + pair * hidden * element;
    }
    tier().add_rows(parts, share + t * top_k, top_k, rows.dtype, hidden, to + t * hidden * element,
                    (float*)(memory + pointers));
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rotquant, CPU, m) { m.impl("moe_experts", TORCH_BOX(&moe_experts)); }

}  // namespace rotquant
