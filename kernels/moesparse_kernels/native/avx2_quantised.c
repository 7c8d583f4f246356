// Weights of 8 and 4 bits by AVX2: values and x meet as 16 bits, 16 products an instruction.
#if defined(__x86_64__)

#include <immintrin.h>
#include <string.h>

#define TARGET __attribute__((target("avx2,fma,f16c,bmi,bmi2,popcnt")))

#include "path.h"
#include "spread.h"

typedef __m256i ints;
typedef __m256 floats;
typedef __m128i octet;

#define COLUMNS 16
#define MOST_TOKENS 2

INLINE ints zero_ints(void) { return _mm256_setzero_si256(); }

INLINE floats zero_floats(void) { return _mm256_setzero_ps(); }

INLINE ints load_ints(const void *p) { return _mm256_load_si256(p); }

INLINE ints own_register(ints v) {
  __asm__("" : "+x"(v));
  return v;
}

INLINE void prefetch(const uint8_t *p) { _mm_prefetch((const char *)p, _MM_HINT_T1); }

INLINE ints add_products(const int wide, ints sums, ints w, ints x) {
  (void)wide;
  return _mm256_add_epi32(sums, _mm256_madd_epi16(w, x));
}

INLINE floats add_scaled_ints(floats sums, ints whole, floats scale) {
  return _mm256_fmadd_ps(_mm256_cvtepi32_ps(whole), scale, sums);
}

INLINE floats splat_scale(float s) { return _mm256_set1_ps(s); }

INLINE floats halves_scale(float a, float b) { return _mm256_set_m128(_mm_set1_ps(b), _mm_set1_ps(a)); }

INLINE float half_value(uint16_t bits) { return _cvtsh_ss(bits); }

INLINE void sums_of(floats a, floats b, floats c, floats d, float *out) {
  const floats pairs = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
}

INLINE octet load_octet(const uint8_t *p) { return _mm_loadl_epi64((const __m128i *)p); }

INLINE octet spread_octet(octet values, uint32_t bits) {
  return _mm_shuffle_epi8(values, _mm_loadl_epi64((const __m128i *)spread_bytes[bits]));
}

INLINE ints widen_octets(const octet *parts) { return _mm256_cvtepi8_epi16(_mm_unpacklo_epi64(parts[0], parts[1])); }

INLINE void split_halves(const uint8_t *p, uint8_t *to) {
  const __m256i words = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)p));
  const __m256i both = _mm256_and_si256(_mm256_or_si256(words, _mm256_slli_epi16(words, 4)), _mm256_set1_epi8(15));
  _mm256_storeu_si256((__m256i *)to, _mm256_sub_epi8(both, _mm256_set1_epi8(8)));
}

#include "octets.inc.h"

const kernel quantised_avx2[2] = KERNELS;

#endif
