// Runs grouped_mma_sp.cu on a CPU, thread by thread: what a GPU brings, written from the PTX ISA, in the place of its
// instructions. Threads are fibers; which warp goes on and when a copy arrives is drawn by chance, so that a stage that is
// read too early or written too early shows in the result. Every copy and every load of an index is checked to lie in
// its array, every 16 bytes of the weight that are copied are counted, and so is every store.
//
//     g++ -D__CUDA_ARCH__=900 -DKERNELS='".../grouped_mma_sp.cu"' -shared -fPIC cuda_emulator.cpp

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#define EMULATED
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

struct Index { unsigned x; };
static Index threadIdx, blockIdx, gridDim;
struct uint4 { u32 x, y, z, w; };
static inline int min(int a, int b) { return a < b ? a : b; }
#define __expf expf

// ---- what the host hands over

struct Array { const char* start; long long bytes; };
struct Report {
  Array values, index, x, out, ints[4];
  u16 *values_copied, *index_copied, *stored;  // for every 16 bytes, and for every element of out
  long long element_bytes, shared_bytes, copies, seed;
  char message[256];
};
static Report* report;

// ---- fibers

constexpr int LANES = 192;
struct Fiber {
  ucontext_t context;
  jmp_buf here;
  std::vector<char> stack;
  bool started, done;
  // not before this: a rendezvous of the warp, of the block, or a phase of a barrier
  long long warp_turn, block_turn;
  u32 barrier, parity;
};
static std::vector<Fiber> fibers(LANES);
static Fiber* now;
static jmp_buf scheduler;
static ucontext_t scheduler_context;
static std::mt19937 chance;

static void yield() {
  if (!_setjmp(now->here)) _longjmp(scheduler, 1);
}

[[noreturn]] static void fail(const char* what, long long a = 0, long long b = 0) {
  if (!report->message[0]) snprintf(report->message, sizeof report->message, "block %u, thread %u: %s (%lld, %lld)", blockIdx.x, threadIdx.x, what, a, b);
  _longjmp(scheduler, 2);
}

static void inside(const Array& array, const void* p, long long bytes, const char* what) {
  long long offset = (const char*)p - array.start;
  if (offset < 0 || offset + bytes > array.bytes) fail(what, offset, array.bytes);
}

struct Ints {
  const int* p;
  explicit operator bool() const { return p; }
  int operator[](long long i) const {
    for (const Array& array : report->ints)
      if ((const char*)p == array.start) {
        inside(array, p + i, 4, "an index is read outside of its array");
        return p[i];
      }
    fail("an array that nobody handed over");
  }
};

// ---- shared memory

static char shared[256 * 1024];
static inline u32 shared_memory() { return 0; }
static char* at(u32 address, int bytes) {
  if (address % bytes || address + bytes > report->shared_bytes) fail("shared memory", address, bytes);
  return shared + address;
}

struct Barrier { int arrivals, pending; long long bytes; u32 phase; };
static Barrier barriers[64];
static Barrier& barrier_at(u32 address) {
  at(address, 8);
  if (address >= 8 * 64) fail("no barrier there", address);
  return barriers[address / 8];
}
static void turn(Barrier& b) {
  if (b.pending < 0) fail("a barrier has more arrivals than it waits for");
  if (b.pending == 0 && b.bytes == 0) b.pending = b.arrivals, b.phase ^= 1;
}
static void barrier_init(u32 address, int arrivals) { barrier_at(address) = {arrivals, arrivals, 0, 0}; }
static void barrier_arrive(u32 address) {
  Barrier& b = barrier_at(address);
  b.pending--;
  turn(b);
}
static void publish_barriers() {}
static void barrier_expect(u32 address, int bytes) {
  barrier_at(address).bytes += bytes;
  barrier_arrive(address);
}
static void barrier_wait(u32 address, u32 parity) {
  Barrier& b = barrier_at(address);
  if (!b.arrivals) fail("a barrier that was not initialised", address);
  now->barrier = address + 1, now->parity = parity;
  yield();
}

// ---- copies, which come some time later

struct Copy { u32 to; const char* from; int bytes; bool real; };
struct Arrival { std::vector<Copy> copies; u32 barrier; int bytes; };
static std::vector<std::vector<Copy>> started(LANES);
static std::vector<Arrival> under_way;

static void check_source(const char* from, int bytes) {
  report->copies++;
  for (auto [array, counts] : {std::pair{&report->values, report->values_copied}, std::pair{&report->index, report->index_copied}})
    if (from >= array->start && from < array->start + array->bytes) {
      inside(*array, from, bytes, "a copy of the weight reaches outside");
      for (int i = 0; i < bytes; i += 16) counts[(from - array->start + i) / 16]++;
      return;
    }
  inside(report->x, from, bytes, "a copy from nowhere");
}
static void copy_16(u32 to, const void* from, bool real) {
  if ((u64)from % 16) fail("a copy of 16 bytes must be aligned", (u64)from);
  if (real) check_source((const char*)from, 16);
  at(to, 16);
  started[threadIdx.x].push_back({to, (const char*)from, 16, real});
}
static void arrive_after_copies(u32 barrier) {
  under_way.push_back({std::move(started[threadIdx.x]), barrier, 0});
  started[threadIdx.x].clear();
}
static void bulk_copy(u32 to, const char* from, int bytes, u32 barrier) {
  if ((u64)from % 16 || to % 16 || to + bytes > report->shared_bytes) fail("a bulk copy must be aligned and inside", to, bytes);
  check_source(from, bytes);
  under_way.push_back({{{to, from, bytes, true}}, barrier, bytes});
}
static void land(size_t i) {
  Arrival a = std::move(under_way[i]);
  under_way.erase(under_way.begin() + i);
  for (const Copy& c : a.copies)
    if (c.real)
      memcpy(shared + c.to, c.from, c.bytes);
    else
      memset(shared + c.to, 0, c.bytes);
  Barrier& b = barrier_at(a.barrier);
  if (a.bytes)
    b.bytes -= a.bytes;
  else
    b.pending--;
  turn(b);
}

static void load_2(u32 (&v)[2], u32 address) { memcpy(v, at(address, 8), 8); }
static uint4 load_4(u32 address) {
  uint4 v;
  memcpy(&v, at(address, 16), 16);
  return v;
}

template <class T> static void put(T* place, T v) {
  inside(report->out, place, sizeof(T), "a store reaches outside");
  if (sizeof(T) != report->element_bytes) fail("a store of another width", sizeof(T));
  report->stored[((char*)place - report->out.start) / sizeof(T)]++;
  *place = v;
}

// ---- what a warp or a block does together

struct Warp {
  int arrived;
  long long turns;
  u32 address[32], a[32][4], b[32][4], metadata[32], result[32][4];
  float c[32][4];
};
static Warp warps[LANES / 32];
static long long block_turns;
static int block_arrived, block_count, block_counted;

template <class Together> static int together(Together what) {
  Warp& w = warps[threadIdx.x / 32];
  if (++w.arrived == 32) {
    what(w);
    w.arrived = 0, w.turns++;
  } else {
    now->warp_turn = w.turns + 1;
    yield();
  }
  return threadIdx.x % 32;
}
static void __syncwarp() {
  together([](Warp&) {});
}
static int __syncthreads_count(bool yes) {
  block_count += yes;
  if (++block_arrived == LANES) {
    block_counted = block_count, block_count = block_arrived = 0, block_turns++;
  } else {
    now->block_turn = block_turns + 1;
    yield();
  }
  return block_counted;
}
static void ldmatrix(u32 (&b)[4], u32 address) {
  warps[threadIdx.x / 32].address[threadIdx.x % 32] = address;
  int lane = together([](Warp& w) {
    // lanes 8 j to 8 j + 7 name the rows of matrix j; lane 4 g + q is given words q of row g
    for (int l = 0; l < 32; l++)
      for (int j = 0; j < 4; j++) memcpy(&w.result[l][j], at(w.address[8 * j + l / 4], 16) + 4 * (l % 4), 4);
  });
  memcpy(b, warps[threadIdx.x / 32].result[lane], 16);
}

#ifdef FP16
static float wide(u16 v) {
  _Float16 r;
  memcpy(&r, &v, 2);
  return (float)r;
}
static u16 narrow(float v) {
  _Float16 r = (_Float16)v;
  u16 bits;
  memcpy(&bits, &r, 2);
  return bits;
}
#else
static float wide(u16 v) {
  u32 bits = (u32)v << 16;
  float r;
  memcpy(&r, &bits, 4);
  return r;
}
static u16 narrow(float v) {
  u32 bits;
  memcpy(&bits, &v, 4);
  if (v != v) return 0x7FFF;
  // to the nearest, to the even one of two
  return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}
#endif

template <int SELECTOR> static void mma_sp(float (&c)[4], uint4 a, const u32 (&b)[4], u32 metadata) {
  Warp& w = warps[threadIdx.x / 32];
  int lane = threadIdx.x % 32;
  memcpy(w.a[lane], &a, 16), memcpy(w.b[lane], b, 16), memcpy(w.c[lane], c, 16), w.metadata[lane] = metadata;
  together([](Warp& w) {
    float dense[16][32] = {}, tokens[32][8];
    for (int l = 0; l < 32; l++) {
      int g = l / 4, q = l % 4;
      for (int r = 0; r < 4; r++) {
        int row = g + r % 2 * 8, group = q + r / 2 * 4;
        // the pair of lanes that the selector names holds the metadata: eight groups in two words, rows + 8 in the high half
        u32 nibble = w.metadata[4 * g + 2 * SELECTOR + group / 4] >> (row / 8 * 16 + group % 4 * 4) & 15;
        if (nibble % 4 >= nibble / 4) fail("metadata that names no two columns in order", nibble);
        dense[row][4 * group + nibble % 4] = wide((u16)w.a[l][r]);
        dense[row][4 * group + nibble / 4] = wide((u16)(w.a[l][r] >> 16));
        tokens[8 * r + 2 * q][g] = wide((u16)w.b[l][r]);
        tokens[8 * r + 2 * q + 1][g] = wide((u16)(w.b[l][r] >> 16));
      }
    }
    for (int l = 0; l < 32; l++)
      for (int i = 0; i < 4; i++) {
        int row = l / 4 + i / 2 * 8, column = l % 4 * 2 + i % 2;
        for (int k = 0; k < 32; k++) w.c[l][i] += dense[row][k] * tokens[k][column];
      }
  });
  memcpy(c, w.c[lane], 16);
}

#include KERNELS

// ---- the scheduler

static void (*kernel)(Arguments);
static Arguments parameter;
static void begin() {
  kernel(parameter);
  now->done = true;
  _longjmp(scheduler, 1);
}

static bool ready(const Fiber& f, int warp) {
  if (f.done || f.warp_turn > warps[warp].turns || f.block_turn > block_turns) return false;
  return !f.barrier || barriers[(f.barrier - 1) / 8].phase != f.parity;
}

// 1: it went on, 2: it failed
static int resume(int thread) {
  Fiber& f = fibers[thread];
  f.barrier = 0;
  now = &f, threadIdx.x = thread;
  int how = _setjmp(scheduler);
  if (how) return how;
  if (f.started) _longjmp(f.here, 1);
  f.started = true;
  f.stack.resize(64 * 1024);
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = f.stack.data();
  f.context.uc_stack.ss_size = f.stack.size();
  makecontext(&f.context, begin, 0);
  swapcontext(&scheduler_context, &f.context);
  return 1;
}

static bool run_block() {
  memset(shared, 0xFF, sizeof shared);  // NaN
  memset(barriers, 0, sizeof barriers);
  memset(warps, 0, sizeof warps);
  block_turns = block_arrived = block_count = 0;
  for (Fiber& f : fibers) f.started = f.done = false, f.warp_turn = f.block_turn = f.barrier = 0;
  for (;;) {
    bool moved = false, left = false;
    if (!under_way.empty() && chance() % 4) land(chance() % under_way.size()), moved = true;
    int first = chance() % 6, how_many = 1 + chance() % 6;
    for (int i = 0; i < how_many; i++) {
      int warp = (first + i) % 6;
      for (int thread = 32 * warp; thread < 32 * warp + 32; thread++)
        while (ready(fibers[thread], warp)) {
          moved = true;
          if (resume(thread) == 2) return false;
          if (fibers[thread].barrier) break;
        }
    }
    for (int thread = 0; thread < LANES; thread++) left |= !fibers[thread].done, moved |= ready(fibers[thread], thread / 32);
    if (!left) return true;
    if (!moved && under_way.empty()) {
      snprintf(report->message, sizeof report->message, "block %u: all threads wait", blockIdx.x);
      return false;
    }
  }
}

extern "C" int emulate(const char* name, int grid, const Arguments* arguments, Report* to) {
  static const struct { const char* name; void (*kernel)(Arguments); } all[] = {
      {"grouped_8", grouped_8}, {"grouped_16", grouped_16}, {"grouped_32", grouped_32}, {"grouped_64", grouped_64}};
  report = to, parameter = *arguments, kernel = nullptr;
  for (auto& entry : all)
    if (!strcmp(entry.name, name)) kernel = entry.kernel;
  if (!kernel) return snprintf(report->message, sizeof report->message, "no kernel %s", name);
  chance.seed(to->seed);
  under_way.clear();
  for (auto& copies : started) copies.clear();
  gridDim.x = grid;
  for (blockIdx.x = 0; blockIdx.x < (unsigned)grid; blockIdx.x++)
    if (!run_block()) return 1;
  if (!under_way.empty()) return snprintf(report->message, sizeof report->message, "copies are under way at the end");
  return 0;
}
