// Grouped GEMM on 2:4 weights in "mma_sp" order (layout.py) for the sparse tensor cores, of few rows per expert.
//
//     out[r, n] = act(sum_k x[r, k] * W[e(r), n, k] + bias[e(r), n])                  not gated
//     out[r, i] = act(gate) * up, gate = row i of W[e(r)], up = row n_out + i         gated
//
// The weight is the sparse operand of mma.sp.m16n8k32 and the tokens are the dense one, so that no weight is expanded. A
// stage of the pipeline in shared memory is two units of the weight (64 rows x 128 columns, 8 KB of values and 1 KB of
// metadata each) and 128 columns of the tokens of a block: gate and up of the same rows, or neighbours where there is no
// gate. Six warps: four multiply 16 rows of both units each, one copies the weight (one bulk copy a piece from sm_90
// on), one gathers the tokens. Blocks are persistent and walk over (block of tokens, pair of units, part of the
// reduction); copies of the next piece of work start under the products of this one. No atomics: every output is written
// by one thread, and parts of the reduction are added afterwards, in order.
//
// Self-contained, for NVRTC; of bf16, or of fp16 with FP16 defined. grid and stages are the host's choice (plan.py), and so
// is the number of tokens, by kernel.
// EMULATED leaves out what only a GPU has: a test on a CPU brings it and runs the rest (tests/kernels/cuda_emulator.cpp).

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

// plan.py has the same numbers
constexpr int WARPS = 4, THREADS = 192, MAX_STAGES = 8;
constexpr int VALUES_BYTES = 8192, INDEX_BYTES = 1024, UNIT_BYTES = VALUES_BYTES + INDEX_BYTES;
// a row of 256 bytes and 16 more, so that eight rows of ldmatrix lie in different banks
constexpr int X_ROW_BYTES = 272;
// the barriers of all stages come first in shared memory, full ones and then empty ones
constexpr int BARRIER_BYTES = 2 * 8 * MAX_STAGES;

#if __CUDA_ARCH__ >= 900
constexpr bool BULK = true;
constexpr int WEIGHT_ARRIVALS = 1;
#else
constexpr bool BULK = false;
constexpr int WEIGHT_ARRIVALS = 32;
#endif

#ifndef EMULATED

typedef const int* Ints;

#ifdef FP16
#define MMA_TYPES "f32.f16.f16.f32"
__device__ __forceinline__ float wide(u16 v) {
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(v));
  return r;
}
__device__ __forceinline__ u16 narrow(float v) {
  u16 r;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(v));
  return r;
}
#else
#define MMA_TYPES "f32.bf16.bf16.f32"
__device__ __forceinline__ float wide(u16 v) { return __uint_as_float((u32)v << 16); }
__device__ __forceinline__ u16 narrow(float v) {
  u16 r;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(v));
  return r;
}
#endif

template <int SELECTOR>
__device__ __forceinline__ void mma_sp(float (&c)[4], uint4 a, const u32 (&b)[4], u32 metadata) {
  asm volatile(
      "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col." MMA_TYPES
      " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(metadata), "n"(SELECTOR));
}

__device__ __forceinline__ u32 shared_memory() {
  extern __shared__ __align__(128) char dynamic[];
  return (u32)__cvta_generic_to_shared(dynamic);
}

__device__ __forceinline__ void barrier_init(u32 barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void barrier_arrive(u32 barrier) {
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\n}" ::"r"(barrier) : "memory");
}

// returns once the phase of this parity is over
__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
  u32 done;
  do {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
        : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
#else
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.test_wait.parity.shared.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
        : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
#endif
  } while (!done);
}

// 16 bytes, or 16 zeros
__device__ __forceinline__ void copy_16(u32 to, const void* from, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(inside ? 16 : 0) : "memory");
}

// one arrival of this lane, when all its copies so far have come
__device__ __forceinline__ void arrive_after_copies(u32 barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void ldmatrix(u32 (&b)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3]) : "r"(address) : "memory");
}

__device__ __forceinline__ void load_2(u32 (&v)[2], u32 address) {
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v[0]), "=r"(v[1]) : "r"(address) : "memory");
}

__device__ __forceinline__ uint4 load_4(u32 address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address) : "memory");
  return v;
}

__device__ __forceinline__ void put(float* place, float v) { *place = v; }
__device__ __forceinline__ void put(u16* place, u16 v) { *place = v; }

#if __CUDA_ARCH__ >= 900
// the engine of bulk copies must see the barriers
__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async;" ::: "memory");
}

// one arrival, and so many bytes to come
__device__ __forceinline__ void barrier_expect(u32 barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void bulk_copy(u32 to, const char* from, int bytes, u32 barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier) : "memory");
}
#endif

#endif  // EMULATED

// the same fields as grouped.Arguments
struct Arguments {
  const char* values;       // (E, tiles, steps) pieces of VALUES_BYTES
  const char* index;        // (E, tiles, steps) pieces of INDEX_BYTES
  const u16* x;             // (T, K) where slot_of is given, else (R, K)
  const u16* bias;          // (E, N), or null
  void* out;                // (splits, R, n_out), float where float_out, else the type of x
  Ints slot_of;       // (R,), or null
  Ints offsets;       // (E + 1,)
  Ints block_expert;  // (num_blocks,), -1 behind the last block
  Ints block_row;     // (num_blocks,)
  int R, N, K, n_out;
  int tiles;       // units along the padded N
  int pairs;       // of them that one piece of work makes: n_out / 64 when gated, else tiles / 2
  int steps;       // units along the padded K
  int splits;      // parts of the reduction
  int num_blocks, top_k, stages, activation, gated, float_out;
};

// by number as in plan.py; one switch for all values of a thread, or the code would be mostly this
template <int NT>
__device__ __forceinline__ void activate(float (&values)[NT][4], int activation) {
#define EACH(expression)                  \
  _Pragma("unroll") for (int nt = 0; nt < NT; nt++) \
      _Pragma("unroll") for (int i = 0; i < 4; i++) { \
    float v = values[nt][i];              \
    values[nt][i] = expression;           \
  }                                       \
  break;
  switch (activation) {
    case 1: EACH(v * (1.f / (1.f + __expf(-v))))  // silu
    case 2: EACH(0.5f * v * (1.f + erff(v * 0.7071067811865476f)))  // gelu
    // gelu_tanh: 0.5 (1 + tanh(z)) is sigmoid(2 z)
    case 3: EACH(v * (1.f / (1.f + __expf(-1.5957691216057308f * (v + 0.044715f * v * v * v)))))
    case 4: EACH(v < 0.f ? 0.f : v)  // relu
    case 5: EACH(v < 0.f ? 0.f : v * v)  // relu2
  }
#undef EACH
}

// Where a piece of work lies: block, pair and split of number w, blocks fastest so that those of an expert share L2.
struct Work {
  int block, pair, expert, first_step, last_step, split;
  __device__ __forceinline__ Work(const Arguments& a, int w, int blocks) {
    block = w % blocks;
    int rest = w / blocks;
    pair = rest % a.pairs;
    split = rest / a.pairs;
    expert = a.block_expert[block];
    int part = (a.steps + a.splits - 1) / a.splits;
    first_step = min(split * part, a.steps);
    last_step = min(first_step + part, a.steps);
  }
};

// A place in the ring of stages: its full barrier (the empty one lies behind all full ones), its memory, and the parity of
// the round.
template <int STAGE_BYTES>
struct Pipe {
  u32 full, data, parity, first_full, first_data, end;
  __device__ __forceinline__ Pipe(u32 barriers, int stages, u32 first_parity) {
    full = first_full = barriers;
    data = first_data = barriers + BARRIER_BYTES;
    end = data + stages * STAGE_BYTES;
    parity = first_parity;
  }
  __device__ __forceinline__ u32 empty() const { return full + 8 * MAX_STAGES; }
  __device__ __forceinline__ void next() {
    full += 8, data += STAGE_BYTES;
    if (data == end) full = first_full, data = first_data, parity ^= 1;
  }
};

// copies both units of every step; one lane where copies are bulk, else all of the warp
template <int STAGE_BYTES>
__device__ __forceinline__ void copy_weight(const Arguments& a, u32 barriers, int blocks, int lane) {
  if (BULK && lane) return;
  // all stages are empty at first: producers wait for the phase before the first one
  Pipe<STAGE_BYTES> pipe(barriers, a.stages, 1);
  for (int w = blockIdx.x; w < blocks * a.pairs * a.splits; w += gridDim.x) {
    Work work(a, w, blocks);
    int first = a.gated ? work.pair : 2 * work.pair, second = a.gated ? work.pair + a.pairs : 2 * work.pair + 1;
    long long base = (long long)work.expert * a.tiles;
    long long unit[2] = {(base + first) * a.steps, (base + second) * a.steps};
    for (int step = work.first_step; step < work.last_step; step++) {
      barrier_wait(pipe.empty(), pipe.parity);
      u32 to = pipe.data, barrier = pipe.full;
#if __CUDA_ARCH__ >= 900
      barrier_expect(barrier, 2 * UNIT_BYTES);
#endif
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const char* values = a.values + (unit[half] + step) * VALUES_BYTES;
        const char* index = a.index + (unit[half] + step) * INDEX_BYTES;
        u32 to_values = to + half * VALUES_BYTES, to_index = to + 2 * VALUES_BYTES + half * INDEX_BYTES;
#if __CUDA_ARCH__ >= 900
        bulk_copy(to_values, values, VALUES_BYTES, barrier);
        bulk_copy(to_index, index, INDEX_BYTES, barrier);
#else
#pragma unroll
        for (int i = 16 * lane; i < VALUES_BYTES; i += 512) copy_16(to_values + i, values + i, true);
#pragma unroll
        for (int i = 16 * lane; i < INDEX_BYTES; i += 512) copy_16(to_index + i, index + i, true);
#endif
      }
      if (!BULK) arrive_after_copies(barrier);
      pipe.next();
    }
  }
}

// gathers 128 columns of the block's tokens, 16 bytes a lane: lane % 16 along a token, two tokens at a time
template <int TOKENS, int STAGE_BYTES>
__device__ __forceinline__ void copy_tokens(const Arguments& a, u32 barriers, int blocks, int lane) {
  Pipe<STAGE_BYTES> pipe(barriers, a.stages, 1);
  for (int w = blockIdx.x; w < blocks * a.pairs * a.splits; w += gridDim.x) {
    Work work(a, w, blocks);
    int row = a.block_row[work.block], rows = a.offsets[work.expert + 1] - row;
    int source[TOKENS / 2];
#pragma unroll
    for (int i = 0; i < TOKENS / 2; i++) {
      // places behind the last token of the block take the last one again, their products go nowhere
      int r = row + min(2 * i + lane / 16, rows - 1);
      source[i] = a.slot_of ? a.slot_of[r] / a.top_k : r;
    }
    for (int step = work.first_step; step < work.last_step; step++) {
      barrier_wait(pipe.empty(), pipe.parity);
      u32 to = pipe.data + 2 * UNIT_BYTES + lane / 16 * X_ROW_BYTES + lane % 16 * 16;
      int column = step * 128 + lane % 16 * 8;
      bool inside = column < a.K;
      const u16* from = a.x + (inside ? column : 0);
#pragma unroll
      for (int i = 0; i < TOKENS / 2; i++) copy_16(to + 2 * i * X_ROW_BYTES, from + (long long)source[i] * a.K, inside);
      arrive_after_copies(pipe.full);
      pipe.next();
    }
  }
}

// a lane has rows g and g + 8 of its warp's 16 and two neighbouring tokens of every eight
template <int NT>
__device__ __forceinline__ void store(const Arguments& a, const Work& work, int row, int rows, int n, int lane, float (&values)[NT][4]) {
#pragma unroll
  for (int nt = 0; nt < NT; nt++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int t = 8 * nt + lane % 4 * 2 + i % 2, m = n + i / 2 * 8;
      if (t >= rows || m >= a.n_out) continue;
      long long place = ((long long)work.split * a.R + row + t) * a.n_out + m;
      if (a.float_out)
        put((float*)a.out + place, values[nt][i]);
      else
        put((u16*)a.out + place, narrow(values[nt][i]));
    }
}

template <int NT>
__device__ __forceinline__ void add_bias(const u16* bias, int N, int n, float (&values)[NT][4]) {
  float low = n < N ? wide(bias[n]) : 0.f, high = n + 8 < N ? wide(bias[n + 8]) : 0.f;
#pragma unroll
  for (int nt = 0; nt < NT; nt++)
#pragma unroll
    for (int i = 0; i < 4; i++) values[nt][i] += i / 2 ? high : low;
}

template <int TOKENS, int STAGE_BYTES>
__device__ __forceinline__ void multiply(const Arguments& a, u32 barriers, int blocks, int warp, int lane) {
  constexpr int NT = TOKENS / 8;
  Pipe<STAGE_BYTES> pipe(barriers, a.stages, 0);
  // of this lane in a stage
  u32 own_values = 16 * (32 * warp + lane), own_index = 2 * VALUES_BYTES + 8 * (32 * warp + lane);
  u32 own_tokens = 2 * UNIT_BYTES + lane % 8 * X_ROW_BYTES + lane / 8 * 16;
  for (int w = blockIdx.x; w < blocks * a.pairs * a.splits; w += gridDim.x) {
    Work work(a, w, blocks);
    int row = a.block_row[work.block], rows = a.offsets[work.expert + 1] - row;
    float first[NT][4] = {}, second[NT][4] = {};
    for (int step = work.first_step; step < work.last_step; step++) {
      barrier_wait(pipe.full, pipe.parity);
      u32 values = pipe.data + own_values, index = pipe.data + own_index, tokens = pipe.data + own_tokens;
      u32 m[2][2];
#pragma unroll
      for (int half = 0; half < 2; half++) load_2(m[half], index + half * INDEX_BYTES);
#pragma unroll
      for (int kt = 0; kt < 4; kt++) {
        uint4 v[2] = {load_4(values + kt * 2048), load_4(values + VALUES_BYTES + kt * 2048)};
#pragma unroll
        for (int nt = 0; nt < NT; nt++) {
          u32 b[4];
          ldmatrix(b, tokens + nt * 8 * X_ROW_BYTES + kt * 64);
          if (kt % 2) {
            mma_sp<1>(first[nt], v[0], b, m[0][kt / 2]);
            mma_sp<1>(second[nt], v[1], b, m[1][kt / 2]);
          } else {
            mma_sp<0>(first[nt], v[0], b, m[0][kt / 2]);
            mma_sp<0>(second[nt], v[1], b, m[1][kt / 2]);
          }
        }
      }
      __syncwarp();
      if (lane == 0) barrier_arrive(pipe.empty());
      pipe.next();
    }
    int n = 64 * (a.gated ? work.pair : 2 * work.pair) + 16 * warp + lane / 4, other = n + (a.gated ? a.n_out : 64);
    if (a.bias) {
      const u16* bias = a.bias + (long long)work.expert * a.N;
      add_bias(bias, a.N, n, first);
      add_bias(bias, a.N, other, second);
    }
    activate(first, a.activation);
    if (a.gated) {
#pragma unroll
      for (int nt = 0; nt < NT; nt++)
#pragma unroll
        for (int i = 0; i < 4; i++) first[nt][i] *= second[nt][i];
    } else {
      activate(second, a.activation);
      store(a, work, row, rows, other, lane, second);
    }
    store(a, work, row, rows, n, lane, first);
  }
}

template <int TOKENS>
__device__ __forceinline__ void grouped(const Arguments& a) {
  constexpr int STAGE_BYTES = 2 * UNIT_BYTES + TOKENS * X_ROW_BYTES;
  u32 barriers = shared_memory();
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int s = 0; s < a.stages; s++) {
      barrier_init(barriers + 8 * s, WEIGHT_ARRIVALS + 32);
      barrier_init(barriers + 8 * (MAX_STAGES + s), WARPS);
    }
#if __CUDA_ARCH__ >= 900
    publish_barriers();
#endif
  }
  // real blocks come first
  int blocks = 0;
  for (int i = 0; i < a.num_blocks; i += THREADS) {
    int block = i + threadIdx.x;
    blocks += __syncthreads_count(block < a.num_blocks && a.block_expert[block] >= 0);
  }
  if (warp < WARPS)
    multiply<TOKENS, STAGE_BYTES>(a, barriers, blocks, warp, lane);
  else if (warp == WARPS)
    copy_weight<STAGE_BYTES>(a, barriers, blocks, lane);
  else
    copy_tokens<TOKENS, STAGE_BYTES>(a, barriers, blocks, lane);
}

#define KERNEL(TOKENS)                                                    \
  extern "C" __global__ void __launch_bounds__(THREADS, 1)                \
      grouped_##TOKENS(const __grid_constant__ Arguments a) {             \
    grouped<TOKENS>(a);                                                   \
  }

KERNEL(8)
KERNEL(16)
KERNEL(32)
KERNEL(64)
