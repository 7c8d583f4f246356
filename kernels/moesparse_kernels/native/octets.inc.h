// Quantised values taken eight columns, a byte of the bitmask, at a time, for CPUs that have no instruction to expand
// values but can shuffle bytes; all meet x as 16 bits. The includer defines
//   octet                          eight bytes in a register
//   load_octet(p), spread_octet(o, bits)   its values to the columns that are set in a byte of the bitmask
//   COLUMNS                        of a register of 16-bit values: 8 or 16
//   widen_octets(o)                COLUMNS / 8 octets to a register of 16-bit values
//   split_halves(p, to)            16 bytes to 32 values of half a byte less 8, at `to`
// before, and all that quantised.inc.h wants besides decode.

#define MOST_REGISTERS (WIDE_STEP / COLUMNS)
#define REGISTERS(wide) MOST_REGISTERS
#define STARTS(wide) 0

#define ROOM (WIDE_STEP + 16) // bytes of the values of a step, and what a load of the last ones reads behind them

// the values of a step as bytes, in `room` where they are not, or where memory behind them may not be read
INLINE const uint8_t *step_values(const int bits, const uint8_t *p, int64_t bytes, const uint8_t *end, uint8_t *room) {
  if (bits == 8 && end - p >= ROOM) return p;
  if (bits == 8) {
    memset(room, 0, ROOM);
    memcpy(room, p, bytes);
    return room;
  }
  uint8_t halves[WIDE_STEP / 2] = {0};
  if (end - p < WIDE_STEP / 2) memcpy(halves, p, bytes);
  for (int i = 0; i < 2; i++) split_halves((end - p < WIDE_STEP / 2 ? halves : p) + 16 * i, room + 32 * i);
  return room;
}

INLINE void decode(const int wide, const int bits, const int form, const uint8_t *p, int64_t step_bytes,
                   const uint8_t *end, const uint8_t *index, int64_t columns, ints *out) {
  uint8_t room[ROOM];
  const uint8_t *values = step_values(bits, p, min_of(step_bytes, end - p), end, room);
  (void)wide;
  for (int i = 0; i < MOST_REGISTERS; i++) {
    octet part[COLUMNS / 8];
    for (int j = 0; j < COLUMNS / 8; j++) {
      const int at = i * (COLUMNS / 8) + j;
      const uint32_t kept = form == DENSE ? 255 : columns == WIDE_STEP || 8 * at < columns ? index[at] : 0;
      part[j] = form == DENSE ? load_octet(values) : spread_octet(load_octet(values), kept);
      values += form == TWO_FOUR ? 4 : form == DENSE ? 8 : __builtin_popcount(kept);
    }
    out[i] = widen_octets(part);
  }
}

#include "quantised.inc.h"

DEFINE_QUANTISED(quantised, 1)

#define KERNEL(most) \
  {.x_bytes = 2, .levels = most, .few_block = MOST_TOKENS, .many_block = MOST_TOKENS, .many_from = MOST_TOKENS + 1, \
   .few = quantised_few, .many = quantised_many}
#define KERNELS {KERNEL(127), KERNEL(4095)}
