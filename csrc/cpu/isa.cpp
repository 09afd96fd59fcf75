#include "balanced_rep/isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__) && !defined(BR_BASE_ONLY)
#include <cpuid.h>
#endif
#if defined(BR_AMX) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace balanced_rep {

#if defined(__aarch64__)
namespace neon {
extern const Kernels kernels;
extern const JvpKernels jvp_kernels;
}  // namespace neon
#else
namespace base {
extern const Kernels kernels;
extern const JvpKernels jvp_kernels;
}  // namespace base
#endif
#if defined(__x86_64__) && !defined(BR_BASE_ONLY)
namespace avx2 {
extern const Kernels kernels;
extern const JvpKernels jvp_kernels;
}  // namespace avx2
namespace avx512 {
extern const Kernels kernels;
extern const JvpKernels jvp_kernels;
#ifdef BR_AMX
extern const JvpKernels amx_jvp_kernels;
#endif
}  // namespace avx512
#endif

namespace {

struct Candidate {
  const char* name;
  const Kernels* kernels;
  const JvpKernels* jvp_kernels;
  bool usable;
};

#if defined(__x86_64__) && !defined(BR_BASE_ONLY)
bool has_f16c() {  // not every compiler's __builtin_cpu_supports knows it
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C) != 0;
}
#endif

#ifdef BR_AMX
// Products of bfloat16 tiles, and the rounding to bfloat16 that goes with them: the processor's, and Linux's leave for
// this process to use the registers.
bool may_use_tiles() {
#ifdef __linux__
  unsigned eax, ebx, ecx, edx;
  constexpr unsigned kTileBf16 = 1u << 22, kTile = 1u << 24, kRounding = 1u << 5;  // AMX-BF16, AMX-TILE, AVX512_BF16
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & kTileBf16) == 0 || (edx & kTile) == 0) return false;
  if (!__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) || (eax & kRounding) == 0) return false;
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}
#endif

std::vector<Candidate> find_candidates() {
#if defined(__aarch64__)
  return {{"neon", &neon::kernels, &neon::jvp_kernels, true}};
#elif defined(__x86_64__) && !defined(BR_BASE_ONLY)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return {
      {"base", &base::kernels, &base::jvp_kernels, true},
      {"avx2", &avx2::kernels, &avx2::jvp_kernels, avx2},
      {"avx512", &avx512::kernels, &avx512::jvp_kernels, avx512},
#ifdef BR_AMX
      {"amx", &avx512::kernels, &avx512::amx_jvp_kernels, avx512 && may_use_tiles()},
#endif
  };
#else
  return {{"base", &base::kernels, &base::jvp_kernels, true}};
#endif
}

// Slowest first.
const std::vector<Candidate>& candidates() {
  static const std::vector<Candidate> all = find_candidates();
  return all;
}

std::string joined(const std::vector<std::string>& names) {
  std::string all;
  for (const std::string& name : names) all += (all.empty() ? "" : ", ") + name;
  return all;
}

std::atomic<const Candidate*> active{nullptr};

}  // namespace

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names;
  for (const Candidate& c : candidates()) names.push_back(c.name);
  return names;
}

std::vector<std::string> usable_isas() {
  std::vector<std::string> names;
  for (const Candidate& c : candidates()) {
    if (c.usable) names.push_back(c.name);
  }
  return names;
}

void set_isa(const std::string& name) {
  for (const Candidate& c : candidates()) {
    if (name == c.name && c.usable) {
      active = &c;
      return;
    }
  }
  throw std::invalid_argument("instruction set '" + name + "' cannot be used: this processor runs " +
                              joined(usable_isas()) + ", the extension was compiled for " + joined(compiled_isas()));
}

void choose_isa() {
  const char* const asked = std::getenv("BALANCED_REP_ISA");
  if (asked == nullptr || *asked == '\0') {
    set_isa(usable_isas().back());
    return;
  }
  try {
    set_isa(asked);
  } catch (const std::invalid_argument& e) {
    throw std::invalid_argument(std::string("BALANCED_REP_ISA: ") + e.what());
  }
}

std::string isa() { return active.load(std::memory_order_relaxed)->name; }
const Kernels& kernels() { return *active.load(std::memory_order_relaxed)->kernels; }
const JvpKernels& jvp_kernels() { return *active.load(std::memory_order_relaxed)->jvp_kernels; }

}  // namespace balanced_rep
