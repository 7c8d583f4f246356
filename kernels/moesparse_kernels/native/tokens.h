// Tokens as the kernels want them (path.h): how many make a block, and how a row gets into one.
#ifndef MOESPARSE_TOKENS_H
#define MOESPARSE_TOKENS_H

#include "path.h"

// how the tokens of one expert are multiplied
typedef struct {
  tile_fn *multiply;
  int block;     // tokens of a block; the last may hold fewer
  int64_t piece; // tokens of a tile, whole blocks
} token_plan;

token_plan plan_tokens(const kernel *k, int64_t tokens);

// Rows of a tile where `matrices` of so many rows are multiplied at once: a chunk, or half of one where every thread would
// get but a few. The bits do not depend on it, for a row is summed alike in every tile.
int64_t row_chunk(int64_t rows, int64_t matrices);

// bytes of a packed row that meets a matrix
int64_t packed_bytes(const kernel *k, const matrix *w);

// the place of a token among the packed rows of its expert
typedef struct {
  char *block;     // where its block begins
  int64_t tokens;  // of the block
  int64_t at;      // its position in the block
} token_place;

token_place place_token(const token_plan *plan, char *packed, int64_t row_bytes, int64_t tokens, int64_t token);

// Columns first..first + count of a row into its place; `first` is a multiple of STEP. Zeros follow the last column. For
// kernels whose x is not quantised.
void pack_columns(const path *p, int dtype, const void *row_part, int64_t first, int64_t count, token_place to);

// A row into its place as whole numbers, -levels..levels, and its scale: its largest magnitude over levels. The scale is
// NaN, and so is each of its products, where a value is NaN or infinite; below 2^-100 a row counts as zeros.
float quantise_row(const path *p, const kernel *k, const matrix *w, int dtype, const void *row, token_place to);

// a quantised row that is alone in its block into another place
void copy_quantised(const kernel *k, const matrix *w, const char *row, token_place to);

#endif
