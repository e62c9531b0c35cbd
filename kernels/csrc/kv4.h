// The 4-bit KV cache: writing pages, attention over them.
#pragma once

#include "kv4_attention.h"
