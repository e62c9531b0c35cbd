// Where the parts of a page of the 4-bit KV cache lie.
#pragma once

#include <cstdint>

#include "tier.h"

namespace RQ_TIER {
namespace {

using namespace rotquant;

// Where 16 tokens lie in their (block, head) plane; see reference.py, kv_planes.
struct Subtile {
  uint8_t *keys, *values;  // tiles of codes
  uint8_t *key_scale, *value_scale, *zeros;
};

// `place`: the first token's position in its page, a multiple of 16.
inline Subtile subtile_of(const KVPages& p, int64_t block, int64_t head, int64_t place) {
  const int64_t n = p.tokens, codes = n * p.head_dim / 2;  // bytes of K's codes, and of V's
  uint8_t* plane = p.data + block * p.block_stride + head * p.head_stride;
  uint8_t *keys = plane + place * p.head_dim / 2, *scales = plane + 2 * codes;
  return {keys, keys + codes, scales + 2 * place, scales + 2 * (n + place), scales + 4 * n + place};
}

}  // namespace
}  // namespace RQ_TIER
