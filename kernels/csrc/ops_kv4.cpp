// torch ops of the 4-bit KV cache: kv4_write, kv4_attention. Specification: reference.py.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "binding.h"

namespace rotquant {
namespace {

// Pages of a cache, uint8 or int8 [blocks, heads, N, C]; each (block, head) plane is contiguous.
KVPages pages_of(const Tensor& cache, int64_t head_dim, bool symmetric) {
  const bool bytes = cache.scalar_type() == ScalarType::Byte || cache.scalar_type() == ScalarType::Char;
  REQUIRE(cache.is_cpu() && bytes && cache.dim() == 4, "cache must be uint8 or int8 [blocks, heads, N, C] on the CPU");
  REQUIRE(head_dim > 0 && head_dim % 16 == 0 && head_dim <= kv_max_dim, "heads of ", head_dim,
          " are not supported: a multiple of 16 up to ", kv_max_dim, " is");
  const int64_t tokens = cache.size(2), token_bytes = head_dim + (symmetric ? 4 : 5);
  REQUIRE(tokens > 0 && tokens % 16 == 0, "cache has pages of ", tokens, " tokens, not a multiple of 16");
  REQUIRE(cache.size(3) == token_bytes, "cache has ", cache.size(3), " bytes a token, ", token_bytes, " expected");
  REQUIRE(cache.stride(3) == 1 && cache.stride(2) == token_bytes, "the planes of cache are not contiguous");
  return {(uint8_t*)cache.data_ptr(), cache.stride(0), cache.stride(1), tokens, head_dim, symmetric};
}

// x is float [tokens, heads, d] with d contiguous; tokens and heads may be any distance apart.
DType check_heads(const Tensor& x, int64_t heads, int64_t head_dim, const char* name) {
  REQUIRE(x.is_cpu() && x.dim() == 3 && x.size(1) == heads && x.size(2) == head_dim, name, " must be [tokens, ", heads,
          ", ", head_dim, "] on the CPU");
  REQUIRE(x.stride(2) == 1, "the last dimension of ", name, " is not contiguous");
  return dtype_of(x, name);
}

int64_t check_rotate(int64_t rotate, int64_t head_dim) {
  const bool fits = rotate == 0 || (rotate > 0 && (rotate & (rotate - 1)) == 0 && head_dim % rotate == 0);
  REQUIRE(fits, "rotate must be 0 or a power of two that divides ", head_dim, ", not ", rotate);
  return rotate;
}

const float* check_feedback(const Tensor& x, int64_t heads, int64_t head_dim) {
  const bool fits = x.is_cpu() && x.dim() == 3 && x.size(0) == heads && x.size(1) == head_dim && x.size(2) == head_dim;
  REQUIRE(fits && x.scalar_type() == ScalarType::Float && x.is_contiguous(), "key_feedback must be float32 [", heads, ", ",
          head_dim, ", ", head_dim, "], contiguous, on the CPU");
  return (const float*)x.const_data_ptr();
}

template <class T>
const T* check_indices(const Tensor& x, int64_t dims, const char* name) {
  const ScalarType type = sizeof(T) == 8 ? ScalarType::Long : ScalarType::Int;
  REQUIRE(x.is_cpu() && x.scalar_type() == type && x.dim() == dims, name, " must be int", 8 * sizeof(T), " with ", dims,
          " dimensions on the CPU");
  REQUIRE(x.size(dims - 1) <= 1 || x.stride(dims - 1) == 1, "the last dimension of ", name, " is not contiguous");
  return (const T*)x.const_data_ptr();
}

void kv4_write(const Tensor& key, const Tensor& value, const Tensor& cache, const Tensor& slots, int64_t rotate,
               bool symmetric, double k_clip, double v_clip, const std::optional<Tensor>& key_feedback) {
  REQUIRE(key.dim() == 3, "key must be [tokens, heads, d]");
  const int64_t dim = key.size(2);
  KVWrite w{};
  w.pages = pages_of(cache, dim, symmetric);
  const int64_t heads = cache.size(1), places = cache.size(0) * w.pages.tokens;
  w.slots = check_indices<int64_t>(slots, 1, "slots");
  w.tokens = slots.size(0);
  w.dtype = check_heads(key, heads, dim, "key");
  REQUIRE(check_heads(value, heads, dim, "value") == w.dtype, "key and value differ in dtype");
  REQUIRE(key.size(0) >= w.tokens && value.size(0) >= w.tokens, w.tokens, " slots for fewer keys or values");
  for (int64_t t = 0; t < w.tokens; t++)
    REQUIRE(w.slots[t] < places, "slots[", t, "] = ", w.slots[t], " is outside the cache of ", places, " tokens");
  w.key = key.const_data_ptr();
  w.value = value.const_data_ptr();
  w.key_token = key.stride(0), w.key_head = key.stride(1);
  w.value_token = value.stride(0), w.value_head = value.stride(1);
  w.rotate = check_rotate(rotate, dim);
  w.key_clip = float(k_clip), w.value_clip = float(v_clip);
  if (key_feedback) w.feedback = check_feedback(*key_feedback, heads, dim);
  const int64_t parts = std::clamp<int64_t>(w.tokens / 64, 1, torch::stable::get_num_threads());
  parallel(heads * parts, w.tokens * heads >= 64, [&](int64_t i) { tier().kv4_write(w, i / parts, i % parts, parts); });
}

// One sequence's share of the work items: KV heads x blocks of rows x chunks, from the first that a row sees.
struct Share {
  int64_t first, blocks, chunk, chunks;
  int64_t floats;  // where its chunks' results begin
};

struct Batch {
  KVQuery query;
  int64_t kv_heads, count, table_stride;
  const int32_t *starts, *lengths, *table;
  Share* shares;  // [count + 1]; the last one holds the totals

  int64_t tokens(int64_t b) const { return starts[b + 1] - starts[b]; }
  int64_t begin(int64_t b) const { return query.begin(lengths[b] - tokens(b)); }  // position that its first token sees
  int64_t block_floats(int64_t b) const {  // of one block and chunk
    return std::min(kv_rows, tokens(b) * query.group) * kv_partial(query.pages.head_dim);
  }
};

// Wrong numbers must not read outside the cache.
void check_batch(const Batch& b, int64_t rows, int64_t blocks, int64_t columns) {
  REQUIRE(b.starts[0] == 0 && b.starts[b.count] <= rows, "query_start must go from 0 to at most ", rows);
  for (int64_t i = 0; i < b.count; i++) {
    REQUIRE(b.tokens(i) >= 0, "query_start decreases at ", i);
    const int64_t pages = b.tokens(i) ? (b.lengths[i] + b.query.pages.tokens - 1) / b.query.pages.tokens : 0;
    REQUIRE(pages <= columns, "seq_lens[", i, "] = ", b.lengths[i], " needs more pages than block_table has");
    for (int64_t p = b.begin(i) / b.query.pages.tokens; p < pages; p++) {
      const int32_t block = b.table[i * b.table_stride + p];
      REQUIRE(block >= 0 && block < blocks, "block_table[", i, ", ", p, "] = ", block, " is outside the cache");
    }
  }
}

// Cuts the batch into items; returns how much work there is, in rows x tiles. Where there are fewer items than keep
// all threads busy, the chunks of a sequence become items of their own.
int64_t share_out(Batch& b, bool split) {
  int64_t work = 0;
  Share next{0, 0, 0, 0, 0};
  for (int64_t i = 0; i < b.count; i++) {
    next.blocks = (b.tokens(i) * b.query.group + kv_rows - 1) / kv_rows;
    next.chunk = split ? b.begin(i) / kv_chunk : 0;
    next.chunks = split ? std::max<int64_t>(1, (b.lengths[i] + kv_chunk - 1) / kv_chunk - next.chunk) : 1;
    b.shares[i] = next;
    next.first += b.kv_heads * next.blocks * next.chunks;
    next.floats += split ? b.kv_heads * next.blocks * next.chunks * b.block_floats(i) : 0;
    work += b.kv_heads * b.query.group * b.tokens(i) * ((b.lengths[i] - b.begin(i)) / 128 + 1);
  }
  b.shares[b.count] = next;
  return work;
}

// Item i: what it is, its chunk, which of its block's chunks that is, and where their results begin.
struct Located {
  KVItem item;
  int64_t chunk, place, chunks, floats;
};

Located locate(const Batch& b, int64_t i) {
  const auto after = [](int64_t at, const Share& share) { return at < share.first; };
  const int64_t s = std::upper_bound(b.shares, b.shares + b.count, i, after) - b.shares - 1;
  const Share& share = b.shares[s];
  const int64_t block = (i - share.first) / share.chunks, row = block % share.blocks * kv_rows;
  Located at;
  at.item = {b.table + s * b.table_stride, block / share.blocks, b.starts[s], b.tokens(s), b.lengths[s], row,
             std::min(kv_rows, b.tokens(s) * b.query.group - row)};
  at.place = (i - share.first) % share.chunks;
  at.chunk = share.chunk + at.place;
  at.chunks = share.chunks;
  at.floats = share.floats + block * share.chunks * b.block_floats(s);
  return at;
}

void attend(Batch& b) {
  const int64_t threads = torch::stable::get_num_threads(), row_floats = kv_partial(b.query.pages.head_dim);
  b.shares = (Share*)scratch(1, size_t(b.count + 1) * sizeof(Share));
  const int64_t work = share_out(b, false), whole = b.shares[b.count].first;
  if (threads > 1 && whole < 4 * threads) share_out(b, true);
  const int64_t items = b.shares[b.count].first;
  const bool split = items > whole;
  float* partials = split ? (float*)scratch(2, size_t(b.shares[b.count].floats) * 4) : nullptr;
  const Tier& kernels = tier();
  const bool worthwhile = work >= 64;
  const auto memory = [&] { return scratch(0, size_t(kernels.kv_scratch)); };
  parallel(items, worthwhile, [&](int64_t i) {
    const Located at = locate(b, i);
    if (!split) return kernels.kv4_attend(b.query, at.item, memory());
    float* partial = partials + at.floats + at.place * at.item.rows * row_floats;
    kernels.kv4_attend_chunk(b.query, at.item, at.chunk, partial, memory());
  });
  if (split)
    parallel(items, worthwhile, [&](int64_t i) {
      const Located at = locate(b, i);
      if (at.place == 0) kernels.kv4_merge(b.query, at.item, at.chunks, partials + at.floats, memory());
    });
}

void kv4_attention(const Tensor& query, const Tensor& cache, const Tensor& query_start, const Tensor& seq_lens,
                   const Tensor& block_table, const Tensor& out, double scale, int64_t rotate, bool symmetric,
                   int64_t window, double cap) {
  REQUIRE(query.dim() == 3, "query must be [tokens, heads, d]");
  const int64_t heads = query.size(1), dim = query.size(2), rows = query.size(0);
  Batch b{};
  KVQuery& q = b.query;
  q.pages = pages_of(cache, dim, symmetric);
  b.kv_heads = cache.size(1);
  REQUIRE(b.kv_heads > 0 && heads % b.kv_heads == 0, heads, " query heads for ", b.kv_heads, " KV heads");
  q.dtype = check_heads(query, heads, dim, "query");
  REQUIRE(check_heads(out, heads, dim, "out") == q.dtype && out.size(0) == rows, "out is not like query");
  b.starts = check_indices<int32_t>(query_start, 1, "query_start");
  b.lengths = check_indices<int32_t>(seq_lens, 1, "seq_lens");
  b.table = check_indices<int32_t>(block_table, 2, "block_table");
  b.count = seq_lens.size(0);
  REQUIRE(query_start.size(0) == b.count + 1 && block_table.size(0) >= b.count,
          "query_start or block_table does not fit ", b.count, " sequences");
  b.table_stride = block_table.stride(0);
  q.query = query.const_data_ptr();
  q.out = out.data_ptr();
  q.query_token = query.stride(0), q.query_head = query.stride(1);
  q.out_token = out.stride(0), q.out_head = out.stride(1);
  q.group = heads / b.kv_heads;
  q.rotate = check_rotate(rotate, dim);
  REQUIRE(window >= 0, "window must be positive, or 0 for none, not ", window);
  q.window = window;
  REQUIRE(cap >= 0 && std::isfinite(cap), "cap must be positive, or 0 for none, not ", cap);
  q.cap = float(cap);
  q.scale = float(scale);
  check_batch(b, rows, cache.size(0), block_table.size(1));
  attend(b);
  for (int64_t t = b.starts[b.count]; t < rows; t++)
    for (int64_t h = 0; h < heads; h++)
      memset((char*)q.out + (t * q.out_token + h * q.out_head) * size_of(q.dtype), 0, size_t(dim * size_of(q.dtype)));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rotquant, CPU, m) {
  m.impl("kv4_write", TORCH_BOX(&kv4_write));
  m.impl("kv4_attention", TORCH_BOX(&kv4_attention));
}

}  // namespace rotquant
