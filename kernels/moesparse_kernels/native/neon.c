// NEON, any 64-bit Arm: products are fp32. Right by emulation; on no machine measured.
#if defined(__aarch64__)

#define TARGET

#include "neon.inc.h"

#define LANES 4

static inline __attribute__((always_inline)) TARGET float32x4_t half_load(const void *p) {
  float16x4_t half;
  memcpy(&half, p, sizeof half);
  return vcvt_f32_f16(half);
}

static inline __attribute__((always_inline)) TARGET void half_store(float32x4_t v, void *p) {
  const float16x4_t half = vcvt_f16_f32(v);
  memcpy(p, &half, sizeof half);
}

#include "rows.inc.h"

DEFINE_BLOCKS(multiply_floats, FP32)
DEFINE_KIND(bf16, BF16, multiply_floats)
DEFINE_KIND(fp16, FP16, multiply_floats)
DEFINE_KIND(fp32, FP32, multiply_floats)

static void unpack_row(const matrix *w, int64_t row, int value_bytes, void *out, int streaming) {
  const uint8_t *p = w->values + row * w->value_row, *index = w->index + row * w->index_row;
  const uint8_t *end = p + w->columns * w->step_bytes / STEP;
  char *to = out;
  (void)streaming;
  for (int64_t at = 0; at < w->columns / 8; at++, to += 8 * value_bytes) {
    const uint32_t bits = index[at];
    if (at % OCTETS == 0) prefetch(p + AHEAD);
    if (value_bytes == 2) {
      const uint16x8_t part = decode_words(ANY_NM, p, bits, end);
      memcpy(to, &part, sizeof part);
    } else {
      vec parts[2];
      decode_floats(ANY_NM, p, bits, end, parts);
      memcpy(to, parts, sizeof parts);
    }
    p += __builtin_popcount(bits) * value_bytes;
  }
}

static void unpack_end(void) {}

#define KERNEL(name) \
  {.x_bytes = 4, .few_block = 4, .many_block = 4, .many_from = 5, .few = name##_few, .many = name##_many}

const path path_neon = {
    .name = "neon",
    .kernels = {KERNEL(bf16), KERNEL(fp16), KERNEL(fp32)},
    .quantised = quantised_neon,
    .widen = widen,
    .narrow = narrow,
    .activate = activate,
    .add = add,
    .add_scaled = add_scaled,
    .largest = largest,
    .quantise = quantise,
    .unpack_row = unpack_row,
    .unpack_end = unpack_end,
    .read_page = read_page,
};

#endif
