#include "tokens.h"

#include <string.h>

#include "threads.h"

token_plan plan_tokens(const kernel *k, int64_t tokens) {
  token_plan plan = {.multiply = k->few, .block = k->many_block};
  if (tokens >= k->many_from) {
    plan.multiply = k->many;
  } else {
    // blocks of equal size, as few as hold them
    const int64_t blocks = tokens > 0 ? ceil_div(tokens, k->few_block) : 1;
    plan.block = (int)ceil_div(tokens > 0 ? tokens : 1, blocks);
  }
  plan.piece = TILE_TOKENS / plan.block * plan.block;
  return plan;
}

int64_t row_chunk(int64_t rows, int64_t matrices) {
  return ceil_div(rows, CHUNK) * matrices < 4 * thread_count() ? CHUNK / 2 : CHUNK;
}

int64_t packed_bytes(const kernel *k, int64_t columns) { return ceil_div(columns, STEP) * STEP * k->x_bytes; }

token_place place_token(const token_plan *plan, char *packed, int64_t row_bytes, int64_t tokens, int64_t token) {
  const int64_t first = token / plan->block * plan->block;
  return (token_place){
      .block = packed + first * row_bytes, .tokens = min_of(plan->block, tokens - first), .at = token - first};
}

void pack_columns(const path *p, int dtype, const void *row_part, int64_t first, int64_t count, token_place to) {
  const kernel *k = &p->kernels[dtype];
  const int64_t size = dtype_bytes(dtype), step_bytes = STEP * k->x_bytes;
  const char *from = row_part;
  char *out = to.block + (first / STEP * to.tokens + to.at) * step_bytes;
  for (int64_t done = 0; done < count; done += STEP, out += to.tokens * step_bytes) {
    const int64_t n = min_of(STEP, count - done);
    if (n < STEP) memset(out, 0, step_bytes);
    if (k->x_bytes == size) {
      memcpy(out, from + done * size, n * size);
    } else if (!k->even_first) {
      p->widen(from + done * size, dtype, (float *)out, n);
    } else {
      float natural[STEP] = {0};
      p->widen(from + done * size, dtype, natural, n);
      for (int i = 0; i < STEP; i++) ((float *)out)[i % 2 * (STEP / 2) + i / 2] = natural[i];
    }
  }
}
