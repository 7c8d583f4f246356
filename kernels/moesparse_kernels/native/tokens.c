#include "tokens.h"

#include <stddef.h>
#include <string.h>

#include "threads.h"

// what the sums of a span start from (path.h)
typedef int32_t span_start[16];

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

int64_t packed_bytes(const kernel *k, const matrix *w) {
  if (!k->levels) return ceil_div(w->columns, STEP) * STEP * k->x_bytes;
  const int64_t steps = ceil_div(w->columns, WIDE_STEP);
  return steps * WIDE_STEP * k->x_bytes + (k->starts ? ceil_div(steps, span_steps(w)) * (int64_t)sizeof(span_start) : 0);
}

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

// ---- whole numbers

// where the parts of a token lie in its block, one after the other
typedef struct {
  char *next;
  int64_t tokens, at;
} stream;

static stream stream_of(token_place to) { return (stream){.next = to.block, .tokens = to.tokens, .at = to.at}; }

// the next `bytes` of the token
static char *take(stream *s, int64_t bytes) {
  char *part = s->next + s->at * bytes;
  s->next += s->tokens * bytes;
  return part;
}

// the magnitude of the largest value of a row
static float largest_of(const path *p, int dtype, const char *row, int64_t columns) {
  const int64_t size = dtype_bytes(dtype);
  float part[512], most = 0.0f;
  for (int64_t k = 0; k < columns; k += 512) {
    const int64_t n = min_of(512, columns - k);
    p->widen(row + k * size, dtype, part, n);
    const float here = p->largest(part, n);
    if (here != here) return here;
    most = here > most ? here : most;
  }
  return most;
}

// minus the bias of the weights, for the columns of a step
static void add_to_start(const int8_t *step, int bias, int32_t *start) {
  for (int i = 0; i < WIDE_STEP; i++) start[i / 4] -= bias * step[i];
}

float quantise_row(const path *p, const kernel *k, const matrix *w, int dtype, const void *row, token_place to) {
  const float most = largest_of(p, dtype, row, w->columns), levels = (float)k->levels;
  // NaN is not larger; 2^-100 over 4095 is far from where fp32 loses bits
  const float factor = most > 0x1p-100f ? levels / most : 0.0f;
  const int64_t size = dtype_bytes(dtype), steps = ceil_div(w->columns, WIDE_STEP), span = span_steps(w);
  stream s = stream_of(to);
  int32_t *start = NULL;
  for (int64_t step = 0; step < steps; step++) {
    if (k->starts && step % span == 0) {
      start = (int32_t *)take(&s, sizeof(span_start));
      memset(start, 0, sizeof(span_start));
    }
    const int64_t n = min_of(WIDE_STEP, w->columns - step * WIDE_STEP);
    char *part = take(&s, WIDE_STEP * k->x_bytes);
    float values[WIDE_STEP];
    if (n < WIDE_STEP || factor == 0.0f) memset(part, 0, WIDE_STEP * k->x_bytes);
    if (factor == 0.0f) continue;
    p->widen((const char *)row + step * WIDE_STEP * size, dtype, values, n);
    p->quantise(values, factor, k->x_bytes, part, n);
    if (k->starts) add_to_start((const int8_t *)part, bias_of(w->bits), start);
  }
  return most > 0x1p-100f || most != most ? most / levels : 0.0f;
}

void copy_quantised(const kernel *k, const matrix *w, const char *row, token_place to) {
  const int64_t steps = ceil_div(w->columns, WIDE_STEP), span = span_steps(w), step_bytes = WIDE_STEP * k->x_bytes;
  stream s = stream_of(to);
  for (int64_t step = 0; step < steps; step++, row += step_bytes) {
    if (k->starts && step % span == 0) {
      memcpy(take(&s, sizeof(span_start)), row, sizeof(span_start));
      row += sizeof(span_start);
    }
    memcpy(take(&s, step_bytes), row, step_bytes);
  }
}
