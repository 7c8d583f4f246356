// Expert layers on a CPU: packed n:m weights (layout.py, "row" order) and dense ones, of 16 and 32 bits or of 8 and 4
// (quantised.py), through one scheme.
//
//   h[r] = act(gate) * up,   [gate | up] = x[token(r)] @ up[e(r)].T + up_bias[e(r)]
//   y[t] = sum_k gates[t, k] * (h[row(t, k)] @ down[e].T + down_bias[e])
//
// Symbols: T tokens, E experts, H hidden, I intermediate, K columns of a matrix, R = T * top_k rows in expert order.
// Products, biases, activations, gates and sums are fp32; h is rounded once to the dtype of x, y to its own. The bits of a
// result depend on the instruction path and on how many tokens an expert has, never on the number of threads.
//
// Where a weight has 8 or 4 bits, what meets it is brought to 8 or 13 bits, a scale for each row: x before the first
// projection, h (fp32 until then) before the second. Products and their sums over 2048 columns or a group are whole
// numbers, exact; what is summed over groups is fp32.
//
// Every pointer is the caller's; nothing is kept after a call but what moesparse_set_threads was given. A call may come
// from any thread.
#ifndef MOESPARSE_NATIVE_H
#define MOESPARSE_NATIVE_H

#include <stdint.h>

// raised with every change of this file: native.py refuses a library of another number
#define MOESPARSE_ABI 3

enum moesparse_dtype { MOESPARSE_BF16, MOESPARSE_FP16, MOESPARSE_FP32 };

enum moesparse_activation {
  MOESPARSE_NONE,
  MOESPARSE_SILU,
  MOESPARSE_GELU,       // with erf
  MOESPARSE_GELU_TANH,
  MOESPARSE_RELU,
  MOESPARSE_RELU2,      // the square of relu
  MOESPARSE_SWIGLU_OAI, // gpt-oss: (clamp(up) + 1) * gate * sigmoid(1.702 * gate), gate and up in alternating rows
};

// which part of a layer a call does
enum moesparse_stage {
  MOESPARSE_WHOLE, // x (T, H) -> y (T, H)
  MOESPARSE_UP,    // x (T, H) -> rows (R, N), the first projection without an activation
  MOESPARSE_DOWN,  // rows (R, I) -> y (T, H)
};

enum moesparse_status {
  MOESPARSE_OK,
  MOESPARSE_NO_MEMORY,
  MOESPARSE_NO_PATH, // this CPU has none of the instruction paths
};

// E matrices of `rows` output features and `columns` input features. Strides are in bytes.
typedef struct {
  const void *values;          // kept values of each row, left to right; dense: the row
  const void *index;           // bit k % 8 of byte k / 8 says that column k is kept; NULL where dense
  const void *scales;          // of the groups of each row, left to right; NULL where values have the dtype of the call
  int64_t rows, columns;
  int64_t value_row, value_expert;
  int64_t index_row, index_expert;
  int64_t scales_row, scales_expert;
  int32_t n, m;                // n of every m columns are kept; not read where dense
  // where there are scales: 8, int8 values, or 4, value + 8 in half a byte, the first of two in the low half
  int32_t bits;
  int32_t group;               // columns that share a scale: 32, 64, 128, or 0 for all of a row
  int32_t scales_dtype;
} moesparse_weight;

typedef struct {
  int32_t stage, dtype;        // dtype of x, rows, biases, and of weights without scales
  int32_t y_dtype;
  int32_t activation, gated;   // gated: the rows of `up` are [gate; up], or alternate for MOESPARSE_SWIGLU_OAI
  int32_t x_bits;              // of x and h where they meet scaled weights: 8 or 13
  int64_t experts, tokens, top_k;
  moesparse_weight up, down;
  const void *up_bias, *down_bias; // (E, up.rows), (E, down.rows), contiguous, or NULL
  const void *x;               // (T, H) contiguous
  const void *ids;             // (T, top_k); ids outside 0..E-1 are dropped
  const void *gates;           // (T, top_k)
  int32_t ids_bytes;           // 4 or 8
  int32_t gates_dtype;
  void *rows;                  // (R, N) or (R, I), in the order of route(): by expert, then by slot, dropped slots last
  void *y;                     // (T, H)
} moesparse_layer;

// y (T, rows) = x (T, columns) @ weight.T + bias, with the first matrix of `weight`
typedef struct {
  moesparse_weight weight;
  const void *bias;            // (rows,) or NULL
  const void *x;
  void *y;
  int64_t tokens;
  int32_t dtype;
  int32_t x_bits;              // as in moesparse_layer
} moesparse_gemm;

// the first matrix of `weight`, which has no scales, bit for bit, pruned positions +0.0
typedef struct {
  moesparse_weight weight;
  void *out;                   // (rows, columns) contiguous
  int32_t value_bytes;         // 2 or 4
} moesparse_unpack;

#define MOESPARSE_API __attribute__((visibility("default")))

MOESPARSE_API int32_t moesparse_abi(void);

// a digest of the sources that the library was built from
MOESPARSE_API const char *moesparse_sources(void);

// the names of the instruction paths this CPU can run, best first, NULL behind the last
MOESPARSE_API const char *moesparse_path(int32_t index);

// takes that path from now on, NULL the best one; 1 when this CPU has it. For tests: not while a call is running.
MOESPARSE_API int32_t moesparse_force_path(const char *name);

// 1 where this CPU multiplies matrices of a dtype by instructions that no path here uses: AMX, fp16 of AVX-512
MOESPARSE_API int32_t moesparse_better_elsewhere(int32_t dtype);

// torch_parallel_for and torch_get_num_threads of torch's stable C interface; without them one thread does all
MOESPARSE_API void moesparse_set_threads(void *parallel_for, void *num_threads);

MOESPARSE_API int32_t moesparse_run_layer(const moesparse_layer *layer);
MOESPARSE_API int32_t moesparse_run_gemm(const moesparse_gemm *gemm);
MOESPARSE_API int32_t moesparse_run_unpack(const moesparse_unpack *unpack);

// the sum of the bytes' 64-bit words, by all threads: how fast memory can be read, for benchmarks. Whole pages of 4 KB.
MOESPARSE_API uint64_t moesparse_read(const void *data, int64_t bytes);

#endif
