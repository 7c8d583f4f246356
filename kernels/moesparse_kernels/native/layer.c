// The expert layer: tokens sorted by expert and packed, the first projection of every expert with its activation, the
// second with gates and the sum over a token's experts. Two parallel regions, three where the tokens are many.
#include <stdlib.h>
#include <string.h>

#include "path.h"
#include "threads.h"
#include "tokens.h"

typedef struct {
  const moesparse_layer *call;
  const path *path;
  const kernel *kernel;
  int64_t hidden, intermediate; // columns of the two projections
  int64_t out_rows;             // hidden values that a row of the first projection gives
  int alternating;              // gate and up take turns in the rows of `up`
  // routing
  int64_t *first;  // (E + 1): first row of each expert, then the number of rows
  int64_t *slot;   // (R): slot of each row
  int64_t *active; // experts that have rows
  int64_t count;   // of them
  float *gates;    // (R): of each slot
  // packed rows of the projections, and how many bytes one takes
  char *x, *h;
  int64_t x_row, h_row;
  float *sums;     // (H / down_chunk, T, down_chunk)
  int64_t up_chunk, down_chunk;
  char *memory;
} layer_run;

// the rows of one expert
typedef struct {
  int64_t expert, first, count;
  token_plan plan;
} expert_rows;

static expert_rows rows_of(const layer_run *run, int64_t active) {
  const int64_t e = run->active[active], first = run->first[e], count = run->first[e + 1] - first;
  return (expert_rows){.expert = e, .first = first, .count = count, .plan = plan_tokens(run->kernel, count)};
}

// ---- routing

static int64_t id_of(const moesparse_layer *call, int64_t slot) {
  return call->ids_bytes == 8 ? ((const int64_t *)call->ids)[slot] : ((const int32_t *)call->ids)[slot];
}

static int has_expert(const moesparse_layer *call, int64_t id) { return id >= 0 && id < call->experts; }

// slots in expert order, stable; those of no expert are in no row
static void sort_slots(layer_run *run) {
  const moesparse_layer *call = run->call;
  const int64_t slots = call->tokens * call->top_k, E = call->experts;
  // first[e + 1] holds how many rows expert e has, then where it begins, then where it ends
  int64_t *first = run->first, begin = 0;
  memset(first, 0, (E + 1) * sizeof *first);
  for (int64_t s = 0; s < slots; s++) {
    const int64_t e = id_of(call, s);
    if (has_expert(call, e)) first[e + 1]++;
  }
  for (int64_t e = 0; e < E; e++) {
    const int64_t rows = first[e + 1];
    if (rows) run->active[run->count++] = e;
    first[e + 1] = begin;
    begin += rows;
  }
  for (int64_t s = 0; s < slots; s++) {
    const int64_t e = id_of(call, s);
    if (has_expert(call, e)) run->slot[first[e + 1]++] = s;
  }
}

// ---- tokens into their experts' blocks

// rows begin..end of all experts: from x, or for the second projection alone from the caller's rows
static void pack_expert(int64_t begin, int64_t end, void *context) {
  const layer_run *run = context;
  const moesparse_layer *call = run->call;
  const int down = call->stage == MOESPARSE_DOWN;
  const int64_t K = down ? run->intermediate : run->hidden, bytes = K * dtype_bytes(call->dtype);
  const int64_t row_bytes = down ? run->h_row : run->x_row;
  for (int64_t a = begin; a < end; a++) {
    const expert_rows rows = rows_of(run, a);
    char *packed = (down ? run->h : run->x) + rows.first * row_bytes;
    for (int64_t i = 0; i < rows.count; i++) {
      const int64_t row = rows.first + i;
      const char *from = down ? (const char *)call->rows + row * bytes
                              : (const char *)call->x + run->slot[row] / call->top_k * bytes;
      pack_columns(run->path, call->dtype, from, 0, K, place_token(&rows.plan, packed, row_bytes, rows.count, i));
    }
  }
}

// ---- first projection

// where the values and the bitmask of a row lie, for the prefetch of what comes next
static void then_row(tile *t, const matrix *w, int64_t row) {
  t->then_values = w->values + row * w->value_row;
  t->then_index = w->index + row * w->index_row;
}

// Gate and up of hidden values i0..i1 into the two halves of `out`, or the values alone into the first; then where
// the next chunk of this or the next expert begins.
static void project_up(const layer_run *run, const expert_rows *rows, tile t, int64_t i0, int64_t i1, int64_t active) {
  const moesparse_layer *call = run->call;
  const matrix w = *t.w;
  matrix next = w;
  if (i1 == run->out_rows && active + 1 < run->count)
    next = matrix_of(&call->up, run->active[active + 1], call->dtype);
  const int64_t next_row = i1 == run->out_rows ? 0 : i1;
  if (run->alternating) {
    t.row0 = 2 * i0;
    t.row1 = 2 * i1;
    then_row(&t, &next, 2 * next_row);
    rows->plan.multiply(&t);
    return;
  }
  t.row0 = i0;
  t.row1 = i1;
  if (call->gated) {
    then_row(&t, &w, run->out_rows + i0);
    rows->plan.multiply(&t);
    t.row0 += run->out_rows;
    t.row1 += run->out_rows;
    t.out += CHUNK;
  }
  then_row(&t, &next, next_row);
  rows->plan.multiply(&t);
}

// alternating gate and up of a row into its two halves
static void part_row(float *row, int64_t n) {
  float both[TILE_LD];
  memcpy(both, row, 2 * n * sizeof(float));
  for (int64_t i = 0; i < n; i++) {
    row[i] = both[2 * i];
    row[CHUNK + i] = both[2 * i + 1];
  }
}

// the biases of hidden values i0..i1 of an expert, laid out as a row of a tile
static void load_up_bias(const layer_run *run, int64_t expert, int64_t i0, int64_t i1, float *bias) {
  const moesparse_layer *call = run->call;
  const int64_t size = dtype_bytes(call->dtype);
  const char *of = (const char *)call->up_bias + expert * call->up.rows * size;
  if (run->alternating) {
    run->path->widen(of + 2 * i0 * size, call->dtype, bias, 2 * (i1 - i0));
    part_row(bias, i1 - i0);
    return;
  }
  run->path->widen(of + i0 * size, call->dtype, bias, i1 - i0);
  if (call->gated) run->path->widen(of + (run->out_rows + i0) * size, call->dtype, bias + CHUNK, i1 - i0);
}

// bias, activation and rounding of one row of a tile, and to where the second projection or the caller reads it
static void finish_up(const layer_run *run, const expert_rows *rows, int64_t i, int64_t i0, int64_t n, float *row,
                      const float *bias) {
  const moesparse_layer *call = run->call;
  const path *p = run->path;
  if (run->alternating) part_row(row, n);
  if (bias) {
    p->add(row, bias, n);
    if (call->gated) p->add(row + CHUNK, bias + CHUNK, n);
  }
  if (call->stage == MOESPARSE_UP) {
    const int64_t at = (rows->first + i) * run->out_rows + i0;
    p->narrow(row, call->dtype, (char *)call->rows + at * dtype_bytes(call->dtype), n);
    return;
  }
  float rounded[CHUNK];
  p->activate(call->activation, row, call->gated ? row + CHUNK : NULL, n);
  p->narrow(row, call->dtype, rounded, n);
  pack_columns(p, call->dtype, rounded, i0, n,
               place_token(&rows->plan, run->h + rows->first * run->h_row, run->h_row, rows->count, i));
}

static void up_chunk(const layer_run *run, int64_t active, int64_t i0) {
  const expert_rows rows = rows_of(run, active);
  const matrix w = matrix_of(&run->call->up, rows.expert, run->call->dtype);
  const int64_t i1 = min_of(i0 + run->up_chunk, run->out_rows);
  float out[TILE_TOKENS * TILE_LD], bias[TILE_LD];
  if (run->call->up_bias) load_up_bias(run, rows.expert, i0, i1, bias);
  for (int64_t first = 0; first < rows.count; first += rows.plan.piece) {
    const int64_t tokens = min_of(rows.plan.piece, rows.count - first);
    const tile t = {.w = &w,
                    .x = run->x + (rows.first + first) * run->x_row,
                    .tokens = tokens,
                    .block = rows.plan.block,
                    .out = out};
    project_up(run, &rows, t, i0, i1, active);
    for (int64_t i = 0; i < tokens; i++)
      finish_up(run, &rows, first + i, i0, i1 - i0, out + i * TILE_LD, run->call->up_bias ? bias : NULL);
  }
}

static void up_chunks(int64_t begin, int64_t end, void *context) {
  const layer_run *run = context;
  const int64_t chunks = ceil_div(run->out_rows, run->up_chunk);
  for (int64_t q = begin; q < end; q++) up_chunk(run, q / chunks, q % chunks * run->up_chunk);
}

// ---- second projection

// rows r0..r1 of one expert's down, times gates, onto the sums of its tokens
static void add_expert(const layer_run *run, int64_t active, int64_t r0, int64_t r1, float *sums) {
  const moesparse_layer *call = run->call;
  const expert_rows rows = rows_of(run, active);
  const matrix w = matrix_of(&call->down, rows.expert, call->dtype);
  const int64_t size = dtype_bytes(call->dtype), n = r1 - r0;
  float out[TILE_TOKENS * TILE_LD], bias[CHUNK];
  if (call->down_bias)
    run->path->widen((const char *)call->down_bias + (rows.expert * w.rows + r0) * size, call->dtype, bias, n);
  for (int64_t first = 0; first < rows.count; first += rows.plan.piece) {
    const int64_t tokens = min_of(rows.plan.piece, rows.count - first);
    tile t = {.w = &w,
              .row0 = r0,
              .row1 = r1,
              .x = run->h + (rows.first + first) * run->h_row,
              .tokens = tokens,
              .block = rows.plan.block,
              .out = out};
    // the next expert's rows of this chunk, or the first expert's of the next
    const int64_t next = active + 1 < run->count ? active + 1 : 0;
    const matrix next_w = matrix_of(&call->down, run->active[next], call->dtype);
    then_row(&t, &next_w, next ? r0 : r1);
    rows.plan.multiply(&t);
    for (int64_t i = 0; i < tokens; i++) {
      const int64_t slot = run->slot[rows.first + first + i];
      float *row = out + i * TILE_LD;
      if (call->down_bias) run->path->add(row, bias, n);
      run->path->add_scaled(sums + slot / call->top_k * run->down_chunk, row, run->gates[slot], n);
    }
  }
}

static void down_chunks(int64_t begin, int64_t end, void *context) {
  const layer_run *run = context;
  const moesparse_layer *call = run->call;
  const int64_t T = call->tokens, N = call->down.rows, size = dtype_bytes(call->dtype);
  for (int64_t q = begin; q < end; q++) {
    const int64_t r0 = q * run->down_chunk, r1 = min_of(r0 + run->down_chunk, N);
    float *sums = run->sums + r0 * T;
    memset(sums, 0, T * run->down_chunk * sizeof(float));
    for (int64_t a = 0; a < run->count; a++) add_expert(run, a, r0, r1, sums);
    for (int64_t t = 0; t < T; t++)
      run->path->narrow(sums + t * run->down_chunk, call->dtype, (char *)call->y + (t * N + r0) * size, r1 - r0);
  }
}

// ---- the whole

static layer_run plan_layer(const moesparse_layer *call, const path *p) {
  const kernel *k = &p->kernels[call->dtype];
  const int split = call->stage != MOESPARSE_UP && call->gated;
  layer_run run = {
      .call = call,
      .path = p,
      .kernel = k,
      .hidden = call->up.columns,
      .intermediate = call->down.columns,
      .out_rows = call->up.rows / (split ? 2 : 1),
      .alternating = split && call->activation == MOESPARSE_SWIGLU_OAI,
      .x_row = packed_bytes(k, call->up.columns),
      .h_row = packed_bytes(k, call->down.columns),
  };
  return run;
}

// one piece of memory for all, 1 when there is none
static int allocate(layer_run *run) {
  const moesparse_layer *call = run->call;
  const int64_t R = call->tokens * call->top_k, E = call->experts;
  const int up = call->stage != MOESPARSE_DOWN, down = call->stage != MOESPARSE_UP;
  const struct {
    void **at;
    int64_t bytes;
  } parts[] = {
      {(void **)&run->first, (E + 1) * 8},
      {(void **)&run->slot, R * 8},
      {(void **)&run->active, E * 8},
      {(void **)&run->gates, down ? R * 4 : 0},
      {(void **)&run->x, up ? R * run->x_row : 0},
      {(void **)&run->h, down ? R * run->h_row : 0},
      {(void **)&run->sums, down ? ceil_div(call->down.rows, CHUNK) * CHUNK * call->tokens * 4 : 0},
  };
  int64_t total = 0;
  for (unsigned i = 0; i < sizeof parts / sizeof *parts; i++) total += ceil_div(parts[i].bytes, 64) * 64;
  run->memory = aligned_alloc(64, total);
  if (!run->memory) return 1;
  char *next = run->memory;
  for (unsigned i = 0; i < sizeof parts / sizeof *parts; i++) {
    *parts[i].at = next;
    next += ceil_div(parts[i].bytes, 64) * 64;
  }
  return 0;
}

// from how many packed bytes on packing them is shared
#define SHARED_PACKING (1 << 20)

static void pack_rows(layer_run *run, int64_t row_bytes) {
  if (run->first[run->call->experts] * row_bytes < SHARED_PACKING) pack_expert(0, run->count, run);
  else share_items(run->count, 1, pack_expert, run);
}

int32_t moesparse_run_layer(const moesparse_layer *call) {
  const path *p = current_path();
  if (!p) return MOESPARSE_NO_PATH;
  if (call->tokens == 0) return MOESPARSE_OK;
  layer_run run = plan_layer(call, p);
  if (allocate(&run)) return MOESPARSE_NO_MEMORY;
  sort_slots(&run);
  if (call->stage != MOESPARSE_DOWN) {
    run.up_chunk = row_chunk(run.out_rows, run.count);
    pack_rows(&run, run.x_row);
    share_items(run.count * ceil_div(run.out_rows, run.up_chunk),
                items_for_a_thread(run.up_chunk * call->up.value_row), up_chunks, &run);
  } else {
    pack_rows(&run, run.h_row);
  }
  if (call->stage != MOESPARSE_UP) {
    run.down_chunk = row_chunk(call->down.rows, 1);
    p->widen(call->gates, call->gates_dtype, run.gates, call->tokens * call->top_k);
    share_items(ceil_div(call->down.rows, run.down_chunk),
                items_for_a_thread(run.count * run.down_chunk * call->down.value_row), down_chunks, &run);
  }
  free(run.memory);
  return MOESPARSE_OK;
}
