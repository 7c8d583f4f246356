// The library under the sanitizers: every entry point on every path this CPU has, results against plain loops.
//
// Inputs and outputs end where a page begins that may not be touched: the vector loads of the kernels, which the address
// sanitizer does not see, stop the program there. Exit status 0 when all is right.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "moesparse_native.h"

static uint64_t state = 88172645463325252u;

static uint64_t draw(uint64_t below) {
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return state % below;
}

static float draw_value(void) { return (float)draw(2001) / 1000.0f - 1.0f; }

// ---- memory before a page that may not be touched

#define MAX_GUARDED 64

static struct {
  void *start;
  size_t bytes;
} guarded[MAX_GUARDED];
static int guarded_count;

static void *guard(size_t bytes) {
  const size_t page = sysconf(_SC_PAGESIZE), whole = (bytes + page - 1) / page * page + page;
  char *start = mmap(NULL, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (start == MAP_FAILED || mprotect(start + whole - page, page, PROT_NONE) || guarded_count == MAX_GUARDED) abort();
  guarded[guarded_count].start = start;
  guarded[guarded_count++].bytes = whole;
  return start + whole - page - bytes;
}

static void free_guarded(void) {
  while (guarded_count > 0) {
    guarded_count--;
    munmap(guarded[guarded_count].start, guarded[guarded_count].bytes);
  }
}

// ---- numbers; all that are drawn are exact in every dtype

static int size_of(int dtype) { return dtype == MOESPARSE_FP32 ? 4 : 2; }

static float half_value(uint16_t h) {
  const int exponent = h >> 10 & 31, fraction = h & 1023;
  const float magnitude = exponent ? ldexpf(1024 + fraction, exponent - 25) : ldexpf(fraction, -24);
  return h >> 15 ? -magnitude : magnitude;
}

static float get(const void *p, int64_t i, int dtype) {
  if (dtype == MOESPARSE_FP32) {
    float value;
    memcpy(&value, (const char *)p + 4 * i, 4);
    return value;
  }
  uint16_t half;
  memcpy(&half, (const char *)p + 2 * i, 2);
  if (dtype == MOESPARSE_FP16) return half_value(half);
  const uint32_t bits = (uint32_t)half << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// a multiple of 1/8 in -1..1, as its bits
static void put_exact(void *p, int64_t i, int dtype) {
  static const uint16_t fp16[] = {0x0000, 0x3000, 0x3400, 0x3800, 0x3A00, 0x3C00, 0xB000, 0xB800, 0xBC00};
  const uint16_t half = fp16[draw(9)];
  const float value = half_value(half);
  uint32_t bits;
  memcpy(&bits, &value, 4);
  const uint16_t bf16 = bits >> 16;
  if (dtype == MOESPARSE_FP32) memcpy((char *)p + 4 * i, &value, 4);
  else memcpy((char *)p + 2 * i, dtype == MOESPARSE_FP16 ? &half : &bf16, 2);
}

static void *values(int64_t count, int dtype) {
  void *p = guard(count * size_of(dtype));
  for (int64_t i = 0; i < count; i++) put_exact(p, i, dtype);
  return p;
}

// ---- weights: packed with random bits, or dense (m = 0)

static moesparse_weight draw_weight(int64_t experts, int64_t rows, int64_t columns, int n, int m, int dtype) {
  moesparse_weight w = {.rows = rows, .columns = columns, .n = n, .m = m};
  const int64_t kept = m ? columns / m * n : columns;
  w.values = values(experts * rows * kept, dtype);
  w.value_row = kept * size_of(dtype);
  w.value_expert = rows * w.value_row;
  if (!m) return w;
  uint8_t *index = guard(experts * rows * columns / 8);
  memset(index, 0, experts * rows * columns / 8);
  for (int64_t group = 0; group < experts * rows * columns / m; group++)
    for (int left = n; left > 0;) {
      const int64_t bit = group * m + draw(m);
      if (index[bit / 8] >> bit % 8 & 1) continue;
      index[bit / 8] |= 1 << bit % 8;
      left--;
    }
  w.index = index;
  w.index_row = columns / 8;
  w.index_expert = rows * w.index_row;
  return w;
}

// one row made dense
static void dense_row(const moesparse_weight *w, int64_t expert, int64_t row, int dtype, double *out) {
  const char *kept = (const char *)w->values + expert * w->value_expert + row * w->value_row;
  const uint8_t *index = (const uint8_t *)w->index + expert * w->index_expert + row * w->index_row;
  int64_t next = 0;
  for (int64_t k = 0; k < w->columns; k++)
    out[k] = !w->m || index[k / 8] >> k % 8 & 1 ? get(kept, next++, dtype) : 0.0;
}

static void fail(const char *what, const char *path, int dtype, const moesparse_weight *w, int64_t tokens) {
  fprintf(stderr, "%s is wrong: path %s, dtype %d, %d:%d, %ld x %ld, %ld tokens\n", what, path, dtype, w->n, w->m,
          (long)w->rows, (long)w->columns, (long)tokens);
  exit(1);
}

static int far(double got, double wanted, int dtype) {
  const double rounding = dtype == MOESPARSE_BF16 ? 0x1p-8 : dtype == MOESPARSE_FP16 ? 0x1p-11 : 0x1p-24;
  return !(fabs(got - wanted) <= fabs(wanted) * rounding * 1.01 + 1e-4);
}

// ---- the entry points

static void check_unpack(const char *path, int n, int m, int64_t rows, int64_t columns, int dtype) {
  const moesparse_weight w = draw_weight(1, rows, columns, n, m, dtype);
  void *out = guard(rows * columns * size_of(dtype));
  double row[columns];
  if (moesparse_run_unpack(&(moesparse_unpack){.weight = w, .out = out, .value_bytes = size_of(dtype)})) exit(1);
  for (int64_t r = 0; r < rows; r++) {
    dense_row(&w, 0, r, dtype, row);
    for (int64_t k = 0; k < columns; k++)
      if (get(out, r * columns + k, dtype) != row[k]) fail("unpack", path, dtype, &w, 0);
  }
}

static void check_gemm(const char *path, int n, int m, int64_t rows, int64_t columns, int64_t tokens, int dtype) {
  const moesparse_weight w = draw_weight(1, rows, columns, n, m, dtype);
  const moesparse_gemm call = {.weight = w,
                               .bias = draw(2) ? values(rows, dtype) : NULL,
                               .x = values(tokens * columns, dtype),
                               .y = guard(tokens * rows * size_of(dtype)),
                               .tokens = tokens,
                               .dtype = dtype};
  double row[columns];
  if (moesparse_run_gemm(&call)) exit(1);
  for (int64_t r = 0; r < rows; r++) {
    dense_row(&w, 0, r, dtype, row);
    for (int64_t t = 0; t < tokens; t++) {
      double sum = call.bias ? get(call.bias, r, dtype) : 0.0;
      for (int64_t k = 0; k < columns; k++) sum += row[k] * get(call.x, t * columns + k, dtype);
      if (far(get(call.y, t * rows + r, dtype), sum, dtype)) fail("gemm", path, dtype, &w, tokens);
    }
  }
}

// A layer whose experts are all alike: what a token gets is one expert's result times the gates of its choices that
// are not dropped. relu, so that the plain loop is exact but for the rounding of h.
static void check_layer(const char *path, int n, int m, int64_t H, int64_t I, int64_t tokens, int dtype) {
  const int64_t E = 3, top_k = 2;
  moesparse_weight up = draw_weight(1, 2 * I, H, n, m, dtype), down = draw_weight(1, H, I, n, m, dtype);
  up.value_expert = up.index_expert = down.value_expert = down.index_expert = 0;
  int32_t *ids = guard(tokens * top_k * 4);
  float *gates = guard(tokens * top_k * 4);
  for (int64_t s = 0; s < tokens * top_k; s++) {
    ids[s] = (int32_t)draw(E + 2) - 1;
    gates[s] = draw_value();
  }
  moesparse_layer call = {.dtype = dtype,
                          .y_dtype = dtype,
                          .activation = MOESPARSE_RELU,
                          .gated = 1,
                          .experts = E,
                          .tokens = tokens,
                          .top_k = top_k,
                          .up = up,
                          .down = down,
                          .x = values(tokens * H, dtype),
                          .ids = ids,
                          .ids_bytes = 4,
                          .gates = gates,
                          .gates_dtype = MOESPARSE_FP32,
                          .y = guard(tokens * H * size_of(dtype))};
  double w[2 * I][H], v[H][I], h[I];
  for (int64_t r = 0; r < 2 * I; r++) dense_row(&up, 0, r, dtype, w[r]);
  for (int64_t r = 0; r < H; r++) dense_row(&down, 0, r, dtype, v[r]);
  if (moesparse_run_layer(&call)) exit(1);
  for (int64_t t = 0; t < tokens; t++) {
    double gate = 0.0, largest = 0.0;
    for (int64_t s = t * top_k; s < (t + 1) * top_k; s++)
      if (ids[s] >= 0 && ids[s] < E) {
        gate += gates[s];
        largest += fabs(gates[s]);
      }
    for (int64_t i = 0; i < I; i++) {
      double g = 0.0, u = 0.0;
      for (int64_t k = 0; k < H; k++) {
        g += w[i][k] * get(call.x, t * H + k, dtype);
        u += w[I + i][k] * get(call.x, t * H + k, dtype);
      }
      h[i] = g > 0 ? g * u : 0.0;
    }
    for (int64_t r = 0; r < H; r++) {
      double sum = 0.0, terms = 0.0;
      for (int64_t i = 0; i < I; i++) {
        sum += v[r][i] * h[i];
        terms += fabs(v[r][i] * h[i]);
      }
      const double got = get(call.y, t * H + r, dtype);
      if (far(got, sum * gate, dtype) && fabs(got - sum * gate) > terms * largest * 0x1p-7) fail("layer", path, dtype, &up, tokens);
    }
  }
  // the halves, each on the other's rows
  call.rows = guard(tokens * top_k * 2 * I * size_of(dtype));
  call.stage = MOESPARSE_UP;
  call.gated = 0;
  if (moesparse_run_layer(&call)) exit(1);
  call.stage = MOESPARSE_DOWN;
  call.rows = values(tokens * top_k * I, dtype);
  if (moesparse_run_layer(&call)) exit(1);
}

// ---- quantised weights

// random bytes under the mask of a weight drawn for 16 bits, or dense
static moesparse_weight draw_quantised(int64_t rows, int64_t columns, int n, int m, int bits, int group) {
  moesparse_weight w = draw_weight(1, rows, columns, n, m, MOESPARSE_BF16);
  const int64_t kept = m ? columns / m * n : columns, groups = group ? (columns + group - 1) / group : 1;
  w.bits = bits;
  w.group = group;
  w.value_row = (kept * bits + 7) / 8;
  w.value_expert = rows * w.value_row;
  uint8_t *bytes = guard(w.value_expert);
  for (int64_t i = 0; i < w.value_expert; i++) bytes[i] = draw(256);
  w.values = bytes;
  w.scales_dtype = draw(3);
  w.scales_row = groups * size_of(w.scales_dtype);
  w.scales_expert = rows * w.scales_row;
  w.scales = values(rows * groups, w.scales_dtype);
  return w;
}

static void quantised_row(const moesparse_weight *w, int64_t row, double *out) {
  const uint8_t *bytes = (const uint8_t *)w->values + row * w->value_row;
  const uint8_t *index = (const uint8_t *)w->index + row * w->index_row;
  int64_t next = 0;
  for (int64_t k = 0; k < w->columns; k++) {
    out[k] = 0.0;
    if (w->m && !(index[k / 8] >> k % 8 & 1)) continue;
    const int value = w->bits == 8 ? (int8_t)bytes[next] : (bytes[next / 2] >> 4 * (next % 2) & 15) - 8;
    const char *scales = (const char *)w->scales + row * w->scales_row;
    out[k] = value * (double)get(scales, w->group ? k / w->group : 0, w->scales_dtype);
    next++;
  }
}

// x is made of whole numbers whose largest is the last level, so that it is what the kernels make of it
static void *whole_tokens(int64_t tokens, int64_t columns, int levels) {
  float *x = guard(tokens * columns * 4);
  for (int64_t i = 0; i < tokens * columns; i++) x[i] = (float)(i % columns ? (int)draw(2 * levels + 1) - levels : levels);
  return x;
}

static void check_quantised_gemm(const char *path, int n, int m, int64_t columns, int64_t tokens) {
  static const int groups[] = {0, 32, 64, 128};
  const int bits = draw(2) ? 8 : 4, x_bits = draw(2) ? 8 : 13;
  const int64_t rows = 1 + draw(70);
  const moesparse_weight w = draw_quantised(rows, columns, n, m, bits, groups[draw(4)]);
  const float *x = whole_tokens(tokens, columns, x_bits == 8 ? 127 : 4095);
  float *y = guard(tokens * rows * 4);
  const moesparse_gemm call = {
      .weight = w, .x = x, .y = y, .tokens = tokens, .dtype = MOESPARSE_FP32, .x_bits = x_bits};
  double row[columns];
  if (moesparse_run_gemm(&call)) exit(1);
  for (int64_t r = 0; r < rows; r++) {
    quantised_row(&w, r, row);
    for (int64_t t = 0; t < tokens; t++) {
      double sum = 0.0, terms = 0.0;
      for (int64_t k = 0; k < columns; k++) {
        sum += row[k] * x[t * columns + k];
        terms += fabs(row[k] * x[t * columns + k]);
      }
      if (!(fabs(y[t * rows + r] - sum) <= terms * 1e-5)) fail("quantised gemm", path, bits, &w, tokens);
    }
  }
}

// Where every index lies and no byte behind is read; the numbers are the gemm's and tested in Python. A token without
// choices gets zeros.
static void check_quantised_layer(int n, int m, int64_t H, int64_t I, int64_t tokens) {
  const int64_t E = 1, top_k = 2;
  int32_t *ids = guard(tokens * top_k * 4);
  float *gates = guard(tokens * top_k * 4), *y = guard(tokens * H * 4);
  for (int64_t s = 0; s < tokens * top_k; s++) {
    ids[s] = s / top_k % 3 ? (int32_t)draw(3) - 1 : -1;
    gates[s] = draw_value();
  }
  const moesparse_layer call = {.dtype = MOESPARSE_FP32,
                                .y_dtype = MOESPARSE_FP32,
                                .activation = MOESPARSE_SILU,
                                .gated = 1,
                                .x_bits = draw(2) ? 8 : 13,
                                .experts = E,
                                .tokens = tokens,
                                .top_k = top_k,
                                .up = draw_quantised(2 * I, H, n, m, 8, 0),
                                .down = draw_quantised(H, I, n, m, 4, 32),
                                .x = whole_tokens(tokens, H, 127),
                                .ids = ids,
                                .ids_bytes = 4,
                                .gates = gates,
                                .gates_dtype = MOESPARSE_FP32,
                                .y = y};
  if (moesparse_run_layer(&call)) exit(1);
  for (int64_t t = 0; t < tokens; t += 3)
    for (int64_t i = 0; i < H; i++)
      if (y[t * H + i] != 0.0f) exit(1);
}

int main(void) {
  static const int patterns[][2] = {{2, 4}, {1, 4}, {4, 4}, {3, 8}, {5, 16}, {1, 32}, {29, 32}, {0, 0}};
  static const int64_t tokens[] = {0, 1, 2, 3, 5, 6, 7, 12, 13, 24, 29, 200};
  int checked = 0;
  for (int p = 0; moesparse_path(p); p++) {
    const char *path = moesparse_path(p);
    if (!moesparse_force_path(path)) return 1;
    for (int dtype = 0; dtype < 3; dtype++)
      for (unsigned i = 0; i < sizeof patterns / sizeof *patterns; i++) {
        const int n = patterns[i][0], m = patterns[i][1];
        const int64_t unit = m > 8 ? m : 8;
        for (int64_t columns = unit; columns <= 200; columns += unit * (1 + draw(4))) {
          if (m) check_unpack(path, n, m, 1 + draw(9), columns, dtype);
          for (unsigned t = 0; t < sizeof tokens / sizeof *tokens; t++) {
            check_gemm(path, n, m, 1 + draw(70), columns, tokens[t], dtype);
            checked++;
            free_guarded();
          }
          check_layer(path, n, m, unit * (1 + draw(3)), columns, 1 + draw(30), dtype);
          free_guarded();
        }
      }
    for (unsigned i = 0; i < sizeof patterns / sizeof *patterns; i++) {
      const int n = patterns[i][0], m = patterns[i][1];
      const int64_t unit = m > 8 ? m : 8;
      for (int64_t columns = unit; columns <= 300; columns += unit * (1 + draw(4))) {
        for (unsigned t = 0; t < sizeof tokens / sizeof *tokens; t++) {
          check_quantised_gemm(path, n, m, columns, tokens[t]);
          checked++;
          free_guarded();
        }
        check_quantised_layer(n, m, unit * (1 + draw(3)), columns, 1 + draw(30));
        free_guarded();
      }
    }
    printf("%s: %d products and layers are right\n", path, checked);
  }
  return 0;
}
