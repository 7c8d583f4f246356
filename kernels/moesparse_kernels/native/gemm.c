// y = x @ weight.T + bias for one matrix.
#include <stdlib.h>

#include "path.h"
#include "threads.h"
#include "tokens.h"

typedef struct {
  const moesparse_gemm *call;
  const path *path;
  const kernel *kernel;
  token_plan plan;
  matrix w;
  char *x;
  float *x_scales;
  int64_t x_row;
  int64_t chunk;
} gemm_run;

static void pack_tokens(int64_t begin, int64_t end, void *context) {
  const gemm_run *run = context;
  const int64_t K = run->w.columns, bytes = K * dtype_bytes(run->call->dtype);
  for (int64_t t = begin; t < end; t++) {
    const char *row = (const char *)run->call->x + t * bytes;
    const token_place to = place_token(&run->plan, run->x, run->x_row, run->call->tokens, t);
    if (run->kernel->levels) run->x_scales[t] = quantise_row(run->path, run->kernel, &run->w, run->call->dtype, row, to);
    else pack_columns(run->path, run->call->dtype, row, 0, K, to);
  }
}

// one chunk of rows for all tokens
static void multiply_chunk(const gemm_run *run, int64_t row0) {
  const moesparse_gemm *call = run->call;
  const int64_t N = run->w.rows, row1 = min_of(row0 + run->chunk, N), size = dtype_bytes(call->dtype);
  float out[TILE_TOKENS * TILE_LD], bias[CHUNK];
  if (call->bias) run->path->widen((const char *)call->bias + row0 * size, call->dtype, bias, row1 - row0);
  for (int64_t first = 0; first < call->tokens; first += run->plan.piece) {
    const int64_t tokens = min_of(run->plan.piece, call->tokens - first);
    run->plan.multiply(&(tile){.w = &run->w,
                               .row0 = row0,
                               .row1 = row1,
                               .x = run->x + first * run->x_row,
                               .x_scales = run->x_scales + first,
                               .tokens = tokens,
                               .block = run->plan.block,
                               .out = out});
    for (int64_t t = 0; t < tokens; t++) {
      if (call->bias) run->path->add(out + t * TILE_LD, bias, row1 - row0);
      run->path->narrow(out + t * TILE_LD, call->dtype, (char *)call->y + ((first + t) * N + row0) * size, row1 - row0);
    }
  }
}

static void multiply_chunks(int64_t begin, int64_t end, void *context) {
  const gemm_run *run = context;
  for (int64_t q = begin; q < end; q++) multiply_chunk(run, q * run->chunk);
}

int32_t moesparse_run_gemm(const moesparse_gemm *call) {
  const path *p = current_path();
  if (!p) return MOESPARSE_NO_PATH;
  const kernel *k = kernel_of(p, &call->weight, call->dtype, call->x_bits);
  gemm_run run = {
      .call = call,
      .path = p,
      .kernel = k,
      .plan = plan_tokens(k, call->tokens),
      .w = matrix_of(&call->weight, 0, call->dtype),
      .chunk = row_chunk(call->weight.rows, 1),
  };
  run.x_row = packed_bytes(k, &run.w);
  if (call->tokens == 0 || run.w.rows == 0) return MOESPARSE_OK;
  const int64_t x_bytes = call->tokens * run.x_row;
  run.x = aligned_alloc(64, x_bytes + ceil_div(call->tokens * 4, 64) * 64);
  if (!run.x) return MOESPARSE_NO_MEMORY;
  run.x_scales = (float *)(run.x + x_bytes);
  share_items(call->tokens, items_for_a_thread(run.x_row), pack_tokens, &run);
  share_items(ceil_div(run.w.rows, run.chunk), items_for_a_thread(run.chunk * run.w.value_row), multiply_chunks, &run);
  free(run.x);
  return MOESPARSE_OK;
}
