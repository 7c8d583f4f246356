// Which rows an expert has, and the rows into its blocks.
#include <string.h>

#include "layer.h"
#include "threads.h"

// ---- routing

static int64_t id_of(const moesparse_layer *call, int64_t slot) {
  return call->ids_bytes == 8 ? ((const int64_t *)call->ids)[slot] : ((const int32_t *)call->ids)[slot];
}

static int has_expert(const moesparse_layer *call, int64_t id) { return id >= 0 && id < call->experts; }

void sort_slots(layer_run *run) {
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

expert_rows rows_of(const layer_run *run, const projection *of, int64_t active) {
  const int64_t e = run->active[active], first = run->first[e], count = run->first[e + 1] - first;
  return (expert_rows){.expert = e, .first = first, .count = count, .plan = plan_tokens(of->kernel, count)};
}

matrix expert_matrix(const layer_run *run, const projection *of, int64_t expert) {
  return matrix_of(of->weight, expert, run->call->dtype);
}

// ---- rows into blocks

// quantised tokens begin..end of x, once for all of their experts
static void quantise_tokens(int64_t begin, int64_t end, void *context) {
  const layer_run *run = context;
  const projection *up = &run->up;
  const matrix w = expert_matrix(run, up, 0);
  const int64_t bytes = w.columns * dtype_bytes(run->call->dtype);
  for (int64_t t = begin; t < end; t++) {
    const token_place alone = {.block = run->tokens + t * up->row_bytes, .tokens = 1};
    run->token_scales[t] = quantise_row(run->path, up->kernel, &w, run->call->dtype,
                                        (const char *)run->call->x + t * bytes, alone);
  }
}

// row `row` of the first projection
static void place_up(const layer_run *run, int64_t row, token_place to) {
  const moesparse_layer *call = run->call;
  const projection *up = &run->up;
  const int64_t K = up->weight->columns, token = run->slot[row] / call->top_k;
  if (up->kernel->levels) {
    const matrix w = expert_matrix(run, up, 0);
    copy_quantised(up->kernel, &w, run->tokens + token * up->row_bytes, to);
    up->scales[row] = run->token_scales[token];
  } else {
    pack_columns(run->path, call->dtype, (const char *)call->x + token * K * dtype_bytes(call->dtype), 0, K, to);
  }
}

// row `row` of the second one
static void place_down(const layer_run *run, int64_t row, token_place to) {
  const moesparse_layer *call = run->call;
  const projection *down = &run->down;
  const int64_t K = down->weight->columns;
  const char *given = (const char *)call->rows + row * K * dtype_bytes(call->dtype);
  if (!down->kernel->levels) {
    pack_columns(run->path, call->dtype, given, 0, K, to);
    return;
  }
  const matrix w = expert_matrix(run, down, 0);
  const int given_rows = call->stage == MOESPARSE_DOWN;
  down->scales[row] = quantise_row(run->path, down->kernel, &w, given_rows ? call->dtype : MOESPARSE_FP32,
                                   given_rows ? given : (const char *)(run->hidden + row * K), to);
}

// rows begin..end of all experts
static void place_rows(const layer_run *run, const projection *of, int64_t begin, int64_t end) {
  int64_t active = 0;
  for (int64_t row = begin; row < end; active++) {
    const expert_rows rows = rows_of(run, of, active);
    char *packed = of->rows + rows.first * of->row_bytes;
    for (; row < min_of(end, rows.first + rows.count); row++) {
      const token_place to = place_token(&rows.plan, packed, of->row_bytes, rows.count, row - rows.first);
      if (of == &run->up) place_up(run, row, to);
      else place_down(run, row, to);
    }
  }
}

static void place_up_rows(int64_t begin, int64_t end, void *context) {
  const layer_run *run = context;
  place_rows(run, &run->up, begin, end);
}

static void place_down_rows(int64_t begin, int64_t end, void *context) {
  const layer_run *run = context;
  place_rows(run, &run->down, begin, end);
}

// from how many packed bytes on packing them is shared
#define SHARED_PACKING (1 << 20)

static void share_rows(layer_run *run, int64_t rows, int64_t row_bytes, job *work) {
  if (rows * row_bytes < SHARED_PACKING) work(0, rows, run);
  else share_items(rows, items_for_a_thread(row_bytes), work, run);
}

void pack_up(layer_run *run) {
  const int64_t T = run->call->tokens, rows = run->first[run->call->experts];
  if (run->up.kernel->levels) share_rows(run, T, run->up.row_bytes, quantise_tokens);
  share_rows(run, rows, run->up.row_bytes, place_up_rows);
}

void pack_down(layer_run *run) {
  const int64_t rows = run->first[run->call->experts];
  if (run->down.kernel->levels || run->call->stage == MOESPARSE_DOWN)
    share_rows(run, rows, run->down.row_bytes, place_down_rows);
}
