// AVX2 with FMA and F16C: a byte of the bitmask chooses, from a table, the byte shuffle that spreads its kept values over
// eight columns; products are fp32. 16 registers hold 4 rows times 3 tokens.
#if defined(__x86_64__)

#include <immintrin.h>

#define TARGET __attribute__((target("avx2,fma,f16c,bmi,bmi2,popcnt")))
#define LANES 8

static inline __attribute__((always_inline)) TARGET __m256 half_load(const void *p) {
  return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
}

static inline __attribute__((always_inline)) TARGET void half_store(__m256 v, void *p) {
  _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

#include "rows.inc.h"

#define ROWS 4
#define BLOCK_TOKENS 3
#define AHEAD 8192
#define BYTES (STEP / 8)   // of the bitmask in a step
#define DECODED_STEPS 16   // of a decoded group: 8 KB that stay in L1 while all blocks pass

enum kind { BF16, FP16, FP32 }; // as enum moesparse_dtype

#define VALUE_BYTES(kind) ((kind) == FP32 ? 4 : 2)

// Byte shuffles by a byte of the bitmask; 0x80 makes a zero.
static uint8_t words_to_floats[256][32] __attribute__((aligned(64))); // bf16 to the upper halves of fp32 lanes
static uint8_t words_to_words[256][16] __attribute__((aligned(64)));
static uint8_t floats_to_floats[256][32] __attribute__((aligned(64))); // of a byte with at most 4 bits
// lanes of any byte, and which of them are kept
static int32_t lane_of[256][8] __attribute__((aligned(64))), lane_kept[256][8] __attribute__((aligned(64)));

__attribute__((constructor)) static void make_tables(void) {
  for (int bits = 0; bits < 256; bits++)
    for (int column = 0, next = 0; column < 8; column++) {
      const int kept = bits >> column & 1;
      for (int i = 0; i < 2; i++) {
        const uint8_t from = kept ? 2 * next + i : 0x80;
        words_to_floats[bits][4 * column + i] = 0x80;
        words_to_floats[bits][4 * column + 2 + i] = from;
        words_to_words[bits][2 * column + i] = from;
      }
      for (int i = 0; i < 4; i++) floats_to_floats[bits][4 * column + i] = kept && next < 4 ? 4 * next + i : 0x80;
      lane_of[bits][column] = next & 7;
      lane_kept[bits][column] = -kept;
      next += kept;
    }
}

// ---- decoding

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

// the eight columns of a byte of the bitmask; nothing at `end` or behind is read
INLINE __m256 decode(const int kind, const int form, const uint8_t *p, uint32_t bits, const uint8_t *end) {
  if (kind == FP32) {
    if (form == DENSE) return load_floats(p, end);
    if (form == TWO_FOUR) {
      const __m256i kept = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)p));
      return _mm256_castsi256_ps(_mm256_shuffle_epi8(kept, _mm256_load_si256((const __m256i *)floats_to_floats[bits])));
    }
    const __m256 spread =
        _mm256_permutevar8x32_ps(load_floats(p, end), _mm256_load_si256((const __m256i *)lane_of[bits]));
    return _mm256_and_ps(spread, _mm256_load_ps((const float *)lane_kept[bits]));
  }
  // the four values of a 2:4 byte, or up to eight
  const __m128i kept = form == TWO_FOUR ? _mm_loadl_epi64((const __m128i *)p) : load_words(p, end);
  if (form == DENSE && kind == BF16)
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(kept), 16));
  if (form == DENSE) return _mm256_cvtph_ps(kept);
  if (kind == FP16)
    return _mm256_cvtph_ps(_mm_shuffle_epi8(kept, _mm_load_si128((const __m128i *)words_to_words[bits])));
  const __m256i both = form == TWO_FOUR ? _mm256_set1_epi64x(_mm_cvtsi128_si64(kept)) : _mm256_broadcastsi128_si256(kept);
  return _mm256_castsi256_ps(_mm256_shuffle_epi8(both, _mm256_load_si256((const __m256i *)words_to_floats[bits])));
}

// bytes of values that a byte of the bitmask stands for
INLINE int64_t advance(const int kind, const int form, uint32_t bits) {
  if (form == DENSE) return 8 * VALUE_BYTES(kind);
  if (form == TWO_FOUR) return 4 * VALUE_BYTES(kind);
  return __builtin_popcount(bits) * VALUE_BYTES(kind);
}

// ---- a group of rows

typedef struct {
  const uint8_t *values[ROWS], *index[ROWS], *end[ROWS];
  int64_t values_ahead, index_ahead;
} group;

// rows row.. of a tile, the last one again where there are fewer
INLINE group group_at(const tile *t, const int kind, int64_t row) {
  const matrix *w = t->w;
  group g;
  for (int r = 0; r < ROWS; r++) {
    const int64_t at = min_of(row + r, t->row1 - 1);
    g.values[r] = w->values + at * w->value_row;
    g.index[r] = w->index + at * w->index_row;
    g.end[r] = g.values[r] + (w->form == DENSE ? w->columns * VALUE_BYTES(kind) : w->columns * w->step_bytes / STEP);
  }
  const int64_t later = ROWS * ceil_div(AHEAD, ROWS * w->value_row), beyond = row + later - t->row1;
  g.values_ahead = later * w->value_row;
  g.index_ahead = later * w->index_row;
  if (beyond >= 0 && t->then_values) {
    g.values_ahead = (t->then_values + beyond * w->value_row) - g.values[0];
    g.index_ahead = (t->then_index + beyond * w->index_row) - g.index[0];
  }
  return g;
}

INLINE void prefetch(const uint8_t *p) { _mm_prefetch((const char *)p, _MM_HINT_T1); }

INLINE void prefetch_ahead(const group *g, const int form, int64_t step_bytes, int64_t k) {
  for (int r = 0; r < ROWS; r++) {
    if (step_bytes > 32 || k % 2 == 0) prefetch(g->values[r] + g->values_ahead);
    if (step_bytes > 64) prefetch(g->values[r] + g->values_ahead + 64);
    if (form != DENSE && k % 16 == 0) prefetch(g->index[r] + g->index_ahead + BYTES * k);
  }
}

INLINE void finish(__m256 sums[][BLOCK_TOKENS], float *out, int64_t rows, const int T, int add_to) {
  for (int t = 0; t < T; t++) {
    const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(sums[0][t], sums[1][t]), _mm256_hadd_ps(sums[2][t], sums[3][t]));
    float part[ROWS];
    _mm_storeu_ps(part, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
    for (int r = 0; r < min_of(rows, ROWS); r++) out[t * TILE_LD + r] = part[r] + (add_to ? out[t * TILE_LD + r] : 0.0f);
  }
}

// ---- few tokens

// the columns of one byte of the bitmask
INLINE void multiply_byte(const int kind, const int form, const int T, group *g, const float *x, int64_t byte,
                          __m256 sums[][BLOCK_TOKENS]) {
  __m256 w[ROWS];
  for (int r = 0; r < ROWS; r++) {
    const uint32_t bits = form == DENSE ? 0 : g->index[r][byte];
    w[r] = decode(kind, form, g->values[r], bits, g->end[r]);
    g->values[r] += advance(kind, form, bits);
  }
  for (int t = 0; t < T; t++) {
    const __m256 tokens = _mm256_load_ps(x + t * STEP);
    for (int r = 0; r < ROWS; r++) sums[r][t] = _mm256_fmadd_ps(w[r], tokens, sums[r][t]);
  }
}

INLINE void multiply(const int kind, const int form, const int T, const matrix *w, group g, const float *x, float *out,
                     int64_t rows) {
  __m256 sums[ROWS][BLOCK_TOKENS];
  for (int r = 0; r < ROWS; r++)
    for (int t = 0; t < T; t++) sums[r][t] = _mm256_setzero_ps();
  const int64_t bytes = ceil_div(w->columns, 8), whole = w->columns / STEP;
  for (int64_t k = 0; k < whole; k++, x += T * STEP) {
    prefetch_ahead(&g, form, w->step_bytes, k);
    for (int b = 0; b < BYTES; b++) multiply_byte(kind, form, T, &g, x + 8 * b, BYTES * k + b, sums);
  }
  for (int64_t byte = BYTES * whole; byte < bytes; byte++)
    multiply_byte(kind, form, T, &g, x + 8 * (byte - BYTES * whole), byte, sums);
  finish(sums, out, rows, T, 0);
}

INLINE void multiply_few(const int kind, const int form, const tile *t) {
  const int64_t token_floats = ceil_div(t->w->columns, STEP) * STEP;
  for (int64_t first = 0; first < t->tokens; first += t->block) {
    const float *x = (const float *)t->x + first * token_floats;
    for (int64_t row = t->row0; row < t->row1; row += ROWS) {
      float *out = t->out + first * TILE_LD + (row - t->row0);
      const group g = group_at(t, kind, row);
      switch (min_of(t->block, t->tokens - first)) {
        case 1: multiply(kind, form, 1, t->w, g, x, out, t->row1 - row); break;
        case 2: multiply(kind, form, 2, t->w, g, x, out, t->row1 - row); break;
        default: multiply(kind, form, 3, t->w, g, x, out, t->row1 - row);
      }
    }
  }
}

// ---- many tokens

// the next steps of a group, expanded to [byte][row]; moves the group on
INLINE void decode_group(const int kind, const int form, const matrix *w, group *g, int64_t k0, int64_t k1, __m256 *to) {
  const int64_t bytes = ceil_div(w->columns, 8);
  for (int64_t byte = BYTES * k0; byte < BYTES * k1; byte++, to += ROWS) {
    if (byte % BYTES == 0) prefetch_ahead(g, form, w->step_bytes, byte / BYTES);
    for (int r = 0; r < ROWS; r++) {
      const uint32_t bits = form == DENSE || byte >= bytes ? 0 : g->index[r][byte];
      to[r] = byte < bytes ? decode(kind, form, g->values[r], bits, g->end[r]) : _mm256_setzero_ps();
      g->values[r] += advance(kind, form, bits);
    }
  }
}

INLINE void multiply_decoded(const int T, const __m256 *w, const float *x, int64_t steps, float *out, int64_t rows,
                             int add_to) {
  __m256 sums[ROWS][BLOCK_TOKENS];
  for (int r = 0; r < ROWS; r++)
    for (int t = 0; t < T; t++) sums[r][t] = _mm256_setzero_ps();
  for (int64_t k = 0; k < steps; k++, x += T * STEP)
    for (int b = 0; b < BYTES; b++, w += ROWS)
      for (int t = 0; t < T; t++) {
        const __m256 tokens = _mm256_load_ps(x + t * STEP + 8 * b);
        for (int r = 0; r < ROWS; r++) sums[r][t] = _mm256_fmadd_ps(w[r], tokens, sums[r][t]);
      }
  finish(sums, out, rows, T, add_to);
}

// decoded steps of a group times all blocks of a tile; the same for every dtype
static TARGET void multiply_blocks(const tile *t, const __m256 *w, int64_t row, int64_t k0, int64_t k1) {
  const int64_t steps = ceil_div(t->w->columns, STEP), rows = t->row1 - row;
  for (int64_t first = 0; first < t->tokens; first += t->block) {
    const int64_t tokens = min_of(t->block, t->tokens - first);
    const float *x = (const float *)t->x + (first * steps + k0 * tokens) * STEP;
    float *out = t->out + first * TILE_LD + (row - t->row0);
    switch (tokens) {
      case 1: multiply_decoded(1, w, x, k1 - k0, out, rows, k0 > 0); break;
      case 2: multiply_decoded(2, w, x, k1 - k0, out, rows, k0 > 0); break;
      default: multiply_decoded(3, w, x, k1 - k0, out, rows, k0 > 0);
    }
  }
}

INLINE void multiply_many(const int kind, const int form, const tile *t) {
  __m256 decoded[DECODED_STEPS * BYTES * ROWS];
  const int64_t steps = ceil_div(t->w->columns, STEP);
  for (int64_t row = t->row0; row < t->row1; row += ROWS) {
    group g = group_at(t, kind, row);
    for (int64_t k0 = 0; k0 < steps; k0 += DECODED_STEPS) {
      const int64_t k1 = min_of(k0 + DECODED_STEPS, steps);
      decode_group(kind, form, t->w, &g, k0, k1, decoded);
      multiply_blocks(t, decoded, row, k0, k1);
    }
  }
}

#define DEFINE_KIND(name, kind)                                      \
  static TARGET void name##_few(const tile *t) {                     \
    switch (t->w->form) {                                            \
      case TWO_FOUR: multiply_few(kind, TWO_FOUR, t); break;         \
      case ANY_NM: multiply_few(kind, ANY_NM, t); break;             \
      default: multiply_few(kind, DENSE, t);                         \
    }                                                                \
  }                                                                  \
  static TARGET void name##_many(const tile *t) {                    \
    switch (t->w->form) {                                            \
      case TWO_FOUR: multiply_many(kind, TWO_FOUR, t); break;        \
      case ANY_NM: multiply_many(kind, ANY_NM, t); break;            \
      default: multiply_many(kind, DENSE, t);                        \
    }                                                                \
  }

DEFINE_KIND(bf16, BF16)
DEFINE_KIND(fp16, FP16)
DEFINE_KIND(fp32, FP32)

// ---- unpacking

static TARGET void unpack_row(const matrix *w, int64_t row, int value_bytes, void *out, int streaming) {
  const uint8_t *p = w->values + row * w->value_row, *index = w->index + row * w->index_row;
  const uint8_t *end = p + w->columns * w->step_bytes / STEP;
  char *to = out;
  const int aligned = streaming && (uintptr_t)out % 32 == 0;
  for (int64_t byte = 0; byte < w->columns / 8; byte++, to += 8 * value_bytes) {
    const uint32_t bits = index[byte];
    if (byte % BYTES == 0) prefetch(p + AHEAD);
    if (value_bytes == 2) {
      const __m128i row_part = _mm_shuffle_epi8(load_words(p, end), _mm_load_si128((const __m128i *)words_to_words[bits]));
      if (aligned) _mm_stream_si128((__m128i *)to, row_part);
      else _mm_storeu_si128((__m128i *)to, row_part);
    } else {
      const __m256 row_part = decode(FP32, ANY_NM, p, bits, end);
      if (aligned) _mm256_stream_ps((float *)to, row_part);
      else _mm256_storeu_ps((float *)to, row_part);
    }
    p += __builtin_popcount(bits) * value_bytes;
  }
}

static TARGET void unpack_end(void) { _mm_sfence(); }

#define KERNEL(name) \
  {.x_bytes = 4, .few_block = 3, .many_block = 3, .many_from = 4, .few = name##_few, .many = name##_many}

const path path_avx2 = {
    .name = "avx2",
    .kernels = {KERNEL(bf16), KERNEL(fp16), KERNEL(fp32)},
    .widen = widen,
    .narrow = narrow,
    .activate = activate,
    .add = add,
    .add_scaled = add_scaled,
    .unpack_row = unpack_row,
    .unpack_end = unpack_end,
    .read_page = read_page,
};

#endif
