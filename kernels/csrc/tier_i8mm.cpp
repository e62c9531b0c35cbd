// NEON with the GEMM of the matrix products.
#define RQ_NEON
#define RQ_I8MM
#define RQ_TIER rotquant_i8mm
#include "gemm.h"

namespace rotquant {
namespace {

Tier with_matrix_products() {
  Tier tier = tier_neon;
  tier.name = "i8mm";
  tier.gemm_panel = RQ_TIER::gemm_panel;
  tier.tile_rows = RQ_TIER::TILE_ROWS;
  return tier;
}

}  // namespace

const Tier tier_i8mm = with_matrix_products();
}  // namespace rotquant
