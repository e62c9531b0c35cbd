// AVX-512 with the products of the matrix units: the GEMM and attention.
#define RQ_AVX512
#define RQ_AMX
#define RQ_TIER rotquant_amx
#include "gemm.h"
#include "kv4_attention.h"

namespace rotquant {
namespace {

Tier with_matrix_units() {
  Tier tier = tier_avx512;
  tier.name = "amx";
  tier.gemm_panel = RQ_TIER::gemm_panel;
  tier.tile_rows = 32;
  tier.kv4_attend = RQ_TIER::kv4_attend;
  tier.kv4_attend_chunk = RQ_TIER::kv4_attend_chunk;
  tier.kv4_merge = RQ_TIER::kv4_merge;
  tier.kv_scratch = sizeof(RQ_TIER::Block);
  return tier;
}

}  // namespace

const Tier tier_amx = with_matrix_units();
}  // namespace rotquant
