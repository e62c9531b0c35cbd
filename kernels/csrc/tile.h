// What the tiles of rows and channels of every tier share.
#pragma once

#include <cstdint>

#include "tier.h"

namespace RQ_TIER {
namespace {

using namespace rotquant;

// Packed weights that are wanted after those of a tile: cache lines fetched every 8 steps, from `at` on.
struct Ahead {
  const uint8_t* at;
  int64_t lines;
};

#if !defined(RQ_AMX)
// How many of the steps a matrix unit has done, and set acc to: none.
inline int64_t matrix(const uint8_t*, bool, const int8_t*, int64_t, int64_t, int64_t, uint8_t*, int32_t*) { return 0; }
#endif

}  // namespace
}  // namespace RQ_TIER
