// AVX-512 with the GEMM of the matrix units.
#define RQ_AVX512
#define RQ_AMX
#define RQ_TIER rotquant_amx
#include "gemm.h"

namespace rotquant {
namespace {

Tier with_matrix_units() {
  Tier tier = tier_avx512;
  tier.name = "amx";
  tier.gemm_panel = RQ_TIER::gemm_panel;
  tier.tile_rows = 32;
  return tier;
}

}  // namespace

const Tier tier_amx = with_matrix_units();
}  // namespace rotquant
