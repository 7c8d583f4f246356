// Functions of one row of fp32 values, in the vectors of an instruction path. The includer defines
//   TARGET              the attribute that allows the path's instructions
//   LANES               fp32 values of a vector
//   half_load(p), half_store(v, p)   LANES fp16 values to fp32 and back, rounded to nearest even
// before, and puts the functions that are not INLINE into its `path`.

#include <string.h>

#include "path.h"

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * LANES)));
typedef int16_t vs __attribute__((vector_size(2 * LANES)));
typedef int8_t vb __attribute__((vector_size(LANES)));

// ---- vectors

INLINE vf splat(float value) { return value - (vf){0}; }

INLINE vf load(const float *p) {
  vf v;
  memcpy(&v, p, sizeof v);
  return v;
}

INLINE void store(vf v, float *p) { memcpy(p, &v, sizeof v); }

// a where the mask is set; comparisons with NaN are false, so a NaN in b comes through
INLINE vf choose(vi mask, vf a, vf b) { return (vf)(((vi)a & mask) | ((vi)b & ~mask)); }

INLINE vf at_most(vf x, float bound) { return choose(x > splat(bound), splat(bound), x); }

INLINE vf at_least(vf x, float bound) { return choose(x < splat(bound), splat(bound), x); }

// relative error 4e-9 before rounding: 1 + r + r^2 p(r) on |r| <= log(2) / 2, p fitted by us to that error
INLINE vf exponential(vf x) {
  // beyond, exp is 0 or infinite in fp32: the two factors below under- and overflow by themselves
  x = at_least(at_most(x, 104.0f), -104.0f);
  // adding 1.5 * 2^23 rounds to a whole number and leaves it in the low bits
  const vf shifted = x * 1.44269504088896341f + 12582912.0f, n = shifted - 12582912.0f;
  const vf r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  vf p = splat(1.395055354e-03f);
  p = p * r + 8.368958203e-03f;
  p = p * r + 4.166620481e-02f;
  p = p * r + 1.666651826e-01f;
  p = p * r + 0.5f;
  p = p * (r * r) + r + 1.0f;
  const vi exponent = (vi)shifted - 0x4B400000, half = exponent >> 1;
  return p * (vf)(((vu)half + 127u) << 23) * (vf)(((vu)(exponent - half) + 127u) << 23);
}

INLINE vf sigmoid(vf x) { return 1.0f / (1.0f + exponential(-x)); }

// absolute error 1e-9 before rounding: x p(x^2) below 1, 1 - exp(-q(|x|)) up to 4, where fp32's erf is 1; fitted by us
INLINE vf error_function(vf x) {
  const vi sign = (vi)x & INT32_MIN;
  const vf a = (vf)((vi)x ^ sign), z = a * a, far = at_most(a, 4.0f);
  vf p = splat(7.889038199e-05f);
  p = p * z - 8.020816936e-04f;
  p = p * z + 5.189532608e-03f;
  p = p * z - 2.685444318e-02f;
  p = p * z + 1.128360014e-01f;
  p = p * z - 3.761262713e-01f;
  p = p * z + 1.128379166e+00f;
  vf q = splat(-1.855946409e-04f);
  q = q * far + 2.939804222e-03f;
  q = q * far - 2.180608493e-02f;
  q = q * far + 1.030389279e-01f;
  q = q * far + 6.382239285e-01f;
  q = q * far + 1.127041062e+00f;
  q = q * far + 3.534729295e-04f;
  const vf magnitude = choose(a < splat(1.0f), a * p, 1.0f - exponential(-q));
  return (vf)((vi)magnitude | sign);
}

// ---- dtypes

INLINE vf load_bf16(const uint16_t *p) {
  vh half;
  memcpy(&half, p, sizeof half);
  return (vf)(__builtin_convertvector(half, vu) << 16);
}

// to nearest even, subnormals kept, NaN quiet
INLINE void store_bf16(vf v, uint16_t *p) {
  const vu bits = (vu)v, rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16, quiet = bits >> 16 | 0x40u;
  const vu nan = (vu)(v != v);
  const vh half = __builtin_convertvector((quiet & nan) | (rounded & ~nan), vh);
  memcpy(p, &half, sizeof half);
}

INLINE vf load_as(const int dtype, const void *p) {
  if (dtype == MOESPARSE_BF16) return load_bf16(p);
  if (dtype == MOESPARSE_FP16) return half_load(p);
  return load(p);
}

INLINE void store_as(const int dtype, vf v, void *p) {
  if (dtype == MOESPARSE_BF16) store_bf16(v, p);
  else if (dtype == MOESPARSE_FP16) half_store(v, p);
  else store(v, p);
}

INLINE void widen_row(const int dtype, const char *from, float *to, int64_t n) {
  const int64_t size = dtype_bytes(dtype);
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) store(load_as(dtype, from + i * size), to + i);
  if (i < n) {
    char part[4 * LANES] = {0};
    float whole[LANES];
    memcpy(part, from + i * size, (n - i) * size);
    store(load_as(dtype, part), whole);
    memcpy(to + i, whole, (n - i) * sizeof(float));
  }
}

INLINE void narrow_row(const int dtype, const float *from, char *to, int64_t n) {
  const int64_t size = dtype_bytes(dtype);
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) store_as(dtype, load(from + i), to + i * size);
  if (i < n) {
    float part[LANES] = {0};
    char whole[4 * LANES];
    memcpy(part, from + i, (n - i) * sizeof(float));
    store_as(dtype, load(part), whole);
    memcpy(to + i * size, whole, (n - i) * size);
  }
}

static TARGET void widen(const void *from, int dtype, float *to, int64_t n) {
  if (dtype == MOESPARSE_BF16) widen_row(MOESPARSE_BF16, from, to, n);
  else if (dtype == MOESPARSE_FP16) widen_row(MOESPARSE_FP16, from, to, n);
  else memcpy(to, from, n * sizeof(float));
}

static TARGET void narrow(const float *from, int dtype, void *to, int64_t n) {
  if (dtype == MOESPARSE_BF16) narrow_row(MOESPARSE_BF16, from, to, n);
  else if (dtype == MOESPARSE_FP16) narrow_row(MOESPARSE_FP16, from, to, n);
  else memcpy(to, from, n * sizeof(float));
}

// ---- activations and sums

INLINE vf activated(const int activation, vf gate, vf up) {
  switch (activation) {
    case MOESPARSE_SILU: return gate * sigmoid(gate) * up;
    case MOESPARSE_GELU: return 0.5f * gate * (1.0f + error_function(gate * 0.70710678118654752f)) * up;
    // 0.5 * (1 + tanh(z)) is sigmoid(2 z)
    case MOESPARSE_GELU_TANH:
      return gate * sigmoid(1.5957691216057308f * (gate + 0.044715f * gate * gate * gate)) * up;
    case MOESPARSE_RELU: return at_least(gate, 0.0f) * up;
    case MOESPARSE_RELU2: {
      const vf positive = at_least(gate, 0.0f);
      return positive * positive * up;
    }
    case MOESPARSE_SWIGLU_OAI: {
      const vf clamped = at_most(gate, 7.0f);
      return (at_least(at_most(up, 7.0f), -7.0f) + 1.0f) * (clamped * sigmoid(1.702f * clamped));
    }
    default: return gate * up;
  }
}

INLINE void activate_row(const int activation, float *gate, const float *up, int64_t n) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES)
    store(activated(activation, load(gate + i), up ? load(up + i) : splat(1.0f)), gate + i);
  if (i < n) {
    float g[LANES] = {0}, u[LANES] = {0};
    memcpy(g, gate + i, (n - i) * sizeof(float));
    if (up) memcpy(u, up + i, (n - i) * sizeof(float));
    store(activated(activation, load(g), up ? load(u) : splat(1.0f)), g);
    memcpy(gate + i, g, (n - i) * sizeof(float));
  }
}

static TARGET void activate(int activation, float *gate, const float *up, int64_t n) {
  switch (activation) {
    case MOESPARSE_SILU: activate_row(MOESPARSE_SILU, gate, up, n); break;
    case MOESPARSE_GELU: activate_row(MOESPARSE_GELU, gate, up, n); break;
    case MOESPARSE_GELU_TANH: activate_row(MOESPARSE_GELU_TANH, gate, up, n); break;
    case MOESPARSE_RELU: activate_row(MOESPARSE_RELU, gate, up, n); break;
    case MOESPARSE_RELU2: activate_row(MOESPARSE_RELU2, gate, up, n); break;
    case MOESPARSE_SWIGLU_OAI: activate_row(MOESPARSE_SWIGLU_OAI, gate, up, n); break;
    default:
      if (up) activate_row(MOESPARSE_NONE, gate, up, n);
  }
}

static TARGET void add_scaled(float *to, const float *from, float scale, int64_t n) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) store(load(to + i) + load(from + i) * scale, to + i);
  for (; i < n; i++) to[i] = __builtin_fmaf(from[i], scale, to[i]);
}

static TARGET void add(float *to, const float *from, int64_t n) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) store(load(to + i) + load(from + i), to + i);
  for (; i < n; i++) to[i] += from[i];
}

// ---- to whole numbers

static TARGET float largest(const float *from, int64_t n) {
  vf most = splat(0.0f), wrong = splat(0.0f);
  float result = 0.0f, rest[LANES] = {0}, lanes[LANES], bad[LANES];
  for (int64_t i = 0; i < n; i += LANES) {
    if (n - i < LANES) memcpy(rest, from + i, (n - i) * sizeof(float));
    const vf v = load(n - i < LANES ? rest : from + i), magnitude = (vf)((vi)v & INT32_MAX);
    most = choose(magnitude > most, magnitude, most);
    // NaN where a value is no finite number
    wrong += v * 0.0f;
  }
  store(most, lanes);
  store(wrong, bad);
  for (int lane = 0; lane < LANES; lane++) {
    if (bad[lane] != 0.0f) return __builtin_nanf("");
    result = lanes[lane] > result ? lanes[lane] : result;
  }
  return result;
}

INLINE void quantise_vector(vf v, float factor, int bytes, void *to) {
  // adding 1.5 * 2^23 rounds to a whole number and leaves it in the low bits
  const vi whole = (vi)(v * factor + 12582912.0f) - 0x4B400000;
  if (bytes == 1) {
    const vb narrow = __builtin_convertvector(whole, vb);
    memcpy(to, &narrow, sizeof narrow);
  } else {
    const vs narrow = __builtin_convertvector(whole, vs);
    memcpy(to, &narrow, sizeof narrow);
  }
}

static TARGET void quantise(const float *from, float factor, int bytes, void *to, int64_t n) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) quantise_vector(load(from + i), factor, bytes, (char *)to + i * bytes);
  if (i < n) {
    float part[LANES] = {0};
    char whole[2 * LANES];
    memcpy(part, from + i, (n - i) * sizeof(float));
    quantise_vector(load(part), factor, bytes, whole);
    memcpy((char *)to + i * bytes, whole, (n - i) * bytes);
  }
}

static TARGET uint64_t read_page(const void *page) {
  vu a = {0}, b = {0}, c = {0}, d = {0}, next;
  for (const char *p = page, *end = p + 4096; p < end; p += 4 * sizeof next) {
    for (uint64_t line = 0; line < 4 * sizeof next; line += 64) __builtin_prefetch(p + 8192 + line, 0, 2);
    memcpy(&next, p, sizeof next), a += next;
    memcpy(&next, p + sizeof next, sizeof next), b += next;
    memcpy(&next, p + 2 * sizeof next, sizeof next), c += next;
    memcpy(&next, p + 3 * sizeof next, sizeof next), d += next;
  }
  const vu sum = a + b + c + d;
  uint64_t total = 0;
  for (int lane = 0; lane < LANES; lane++) total += sum[lane];
  return total;
}
