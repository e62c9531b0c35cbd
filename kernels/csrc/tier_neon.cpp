#define RQ_NEON
#define RQ_TIER rotquant_neon
#define RQ_TABLE tier_neon
#define RQ_NAME "neon"
#include "kernels.h"
