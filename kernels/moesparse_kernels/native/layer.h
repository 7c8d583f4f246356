// One call of the expert layer, as its parts see it: routing and packing of rows (layer_rows.c), projections (layer.c).
#ifndef MOESPARSE_LAYER_H
#define MOESPARSE_LAYER_H

#include "path.h"
#include "tokens.h"

// what one of the two projections multiplies
typedef struct {
  const moesparse_weight *weight;
  const kernel *kernel;
  int64_t row_bytes; // of a packed row
  char *rows;        // (R) packed rows
  float *scales;     // (R) of them where they are quantised
  int64_t chunk;     // rows of a tile
} projection;

typedef struct {
  const moesparse_layer *call;
  const path *path;
  projection up, down;
  int64_t out_rows; // hidden values that a row of the first projection gives
  int alternating;  // gate and up take turns in the rows of `up`
  // routing
  int64_t *first;  // (E + 1): first row of each expert, then the number of rows
  int64_t *slot;   // (R): slot of each row
  int64_t *active; // experts that have rows
  int64_t count;   // of them
  float *gates;    // (R): of each slot
  // of quantised projections
  char *tokens;        // (T) rows of x, each alone in its block
  float *token_scales; // (T)
  float *hidden;       // (R, I), what the first projection gives to a second one that is quantised
  float *sums;         // (H / chunk, T, chunk)
  char *memory;
} layer_run;

// the rows of one expert in a projection
typedef struct {
  int64_t expert, first, count;
  token_plan plan;
} expert_rows;

expert_rows rows_of(const layer_run *run, const projection *of, int64_t active);

// the matrix of an expert
matrix expert_matrix(const layer_run *run, const projection *of, int64_t expert);

// slots in expert order, stable; those of no expert are in no row
void sort_slots(layer_run *run);

// x into the blocks of the first projection
void pack_up(layer_run *run);

// Hidden rows, or in a call of the second projection alone the caller's, into its blocks, unless finish_up (layer.c) has
// put them there.
void pack_down(layer_run *run);

#endif
