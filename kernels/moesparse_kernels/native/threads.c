#include "threads.h"

#include <stddef.h>

#include "moesparse_native.h"

typedef int32_t parallel_for_fn(int64_t begin, int64_t end, int64_t grain, job *work, void *context);
typedef int32_t num_threads_fn(uint32_t *out);

static parallel_for_fn *torch_parallel_for;
static num_threads_fn *torch_num_threads;

void moesparse_set_threads(void *parallel_for, void *num_threads) {
  torch_parallel_for = (parallel_for_fn *)parallel_for;
  torch_num_threads = (num_threads_fn *)num_threads;
}

int64_t thread_count(void) {
  uint32_t count = 1;
  if (torch_parallel_for == NULL || torch_num_threads == NULL || torch_num_threads(&count) != 0 || count < 1) return 1;
  return count;
}

typedef struct {
  job *work;
  void *context;
  int64_t items, workers;
  int64_t next; // the first item nobody has taken
} queue;

// the next run of items, half of an equal share of what is left; 0 when nothing is
static int take(queue *q, int64_t *begin, int64_t *end) {
  int64_t at = __atomic_load_n(&q->next, __ATOMIC_RELAXED), count;
  do {
    if (at >= q->items) return 0;
    count = (q->items - at) / (2 * q->workers);
    if (count < 1) count = 1;
  } while (!__atomic_compare_exchange_n(&q->next, &at, at + count, 1, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  *begin = at;
  *end = at + count;
  return 1;
}

// torch gives each thread one or more worker numbers; what they are does not matter
static void work_off(int64_t first_worker, int64_t last_worker, void *context) {
  queue *q = context;
  int64_t begin, end;
  (void)first_worker;
  (void)last_worker;
  while (take(q, &begin, &end)) q->work(begin, end, q->context);
}

void share_items(int64_t items, int64_t least, job *work, void *context) {
  queue q = {.work = work, .context = context, .items = items, .workers = thread_count(), .next = 0};
  if (items <= 0) return;
  if (q.workers > items / least) q.workers = items / least;
  if (q.workers < 2 || torch_parallel_for(0, q.workers, 1, work_off, &q) != 0) {
    q.workers = 1;
    q.next = 0;
    work(0, items, context);
  }
}
