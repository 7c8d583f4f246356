// Tables by a byte of the bitmask, which spread its kept values over eight columns: for every byte of the result the byte
// of the values that goes there, or 0x80 for a zero. What shuffles of bytes want, on x86 and on Arm.
#ifndef MOESPARSE_SPREAD_H
#define MOESPARSE_SPREAD_H

#include <stdint.h>

extern uint8_t spread_bytes[256][8];           // 8-bit values to 8-bit columns
extern uint8_t spread_words[256][16];          // 16-bit values to 16-bit columns
extern uint8_t spread_upper[256][32];          // 16-bit values to the upper halves of 32-bit columns: bf16 to fp32
extern uint8_t spread_floats[256][32];         // 32-bit values
extern int32_t spread_lane[256][8];            // the value of each column
extern int32_t spread_kept[256][8];            // -1 where there is one

#endif
