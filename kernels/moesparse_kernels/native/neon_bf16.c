// NEON with the bf16 products of Armv8.6: Graviton 3, Apple M2 and later. Right by emulation; on no machine measured.
#if defined(__aarch64__)

#ifdef __clang__
#define TARGET __attribute__((target("bf16")))
#else
#define TARGET __attribute__((target("arch=armv8.2-a+bf16")))
#endif
#define HAS_BF16

#include "neon.inc.h"

DEFINE_BLOCKS(multiply_words, BF16_DOT)
DEFINE_KIND(bf16, BF16_DOT, multiply_words)

const kernel kernel_bf16_neon = {
    .x_bytes = 2, .few_block = 6, .many_block = 6, .many_from = 7, .few = bf16_few, .many = bf16_many};

#endif
