#define RQ_SCALAR
#define RQ_TIER rotquant_scalar
#define RQ_TABLE tier_scalar
#define RQ_NAME "scalar"
#include "kernels.h"
