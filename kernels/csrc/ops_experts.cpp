// torch op of a mixture of experts: moe_experts. Specification: experts.py.
//
// Pairs of a token and one of its experts are sorted by expert, so that an expert's weights are read once for all its
// tokens. A row of x is quantized once, whatever the number of its experts.
#include <algorithm>
#include <numeric>
#include <vector>

#include "linear.h"

namespace rotquant {
namespace {

constexpr int64_t WAVE = 2048;  // pairs whose rows are in memory at once, so that a cache holds them from step to step

inline int64_t lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }

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

// Quantized rows in somebody's memory.
struct Quantized {
  int64_t lda, groups;
  QuantRow* quant;
  int32_t* sums;
  int8_t* codes;

  static Quantized in(char*& memory, int64_t rows, const Weight& w) {
    const int64_t lda = codes_stride(w.padded() * w.groups);
    QuantRow* quant = (QuantRow*)memory;
    int32_t* sums = (int32_t*)(quant + rows);
    char* codes = memory + lines(rows * (int64_t(sizeof(QuantRow)) + 4 * w.groups));
    memory = codes + rows * lda;
    return {lda, w.groups, quant, sums, (int8_t*)codes};
  }

  static int64_t bytes(int64_t rows, const Weight& w) {
    char* end = nullptr;
    in(end, rows, w);
    return end - (char*)nullptr;
  }

  void quantize(int64_t i, const float* row, const Weight& w, const ActFormat& format) const {
    quant[i] = tier().quantize_row(row, w.columns / groups, groups, w.padded(), format, codes + i * lda,
                                   sums + i * groups);
  }

  void copy(int64_t i, const Quantized& from, int64_t j) const {
    quant[i] = from.quant[j];
    memcpy(sums + i * groups, from.sums + j * groups, size_t(groups) * 4);
    memcpy(codes + i * lda, from.codes + j * lda, size_t(lda));
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

// out[pair - begin] = the expert's weights times row pair - begin of `rows`, for the pairs begin ... end. Threads share
// out experts, blocks of rows and runs of panels: a thread reads on where it stopped.
void multiply(const Stack& stack, const Pairs& pairs, int64_t begin, int64_t end, const Quantized& rows, int act_bits,
              DType dtype, char* out) {
  struct Task {
    int64_t expert, begin, end;
  };
  std::vector<Task> tasks;
  for (int64_t e = 0; e < stack.count; e++) {
    const int64_t first = std::max(pairs.first[size_t(e)], begin), last = std::min(pairs.first[size_t(e + 1)], end);
    const int64_t blocks = (last - first + GEMM_ROWS - 1) / GEMM_ROWS;
    const int64_t height = last > first ? block_rows(last - first, blocks, tier().tile_rows) : 1;
    for (int64_t m = first; m < last; m += height)
      tasks.push_back({e, m - begin, std::min(m + height, last) - begin});
  }
  const int64_t panels = (stack.rows + PANEL - 1) / PANEL, all = int64_t(tasks.size()) * panels;
  const int64_t shares = 8 * int64_t(torch::stable::get_num_threads());
  const int64_t run = std::max<int64_t>(1, std::min(panels, all / shares)), runs = (panels + run - 1) / run;
  const int64_t work = (end - begin) * stack.rows * stack.columns / 4;
  parallel(int64_t(tasks.size()) * runs, worth_threads(work), [&](int64_t i) {
    const Task& task = tasks[size_t(i / runs)];
    Gemm g{};
    g.weight = stack.of(task.expert);
    g.codes = rows.codes;
    g.lda = rows.lda;
    g.quant = rows.quant;
    g.sums = rows.sums;
    g.out = out;
    g.out_dtype = dtype;
    g.rows = end - begin;
    g.act_bits = act_bits;
    const int64_t first = i % runs * run;
    for (int64_t panel = first; panel < std::min(first + run, panels); panel++)
      tier().gemm_panel(g, task.begin, task.end, panel, scratch(2, GEMM_SCRATCH));
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

  const Weight up_weight = first.of(0), down_weight = second.of(0);
  char* memory = (char*)scratch(1, size_t(Quantized::bytes(tokens, up_weight)));
  const Quantized once = Quantized::in(memory, tokens, up_weight);
  const ActFormat up_format = act_format(act_bits, act_symmetric, up_clip);
  const ActFormat down_format = act_format(act_bits, act_symmetric, down_clip);
  parallel(tokens, worth_threads(tokens * hidden), [&](int64_t i) {
    once.quantize(i, transformed(rows, i, none), up_weight, up_format);
  });

  Tensor y = torch::stable::new_empty(x, {count, hidden});
  ask_for_huge_pages(y.mutable_data_ptr(), count * hidden * element);
  const int64_t wave = std::min(count, WAVE), up_bytes = lines(wave * 2 * width * element);
  const int64_t sizes[] = {lines(Quantized::bytes(wave, up_weight)), lines(Quantized::bytes(wave, down_weight))};
  memory = (char*)scratch(3, size_t(sizes[0] + sizes[1] + up_bytes));
  char *at = memory, *gate_up = memory + sizes[0] + sizes[1];
  const Quantized sorted = Quantized::in(at, wave, up_weight);
  at = memory + sizes[0];
  const Quantized between = Quantized::in(at, wave, down_weight);
  for (int64_t begin = 0; begin < count; begin += wave) {
    const int64_t end = std::min(begin + wave, count), n = end - begin;
    parallel(n, worth_threads(n * hidden), [&](int64_t i) { sorted.copy(i, once, pairs.token[size_t(begin + i)]); });
    multiply(first, pairs, begin, end, sorted, int(act_bits), rows.dtype, gate_up);
    const Rows inside{x, gate_up, rows.dtype, n, width, 2 * width * element, true};
    parallel(n, worth_threads(n * width), [&](int64_t i) {
      between.quantize(i, transformed(inside, i, r4), down_weight, down_format);
    });
    char* to = (char*)y.mutable_data_ptr() + begin * hidden * element;
    multiply(second, pairs, begin, end, between, int(act_bits), rows.dtype, to);
  }

  Tensor out = torch::stable::new_empty(x, {tokens, hidden});
  const char* from = (const char*)y.const_data_ptr();
  char* to = (char*)out.mutable_data_ptr();
  const float* share = (const float*)weights.const_data_ptr();
  parallel(tokens, worth_threads(tokens * top_k * hidden), [&](int64_t t) {
    const void** parts = (const void**)scratch(0, size_t(top_k) * sizeof(void*));
    for (int64_t s = 0; s < top_k; s++) {
      const int64_t pair = pairs.place[size_t(t * top_k + s)];
      parts[s] = pair < 0 ? nullptr : from + pair * hidden * element;
    }
    tier().add_rows(parts, share + t * top_k, top_k, rows.dtype, hidden, to + t * hidden * element);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rotquant, CPU, m) { m.impl("moe_experts", TORCH_BOX(&moe_experts)); }

}  // namespace rotquant
