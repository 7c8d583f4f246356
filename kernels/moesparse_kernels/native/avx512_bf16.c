// AVX-512 with VBMI2 (expanding 16-bit values) and BF16 (their products): AMD from Zen 4, Intel from Sapphire Rapids on.
#if defined(__x86_64__)

#define TARGET \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,avx512bf16,fma,f16c,bmi,bmi2,popcnt")))
#define HAS_BF16

#include "avx512.inc.h"

DEFINE_KIND(bf16, BF16_DOT, SIZES_TO_12)

const kernel kernel_bf16_avx512 = {
    .x_bytes = 2, .few_block = 12, .many_block = 6, .many_from = 24, .few = bf16_few, .many = bf16_many};

#endif
