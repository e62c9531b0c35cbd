// NEON with the GEMM of the matrix products.
#define RQ_NEON
#define RQ_I8MM
#define RQ_TIER rotquant_i8mm
#define RQ_TABLE tier_i8mm
#define RQ_NAME "i8mm"
#include "kernels.h"
