// AVX2 with the dot products of VNNI.
#define RQ_AVX2
#define RQ_AVXVNNI
#define RQ_TIER rotquant_avxvnni
#define RQ_TABLE tier_avxvnni
#define RQ_NAME "avxvnni"
#include "kernels.h"
