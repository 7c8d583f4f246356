// AVX-512 with VBMI2 (expanding 16-bit values), bf16 multiplied as fp32: Intel Ice Lake, Tiger Lake. Also all that
// avx512_bf16.c does not do better.
#if defined(__x86_64__)

#include <immintrin.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,fma,f16c,bmi,bmi2,popcnt")))
#define LANES 16

static inline __attribute__((always_inline)) TARGET __m512 half_load(const void *p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}

static inline __attribute__((always_inline)) TARGET void half_store(__m512 v, void *p) {
  _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

#include "avx512.inc.h"
#include "rows.inc.h"

DEFINE_KIND(bf16, BF16_FMA, SIZES_TO_6)
DEFINE_KIND(fp16, FP16_FMA, SIZES_TO_6)
DEFINE_KIND(fp32, FP32_FMA, SIZES_TO_6)

// ---- unpacking

INLINE void store_dense(const int streaming, __m512i v, void *to) {
  if (streaming) _mm512_stream_si512(to, v);
  else _mm512_storeu_si512(to, v);
}

INLINE void unpack_words(const int form, const matrix *w, int64_t row, const int streaming, char *out) {
  const uint8_t *values = w->values + row * w->value_row, *index = w->index + row * w->index_row;
  const int rest = w->columns % STEP;
  int64_t k = 0;
  for (; k < w->columns / STEP; k++, values += w->step_bytes) {
    prefetch(values + AHEAD);
    store_dense(streaming, expand_words(form, 0, values, mask_at(form, index, k)), out + 64 * k);
  }
  if (rest) {
    const __m512i last = expand_words(form, 1, values, mask_of_rest(form, index, k, rest));
    _mm512_mask_storeu_epi16(out + 64 * k, (1u << rest) - 1, last);
  }
}

INLINE void unpack_floats(const int form, const matrix *w, int64_t row, const int streaming, char *out) {
  const uint8_t *values = w->values + row * w->value_row, *index = w->index + row * w->index_row;
  const int rest = w->columns % STEP;
  int64_t k = 0;
  for (; k < w->columns / STEP; k++, values += w->step_bytes) {
    const uint32_t mask = mask_at(form, index, k);
    prefetch(values + AHEAD);
    for (int upper = 0; upper < 2; upper++)
      store_dense(streaming, expand_floats(form, 0, values, mask, upper), out + 128 * k + 64 * upper);
  }
  if (rest) {
    const uint32_t mask = mask_of_rest(form, index, k, rest), columns = (1u << rest) - 1;
    for (int upper = 0; upper < 2; upper++) {
      const __m512i last = expand_floats(form, 1, values, mask, upper);
      _mm512_mask_storeu_epi32(out + 128 * k + 64 * upper, upper ? columns >> 16 : columns, last);
    }
  }
}

INLINE void unpack_form(const int form, const matrix *w, int64_t row, int value_bytes, char *out, const int streaming) {
  if (value_bytes == 2) unpack_words(form, w, row, streaming, out);
  else unpack_floats(form, w, row, streaming, out);
}

static TARGET void unpack_row(const matrix *w, int64_t row, int value_bytes, void *out, int streaming) {
  // streaming stores want whole cache lines
  if (streaming && (uintptr_t)out % 64 == 0) {
    if (w->form == TWO_FOUR) unpack_form(TWO_FOUR, w, row, value_bytes, out, 1);
    else unpack_form(ANY_NM, w, row, value_bytes, out, 1);
  } else {
    if (w->form == TWO_FOUR) unpack_form(TWO_FOUR, w, row, value_bytes, out, 0);
    else unpack_form(ANY_NM, w, row, value_bytes, out, 0);
  }
}

static TARGET void unpack_end(void) { _mm_sfence(); }

#define KERNEL(name) \
  .x_bytes = 4, .few_block = 6, .many_block = 6, .many_from = 13, .few = name##_few, .many = name##_many

const path path_avx512 = {
    .name = "avx512",
    .kernels = {{KERNEL(bf16), .even_first = 1}, {KERNEL(fp16)}, {KERNEL(fp32)}},
    .quantised = quantised_vnni,
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
