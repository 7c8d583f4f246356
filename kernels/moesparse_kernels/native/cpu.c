#include "cpu.h"

#include <stdint.h>

// own code, because __builtin_cpu_supports says nothing under some compilers and would leave the slow path

#if defined(__x86_64__)

#include <cpuid.h>

typedef struct {
  uint32_t eax, ebx, ecx, edx;
} registers;

static registers cpuid(uint32_t leaf, uint32_t subleaf) {
  registers r = {0, 0, 0, 0};
  if (!__get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx)) r = (registers){0, 0, 0, 0};
  return r;
}

static int all(uint32_t flags, uint32_t wanted) { return (flags & wanted) == wanted; }

// the register files that the operating system saves
static uint64_t saved_state(void) {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t)high << 32 | low;
}

cpu_features detect_cpu(void) {
  cpu_features found = {0};
  const registers basic = cpuid(1, 0), more = cpuid(7, 0), rest = cpuid(7, 1);
  if (!all(basic.ecx, bit_OSXSAVE | bit_AVX | bit_FMA | bit_F16C | bit_POPCNT)) return found;
  const uint64_t ymm = 1u << 1 | 1u << 2, zmm = ymm | 1u << 5 | 1u << 6 | 1u << 7, saved = saved_state();
  if ((saved & ymm) != ymm || !all(more.ebx, bit_AVX2 | bit_BMI | bit_BMI2)) return found;
  found.avx2 = 1;
  const uint32_t avx512 = bit_AVX512F | bit_AVX512BW | bit_AVX512VL | bit_AVX512DQ;
  // no CPU has the one of these two without the other
  const uint32_t values = bit_AVX512VBMI2 | bit_AVX512VNNI;
  if ((saved & zmm) != zmm || !all(more.ebx, avx512) || !all(more.ecx, values)) return found;
  found.avx512_vbmi2 = 1;
  found.avx512_bf16 = all(rest.eax, bit_AVX512BF16);
  found.avx512_fp16 = more.edx >> 23 & 1;
  found.amx_bf16 = more.edx >> 22 & 1;
  found.amx_fp16 = rest.eax >> 21 & 1;
  return found;
}

#elif defined(__aarch64__)

#if defined(__linux__)
#include <sys/auxv.h>

cpu_features detect_cpu(void) {
  // HWCAP2_BF16, by number because old C libraries do not name it; NEON is part of the architecture
  return (cpu_features){.neon = 1, .neon_bf16 = (getauxval(AT_HWCAP2) >> 14 & 1) != 0};
}
#elif defined(__APPLE__)
#include <stddef.h>
#include <sys/sysctl.h>

cpu_features detect_cpu(void) {
  int has_bf16 = 0;
  size_t size = sizeof has_bf16;
  if (sysctlbyname("hw.optional.arm.FEAT_BF16", &has_bf16, &size, NULL, 0) != 0) has_bf16 = 0;
  return (cpu_features){.neon = 1, .neon_bf16 = has_bf16 != 0};
}
#else
cpu_features detect_cpu(void) { return (cpu_features){.neon = 1}; }
#endif

#else

cpu_features detect_cpu(void) { return (cpu_features){0}; }

#endif
