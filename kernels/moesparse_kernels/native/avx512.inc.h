// The kernels of the two AVX-512 paths, avx512.c and avx512_bf16.c. The includer defines TARGET, the attribute that allows
// the path's instructions, and HAS_BF16 where the CPU multiplies bf16.
//
// A group of 4 rows (2 where the tokens are many) meets a block of tokens: every product has an accumulator, weights are
// expanded from the packed row straight into a register. What limits a few tokens is memory: the group that comes 8 KB
// later is prefetched into L2, because the few line fill buffers of L1 would cap a core at half the memory rate. What
// limits many tokens are the multiply-adds: `many` expands a group once into L1 and takes block after block past it.

#include <immintrin.h>
#include <string.h>

#include "path.h"

#define ROWS 4        // of a group
#define AHEAD 8192    // bytes
#define PIECE 24576   // bytes of packed x that stay in L1 while all rows of a tile pass
#define DECODED 8192  // bytes of a decoded group that stay in L1 while all blocks pass

// how a kernel multiplies: bf16 pairs into fp32 (`x` stays bf16), or fp32 multiply-adds. BF16_FMA splits a register of
// 32 bf16 values into its even and its odd columns, and packed x has them in that order.
enum kind { BF16_DOT, BF16_FMA, FP16_FMA, FP32_FMA };

#define VECTORS(kind) ((kind) == BF16_DOT ? 1 : 2) // registers of a step of one row

// ---- decoding

// 16-bit values of the columns in `mask`; `rest`: the last columns of a row, nothing is read behind them
INLINE __m512i expand_words(const int form, const int rest, const uint8_t *values, uint32_t mask) {
  if (rest || form == ANY_NM) return _mm512_maskz_expandloadu_epi16(mask, values);
  if (form == TWO_FOUR) return _mm512_maskz_expand_epi16(mask, _mm512_castsi256_si512(_mm256_loadu_si256((void *)values)));
  return _mm512_loadu_si512(values);
}

INLINE __m512i expand_floats(const int form, const int rest, const uint8_t *values, uint32_t mask, const int upper) {
  if (rest || form == ANY_NM) {
    const uint8_t *first = values + (upper ? 4 * __builtin_popcount(mask & 0xFFFF) : 0);
    return _mm512_castps_si512(_mm512_maskz_expandloadu_ps(upper ? mask >> 16 : mask, first));
  }
  if (form == TWO_FOUR) {
    const __m256 kept = _mm256_loadu_ps((const float *)(values + 32 * upper));
    return _mm512_castps_si512(_mm512_maskz_expand_ps(upper ? mask >> 16 : mask, _mm512_castps256_ps512(kept)));
  }
  return _mm512_loadu_si512(values + 64 * upper);
}

// The raw register of a step, from which `part` makes each half. fp32 values have none.
INLINE __m512i raw_of(const int kind, const int form, const int rest, const uint8_t *values, uint32_t mask) {
  return kind == FP32_FMA ? _mm512_setzero_si512() : expand_words(form, rest, values, mask);
}

INLINE __m512i part_of(
    const int kind, const int form, const int rest, __m512i raw, const uint8_t *values, uint32_t mask, const int upper) {
  switch (kind) {
    case BF16_FMA:
      return upper ? _mm512_and_si512(raw, _mm512_set1_epi32(-65536)) : _mm512_slli_epi32(raw, 16);
    case FP16_FMA: {
      const __m256i half = upper ? _mm512_extracti64x4_epi64(raw, 1) : _mm512_castsi512_si256(raw);
      return _mm512_castps_si512(_mm512_cvtph_ps(half));
    }
    case FP32_FMA: return expand_floats(form, rest, values, mask, upper);
    default: return raw;
  }
}

INLINE __m512 multiply_add(const int kind, __m512 sum, __m512i w, __m512i x) {
#ifndef HAS_BF16
  (void)kind;
#else
  if (kind == BF16_DOT) return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x);
#endif
  return _mm512_fmadd_ps(_mm512_castsi512_ps(w), _mm512_castsi512_ps(x), sum);
}

// ---- results

// the sums of four registers
INLINE __m128 sums_of(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512 all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xEE));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// `rows` sums of a token, fewer than a group where the matrix ends
INLINE void put(__m128 sums, float *out, int64_t rows, const int group, int add) {
  const __mmask8 which = (1u << (rows < group ? rows : group)) - 1;
  if (add) sums = _mm_add_ps(sums, _mm_maskz_loadu_ps(which, out));
  _mm_mask_storeu_ps(out, which, sums);
}

INLINE void finish(__m512 sums[][12], float *out, int64_t rows, const int R, const int T, int add) {
  if (R == 4) {
    for (int t = 0; t < T; t++)
      put(sums_of(sums[0][t], sums[1][t], sums[2][t], sums[3][t]), out + t * TILE_LD, rows, 4, add);
    return;
  }
  for (int t = 0; t < T; t += 2) {
    const int u = t + 1 < T ? t + 1 : t;
    const __m128 both = sums_of(sums[0][t], sums[1][t], sums[0][u], sums[1][u]);
    put(both, out + t * TILE_LD, rows, 2, add);
    if (u > t) put(_mm_movehl_ps(both, both), out + u * TILE_LD, rows, 2, add);
  }
}

// ---- a group of rows

// where the rows of a group lie, and how many bytes later what will be read after them
typedef struct {
  const uint8_t *values[ROWS], *index[ROWS];
  int64_t values_ahead, index_ahead;
} group;

// Rows row.. of a tile, the last one again where there are fewer than R. What comes after row1 are the tile's own first
// rows, `steps_on` steps to the right, or else what the tile names.
INLINE group group_at(const tile *t, int64_t row, const int R, int64_t steps_on) {
  const matrix *w = t->w;
  group g;
  for (int r = 0; r < R; r++) {
    const int64_t at = min_of(row + r, t->row1 - 1);
    g.values[r] = w->values + at * w->value_row;
    g.index[r] = w->index + at * w->index_row;
  }
  const int64_t later = R * ceil_div(AHEAD, R * w->value_row), beyond = row + later - t->row1;
  g.values_ahead = later * w->value_row;
  g.index_ahead = later * w->index_row;
  if (beyond >= 0 && steps_on > 0) {
    g.values_ahead += (t->row0 - t->row1) * w->value_row + steps_on * w->step_bytes;
    g.index_ahead += (t->row0 - t->row1) * w->index_row + steps_on * 4;
  } else if (beyond >= 0 && t->then_values) {
    g.values_ahead = (t->then_values + beyond * w->value_row) - g.values[0];
    g.index_ahead = (t->then_index + beyond * w->index_row) - g.index[0];
  }
  return g;
}

INLINE void prefetch(const uint8_t *p) { _mm_prefetch((const char *)p, _MM_HINT_T1); }

// a step of every row of a group; where two steps are within a cache line, both at the first
INLINE void prefetch_ahead(const group *g, const int form, const int R, int64_t step_bytes, int64_t k) {
  for (int r = 0; r < R; r++) {
    if (step_bytes > 32 || k % 2 == 0) prefetch(g->values[r] + g->values_ahead + step_bytes * k);
    if (step_bytes > 64) prefetch(g->values[r] + g->values_ahead + step_bytes * k + 64);
    if (form != DENSE && k % 16 == 0) prefetch(g->index[r] + g->index_ahead + 4 * k);
  }
}

INLINE uint32_t mask_at(const int form, const uint8_t *index, int64_t k) {
  uint32_t mask = 0xFFFFFFFF;
  if (form != DENSE) memcpy(&mask, index + 4 * k, 4);
  return mask;
}

// the mask of the last columns of a row, fewer than 32
INLINE uint32_t mask_of_rest(const int form, const uint8_t *index, int64_t k, int columns) {
  uint32_t mask = (1u << columns) - 1;
  if (form != DENSE) {
    mask = 0;
    memcpy(&mask, index + 4 * k, columns / 8);
  }
  return mask;
}

INLINE const char *x_at(const int kind, const void *x, const int T, int64_t k, int t, int half) {
  return (const char *)x + (k * T + t) * (64 * VECTORS(kind)) + 64 * half;
}

// ---- few tokens

// a constant to the compiler where it can be one
INLINE int64_t step_bytes_of(const int kind, const int form, const matrix *w) {
  return form == ANY_NM ? w->step_bytes : (form == DENSE ? 64 : 32) * (kind == FP32_FMA ? 2 : 1);
}

// one step of a group; `rest`: columns of the last step, 0 for a whole one
INLINE void multiply_step(const int kind, const int form, const int R, const int T, const matrix *w, const group *g,
                          const void *x, int64_t k, int rest, __m512 sums[][12]) {
  const uint8_t *values[ROWS];
  uint32_t mask[ROWS];
  __m512i raw[ROWS], part[ROWS];
  const int64_t step_bytes = step_bytes_of(kind, form, w);
  for (int r = 0; r < R; r++) {
    values[r] = g->values[r] + step_bytes * k;
    mask[r] = rest ? mask_of_rest(form, g->index[r], k, rest) : mask_at(form, g->index[r], k);
    raw[r] = raw_of(kind, form, rest != 0, values[r], mask[r]);
  }
  for (int half = 0; half < VECTORS(kind); half++) {
    for (int r = 0; r < R; r++) part[r] = part_of(kind, form, rest != 0, raw[r], values[r], mask[r], half);
    for (int t = 0; t < T; t++) {
      const __m512i tokens = _mm512_load_si512(x_at(kind, x, T, k, t, half));
      for (int r = 0; r < R; r++) sums[r][t] = multiply_add(kind, sums[r][t], part[r], tokens);
    }
  }
}

// R rows times a block of T tokens over the steps k0..k1
INLINE void multiply(const int kind, const int form, const int R, const int T, const matrix *w, const group *g,
                     const void *x, int64_t k0, int64_t k1, float *out, int64_t rows) {
  __m512 sums[ROWS][12];
  for (int r = 0; r < R; r++)
    for (int t = 0; t < T; t++) sums[r][t] = _mm512_setzero_ps();
  const int64_t step_bytes = step_bytes_of(kind, form, w);
  const int64_t whole = min_of(w->columns / STEP, k1);
  int64_t k = k0;
  for (; k < whole; k++) {
    prefetch_ahead(g, form, R, step_bytes, k);
    multiply_step(kind, form, R, T, w, g, x, k, 0, sums);
  }
  if (k < k1) multiply_step(kind, form, R, T, w, g, x, k, w->columns % STEP, sums);
  finish(sums, out, rows, R, T, k0 > 0);
}

// all rows of a tile times one block
INLINE void multiply_block(const int kind, const int form, const int R, const int T, const tile *t, const void *x,
                           float *out, int last_block) {
  const int64_t steps = ceil_div(t->w->columns, STEP);
  // so many tokens are bound by their products: x goes by in pieces that stay in L1
  const int64_t piece = R < ROWS ? PIECE / (64 * VECTORS(kind) * T) : steps;
  tile own = *t;
  if (!last_block) {
    // the next block reads the same rows again
    own.then_values = t->w->values + t->row0 * t->w->value_row;
    own.then_index = t->w->index + t->row0 * t->w->index_row;
  }
  for (int64_t k0 = 0; k0 < steps; k0 += piece) {
    const int64_t k1 = min_of(k0 + piece, steps);
    for (int64_t row = t->row0; row < t->row1; row += R) {
      const group g = group_at(&own, row, R, k1 < steps ? piece : 0);
      multiply(kind, form, R, T, t->w, &g, x, k0, k1, out + (row - t->row0), t->row1 - row);
    }
  }
}

#define BLOCK(kind, form, R, T) \
  case T: multiply_block(kind, form, R, T, t, x, out, last_block); break;
#define BLOCKS_1_TO_6(kind, form) \
  BLOCK(kind, form, 4, 1) BLOCK(kind, form, 4, 2) BLOCK(kind, form, 4, 3) \
  BLOCK(kind, form, 4, 4) BLOCK(kind, form, 4, 5) BLOCK(kind, form, 4, 6)
#define BLOCKS_7_TO_12(kind, form) \
  BLOCK(kind, form, 2, 7) BLOCK(kind, form, 2, 8) BLOCK(kind, form, 2, 9) \
  BLOCK(kind, form, 2, 10) BLOCK(kind, form, 2, 11) BLOCK(kind, form, 2, 12)

// defines one function of a kind and a form for blocks of the sizes that it is given
#define DEFINE_BLOCK(name, kind, form, SIZES)                                                       \
  static TARGET void name(const tile *t, const void *x, float *out, int tokens, int last_block) {   \
    switch (tokens) { SIZES }                                                                       \
  }

typedef void block_fn(const tile *t, const void *x, float *out, int tokens, int last_block);

INLINE void each_block(const int kind, const tile *t, block_fn *block) {
  const int64_t token_bytes = ceil_div(t->w->columns, STEP) * (64 * VECTORS(kind));
  for (int64_t first = 0; first < t->tokens; first += t->block) {
    const int64_t tokens = min_of(t->block, t->tokens - first);
    block(t, (const char *)t->x + first * token_bytes, t->out + first * TILE_LD, tokens, first + tokens == t->tokens);
  }
}

// ---- many tokens

// steps k0..k1 of a group, expanded to [step][register][row]
INLINE void decode_group(const int kind, const int form, const tile *t, const group *g, int64_t k0, int64_t k1,
                         __m512i *to) {
  const matrix *w = t->w;
  const int64_t whole = min_of(w->columns / STEP, k1);
  for (int64_t k = k0; k < k1; k++) {
    const int rest = k < whole ? 0 : (int)(w->columns % STEP);
    prefetch_ahead(g, form, ROWS, w->step_bytes, k);
    for (int r = 0; r < ROWS; r++) {
      const uint8_t *values = g->values[r] + w->step_bytes * k;
      const uint32_t mask = rest ? mask_of_rest(form, g->index[r], k, rest) : mask_at(form, g->index[r], k);
      const __m512i raw = raw_of(kind, form, rest != 0, values, mask);
      for (int half = 0; half < VECTORS(kind); half++)
        to[((k - k0) * VECTORS(kind) + half) * ROWS + r] = part_of(kind, form, rest != 0, raw, values, mask, half);
    }
  }
}

INLINE void multiply_decoded(const int kind, const int T, const __m512i *w, const char *x, int64_t k0, int64_t k1,
                             float *out, int64_t rows) {
  __m512 sums[ROWS][12];
  for (int r = 0; r < ROWS; r++)
    for (int t = 0; t < T; t++) sums[r][t] = _mm512_setzero_ps();
  for (int64_t k = k0; k < k1; k++)
    for (int half = 0; half < VECTORS(kind); half++, w += ROWS)
      for (int t = 0; t < T; t++) {
        const __m512i tokens = _mm512_load_si512(x_at(kind, x, T, k, t, half));
        for (int r = 0; r < ROWS; r++) sums[r][t] = multiply_add(kind, sums[r][t], w[r], tokens);
      }
  finish(sums, out, rows, ROWS, T, k0 > 0);
}

// a decoded group times all blocks of a tile
INLINE void multiply_blocks(const int kind, const tile *t, const __m512i *w, int64_t row, int64_t k0, int64_t k1) {
  const int64_t steps = ceil_div(t->w->columns, STEP), rows = t->row1 - row;
  for (int64_t first = 0; first < t->tokens; first += t->block) {
    const char *x = (const char *)t->x + first * steps * (64 * VECTORS(kind));
    float *out = t->out + first * TILE_LD + (row - t->row0);
    switch (min_of(t->block, t->tokens - first)) {
      case 1: multiply_decoded(kind, 1, w, x, k0, k1, out, rows); break;
      case 2: multiply_decoded(kind, 2, w, x, k0, k1, out, rows); break;
      case 3: multiply_decoded(kind, 3, w, x, k0, k1, out, rows); break;
      case 4: multiply_decoded(kind, 4, w, x, k0, k1, out, rows); break;
      case 5: multiply_decoded(kind, 5, w, x, k0, k1, out, rows); break;
      default: multiply_decoded(kind, 6, w, x, k0, k1, out, rows);
    }
  }
}

typedef void blocks_fn(const tile *t, const __m512i *w, int64_t row, int64_t k0, int64_t k1);

INLINE void multiply_many(const int kind, const int form, const tile *t, blocks_fn *blocks) {
  __m512i decoded[DECODED / 64];
  const int64_t steps = ceil_div(t->w->columns, STEP), piece = DECODED / (64 * VECTORS(kind) * ROWS);
  for (int64_t k0 = 0; k0 < steps; k0 += piece) {
    const int64_t k1 = min_of(k0 + piece, steps);
    for (int64_t row = t->row0; row < t->row1; row += ROWS) {
      const group g = group_at(t, row, ROWS, k1 < steps ? piece : 0);
      decode_group(kind, form, t, &g, k0, k1, decoded);
      blocks(t, decoded, row, k0, k1);
    }
  }
}

// ---- the functions of a kind, for every form

#define DEFINE_KIND(name, kind, SIZES)                                                                               \
  DEFINE_BLOCK(name##_two_four, kind, TWO_FOUR, SIZES(kind, TWO_FOUR))                                               \
  DEFINE_BLOCK(name##_any_nm, kind, ANY_NM, SIZES(kind, ANY_NM))                                                     \
  DEFINE_BLOCK(name##_dense, kind, DENSE, SIZES(kind, DENSE))                                                        \
  static TARGET void name##_few(const tile *t) {                                                                     \
    static block_fn *const blocks[] = {name##_two_four, name##_any_nm, name##_dense};                                \
    each_block(kind, t, blocks[t->w->form]);                                                                         \
  }                                                                                                                  \
  static TARGET void name##_blocks(const tile *t, const __m512i *w, int64_t row, int64_t k0, int64_t k1) {           \
    multiply_blocks(kind, t, w, row, k0, k1);                                                                        \
  }                                                                                                                  \
  static TARGET void name##_many(const tile *t) {                                                                    \
    switch (t->w->form) {                                                                                            \
      case TWO_FOUR: multiply_many(kind, TWO_FOUR, t, name##_blocks); break;                                         \
      case ANY_NM: multiply_many(kind, ANY_NM, t, name##_blocks); break;                                             \
      default: multiply_many(kind, DENSE, t, name##_blocks);                                                         \
    }                                                                                                                \
  }

#define SIZES_TO_6(kind, form) BLOCKS_1_TO_6(kind, form)
#define SIZES_TO_12(kind, form) BLOCKS_1_TO_6(kind, form) BLOCKS_7_TO_12(kind, form)
