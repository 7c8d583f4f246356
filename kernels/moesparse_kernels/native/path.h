// What an instruction path is: the inside interface between the layer (layer.c) and the kernels.
//
// Rows are read in groups, columns in steps of 32. The tokens of an expert lie packed for the kernels: cut into blocks
// of a few tokens, each block as [K / 32][tokens][32], zero behind K. So a kernel reads one stream whatever K is (rows
// of x 8 KB apart would all fall into the same sets of the L1 cache), and a value of x meets the column it belongs to.
#ifndef MOESPARSE_PATH_H
#define MOESPARSE_PATH_H

#include <stdint.h>

#include "moesparse_native.h"

// how every function of a kernel is declared; the file that includes this defines TARGET, the attribute that allows its
// path's instructions
#define INLINE static inline __attribute__((always_inline)) TARGET

#define STEP 32       // columns that the kernels take at a time
#define CHUNK 64      // most rows of a tile
#define TILE_LD (2 * CHUNK)
#define TILE_TOKENS 192 // most tokens of a tile

enum form { TWO_FOUR, ANY_NM, DENSE };

// one matrix; strides in bytes
typedef struct {
  const uint8_t *values, *index;
  int64_t value_row, index_row;
  int64_t rows, columns;
  int64_t step_bytes; // of the values of 32 columns
  int form;
} matrix;

// The product of rows row0..row1 of a matrix (row0 a multiple of 4) with tokens that begin at a whole block:
// out[t * TILE_LD + r - row0] for every token t and row r.
typedef struct {
  const matrix *w;
  int64_t row0, row1;
  // what is read after row1: the prefetch goes on there; NULL where nobody knows
  const uint8_t *then_values, *then_index;
  const void *x;
  int64_t tokens;
  int block; // tokens of a block; the last may hold fewer
  float *out;
} tile;

typedef void tile_fn(const tile *t);

// the kernels of one dtype
typedef struct {
  int x_bytes;    // of a packed value of x: 2 as it came, 4 for fp32
  int even_first; // packed x has the even columns of a step first, then the odd ones
  int few_block;  // most tokens of a block where `few` runs
  int many_block; // where `many` runs
  int many_from;  // tokens of an expert from which `many` runs
  tile_fn *few;   // decodes the weights again for every block
  tile_fn *many;  // decodes them once for all blocks
} kernel;

// Row functions: n values, any n, no alignment. `dtype` is one of enum moesparse_dtype.
typedef struct {
  const char *name;
  kernel kernels[3]; // by dtype
  void (*widen)(const void *from, int dtype, float *to, int64_t n);
  void (*narrow)(const float *from, int dtype, void *to, int64_t n);
  // gate[i] = act(gate[i]), times up[i] unless up is NULL
  void (*activate)(int activation, float *gate, const float *up, int64_t n);
  void (*add)(float *to, const float *from, int64_t n);
  void (*add_scaled)(float *to, const float *from, float scale, int64_t n);
  // the dense row; streaming stores leave the caches alone where `out` will not be read soon
  void (*unpack_row)(const matrix *w, int64_t row, int value_bytes, void *out, int streaming);
  void (*unpack_end)(void); // after the last streaming store of a thread
  uint64_t (*read_page)(const void *page);
} path;

extern const path path_avx512, path_avx2, path_neon;

// bf16 products on a CPU that has them, in the place of path_avx512's and path_neon's
extern const kernel kernel_bf16_avx512, kernel_bf16_neon;

// the path in use, NULL when this CPU has none
const path *current_path(void);

// the first matrix of w, moved to `expert`
matrix matrix_of(const moesparse_weight *w, int64_t expert, int dtype);

static inline int dtype_bytes(int dtype) { return dtype == MOESPARSE_FP32 ? 4 : 2; }

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

static inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

#endif
