// Weights of 8 and 4 bits by NEON, any 64-bit Arm: values and x meet as 16 bits, 4 products an instruction. Right by
// emulation; on no machine measured.
#if defined(__aarch64__)

#include <arm_neon.h>
#include <string.h>

#define TARGET

#include "path.h"
#include "spread.h"

// of sums, and of eight 16-bit values
typedef int32x4_t ints;
typedef float32x4_t floats;
typedef uint8x8_t octet;

#define COLUMNS 8
#define MOST_TOKENS 4

INLINE ints zero_ints(void) { return vdupq_n_s32(0); }

INLINE floats zero_floats(void) { return vdupq_n_f32(0.0f); }

INLINE ints load_ints(const void *p) { return vld1q_s32(p); }

INLINE ints own_register(ints v) {
  __asm__("" : "+w"(v));
  return v;
}

INLINE void prefetch(const uint8_t *p) { __builtin_prefetch(p, 0, 2); }

INLINE ints add_products(const int wide, ints sums, ints w, ints x) {
  const int16x8_t a = vreinterpretq_s16_s32(w), b = vreinterpretq_s16_s32(x);
  (void)wide;
  return vmlal_high_s16(vmlal_s16(sums, vget_low_s16(a), vget_low_s16(b)), a, b);
}

INLINE floats add_scaled_ints(floats sums, ints whole, floats scale) {
  return vfmaq_f32(sums, vcvtq_f32_s32(whole), scale);
}

INLINE floats splat_scale(float s) { return vdupq_n_f32(s); }

INLINE floats halves_scale(float a, float b) { return vcombine_f32(vdup_n_f32(a), vdup_n_f32(b)); }

INLINE float half_value(uint16_t bits) {
  const float16x4_t half = vreinterpret_f16_u16(vdup_n_u16(bits));
  return vgetq_lane_f32(vcvt_f32_f16(half), 0);
}

INLINE void sums_of(floats a, floats b, floats c, floats d, float *out) {
  vst1q_f32(out, vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d)));
}

INLINE octet load_octet(const uint8_t *p) { return vld1_u8(p); }

INLINE octet spread_octet(octet values, uint32_t bits) { return vtbl1_u8(values, vld1_u8(spread_bytes[bits])); }

INLINE ints widen_octets(const octet *parts) {
  return vreinterpretq_s32_s16(vmovl_s8(vreinterpret_s8_u8(parts[0])));
}

INLINE void split_halves(const uint8_t *p, uint8_t *to) {
  const uint8x16_t both = vld1q_u8(p), offset = vdupq_n_u8(8);
  const uint8x16_t low = vandq_u8(both, vdupq_n_u8(15)), high = vshrq_n_u8(both, 4);
  vst1q_u8(to, vsubq_u8(vzip1q_u8(low, high), offset));
  vst1q_u8(to + 16, vsubq_u8(vzip2q_u8(low, high), offset));
}

#include "octets.inc.h"

const kernel quantised_neon[2] = KERNELS;

#endif
