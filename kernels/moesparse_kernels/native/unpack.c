// A packed matrix made dense.
#include "path.h"
#include "threads.h"

// results larger than most caches are written past them: they are read again long after
#define STREAM_BYTES (16 << 20)

typedef struct {
  const path *path;
  matrix w;
  char *out;
  int value_bytes, streaming;
} unpack_run;

static void unpack_rows(int64_t begin, int64_t end, void *context) {
  const unpack_run *run = context;
  const int64_t row_bytes = run->w.columns * run->value_bytes;
  for (int64_t row = begin; row < end; row++)
    run->path->unpack_row(&run->w, row, run->value_bytes, run->out + row * row_bytes, run->streaming);
  if (run->streaming) run->path->unpack_end();
}

int32_t moesparse_run_unpack(const moesparse_unpack *call) {
  const path *p = current_path();
  if (!p) return MOESPARSE_NO_PATH;
  const int dtype = call->value_bytes == 4 ? MOESPARSE_FP32 : MOESPARSE_BF16;
  unpack_run run = {.path = p, .w = matrix_of(&call->weight, 0, dtype), .out = call->out, .value_bytes = call->value_bytes};
  const int64_t row_bytes = run.w.columns * run.value_bytes;
  if (row_bytes == 0) return MOESPARSE_OK;
  run.streaming = run.w.rows * row_bytes >= STREAM_BYTES;
  share_items(run.w.rows, items_for_a_thread(row_bytes), unpack_rows, &run);
  return MOESPARSE_OK;
}
