// AVX-512 with the products of the matrix units: the GEMM and attention.
#define RQ_AVX512
#define RQ_AMX
#define RQ_TIER rotquant_amx
#define RQ_TABLE tier_amx
#define RQ_NAME "amx"
#include "kernels.h"
