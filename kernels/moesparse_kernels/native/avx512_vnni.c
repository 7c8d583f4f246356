// AVX-512 with VBMI2 (expanding 8-bit values) and VNNI (their products): x of 8 bits meets values made unsigned, 64
// products an instruction; x of 13 bits meets 16-bit ones, 32.
#if defined(__x86_64__)

#include <immintrin.h>
#include <string.h>

#define TARGET \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,avx512vnni,fma,f16c,bmi,bmi2,popcnt")))

#include "path.h"

typedef __m512i ints;
typedef __m512 floats;

#define MOST_REGISTERS 2
#define REGISTERS(wide) ((wide) ? 2 : 1)
#define STARTS(wide) (!(wide))
#define MOST_TOKENS 4

INLINE ints zero_ints(void) { return _mm512_setzero_si512(); }

INLINE floats zero_floats(void) { return _mm512_setzero_ps(); }

INLINE ints load_ints(const void *p) { return _mm512_load_si512(p); }

INLINE ints own_register(ints v) {
  __asm__("" : "+v"(v));
  return v;
}

INLINE void prefetch(const uint8_t *p) { _mm_prefetch((const char *)p, _MM_HINT_T1); }

INLINE ints add_products(const int wide, ints sums, ints w, ints x) {
  return wide ? _mm512_dpwssd_epi32(sums, w, x) : _mm512_dpbusd_epi32(sums, w, x);
}

INLINE floats add_scaled_ints(floats sums, ints whole, floats scale) {
  return _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole), scale, sums);
}

INLINE floats splat_scale(float s) { return _mm512_set1_ps(s); }

INLINE floats halves_scale(float a, float b) { return _mm512_mask_mov_ps(_mm512_set1_ps(a), 0xFF00, _mm512_set1_ps(b)); }

INLINE float half_value(uint16_t bits) { return _cvtsh_ss(bits); }

INLINE void sums_of(floats a, floats b, floats c, floats d, float *out) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512 all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xEE));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}

// The values of so many bytes; `rest`: zeros behind them, which are not read. Else 2:4 reads what it has, for a masked load
// touches the cache line behind.
INLINE __m512i load_values(const int bits, const int form, const int rest, const uint8_t *p, int64_t bytes) {
  const int half = form == TWO_FOUR && !rest;
  const uint64_t which = _bzhi_u64(~0ull, bytes);
  if (bits == 8 && half) return _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)p));
  if (bits == 8) return _mm512_maskz_loadu_epi8(which, p);
  // the two of a byte into bytes of their own
  const __m256i pairs = half ? _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)p))
                             : _mm256_maskz_loadu_epi8((uint32_t)which, p);
  const __m512i words = half ? _mm512_castsi256_si512(_mm256_cvtepu8_epi16(_mm256_castsi256_si128(pairs)))
                             : _mm512_cvtepu8_epi16(pairs);
  return _mm512_and_si512(_mm512_or_si512(words, _mm512_slli_epi16(words, 4)), _mm512_set1_epi8(15));
}

INLINE uint64_t kept_columns(const uint8_t *index, int64_t columns) {
  uint64_t kept = 0;
  if (columns == WIDE_STEP) memcpy(&kept, index, 8);
  else memcpy(&kept, index, columns / 8);
  return kept;
}

INLINE void decode(const int wide, const int bits, const int form, const uint8_t *p, int64_t step_bytes,
                   const uint8_t *end, const uint8_t *index, int64_t columns, ints *out) {
  (void)end;
  // what stands for 0 among values of half a byte
  const __m512i none = bits == 4 ? _mm512_set1_epi8(8) : _mm512_setzero_si512();
  const int rest = columns != WIDE_STEP;
  __m512i values = load_values(bits, form, rest, p, rest ? ceil_div(columns * step_bytes, WIDE_STEP) : step_bytes);
  if (form != DENSE) values = _mm512_mask_expand_epi8(none, kept_columns(index, columns), values);
  if (wide) {
    values = _mm512_sub_epi8(values, none);
    out[0] = _mm512_cvtepi8_epi16(_mm512_castsi512_si256(values));
    out[1] = _mm512_cvtepi8_epi16(_mm512_extracti64x4_epi64(values, 1));
  } else {
    out[0] = bits == 4 ? values : _mm512_xor_si512(values, _mm512_set1_epi8(-128));
  }
}

#include "quantised.inc.h"

DEFINE_QUANTISED(eight, 0)
DEFINE_QUANTISED(thirteen, 1)

#define KERNEL(name) .few_block = 4, .many_block = 4, .many_from = 5, .few = name##_few, .many = name##_many

const kernel quantised_vnni[2] = {
    {.x_bytes = 1, .levels = 127, .starts = 1, KERNEL(eight)},
    {.x_bytes = 2, .levels = 4095, KERNEL(thirteen)},
};

#endif
