// The expert layer: tokens sorted by expert and packed, the first projection of every expert with its activation, the
// second with gates and the sum over a token's experts. Two parallel regions, more where the tokens are many.
#include "layer.h"

#include <stdlib.h>
#include <string.h>

#include "threads.h"

// ---- first projection

// where the values, the bitmask and the scales of a row lie, for the prefetch of what comes next
static void then_row(tile *t, const matrix *w, int64_t row) {
  t->then_values = w->values + row * w->value_row;
  t->then_index = w->index + row * w->index_row;
  t->then_scales = w->scales ? w->scales + row * w->scales_row : NULL;
}

// Gate and up of hidden values i0..i1 into the two halves of `out`, or the values alone into the first; then where
// the next chunk of this or the next expert begins.
static void project_up(const layer_run *run, const expert_rows *rows, tile t, int64_t i0, int64_t i1, int64_t active) {
  const moesparse_layer *call = run->call;
  const matrix w = *t.w;
  matrix next = w;
  if (i1 == run->out_rows && active + 1 < run->count)
    next = expert_matrix(run, &run->up, run->active[active + 1]);
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
  p->activate(call->activation, row, call->gated ? row + CHUNK : NULL, n);
  const projection *down = &run->down;
  if (down->kernel->levels) {
    // a scale needs the whole row: pack_down
    memcpy(run->hidden + (rows->first + i) * run->out_rows + i0, row, n * sizeof(float));
    return;
  }
  float rounded[CHUNK];
  p->narrow(row, call->dtype, rounded, n);
  const token_plan plan = plan_tokens(down->kernel, rows->count);
  pack_columns(p, call->dtype, rounded, i0, n,
               place_token(&plan, down->rows + rows->first * down->row_bytes, down->row_bytes, rows->count, i));
}

static void up_chunk(const layer_run *run, int64_t active, int64_t i0) {
  const projection *up = &run->up;
  const expert_rows rows = rows_of(run, up, active);
  const matrix w = expert_matrix(run, up, rows.expert);
  const int64_t i1 = min_of(i0 + up->chunk, run->out_rows);
  float out[TILE_TOKENS * TILE_LD], bias[TILE_LD];
  if (run->call->up_bias) load_up_bias(run, rows.expert, i0, i1, bias);
  for (int64_t first = 0; first < rows.count; first += rows.plan.piece) {
    const int64_t tokens = min_of(rows.plan.piece, rows.count - first);
    const tile t = {.w = &w,
                    .x = up->rows + (rows.first + first) * up->row_bytes,
                    .x_scales = up->scales + rows.first + first,
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
  const int64_t chunks = ceil_div(run->out_rows, run->up.chunk);
  for (int64_t q = begin; q < end; q++) up_chunk(run, q / chunks, q % chunks * run->up.chunk);
}

// ---- second projection

// rows r0..r1 of one expert's down, times gates, onto the sums of its tokens
static void add_expert(const layer_run *run, int64_t active, int64_t r0, int64_t r1, float *sums) {
  const moesparse_layer *call = run->call;
  const projection *down = &run->down;
  const expert_rows rows = rows_of(run, down, active);
  const matrix w = expert_matrix(run, down, rows.expert);
  const int64_t size = dtype_bytes(call->dtype), n = r1 - r0;
  float out[TILE_TOKENS * TILE_LD], bias[CHUNK];
  if (call->down_bias)
    run->path->widen((const char *)call->down_bias + (rows.expert * w.rows + r0) * size, call->dtype, bias, n);
  for (int64_t first = 0; first < rows.count; first += rows.plan.piece) {
    const int64_t tokens = min_of(rows.plan.piece, rows.count - first);
    tile t = {.w = &w,
              .row0 = r0,
              .row1 = r1,
              .x = down->rows + (rows.first + first) * down->row_bytes,
              .x_scales = down->scales + rows.first + first,
              .tokens = tokens,
              .block = rows.plan.block,
              .out = out};
    // the next expert's rows of this chunk, or the first expert's of the next
    const int64_t next = active + 1 < run->count ? active + 1 : 0;
    const matrix next_w = expert_matrix(run, down, run->active[next]);
    then_row(&t, &next_w, next ? r0 : r1);
    rows.plan.multiply(&t);
    for (int64_t i = 0; i < tokens; i++) {
      const int64_t slot = run->slot[rows.first + first + i];
      float *row = out + i * TILE_LD;
      if (call->down_bias) run->path->add(row, bias, n);
      run->path->add_scaled(sums + slot / call->top_k * run->down.chunk, row, run->gates[slot], n);
    }
  }
}

static void down_chunks(int64_t begin, int64_t end, void *context) {
  const layer_run *run = context;
  const moesparse_layer *call = run->call;
  const int64_t T = call->tokens, N = call->down.rows, size = dtype_bytes(call->y_dtype);
  for (int64_t q = begin; q < end; q++) {
    const int64_t r0 = q * run->down.chunk, r1 = min_of(r0 + run->down.chunk, N);
    float *sums = run->sums + r0 * T;
    memset(sums, 0, T * run->down.chunk * sizeof(float));
    for (int64_t a = 0; a < run->count; a++) add_expert(run, a, r0, r1, sums);
    for (int64_t t = 0; t < T; t++)
      run->path->narrow(sums + t * run->down.chunk, call->y_dtype, (char *)call->y + (t * N + r0) * size, r1 - r0);
  }
}

// ---- the whole

static projection plan_projection(const moesparse_layer *call, const path *p, const moesparse_weight *weight) {
  projection of = {.weight = weight, .kernel = kernel_of(p, weight, call->dtype, call->x_bits)};
  const matrix w = matrix_of(weight, 0, call->dtype);
  of.row_bytes = packed_bytes(of.kernel, &w);
  return of;
}

static layer_run plan_layer(const moesparse_layer *call, const path *p) {
  const int split = call->stage != MOESPARSE_UP && call->gated;
  return (layer_run){
      .call = call,
      .path = p,
      .up = plan_projection(call, p, &call->up),
      .down = plan_projection(call, p, &call->down),
      .out_rows = call->up.rows / (split ? 2 : 1),
      .alternating = split && call->activation == MOESPARSE_SWIGLU_OAI,
  };
}

// one piece of memory for all, 1 when there is none
static int allocate(layer_run *run) {
  const moesparse_layer *call = run->call;
  const int64_t T = call->tokens, R = T * call->top_k, E = call->experts;
  const int up = call->stage != MOESPARSE_DOWN, down = call->stage != MOESPARSE_UP;
  const int whole_up = up && run->up.kernel->levels, whole_down = down && run->down.kernel->levels;
  const struct {
    void *at;
    int64_t bytes;
  } parts[] = {
      {&run->first, (E + 1) * 8},
      {&run->slot, R * 8},
      {&run->active, E * 8},
      {&run->gates, down ? R * 4 : 0},
      {&run->up.rows, up ? R * run->up.row_bytes : 0},
      {&run->up.scales, whole_up ? R * 4 : 0},
      {&run->down.rows, down ? R * run->down.row_bytes : 0},
      {&run->down.scales, whole_down ? R * 4 : 0},
      {&run->tokens, whole_up ? T * run->up.row_bytes : 0},
      {&run->token_scales, whole_up ? T * 4 : 0},
      {&run->hidden, whole_down && up ? R * call->down.columns * 4 : 0},
      {&run->sums, down ? ceil_div(call->down.rows, CHUNK) * CHUNK * T * 4 : 0},
  };
  int64_t total = 0;
  for (unsigned i = 0; i < sizeof parts / sizeof *parts; i++) total += ceil_div(parts[i].bytes, 64) * 64;
  run->memory = aligned_alloc(64, total);
  if (!run->memory) return 1;
  char *next = run->memory;
  for (unsigned i = 0; i < sizeof parts / sizeof *parts; i++) {
    memcpy(parts[i].at, &next, sizeof next);
    next += ceil_div(parts[i].bytes, 64) * 64;
  }
  return 0;
}

int32_t moesparse_run_layer(const moesparse_layer *call) {
  const path *p = current_path();
  if (!p) return MOESPARSE_NO_PATH;
  if (call->tokens == 0) return MOESPARSE_OK;
  layer_run run = plan_layer(call, p);
  if (allocate(&run)) return MOESPARSE_NO_MEMORY;
  sort_slots(&run);
  if (call->stage != MOESPARSE_DOWN) {
    run.up.chunk = row_chunk(run.out_rows, run.count);
    pack_up(&run);
    share_items(run.count * ceil_div(run.out_rows, run.up.chunk), items_for_a_thread(run.up.chunk * call->up.value_row),
                up_chunks, &run);
  }
  if (call->stage != MOESPARSE_UP) {
    pack_down(&run);
    run.down.chunk = row_chunk(call->down.rows, 1);
    p->widen(call->gates, call->gates_dtype, run.gates, call->tokens * call->top_k);
    share_items(ceil_div(call->down.rows, run.down.chunk),
                items_for_a_thread(run.count * run.down.chunk * call->down.value_row), down_chunks, &run);
  }
  free(run.memory);
  return MOESPARSE_OK;
}
