// Calls the functions of a tier without torch: reads calls from stdin until it ends, writes the results to stdout.
// For processors that can only be emulated (emulated_tier.py, which documents the calls). argv[1] names the tier.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "processor.h"

using namespace rotquant;

namespace {

// Memory of its exact size, aligned as the tensors of torch are.
template <class T>
struct Array {
  explicit Array(int64_t n) : size(n), data((T*)aligned_alloc(64, size_t(n * int64_t(sizeof(T)) + 63) / 64 * 64), free) {}
  int64_t size;
  std::unique_ptr<T, decltype(&free)> data;
  T* get() { return data.get(); }
};

template <class T>
Array<T> array() {
  int64_t bytes;
  if (fread(&bytes, 8, 1, stdin) != 1) abort();
  Array<T> found(bytes / int64_t(sizeof(T)));
  if (bytes && fread(found.get(), size_t(bytes), 1, stdin) != 1) abort();
  return found;
}

int64_t number() {
  int64_t x;
  return fread(&x, 8, 1, stdin) == 1 ? x : -1;
}

float real() {
  double x;
  if (fread(&x, 8, 1, stdin) != 1) abort();
  return float(x);
}

void give(const void* data, int64_t bytes) { fwrite(data, 1, size_t(bytes), stdout); }

struct Rows {
  DType dtype;
  int64_t count, columns;
  bool silu_mul;
  Transform transform;
  ActFormat format;
  Array<char> x, tensor;

  Rows()
      : dtype(DType(number())), count(number()), columns(number()), silu_mul(number()),
        transform{Transform::Kind(number()), number()}, format{int(number()), bool(number()), real()},
        x(array<char>()), tensor(array<char>()) {
    transform.matrix = (const float*)tensor.get();
    transform.order = (const int32_t*)tensor.get();
  }

  // Row m after its transform.
  void load(const Tier& t, int64_t m, float* row) {
    (silu_mul ? t.load_silu_mul : t.load_row)(x.get() + m * columns * (1 + silu_mul) * size_of(dtype), dtype, columns, row);
    t.transform_row(row, columns, transform, row + columns);
  }
};

// Transformed rows, codes, scales and zero points.
void quantize(const Tier& t) {
  Rows rows;
  const int64_t k = rows.columns;
  Array<float> row(2 * k);
  Array<int8_t> codes(k);
  int32_t sum;
  for (int64_t m = 0; m < rows.count; m++) {
    rows.load(t, m, row.get());
    const QuantRow q = t.quantize_row(row.get(), k, 1, k, rows.format, codes.get(), &sum);
    give(row.get(), 4 * k);
    give(codes.get(), k);
    give(&q, 8);
  }
}

void linear(const Tier& t) {
  Rows rows;
  Gemm g{};
  const int64_t n = number(), groups = number(), bits = number(), rank = number(), subtracts = number(), m = rows.count;
  Array<uint8_t> panels = array<uint8_t>();
  Array<float> scale = array<float>();
  Array<char> bias = array<char>(), down = array<char>(), up = array<char>();
  const int64_t padded = padded_group(rows.columns, groups), count = (n + PANEL - 1) / PANEL;
  const int32_t* sums = (const int32_t*)(panels.get() + count * groups * padded * PANEL * bits / 8);
  g.weight = {panels.get(), sums, scale.get(), int(bits), n, rows.columns, groups};
  g.low_rank = {rank, down.get(), up.get(), rows.dtype, subtracts != 0};
  g.lda = codes_stride(padded * groups);
  Array<int8_t> codes(m * g.lda);
  Array<QuantRow> quant(m);
  Array<int32_t> code_sums(m * groups);
  Array<float> row(2 * rows.columns), projected(m * rank);
  Array<char> out(m * n * size_of(rows.dtype)), memory(GEMM_SCRATCH);
  for (int64_t i = 0; i < m; i++) {
    rows.load(t, i, row.get());
    if (rank) t.project_row(row.get(), rows.columns, g.low_rank, projected.get() + i * rank);
    if (subtracts) t.subtract_row(row.get(), rows.columns, g.low_rank, projected.get() + i * rank);
    quant.get()[i] = t.quantize_row(row.get(), rows.columns / groups, groups, padded, rows.format,
                                    codes.get() + i * g.lda, code_sums.get() + i * groups);
  }
  g.codes = codes.get();
  g.quant = quant.get();
  g.sums = code_sums.get();
  g.down = projected.get();
  g.bias = bias.size ? bias.get() : nullptr;
  g.bias_dtype = g.out_dtype = rows.dtype;
  g.out = out.get();
  g.rows = m;
  g.act_bits = rows.format.bits;
  for (int64_t m0 = 0; m0 < m; m0 += GEMM_ROWS)
    for (int64_t panel = 0; panel < count; panel++)
      t.gemm_panel(g, m0, m0 + GEMM_ROWS < m ? m0 + GEMM_ROWS : m, panel, memory.get());
  give(out.get(), out.size);
}

// Pages [blocks, heads, tokens, C].
struct Pages {
  int64_t heads, tokens, head_dim;
  bool symmetric;
  Array<uint8_t> data;

  Pages() : heads(number()), tokens(number()), head_dim(number()), symmetric(number()), data(array<uint8_t>()) {}
  KVPages view() {
    const int64_t plane = tokens * (head_dim + (symmetric ? 4 : 5));
    return {data.get(), heads * plane, plane, tokens, head_dim, symmetric};
  }
};

void kv_write(const Tier& t) {
  Pages pages;
  KVWrite w{};
  w.pages = pages.view();
  w.dtype = DType(number());
  w.rotate = number();
  w.key_clip = real();
  w.value_clip = real();
  const bool fed_back = number();
  Array<float> feedback = array<float>();
  w.feedback = fed_back ? feedback.get() : nullptr;
  Array<char> key = array<char>(), value = array<char>();
  Array<int64_t> slots = array<int64_t>();
  w.key = key.get(), w.value = value.get(), w.slots = slots.get();
  w.tokens = slots.size;
  w.key_head = w.value_head = pages.head_dim;
  w.key_token = w.value_token = pages.heads * pages.head_dim;
  for (int64_t head = 0; head < pages.heads; head++)
    for (int64_t part = 0; part < 2; part++) t.kv4_write(w, head, part, 2);
  give(pages.data.get(), pages.data.size);
}

// One sequence: attention of its last tokens, in chunks if asked for.
void kv_attend(const Tier& t) {
  Pages pages;
  KVQuery q{};
  q.pages = pages.view();
  q.dtype = DType(number());
  q.rotate = number();
  q.group = number();
  q.window = number();
  const int64_t length = number();
  const bool chunked = number();
  q.scale = real();
  Array<char> query = array<char>();
  Array<int32_t> table = array<int32_t>();
  const int64_t heads = pages.heads * q.group, element = size_of(q.dtype);
  const int64_t tokens = query.size / (heads * pages.head_dim * element);
  Array<char> out(query.size), memory(t.kv_scratch);
  q.query = query.get(), q.out = out.get();
  q.query_head = q.out_head = pages.head_dim;
  q.query_token = q.out_token = heads * pages.head_dim;
  for (int64_t head = 0; head < pages.heads; head++)
    for (int64_t row = 0; row < tokens * q.group; row += kv_rows) {
      const int64_t rest = tokens * q.group - row;
      const KVItem item{table.get(), head, 0, tokens, length, row, rest < kv_rows ? rest : kv_rows};
      if (!chunked) {
        t.kv4_attend(q, item, memory.get());
        continue;
      }
      const int64_t chunks = (length + kv_chunk - 1) / kv_chunk, floats = item.rows * kv_partial(pages.head_dim);
      Array<float> partials(chunks * floats);
      for (int64_t c = 0; c < chunks; c++)
        t.kv4_attend_chunk(q, item, c, partials.get() + c * floats, memory.get());
      t.kv4_merge(q, item, chunks, partials.get(), memory.get());
    }
  give(out.get(), out.size);
}

// out[n] = sum of weights[i] rows[i]; a weight of 0 stands for a row that is null.
void add_rows(const Tier& t) {
  const DType dtype = DType(number());
  const int64_t n = number();
  Array<char> rows = array<char>();
  Array<float> weights = array<float>();
  Array<char> out(n * size_of(dtype));
  std::vector<const void*> parts;
  for (int64_t i = 0; i < weights.size; i++)
    parts.push_back(weights.get()[i] != 0 ? rows.get() + i * n * size_of(dtype) : nullptr);
  t.add_rows(parts.data(), weights.get(), weights.size, dtype, n, out.get());
  give(out.get(), out.size);
}

}  // namespace

int main(int, char** argv) {
  const Tier* tier = find_tier(argv[1]);
  if (!tier) return 3;
  fprintf(stderr, "%s", tier->name);
  constexpr void (*calls[])(const Tier&) = {quantize, linear, kv_write, kv_attend, add_rows};
  for (int64_t call; (call = number()) >= 0;) calls[call](*tier);
}
