// What this machine's processor can do: its tiers, the best first.
#pragma once

#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

#include "tier.h"

namespace rotquant {
namespace {

#if defined(__x86_64__)
// Whether the processor has AMX for int8 and Linux lets this process use its registers, which has to be asked for.
bool tiles_granted() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 24 & 1) || !(d >> 25 & 1)) return false;
#if defined(SYS_arch_prctl)
  constexpr long request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

// Whether it converts float16, which compilers older than GCC 11 do not know by name.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
}

// Whether it has VNNI in the encoding of AVX2.
bool has_avxvnni() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
#endif

// The tier of this name, the best one without a name; null where the machine has none of it.
const Tier* find_tier(const std::string& name) {
  const auto wanted = [&](const Tier& tier) { return name.empty() || name == tier.name; };
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512vnni");
  if (avx512 && wanted(tier_amx) && tiles_granted()) return &tier_amx;
  if (avx512 && wanted(tier_avx512)) return &tier_avx512;
  if (avx2 && wanted(tier_avxvnni) && has_avxvnni()) return &tier_avxvnni;
  if (avx2 && wanted(tier_avx2)) return &tier_avx2;
#elif defined(__aarch64__) && defined(__linux__)
  constexpr unsigned long dot_products = 1ul << 20, matrix_products = 1ul << 13;  // of AT_HWCAP, of AT_HWCAP2
  const bool neon = getauxval(AT_HWCAP) & dot_products, i8mm = neon && (getauxval(AT_HWCAP2) & matrix_products);
  if (i8mm && wanted(tier_i8mm)) return &tier_i8mm;
  if (neon && wanted(tier_neon)) return &tier_neon;
#endif
  return wanted(tier_scalar) ? &tier_scalar : nullptr;
}

}  // namespace
}  // namespace rotquant
