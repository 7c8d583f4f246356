// Kernels that take a byte of the bitmask, eight columns, at a time: for CPUs that have no instruction to expand values but
// can shuffle bytes. The includer defines
//   TARGET                         the attribute that allows the path's instructions
//   vec, MAX_PARTS, PARTS(kind)    a register, and how many of them eight columns of a kind take
//   BLOCK_TOKENS                   most tokens that meet a group of 4 rows
//   VALUE_BYTES(kind)              of a stored value
//   zero(), load_vec(p), multiply_add(kind, sum, w, x), sums_of(a, b, c, d, out[4]), prefetch(p)
//   decode(kind, form, p, bits, end, out[])   the eight columns of a byte of the bitmask; reads nothing at `end` or behind
// before. What limits a few tokens is memory, as in avx512.inc.h: the group that comes 8 KB later is prefetched into L2.

#include "path.h"

#define ROWS 4            // of a group
#define AHEAD 8192        // bytes
#define OCTETS (STEP / 8) // bytes of the bitmask in a step
#define DECODED_STEPS 16  // of a decoded group, which stays in L1 while all blocks pass

#define OCTET_BYTES(kind) (PARTS(kind) * (int64_t)sizeof(vec)) // of packed x, eight columns of a token
#define STEP_BYTES(kind) (OCTETS * OCTET_BYTES(kind))

// bytes of values that a byte of the bitmask stands for
INLINE int64_t advance(const int kind, const int form, uint32_t bits) {
  if (form == DENSE) return 8 * VALUE_BYTES(kind);
  if (form == TWO_FOUR) return 4 * VALUE_BYTES(kind);
  return __builtin_popcount(bits) * VALUE_BYTES(kind);
}

// ---- a group of rows

typedef struct {
  const uint8_t *values[ROWS], *index[ROWS], *end[ROWS]; // `values` moves on while the row is read
  int64_t values_ahead, index_ahead;                     // how many bytes later what is read after them lies
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

// step k of every row of a group; where two steps are within a cache line, both at the first
INLINE void prefetch_ahead(const group *g, const int form, int64_t step_bytes, int64_t k) {
  for (int r = 0; r < ROWS; r++) {
    if (step_bytes > 32 || k % 2 == 0) prefetch(g->values[r] + g->values_ahead);
    if (step_bytes > 64) prefetch(g->values[r] + g->values_ahead + 64);
    if (form != DENSE && k % 16 == 0) prefetch(g->index[r] + g->index_ahead + OCTETS * k);
  }
}

INLINE void clear(vec sums[][BLOCK_TOKENS], const int T) {
  for (int r = 0; r < ROWS; r++)
    for (int t = 0; t < T; t++) sums[r][t] = zero();
}

INLINE void finish(vec sums[][BLOCK_TOKENS], float *out, int64_t rows, const int T, int add_to) {
  for (int t = 0; t < T; t++, out += TILE_LD) {
    float part[ROWS];
    sums_of(sums[0][t], sums[1][t], sums[2][t], sums[3][t], part);
    for (int r = 0; r < min_of(rows, ROWS); r++) out[r] = part[r] + (add_to ? out[r] : 0.0f);
  }
}

// the products of one octet of columns with T tokens; w: [part][row]
INLINE void multiply_octet(const int kind, const int T, const vec *w, const char *x, vec sums[][BLOCK_TOKENS]) {
  for (int part = 0; part < PARTS(kind); part++)
    for (int t = 0; t < T; t++) {
      const vec tokens = load_vec(x + t * STEP_BYTES(kind) + part * sizeof(vec));
      for (int r = 0; r < ROWS; r++) sums[r][t] = multiply_add(kind, sums[r][t], w[part * ROWS + r], tokens);
    }
}

// the octet of a group that byte `at` of the bitmask stands for, to [part][row]; moves the group on
INLINE void decode_octet(const int kind, const int form, group *g, int64_t at, vec *to) {
  for (int r = 0; r < ROWS; r++) {
    const uint32_t bits = form == DENSE ? 0 : g->index[r][at];
    vec parts[MAX_PARTS];
    decode(kind, form, g->values[r], bits, g->end[r], parts);
    for (int part = 0; part < PARTS(kind); part++) to[part * ROWS + r] = parts[part];
    g->values[r] += advance(kind, form, bits);
  }
}

// ---- few tokens: the weights are decoded again for every block

INLINE void multiply_group(const int kind, const int form, const int T, const matrix *w, group g, const char *x,
                           float *out, int64_t rows) {
  vec sums[ROWS][BLOCK_TOKENS], octet[MAX_PARTS * ROWS];
  const int64_t octets = ceil_div(w->columns, 8), whole = w->columns / STEP;
  clear(sums, T);
  for (int64_t k = 0; k < whole; k++, x += T * STEP_BYTES(kind)) {
    prefetch_ahead(&g, form, w->step_bytes, k);
    for (int b = 0; b < OCTETS; b++) {
      decode_octet(kind, form, &g, OCTETS * k + b, octet);
      multiply_octet(kind, T, octet, x + b * OCTET_BYTES(kind), sums);
    }
  }
  for (int64_t at = OCTETS * whole; at < octets; at++, x += OCTET_BYTES(kind)) {
    decode_octet(kind, form, &g, at, octet);
    multiply_octet(kind, T, octet, x, sums);
  }
  finish(sums, out, rows, T, 0);
}

#define EACH_SIZE(call) \
  case 1: call(1); break; \
  case 2: call(2); break; \
  case 3: call(3); break; \
  MORE_SIZES(call)
#if BLOCK_TOKENS == 3
#define MORE_SIZES(call)
#else
#define MORE_SIZES(call) \
  case 4: call(4); break; \
  case 5: call(5); break; \
  case 6: call(6); break;
#endif

INLINE void multiply_few(const int kind, const int form, const tile *t) {
  const int64_t token_bytes = ceil_div(t->w->columns, STEP) * STEP_BYTES(kind);
  for (int64_t first = 0; first < t->tokens; first += t->block) {
    const char *x = (const char *)t->x + first * token_bytes;
    for (int64_t row = t->row0; row < t->row1; row += ROWS) {
      float *out = t->out + first * TILE_LD + (row - t->row0);
      const group g = group_at(t, kind, row);
#define CALL(T) multiply_group(kind, form, T, t->w, g, x, out, t->row1 - row)
      switch (min_of(t->block, t->tokens - first)) { EACH_SIZE(CALL) }
#undef CALL
    }
  }
}

// ---- many tokens: they are decoded once for all blocks

// steps k0..k1 of a group to [octet][part][row]; moves the group on
INLINE void decode_group(const int kind, const int form, const matrix *w, group *g, int64_t k0, int64_t k1, vec *to) {
  const int64_t octets = ceil_div(w->columns, 8);
  for (int64_t at = OCTETS * k0; at < OCTETS * k1; at++, to += PARTS(kind) * ROWS) {
    if (at % OCTETS == 0) prefetch_ahead(g, form, w->step_bytes, at / OCTETS);
    if (at < octets) decode_octet(kind, form, g, at, to);
    else
      for (int i = 0; i < PARTS(kind) * ROWS; i++) to[i] = zero();
  }
}

INLINE void multiply_decoded(const int kind, const int T, const vec *w, const char *x, int64_t steps, float *out,
                             int64_t rows, int add_to) {
  vec sums[ROWS][BLOCK_TOKENS];
  clear(sums, T);
  for (int64_t k = 0; k < steps; k++, x += T * STEP_BYTES(kind))
    for (int b = 0; b < OCTETS; b++, w += PARTS(kind) * ROWS)
      multiply_octet(kind, T, w, x + b * OCTET_BYTES(kind), sums);
  finish(sums, out, rows, T, add_to);
}

// decoded steps k0..k1 of a group times all blocks of a tile
INLINE void multiply_blocks(const int kind, const tile *t, const vec *w, int64_t row, int64_t k0, int64_t k1) {
  const int64_t steps = ceil_div(t->w->columns, STEP);
  for (int64_t first = 0; first < t->tokens; first += t->block) {
    const int64_t tokens = min_of(t->block, t->tokens - first);
    const char *x = (const char *)t->x + (first * steps + k0 * tokens) * STEP_BYTES(kind);
    float *out = t->out + first * TILE_LD + (row - t->row0);
#define CALL(T) multiply_decoded(kind, T, w, x, k1 - k0, out, t->row1 - row, k0 > 0)
    switch (tokens) { EACH_SIZE(CALL) }
#undef CALL
  }
}

typedef void blocks_fn(const tile *t, const vec *w, int64_t row, int64_t k0, int64_t k1);

INLINE void multiply_many(const int kind, const int form, const tile *t, blocks_fn *blocks) {
  vec decoded[DECODED_STEPS * OCTETS * MAX_PARTS * ROWS];
  const int64_t steps = ceil_div(t->w->columns, STEP);
  for (int64_t row = t->row0; row < t->row1; row += ROWS) {
    group g = group_at(t, kind, row);
    for (int64_t k0 = 0; k0 < steps; k0 += DECODED_STEPS) {
      const int64_t k1 = min_of(k0 + DECODED_STEPS, steps);
      decode_group(kind, form, t->w, &g, k0, k1, decoded);
      blocks(t, decoded, row, k0, k1);
    }
  }
}

// ---- the functions of a kind, for every form; `products` multiplies what is decoded, and may be another kind's

#define DEFINE_BLOCKS(products, kind)                                                                        \
  static TARGET void products(const tile *t, const vec *w, int64_t row, int64_t k0, int64_t k1) {            \
    multiply_blocks(kind, t, w, row, k0, k1);                                                                \
  }

#define DEFINE_KIND(name, kind, products)                                       \
  static TARGET void name##_few(const tile *t) {                                \
    switch (t->w->form) {                                                       \
      case TWO_FOUR: multiply_few(kind, TWO_FOUR, t); break;                    \
      case ANY_NM: multiply_few(kind, ANY_NM, t); break;                        \
      default: multiply_few(kind, DENSE, t);                                    \
    }                                                                           \
  }                                                                             \
  static TARGET void name##_many(const tile *t) {                               \
    switch (t->w->form) {                                                       \
      case TWO_FOUR: multiply_many(kind, TWO_FOUR, t, products); break;         \
      case ANY_NM: multiply_many(kind, ANY_NM, t, products); break;             \
      default: multiply_many(kind, DENSE, t, products);                         \
    }                                                                           \
  }
