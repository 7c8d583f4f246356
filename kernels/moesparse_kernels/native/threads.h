// Work shared by the threads of torch's pool.
#ifndef MOESPARSE_THREADS_H
#define MOESPARSE_THREADS_H

#include <stdint.h>

// does the items begin..end of a job
typedef void job(int64_t begin, int64_t end, void *context);

// how many threads torch would use
int64_t thread_count(void);

// Does the items 0..items, in runs of neighbours that idle threads take one after the other: long ones first, single
// items in the end, so that threads of different speed finish together. Returns when all are done. A thread more is
// asked for where it gets `least` items.
void share_items(int64_t items, int64_t least, job *work, void *context);

// how many items of so many bytes are worth a thread: starting one costs about as much as reading 64 KB
static inline int64_t items_for_a_thread(int64_t bytes) { return bytes > 0 && bytes < 65536 ? 65536 / bytes : 1; }

#endif
