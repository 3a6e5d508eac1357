#include "dispatch.h"

#include <atomic>

namespace synthward {

namespace baseline {
extern const KernelTable table;
}
#if defined(__x86_64__) || defined(_M_X64)
namespace avx2 {
extern const KernelTable table;
}
namespace avx512 {
extern const KernelTable table;
}
#endif

namespace {

std::vector<const KernelTable*> usable() {
  std::vector<const KernelTable*> found{&baseline::table};
#if defined(__x86_64__) || defined(_M_X64)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&avx2::table);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    found.push_back(&avx512::table);
#endif
  return found;
}

std::atomic<const KernelTable*> forced{nullptr};

}  // namespace

const KernelTable& kernels() {
  if (const KernelTable* table = forced.load(std::memory_order_relaxed)) return *table;
  static const KernelTable* best = usable().back();
  return *best;
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const KernelTable* table : usable()) names.emplace_back(table->name);
  return names;
}

bool force_isa(const std::string& name) {
  if (name.empty()) {
    forced.store(nullptr);
    return true;
  }
  for (const KernelTable* table : usable())
    if (name == table->name) {
      forced.store(table);
      return true;
    }
  return false;
}

}  // namespace synthward
