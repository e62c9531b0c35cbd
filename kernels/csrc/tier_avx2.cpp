#define RQ_AVX2
#define RQ_TIER rotquant_avx2
#define RQ_TABLE tier_avx2
#define RQ_NAME "avx2"
#include "kernels.h"
