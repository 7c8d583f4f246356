// AVX2 with FMA and F16C: products are fp32; 16 registers hold 4 rows times 3 tokens.
#if defined(__x86_64__)

#include <immintrin.h>

#include "spread.h"

#define TARGET __attribute__((target("avx2,fma,f16c,bmi,bmi2,popcnt")))
#define LANES 8

static inline __attribute__((always_inline)) TARGET __m256 half_load(const void *p) {
  return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
}

static inline __attribute__((always_inline)) TARGET void half_store(__m256 v, void *p) {
  _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

#include "rows.inc.h"

enum kind { BF16, FP16, FP32 };

typedef __m256 vec;
#define MAX_PARTS 1
#define PARTS(kind) 1
#define BLOCK_TOKENS 3
#define VALUE_BYTES(kind) ((kind) == FP32 ? 4 : 2)

INLINE vec zero(void) { return _mm256_setzero_ps(); }

INLINE vec load_vec(const void *p) { return _mm256_load_ps((const float *)p); }

INLINE vec multiply_add(const int kind, vec sum, vec w, vec x) {
  (void)kind;
  return _mm256_fmadd_ps(w, x, sum);
}

INLINE void sums_of(vec a, vec b, vec c, vec d, float *out) {
  const vec pairs = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
}

INLINE void prefetch(const uint8_t *p) { _mm_prefetch((const char *)p, _MM_HINT_T1); }

INLINE __m128i table_words(const uint8_t *row) { return _mm_load_si128((const __m128i *)row); }

INLINE __m256i table_floats(const void *row) { return _mm256_load_si256((const __m256i *)row); }

// up to 16 bytes at p, zeros for those at `end` and behind
INLINE __m128i load_words(const uint8_t *p, const uint8_t *end) {
  uint8_t bytes[16] = {0};
  if (end - p >= 16) return _mm_loadu_si128((const __m128i *)p);
  if (end > p) memcpy(bytes, p, end - p);
  return _mm_loadu_si128((const __m128i *)bytes);
}

INLINE __m256 load_floats(const uint8_t *p, const uint8_t *end) {
  float values[8] = {0};
  if (end - p >= 32) return _mm256_loadu_ps((const float *)p);
  if (end > p) memcpy(values, p, end - p);
  return _mm256_loadu_ps(values);
}

INLINE __m256 decode_floats(const int form, const uint8_t *p, uint32_t bits, const uint8_t *end) {
  if (form == DENSE) return load_floats(p, end);
  if (form == TWO_FOUR) {
    const __m256i kept = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)p));
    return _mm256_castsi256_ps(_mm256_shuffle_epi8(kept, table_floats(spread_floats[bits])));
  }
  const __m256 spread = _mm256_permutevar8x32_ps(load_floats(p, end), table_floats(spread_lane[bits]));
  return _mm256_and_ps(spread, _mm256_castsi256_ps(table_floats(spread_kept[bits])));
}

INLINE void decode(const int kind, const int form, const uint8_t *p, uint32_t bits, const uint8_t *end, vec *out) {
  if (kind == FP32) {
    *out = decode_floats(form, p, bits, end);
    return;
  }
  // the four values of a 2:4 byte, or up to eight
  const __m128i kept = form == TWO_FOUR ? _mm_loadl_epi64((const __m128i *)p) : load_words(p, end);
  if (kind == FP16) {
    *out = _mm256_cvtph_ps(form == DENSE ? kept : _mm_shuffle_epi8(kept, table_words(spread_words[bits])));
  } else if (form == DENSE) {
    *out = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(kept), 16));
  } else {
    const __m256i both =
        form == TWO_FOUR ? _mm256_set1_epi64x(_mm_cvtsi128_si64(kept)) : _mm256_broadcastsi128_si256(kept);
    *out = _mm256_castsi256_ps(_mm256_shuffle_epi8(both, table_floats(spread_upper[bits])));
  }
}

#include "bytes.inc.h"

// decoded weights are fp32, whatever they were
DEFINE_BLOCKS(multiply_floats, FP32)
DEFINE_KIND(bf16, BF16, multiply_floats)
DEFINE_KIND(fp16, FP16, multiply_floats)
DEFINE_KIND(fp32, FP32, multiply_floats)

// eight columns to `to`; `past`: past the caches
INLINE void put_words(__m128i part, const int past, char *to) {
  if (past) _mm_stream_si128((__m128i *)to, part);
  else _mm_storeu_si128((__m128i *)to, part);
}

INLINE void put_floats(__m256 part, const int past, char *to) {
  if (past) _mm256_stream_ps((float *)to, part);
  else _mm256_storeu_ps((float *)to, part);
}

INLINE void unpack_octets(const int form, const int value_bytes, const int past, const matrix *w, int64_t row, char *to) {
  const uint8_t *p = w->values + row * w->value_row, *index = w->index + row * w->index_row;
  const uint8_t *end = p + w->columns * w->step_bytes / STEP;
  for (int64_t at = 0; at < w->columns / 8; at++, to += 8 * value_bytes) {
    const uint32_t bits = index[at];
    if (at % OCTETS == 0) prefetch(p + AHEAD);
    if (value_bytes == 4) {
      put_floats(decode_floats(form, p, bits, end), past, to);
    } else {
      // the four values of a 2:4 byte, or up to eight
      const __m128i kept = form == TWO_FOUR ? _mm_loadl_epi64((const __m128i *)p) : load_words(p, end);
      put_words(_mm_shuffle_epi8(kept, table_words(spread_words[bits])), past, to);
    }
    p += form == TWO_FOUR ? 4 * value_bytes : __builtin_popcount(bits) * value_bytes;
  }
}

INLINE void unpack_past(const int value_bytes, const int past, const matrix *w, int64_t row, char *out) {
  if (w->form == TWO_FOUR) unpack_octets(TWO_FOUR, value_bytes, past, w, row, out);
  else unpack_octets(ANY_NM, value_bytes, past, w, row, out);
}

static TARGET void unpack_row(const matrix *w, int64_t row, int value_bytes, void *out, int streaming) {
  const int past = streaming && (uintptr_t)out % 32 == 0;
  if (value_bytes == 2 && past) unpack_past(2, 1, w, row, out);
  else if (value_bytes == 2) unpack_past(2, 0, w, row, out);
  else if (past) unpack_past(4, 1, w, row, out);
  else unpack_past(4, 0, w, row, out);
}

static TARGET void unpack_end(void) { _mm_sfence(); }

#define KERNEL(name) \
  {.x_bytes = 4, .few_block = 3, .many_block = 3, .many_from = 4, .few = name##_few, .many = name##_many}

const path path_avx2 = {
    .name = "avx2",
    .kernels = {KERNEL(bf16), KERNEL(fp16), KERNEL(fp32)},
    .quantised = quantised_avx2,
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
