// The choice of an instruction path, and what the layer, the product and the unpacking share.
#include <stddef.h>
#include <string.h>

#include "cpu.h"
#include "path.h"
#include "threads.h"

#define MAX_PATHS 4

static const path *paths[MAX_PATHS + 1]; // that this CPU has, best first
static const path *in_use;

// a path with another kernel for bf16
static path with_bf16;

static void add_path(const path *p) {
  int count = 0;
  while (paths[count]) count++;
  paths[count] = p;
}

static void add_path_with(const path *p, const char *name, const kernel *bf16) {
  with_bf16 = *p;
  with_bf16.name = name;
  with_bf16.kernels[MOESPARSE_BF16] = *bf16;
  add_path(&with_bf16);
}

__attribute__((constructor)) static void find_paths(void) {
  const cpu_features cpu = detect_cpu();
  (void)cpu;
#if defined(__x86_64__)
  if (cpu.avx512_bf16) add_path_with(&path_avx512, "avx512_bf16", &kernel_bf16_avx512);
  if (cpu.avx512_vbmi2) add_path(&path_avx512);
  if (cpu.avx2) add_path(&path_avx2);
#elif defined(__aarch64__)
  if (cpu.neon_bf16) add_path_with(&path_neon, "neon_bf16", &kernel_bf16_neon);
  if (cpu.neon) add_path(&path_neon);
#endif
  in_use = paths[0];
}

const path *current_path(void) { return in_use; }

int32_t moesparse_abi(void) { return MOESPARSE_ABI; }

const char *moesparse_sources(void) { return MOESPARSE_SOURCES; }

const char *moesparse_path(int32_t index) {
  return index >= 0 && index < MAX_PATHS && paths[index] ? paths[index]->name : NULL;
}

int32_t moesparse_force_path(const char *name) {
  for (int i = 0; paths[i]; i++)
    if (name == NULL || strcmp(paths[i]->name, name) == 0) {
      in_use = paths[i];
      return 1;
    }
  return 0;
}

int32_t moesparse_better_elsewhere(int32_t dtype) {
  const cpu_features cpu = detect_cpu();
  if (dtype == MOESPARSE_BF16) return cpu.amx_bf16;
  return dtype == MOESPARSE_FP16 && (cpu.amx_fp16 || cpu.avx512_fp16);
}

matrix matrix_of(const moesparse_weight *w, int64_t expert, int dtype) {
  const int dense = w->index == NULL;
  matrix of = {
      .values = (const uint8_t *)w->values + expert * w->value_expert,
      .value_row = w->value_row,
      .rows = w->rows,
      .columns = w->columns,
      .step_bytes = w->scales ? WIDE_STEP * w->bits / 8 : STEP * dtype_bytes(dtype),
      .form = dense ? DENSE : w->n == 2 && w->m == 4 ? TWO_FOUR : ANY_NM,
  };
  if (w->scales) {
    of.bits = w->bits;
    of.group = w->group;
    of.scales = (const uint8_t *)w->scales + expert * w->scales_expert;
    of.scales_row = w->scales_row;
    of.scales_dtype = w->scales_dtype;
  }
  // a dense matrix has no bitmask; its address is moved like the others but never read
  of.index = dense ? of.values : (const uint8_t *)w->index + expert * w->index_expert;
  if (!dense) {
    of.index_row = w->index_row;
    of.step_bytes = of.step_bytes / w->m * w->n;
  }
  return of;
}

// ---- memory reads, for benchmarks

typedef struct {
  const char *data;
  uint64_t sum;
} reading;

static void read_pages(int64_t begin, int64_t end, void *context) {
  reading *r = context;
  uint64_t sum = 0;
  for (int64_t page = begin; page < end; page++) sum += in_use->read_page(r->data + page * 4096);
  __atomic_fetch_add(&r->sum, sum, __ATOMIC_RELAXED);
}

uint64_t moesparse_read(const void *data, int64_t bytes) {
  reading r = {.data = data};
  if (in_use) share_items(bytes / 4096, 64, read_pages, &r);
  return r.sum;
}
