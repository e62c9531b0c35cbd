// Which tier runs: the best that the processor can do, until `cpu_tier` chooses another.
#include <sys/syscall.h>
#include <unistd.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "binding.h"

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
#endif

const Tier* find(const std::string& name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512vnni");
  if (avx512 && (name.empty() || name == tier_amx.name) && tiles_granted()) return &tier_amx;
  if (avx512 && (name.empty() || name == tier_avx512.name)) return &tier_avx512;
  if (avx2 && (name.empty() || name == tier_avx2.name)) return &tier_avx2;
#endif
  if (name.empty() || name == tier_scalar.name) return &tier_scalar;
  REQUIRE(false, "this machine has no kernels of the tier '", name, "': auto, amx, avx512, avx2, scalar or reference");
}

const Tier*& chosen() {
  static const Tier* current = find("");
  return current;
}

// Name of the tier in use; a name other than "" is chosen first, "auto" is the best one.
std::string cpu_tier(const std::string& name) {
  if (!name.empty()) chosen() = find(name == "auto" ? "" : name);
  return chosen()->name;
}

}  // namespace

const Tier& tier() { return *chosen(); }

STABLE_TORCH_LIBRARY_FRAGMENT(rotquant, m) { m.def("cpu_tier(str name) -> str"); }
STABLE_TORCH_LIBRARY_IMPL(rotquant, CompositeExplicitAutograd, m) { m.impl("cpu_tier", TORCH_BOX(&cpu_tier)); }

}  // namespace rotquant
