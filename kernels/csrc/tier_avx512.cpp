#define RQ_AVX512
#define RQ_TIER rotquant_avx512
#define RQ_TABLE tier_avx512
#define RQ_NAME "avx512"
#include "kernels.h"
