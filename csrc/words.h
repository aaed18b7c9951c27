// Numbers and words that are the same in both worlds of device.h; WF_DEVICE is defined before.
#pragma once

#include <cstdint>

namespace wf {

constexpr int kWarpgroup = 128;

// 16-bit numbers as they lie in memory; arithmetic is in fp32.
struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

struct alignas(16) Vec16 {
  uint32_t word[4];
};

// Halves of a word that holds two 16-bit numbers, the low one at the lower address.
template <class T>
WF_DEVICE float low_half(uint32_t word) {
  return to_float(T{static_cast<uint16_t>(word & 0xFFFFu)});
}
template <class T>
WF_DEVICE float high_half(uint32_t word) {
  return to_float(T{static_cast<uint16_t>(word >> 16)});
}

// Matrix descriptor of a 128-byte swizzled tile at a multiple of 1024 bytes (or 32 * i bytes into
// its rows, for the i-th 16 of K). `stride`: bytes from 8 rows to the next 8 rows; a row is 128
// bytes. `leading`: bytes from 64 elements of N to the next 64, for N-major operands only.
WF_DEVICE uint64_t wgmma_descriptor(uint32_t address, uint32_t leading, uint32_t stride) {
  return static_cast<uint64_t>(address >> 4 & 0x3FFF) |
         static_cast<uint64_t>(leading >> 4 & 0x3FFF) << 16 |
         static_cast<uint64_t>(stride >> 4 & 0x3FFF) << 32 | uint64_t{1} << 62;
}

}  // namespace wf
