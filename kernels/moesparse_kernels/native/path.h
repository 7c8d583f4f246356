// What an instruction path is: the inside interface between the layer (layer.c) and the kernels.
//
// Rows are read in groups, columns in steps of 32. The tokens of an expert lie packed for the kernels: cut into blocks
// of a few tokens, each block as [K / 32][tokens][32], zero behind K. So a kernel reads one stream whatever K is (rows
// of x 8 KB apart would all fall into the same sets of the L1 cache), and a value of x meets the column it belongs to.
// Against quantised weights steps have 64 columns, and a block is one stream of spans (below).
#ifndef MOESPARSE_PATH_H
#define MOESPARSE_PATH_H

#include <stdint.h>

#include "moesparse_native.h"

// how every function of a kernel is declared; the file that includes this defines TARGET, the attribute that allows its
// path's instructions
#define INLINE static inline __attribute__((always_inline)) TARGET

#define STEP 32       // columns that the kernels take at a time
#define WIDE_STEP 64  // and those of quantised weights
#define SPAN_STEPS 32 // most steps of 64 columns whose products are summed as whole numbers
#define CHUNK 64      // most rows of a tile
#define TILE_LD (2 * CHUNK)
#define TILE_TOKENS 192 // most tokens of a tile

enum form { TWO_FOUR, ANY_NM, DENSE };

// one matrix; strides in bytes
typedef struct {
  const uint8_t *values, *index;
  int64_t value_row, index_row;
  int64_t rows, columns;
  int64_t step_bytes; // of the values of a step
  int form;
  // of quantised values; bits is 0 where they are none
  int bits, scales_dtype;
  int64_t group; // columns that share a scale, 0 for all of a row
  const uint8_t *scales;
  int64_t scales_row;
} matrix;

// steps of a span: the columns whose products are summed as whole numbers. Those of a group, at least a step.
static inline int64_t span_steps(const matrix *w) {
  if (w->group == 0) return SPAN_STEPS;
  return w->group > WIDE_STEP ? w->group / WIDE_STEP : 1;
}

// The product of rows row0..row1 of a matrix (row0 a multiple of 4) with tokens that begin at a whole block:
// out[t * TILE_LD + r - row0] for every token t and row r.
typedef struct {
  const matrix *w;
  int64_t row0, row1;
  // what is read after row1: the prefetch goes on there; NULL where nobody knows
  const uint8_t *then_values, *then_index, *then_scales;
  const void *x;
  const float *x_scales; // of each token, where x is quantised
  int64_t tokens;
  int block; // tokens of a block; the last may hold fewer
  float *out;
} tile;

typedef void tile_fn(const tile *t);

// the kernels of one dtype, or of quantised weights and one precision of x
typedef struct {
  int x_bytes;    // of a packed value of x: 2 as it came, 4 for fp32; quantised 1 or 2
  int even_first; // packed x has the even columns of a step first, then the odd ones
  int levels;     // the largest value of quantised x; 0 where x is not quantised
  // Weights meet x as unsigned numbers, `bias_of` their bits too large: each span of a packed token begins with the 16
  // numbers from which the sums of its columns 4 i..4 i + 3 start.
  int starts;
  int few_block;  // most tokens of a block where `few` runs
  int many_block; // where `many` runs
  int many_from;  // tokens of an expert from which `many` runs
  tile_fn *few;   // decodes the weights again for every block
  tile_fn *many;  // decodes them once for all blocks
} kernel;

// Row functions: n values, any n, no alignment. `dtype` is one of enum moesparse_dtype.
typedef struct {
  const char *name;
  kernel kernels[3];      // by dtype
  const kernel *quantised; // [2]: x in 8 and in 13 bits
  void (*widen)(const void *from, int dtype, float *to, int64_t n);
  void (*narrow)(const float *from, int dtype, void *to, int64_t n);
  // gate[i] = act(gate[i]), times up[i] unless up is NULL
  void (*activate)(int activation, float *gate, const float *up, int64_t n);
  void (*add)(float *to, const float *from, int64_t n);
  void (*add_scaled)(float *to, const float *from, float scale, int64_t n);
  float (*largest)(const float *from, int64_t n); // magnitude; NaN where a value is none or infinite
  // to the nearest whole number of from * factor, which lies in -4095..4095, of 1 or 2 bytes
  void (*quantise)(const float *from, float factor, int bytes, void *to, int64_t n);
  // the dense row; streaming stores leave the caches alone where `out` will not be read soon
  void (*unpack_row)(const matrix *w, int64_t row, int value_bytes, void *out, int streaming);
  void (*unpack_end)(void); // after the last streaming store of a thread
  uint64_t (*read_page)(const void *page);
} path;

extern const path path_avx512, path_avx2, path_neon;

// bf16 products on a CPU that has them, in the place of path_avx512's and path_neon's
extern const kernel kernel_bf16_avx512, kernel_bf16_neon;

// kernels of quantised weights: x in 8 and in 13 bits
extern const kernel quantised_vnni[2], quantised_avx2[2], quantised_neon[2];

// the path in use, NULL when this CPU has none
const path *current_path(void);

// the first matrix of w, moved to `expert`
matrix matrix_of(const moesparse_weight *w, int64_t expert, int dtype);

// the kernel that multiplies a weight
static inline const kernel *kernel_of(const path *p, const moesparse_weight *w, int dtype, int x_bits) {
  return w->scales ? &p->quantised[x_bits == 13] : &p->kernels[dtype];
}

// what is added to values so that they are not negative
static inline int bias_of(int bits) { return bits == 8 ? 128 : 8; }

static inline int dtype_bytes(int dtype) { return dtype == MOESPARSE_FP32 ? 4 : 2; }

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

static inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

#endif
