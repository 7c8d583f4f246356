// What instructions this CPU and its operating system have.
#ifndef MOESPARSE_CPU_H
#define MOESPARSE_CPU_H

// each implies all that the path of its name needs (the .c file of that name)
typedef struct {
  int avx512_bf16;
  int avx512_vbmi2;
  int avx2;
  int neon;
  int neon_bf16;
  // what the paths leave to others
  int amx_bf16, amx_fp16, avx512_fp16;
} cpu_features;

cpu_features detect_cpu(void);

#endif
