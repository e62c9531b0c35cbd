// A small vector of float32 in four tiers: AVX-512 (16 lanes), AVX2 (8), NEON (4), scalar (1, any machine).
//
// Each tier compiles the kernels once more, in a file and a namespace of its own (tier_*.cpp defines
// RQ_TIER and one of RQ_AVX512, RQ_AVX2, RQ_NEON, RQ_SCALAR). Nothing here may be an inline function of another
// library: the linker would be free to keep the copy that needs AVX-512.
#pragma once

#if defined(RQ_AVX512)
#include "vec_avx512.h"
#elif defined(RQ_AVX2)
#include "vec_avx2.h"
#elif defined(RQ_NEON)
#include "vec_neon.h"
#else
#include "vec_scalar.h"
#endif
