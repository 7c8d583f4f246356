// The kernels of the two NEON paths. The includer defines TARGET, and HAS_BF16 where the CPU multiplies bf16.

#include <arm_neon.h>
#include <string.h>

#include "path.h"
#include "spread.h"

// BF16_DOT: bf16 pairs into fp32 (`x` stays bf16); the others widen to fp32
enum kind { BF16, FP16, FP32, BF16_DOT };

typedef float32x4_t vec;
#define MAX_PARTS 2
#define PARTS(kind) ((kind) == BF16_DOT ? 1 : 2)
#define BLOCK_TOKENS 6
#define VALUE_BYTES(kind) ((kind) == FP32 ? 4 : 2)

INLINE vec zero(void) { return vdupq_n_f32(0.0f); }

INLINE vec load_vec(const void *p) { return vld1q_f32((const float *)p); }

INLINE vec multiply_add(const int kind, vec sum, vec w, vec x) {
#ifdef HAS_BF16
  if (kind == BF16_DOT) return vbfdotq_f32(sum, vreinterpretq_bf16_f32(w), vreinterpretq_bf16_f32(x));
#else
  (void)kind;
#endif
  return vfmaq_f32(sum, w, x);
}

INLINE void sums_of(vec a, vec b, vec c, vec d, float *out) {
  vst1q_f32(out, vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d)));
}

INLINE void prefetch(const uint8_t *p) { __builtin_prefetch(p, 0, 2); }

// up to 16 bytes at p, zeros for those at `end` and behind
INLINE uint8x16_t load_bytes(const uint8_t *p, const uint8_t *end) {
  uint8_t bytes[16] = {0};
  if (end - p >= 16) return vld1q_u8(p);
  if (end > p) memcpy(bytes, p, end - p);
  return vld1q_u8(bytes);
}

INLINE void decode_floats(const int form, const uint8_t *p, uint32_t bits, const uint8_t *end, vec *out) {
  if (form == DENSE) {
    for (int part = 0; part < 2; part++) out[part] = vreinterpretq_f32_u8(load_bytes(p + 16 * part, end));
    return;
  }
  for (int part = 0; part < 2; part++) {
    const uint8x16_t from = vld1q_u8(spread_floats[bits] + 16 * part);
    if (form == TWO_FOUR) {
      out[part] = vreinterpretq_f32_u8(vqtbl1q_u8(vld1q_u8(p), from));
    } else {
      const uint8x16x2_t kept = {{load_bytes(p, end), load_bytes(p + 16, end)}};
      out[part] = vreinterpretq_f32_u8(vqtbl2q_u8(kept, from));
    }
  }
}

// eight 16-bit columns
INLINE uint16x8_t decode_words(const int form, const uint8_t *p, uint32_t bits, const uint8_t *end) {
  if (form == DENSE) return vreinterpretq_u16_u8(load_bytes(p, end));
  const uint8x16_t kept = form == TWO_FOUR ? vcombine_u8(vld1_u8(p), vdup_n_u8(0)) : load_bytes(p, end);
  return vreinterpretq_u16_u8(vqtbl1q_u8(kept, vld1q_u8(spread_words[bits])));
}

INLINE void decode(const int kind, const int form, const uint8_t *p, uint32_t bits, const uint8_t *end, vec *out) {
  if (kind == FP32) {
    decode_floats(form, p, bits, end, out);
    return;
  }
  const uint16x8_t words = decode_words(form, p, bits, end);
  if (kind == BF16_DOT) {
    out[0] = vreinterpretq_f32_u16(words);
  } else if (kind == BF16) {
    out[0] = vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(words), 16));
    out[1] = vreinterpretq_f32_u32(vshll_n_u16(vget_high_u16(words), 16));
  } else {
    out[0] = vcvt_f32_f16(vreinterpret_f16_u16(vget_low_u16(words)));
    out[1] = vcvt_f32_f16(vreinterpret_f16_u16(vget_high_u16(words)));
  }
}

#include "bytes.inc.h"
