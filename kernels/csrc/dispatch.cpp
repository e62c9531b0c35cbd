// Which tier runs: chosen once by what the processor can do, or by ROTQUANT_CPU_TIER.
#include "binding.h"

namespace rotquant {
namespace {

const Tier* find(const std::string& name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512vnni");
  if (avx512 && (name.empty() || name == tier_avx512.name)) return &tier_avx512;
  if (avx2 && (name.empty() || name == tier_avx2.name)) return &tier_avx2;
#endif
  if (name.empty() || name == tier_scalar.name) return &tier_scalar;
  REQUIRE(false, "ROTQUANT_CPU_TIER=", name, " is not a tier of this machine: avx512, avx2 or scalar");
}

const Tier*& chosen() {
  static const Tier* current = [] {
    const char* wanted = getenv("ROTQUANT_CPU_TIER");
    return find(wanted ? wanted : "");
  }();
  return current;
}

// Name of the tier in use; a name other than "" is chosen first (tests run all tiers in one process).
std::string cpu_tier(const std::string& name) {
  if (!name.empty()) chosen() = find(name);
  return chosen()->name;
}

}  // namespace

const Tier& tier() { return *chosen(); }

STABLE_TORCH_LIBRARY_FRAGMENT(rotquant, m) { m.def("cpu_tier(str name) -> str"); }
STABLE_TORCH_LIBRARY_IMPL(rotquant, CompositeExplicitAutograd, m) { m.impl("cpu_tier", TORCH_BOX(&cpu_tier)); }

}  // namespace rotquant
