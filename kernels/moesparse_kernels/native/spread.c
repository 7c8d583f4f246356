#include "spread.h"

uint8_t spread_bytes[256][8] __attribute__((aligned(64)));
uint8_t spread_words[256][16] __attribute__((aligned(64)));
uint8_t spread_upper[256][32] __attribute__((aligned(64)));
uint8_t spread_floats[256][32] __attribute__((aligned(64)));
int32_t spread_lane[256][8] __attribute__((aligned(64)));
int32_t spread_kept[256][8] __attribute__((aligned(64)));

__attribute__((constructor)) static void fill_tables(void) {
  for (int bits = 0; bits < 256; bits++)
    for (int column = 0, next = 0; column < 8; column++) {
      const int kept = bits >> column & 1;
      spread_bytes[bits][column] = kept ? next : 0x80;
      for (int i = 0; i < 2; i++) {
        const uint8_t from = kept ? 2 * next + i : 0x80;
        spread_words[bits][2 * column + i] = from;
        spread_upper[bits][4 * column + i] = 0x80;
        spread_upper[bits][4 * column + 2 + i] = from;
      }
      for (int i = 0; i < 4; i++) spread_floats[bits][4 * column + i] = kept ? 4 * next + i : 0x80;
      spread_lane[bits][column] = next & 7;
      spread_kept[bits][column] = -kept;
      next += kept;
    }
}
