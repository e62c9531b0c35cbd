// Which tier runs: the best that the processor can do, until `cpu_tier` chooses another.
#include "binding.h"
#include "processor.h"

namespace rotquant {
namespace {

const Tier* find(const std::string& name) {
  const Tier* found = find_tier(name);
  REQUIRE(found, "this machine has no kernels of the tier '", name,
          "': auto, amx, avx512, avxvnni, avx2, i8mm, neon, scalar or reference");
  return found;
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
