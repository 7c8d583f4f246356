// Kernels of weights whose values have 8 or 4 bits. The includer defines
//   TARGET                       the attribute that allows the path's instructions
//   ints, floats                 registers of int32 sums and of as many fp32 ones
//   REGISTERS(wide)              that the 64 columns of a step take; wide: as 16 bits, else as 8 and not negative
//   STARTS(wide)                 whether sums start at what the packed tokens say (path.h), or at 0
//   MOST_TOKENS                  of a block
//   TWO_FOUR_IS_ANY              where 2:4 has no code of its own
//   zero_ints(), zero_floats(), load_ints(p), sums_of(a, b, c, d, out[4]), prefetch(p)
//   own_register(ints)           of which the compiler knows nothing
//   add_products(wide, sums, w, x)      of the columns of a register
//   add_scaled_ints(sums, ints, scale)  to fp32
//   splat_scale(s), halves_scale(a, b)  a for the first half of the lanes, b for the others
//   half_value(bits)             an fp16 number
//   decode(wide, bits, form, values, step_bytes, end, index, columns, out[])
//       the registers of a step that has so many columns; reads nothing at `end`, that of the matrix, or behind
// before. A group of 4 rows meets a block of tokens. The products of a span are summed as whole numbers, exactly, and then
// added times its scale to fp32 sums. What is ahead is prefetched into L2 as in avx512.inc.h.

#include <stddef.h>
#include <string.h>

#include "path.h"

#define ROWS 4     // of a group
#define AHEAD 8192 // bytes

#define STEP_X(wide) ((wide) ? 2 * WIDE_STEP : WIDE_STEP) // bytes of a step of a token
#define MOST_SCALES (SPAN_STEPS * 2 + 1)                  // of a piece of a row, of groups of 32 columns, and one more
#define PIECE (SPAN_STEPS * MOST_REGISTERS * ROWS)        // registers of a decoded piece of a group

// ---- a group of rows

// what a block of tokens is multiplied with: rows as they are stored, or a piece of them that was decoded
typedef struct {
  const tile *t;
  int64_t row;                 // the first of the group
  int64_t bytes;               // of the values of a row
  int64_t later;               // how many rows later what is prefetched lies
  int64_t scales_of_row;
  const ints *decoded;         // [step][register][row]
  float scales[ROWS][MOST_SCALES];
} weights;

typedef struct {
  const uint8_t *values[ROWS], *index[ROWS];
  const uint8_t *end; // of the values of the matrix
  int64_t values_ahead, index_ahead; // how many bytes later what is read after them lies
  int64_t step_bytes;
  int lines; // a step is prefetched where the bits of its number that are set here are 0: the first of a cache line
} group;

INLINE void start_tile(weights *from, const tile *t, const ints *decoded) {
  const matrix *w = t->w;
  from->t = t;
  from->bytes = ceil_div(w->columns * w->step_bytes, WIDE_STEP);
  from->later = ROWS * ceil_div(AHEAD, ROWS * from->bytes);
  from->scales_of_row = w->group ? ceil_div(w->columns, w->group) : 1;
  from->decoded = decoded;
}

// the last row of a tile again where there are fewer
INLINE group group_of(const weights *from) {
  const tile *t = from->t;
  const matrix *w = t->w;
  group g = {.step_bytes = w->step_bytes, .lines = w->step_bytes > 32 ? 0 : w->step_bytes > 16 ? 1 : 3};
  for (int r = 0; r < ROWS; r++) {
    const int64_t at = min_of(from->row + r, t->row1 - 1);
    g.values[r] = w->values + at * w->value_row;
    g.index[r] = w->index + at * w->index_row;
  }
  g.end = w->values + (w->rows - 1) * w->value_row + from->bytes;
  const int64_t beyond = from->row + from->later - t->row1;
  g.values_ahead = from->later * w->value_row;
  g.index_ahead = from->later * w->index_row;
  if (beyond >= 0 && t->then_values) {
    g.values_ahead = (t->then_values + beyond * w->value_row) - g.values[0];
    g.index_ahead = (t->then_index + beyond * w->index_row) - g.index[0];
  }
  return g;
}

INLINE void prefetch_step(const group *g, const int form, int64_t k) {
  if ((k & g->lines) == 0)
    for (int r = 0; r < ROWS; r++) prefetch(g->values[r] + g->values_ahead + g->step_bytes * k);
  if (form != DENSE && k % 8 == 0)
    for (int r = 0; r < ROWS; r++) prefetch(g->index[r] + g->index_ahead + 8 * k);
}

INLINE float scale_value(const int dtype, const uint8_t *p) {
  uint32_t bits = 0;
  float value;
  if (dtype == MOESPARSE_FP16) {
    memcpy(&bits, p, 2);
    return half_value(bits);
  }
  if (dtype == MOESPARSE_BF16) memcpy((char *)&bits + 2, p, 2);
  else memcpy(&bits, p, 4);
  memcpy(&value, &bits, 4);
  return value;
}

INLINE void widen_scales(const int dtype, const uint8_t *from, int64_t count, float *to) {
  const int size = dtype == MOESPARSE_FP32 ? 4 : 2;
  for (int64_t i = 0; i < count; i++) to[i] = scale_value(dtype, from + i * size);
}

// the scales of the steps k0..k1 of a group
INLINE void load_scales(weights *from, int64_t k0, int64_t k1) {
  const tile *t = from->t;
  const matrix *w = t->w;
  const int64_t beyond = from->row + from->later - t->row1;
  const int64_t first = w->group ? k0 * WIDE_STEP / w->group : 0;
  const int64_t last = w->group ? min_of(ceil_div(k1 * WIDE_STEP, w->group), from->scales_of_row) : 1;
  for (int r = 0; r < ROWS; r++) {
    const int64_t at = min_of(from->row + r, t->row1 - 1), offset = first * dtype_bytes(w->scales_dtype);
    const uint8_t *p = w->scales + at * w->scales_row + offset;
    prefetch(beyond >= 0 && t->then_scales ? t->then_scales + (beyond + r) * w->scales_row + offset
                                           : p + from->later * w->scales_row);
    // a step of groups of 32 may end with one group
    from->scales[r][last - first] = 0.0f;
    switch (w->scales_dtype) {
      case MOESPARSE_BF16: widen_scales(MOESPARSE_BF16, p, last - first, from->scales[r]); break;
      case MOESPARSE_FP16: widen_scales(MOESPARSE_FP16, p, last - first, from->scales[r]); break;
      default: widen_scales(MOESPARSE_FP32, p, last - first, from->scales[r]);
    }
  }
}

// ---- products

#define DECODED -1 // for a form

// all rows of a tile times the tokens of a block, which begins with token `first`
typedef void rows_fn(weights *from, int64_t first, const char *x);

// the steps k0..k1, a piece, of decoded rows times the tokens of a block, added to `totals`
typedef void decoded_fn(const weights *from, const char *x, int64_t k0, int64_t k1, floats totals[][MOST_TOKENS]);

// a piece of a group, decoded
typedef void decode_fn(const weights *from, int64_t k0, int64_t k1, ints *to);

// registers first..first + count of a step times T tokens
INLINE void multiply_registers(const int wide, const int T, const ints *w, const char *x, const int first,
                               const int count, ints sums[][MOST_TOKENS]) {
  for (int i = first; i < first + count; i++)
    for (int t = 0; t < T; t++) {
      const ints tokens = load_ints(x + t * STEP_X(wide) + i * sizeof(ints));
      for (int r = 0; r < ROWS; r++) sums[r][t] = add_products(wide, sums[r][t], w[i * ROWS + r], tokens);
    }
}

INLINE void start_sums(const int wide, const int T, const char **x, ints sums[][MOST_TOKENS]) {
  (void)wide;
  for (int t = 0; t < T; t++) {
    const ints start = STARTS(wide) ? load_ints(*x + t * sizeof(ints)) : zero_ints();
    // four registers from here on; known to be equal, they would be copied in every step
    for (int r = 0; r < ROWS; r++) sums[r][t] = own_register(start);
  }
  if (STARTS(wide)) *x += T * sizeof(ints);
}

// Adds the sums of a span times its scales. The totals stay in memory, for the sums need the registers.
INLINE void add_sums(const int T, ints sums[][MOST_TOKENS], const floats *scale, floats totals[][MOST_TOKENS]) {
  __asm__("" : "+r"(totals) : : "memory");
  for (int r = 0; r < ROWS; r++)
    for (int t = 0; t < T; t++) totals[r][t] = add_scaled_ints(totals[r][t], sums[r][t], scale[r]);
}

// a step whose halves have scales of their own
INLINE void multiply_halves(const int wide, const int T, const ints *w, const char **x, const weights *from, int64_t at,
                            floats totals[][MOST_TOKENS]) {
  const int registers = REGISTERS(wide), parts = registers > 1 ? 2 : 1;
  ints sums[ROWS][MOST_TOKENS];
  floats scale[ROWS];
  start_sums(wide, T, x, sums);
  for (int part = 0; part < parts; part++) {
    if (part)
      for (int r = 0; r < ROWS; r++)
        for (int t = 0; t < T; t++) sums[r][t] = zero_ints();
    multiply_registers(wide, T, w, *x, part * (registers / parts), registers / parts, sums);
    for (int r = 0; r < ROWS; r++) {
      const float *s = from->scales[r] + 2 * at;
      scale[r] = parts == 1 ? halves_scale(s[0], s[1]) : splat_scale(s[part]);
    }
    add_sums(T, sums, scale, totals);
  }
  *x += T * STEP_X(wide);
}

INLINE void decode_rows(const int wide, const int bits, const int form, const group *g, int64_t k, int64_t columns,
                        ints *to) {
  prefetch_step(g, form, k);
  for (int r = 0; r < ROWS; r++) {
    ints row[MOST_REGISTERS];
    decode(wide, bits, form, g->values[r] + g->step_bytes * k, g->step_bytes, g->end, g->index[r] + 8 * k, columns,
           row);
    for (int i = 0; i < REGISTERS(wide); i++) to[i * ROWS + r] = row[i];
  }
}

// the steps k0..k1, which share their scales, times T tokens
INLINE const char *multiply_steps(const int wide, const int bits, const int form, const int T, const matrix *w,
                                  const group *g, const ints *decoded, const char *x, int64_t k0, int64_t k1,
                                  ints sums[][MOST_TOKENS]) {
  ints room[MOST_REGISTERS * ROWS];
  const int64_t whole = min_of(k1, w->columns / WIDE_STEP);
  int64_t k = k0;
  if (form == DECODED) {
    for (; k < k1; k++, x += T * STEP_X(wide), decoded += REGISTERS(wide) * ROWS)
      multiply_registers(wide, T, decoded, x, 0, REGISTERS(wide), sums);
    return x;
  }
  for (; k < whole; k++, x += T * STEP_X(wide)) {
    decode_rows(wide, bits, form, g, k, WIDE_STEP, room);
    multiply_registers(wide, T, room, x, 0, REGISTERS(wide), sums);
  }
  if (k < k1) {
    decode_rows(wide, bits, form, g, k, w->columns - k * WIDE_STEP, room);
    multiply_registers(wide, T, room, x, 0, REGISTERS(wide), sums);
    x += T * STEP_X(wide);
  }
  return x;
}

INLINE const char *multiply_piece(const int wide, const int bits, const int form, const int T, const weights *from,
                                  const char *x, int64_t k0, int64_t k1, floats totals[][MOST_TOKENS]) {
  const matrix *w = from->t->w;
  const int64_t span = span_steps(w);
  const group g = group_of(from);
  const ints *decoded = from->decoded;
  if (w->group == WIDE_STEP / 2) {
    for (int64_t k = k0; k < k1; k++) {
      ints room[MOST_REGISTERS * ROWS];
      if (form != DECODED) decode_rows(wide, bits, form, &g, k, min_of(WIDE_STEP, w->columns - k * WIDE_STEP), room);
      const ints *step = form == DECODED ? decoded + (k - k0) * REGISTERS(wide) * ROWS : room;
      multiply_halves(wide, T, step, &x, from, k - k0, totals);
    }
    return x;
  }
  for (int64_t k = k0, at = 0; k < k1; k += span, at++) {
    ints sums[ROWS][MOST_TOKENS];
    floats scale[ROWS];
    start_sums(wide, T, &x, sums);
    x = multiply_steps(wide, bits, form, T, w, &g, decoded + (k - k0) * REGISTERS(wide) * ROWS, x, k,
                       min_of(k + span, k1), sums);
    for (int r = 0; r < ROWS; r++) scale[r] = splat_scale(from->scales[r][w->group ? at : 0]);
    add_sums(T, sums, scale, totals);
  }
  return x;
}

INLINE void decode_piece(const int wide, const int bits, const int form, const weights *from, int64_t k0, int64_t k1,
                         ints *to) {
  const matrix *w = from->t->w;
  const group g = group_of(from);
  for (int64_t k = k0; k < k1; k++, to += REGISTERS(wide) * ROWS)
    decode_rows(wide, bits, form, &g, k, min_of(WIDE_STEP, w->columns - k * WIDE_STEP), to);
}

INLINE void clear_totals(const int64_t tokens, floats totals[][MOST_TOKENS]) {
  for (int64_t t = 0; t < tokens; t++)
    for (int r = 0; r < ROWS; r++) totals[r][t] = zero_floats();
}

// sums of `tokens` from token `first` of a tile on, for the group of rows that begins at `row`
INLINE void finish(const tile *t, int64_t first, const int64_t tokens, int64_t row, floats totals[][MOST_TOKENS], int add_to) {
  const int64_t rows = min_of(t->row1 - row, ROWS);
  float *out = t->out + first * TILE_LD + (row - t->row0);
  for (int64_t i = 0; i < tokens; i++, out += TILE_LD) {
    float part[ROWS];
    sums_of(totals[0][i], totals[1][i], totals[2][i], totals[3][i], part);
    for (int r = 0; r < rows; r++) out[r] = part[r] * t->x_scales[first + i] + (add_to ? out[r] : 0.0f);
  }
}

// all rows of a tile times the tokens of a block, which begins with token `first`
INLINE void multiply_rows(const int wide, const int bits, const int form, const int T, weights *from, int64_t first,
                          const char *x) {
  const tile *t = from->t;
  const int64_t steps = ceil_div(t->w->columns, WIDE_STEP);
  for (from->row = t->row0; from->row < t->row1; from->row += ROWS) {
    floats totals[ROWS][MOST_TOKENS];
    const char *next = x;
    clear_totals(T, totals);
    for (int64_t k0 = 0; k0 < steps; k0 += SPAN_STEPS) {
      const int64_t k1 = min_of(k0 + SPAN_STEPS, steps);
      if (k0 == 0 || t->w->group) load_scales(from, k0, k1);
      next = multiply_piece(wide, bits, form, T, from, next, k0, k1, totals);
    }
    finish(t, first, T, from->row, totals, 0);
  }
}

// ---- tiles

// the functions of a precision of x
typedef struct {
  int wide;
  rows_fn *rows[2][3][MOST_TOKENS]; // by bits == 4, form and tokens - 1
  decode_fn *decode[2][3];
  decoded_fn *decoded[MOST_TOKENS]; // by tokens - 1
} functions;

// bytes of a packed token before step k, where a span begins
INLINE int64_t packed_before(const int wide, const matrix *w, int64_t k) {
  return k * STEP_X(wide) + (STARTS(wide) ? ceil_div(k, span_steps(w)) * (int64_t)sizeof(ints) : 0);
}

// few tokens: the weights are decoded again for every block
INLINE void multiply_few(const functions *f, const tile *t) {
  const matrix *w = t->w;
  const int64_t steps = ceil_div(w->columns, WIDE_STEP), token_bytes = packed_before(f->wide, w, steps);
  weights from;
  start_tile(&from, t, NULL);
  for (int64_t first = 0; first < t->tokens; first += t->block) {
    const int64_t tokens = min_of(t->block, t->tokens - first);
    f->rows[w->bits == 4][w->form][tokens - 1](&from, first, (const char *)t->x + first * token_bytes);
  }
}

// many tokens: the weights are decoded once for all blocks, a piece at a time
INLINE void multiply_many(const functions *f, const tile *t) {
  const matrix *w = t->w;
  const int64_t steps = ceil_div(w->columns, WIDE_STEP), token_bytes = packed_before(f->wide, w, steps);
  ints decoded[PIECE];
  weights from;
  start_tile(&from, t, decoded);
  for (int64_t row = t->row0; row < t->row1; row += ROWS) {
    from.row = row;
    for (int64_t k0 = 0; k0 < steps; k0 += SPAN_STEPS) {
      const int64_t k1 = min_of(k0 + SPAN_STEPS, steps);
      if (k0 == 0 || w->group) load_scales(&from, k0, k1);
      f->decode[w->bits == 4][w->form](&from, k0, k1, decoded);
      for (int64_t first = 0; first < t->tokens; first += t->block) {
        const int64_t tokens = min_of(t->block, t->tokens - first);
        const char *x = (const char *)t->x + first * token_bytes + tokens * packed_before(f->wide, w, k0);
        floats totals[ROWS][MOST_TOKENS];
        clear_totals(tokens, totals);
        f->decoded[tokens - 1](&from, x, k0, k1, totals);
        finish(t, first, tokens, row, totals, k0 > 0);
      }
    }
  }
}

// ---- the functions of a precision of x, for values of 8 and 4 bits in every form

#define DEFINE_ROWS(name, wide, bits, form, T)                                           \
  static TARGET void name##_##T(weights *from, int64_t first, const char *x) {           \
    multiply_rows(wide, bits, form, T, from, first, x);                                  \
  }
#define DEFINE_DECODED(name, wide, bits, form, T)                                        \
  static TARGET void name##_##T(const weights *from, const char *x, int64_t k0, int64_t k1, floats totals[][MOST_TOKENS]) { \
    multiply_piece(wide, bits, form, T, from, x, k0, k1, totals);                        \
  }
#if MOST_TOKENS == 2
#define EACH_SIZE(DEFINE, name, wide, bits, form) \
  DEFINE(name, wide, bits, form, 1) DEFINE(name, wide, bits, form, 2)
#define SIZES(name) {name##_1, name##_2}
#else
#define EACH_SIZE(DEFINE, name, wide, bits, form)                     \
  DEFINE(name, wide, bits, form, 1) DEFINE(name, wide, bits, form, 2) \
  DEFINE(name, wide, bits, form, 3) DEFINE(name, wide, bits, form, 4)
#define SIZES(name) {name##_1, name##_2, name##_3, name##_4}
#endif

#define DEFINE_FORM(name, wide, bits, form)                                                                             \
  EACH_SIZE(DEFINE_ROWS, name, wide, bits, form)                                                                                 \
  static TARGET void name##_decode(const weights *from, int64_t k0, int64_t k1, ints *to) {                              \
    decode_piece(wide, bits, form, from, k0, k1, to);                                                                   \
  }

#define DEFINE_FORMS(name, wide, bits)     \
  DEFINE_FORM(name##_any, wide, bits, ANY_NM) \
  DEFINE_FORM(name##_dense, wide, bits, DENSE)

#ifdef TWO_FOUR_IS_ANY
#define DEFINE_TWO_FOUR(name, wide, bits)
#define BY_FORM(name, of) {of(name##_any), of(name##_any), of(name##_dense)}
#else
#define DEFINE_TWO_FOUR(name, wide, bits) DEFINE_FORM(name##_two_four, wide, bits, TWO_FOUR)
#define BY_FORM(name, of) {of(name##_two_four), of(name##_any), of(name##_dense)}
#endif
#define DECODE(name) name##_decode

#define DEFINE_QUANTISED(name, is_wide)                                                                    \
  DEFINE_FORMS(name##_8, is_wide, 8)                                                                       \
  DEFINE_FORMS(name##_4, is_wide, 4)                                                                       \
  DEFINE_TWO_FOUR(name##_8, is_wide, 8)                                                                    \
  DEFINE_TWO_FOUR(name##_4, is_wide, 4)                                                                    \
  EACH_SIZE(DEFINE_DECODED, name##_decoded, is_wide, 0, DECODED)                                                       \
  static const functions name##_functions = {                                                              \
      .wide = is_wide,                                                                                     \
      .rows = {BY_FORM(name##_8, SIZES), BY_FORM(name##_4, SIZES)},                                    \
      .decoded = SIZES(name##_decoded),                                                                   \
      .decode = {BY_FORM(name##_8, DECODE), BY_FORM(name##_4, DECODE)},                                    \
  };                                                                                                       \
  static TARGET void name##_few(const tile *t) { multiply_few(&name##_functions, t); }                     \
  static TARGET void name##_many(const tile *t) { multiply_many(&name##_functions, t); }
