// Everything a tier is made of; included once by each tier_*.cpp.
//
// The table is constant, its entries all of this file: a constructor would be compiled with the tier's instructions and
// run where the library is loaded, on processors that lack them.
#pragma once

#include "experts.h"
#include "gemm.h"
#include "kv4_attention.h"
#include "kv4_write.h"
#include "low_rank.h"
#include "rows.h"
#include "silu.h"
#include "stages.h"
#include "tier.h"

namespace rotquant {
constinit const Tier RQ_TABLE = {
    RQ_NAME,
    RQ_TIER::load_row,
    RQ_TIER::load_silu_mul,
    RQ_TIER::transform_row,
    RQ_TIER::quantize_row,
    RQ_TIER::project_row,
    RQ_TIER::subtract_row,
    RQ_TIER::gemm_panel,
    RQ_TIER::PANEL_ROWS,
    RQ_TIER::add_rows,
    RQ_TIER::kv4_write,
    RQ_TIER::kv4_attend,
    RQ_TIER::kv4_attend_chunk,
    RQ_TIER::kv4_merge,
    sizeof(RQ_TIER::Block),
};
}  // namespace rotquant
