// Parameters of the tensor maps (TMA descriptors) that the kernels read their operands by.
//
// On the host these structs are what the emulation reads; for a device, driver.h hands them to
// cuTensorMapEncodeTiled / cuTensorMapEncodeIm2col. Axes are ordered as the driver wants them: the
// contiguous one first, corners as {W, H}.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "geometry.h"

namespace wf {

struct TensorMapParameters {
  const void* address;
  int rank;
  bool im2col;
  bool bf16;
  uint64_t size[4];           // elements
  uint64_t stride[4];         // bytes to the next element of axis i; [0] is implied: 2
  uint32_t box[4];            // tiled: elements per copy
  uint32_t element_step[4];   // im2col: distance of neighbouring filter bases
  int lower[2], upper[2];     // im2col: first base {W, H}; last base, counted from the last pixel
  uint32_t channels, pixels;  // im2col: elements per copy
};

// Axes of dense memory, the contiguous one first.
inline TensorMapParameters dense_map(const void* address, bool bf16,
                                     std::initializer_list<int64_t> sizes) {
  TensorMapParameters map{};
  map.address = address;
  map.bf16 = bf16;
  uint64_t bytes = 2;
  for (const int64_t size : sizes) {
    if (map.rank > 0) map.stride[map.rank] = bytes;
    map.element_step[map.rank] = map.box[map.rank] = 1;
    map.size[map.rank++] = size;
    bytes *= size;
  }
  return map;
}

// [rows, depth] in boxes of [box_rows, 64].
inline TensorMapParameters matrix_map(const void* address, bool bf16, int64_t rows, int depth,
                                      int box_rows) {
  TensorMapParameters map = dense_map(address, bf16, {depth, rows});
  map.box[0] = kBlockK, map.box[1] = box_rows;
  return map;
}

// The filter, [out_channels, R * S, in_channels], in boxes of [box_rows, 1, 64].
inline TensorMapParameters filter_map(const void* address, bool bf16, int out_channels, int taps,
                                      int in_channels, int box_rows) {
  TensorMapParameters map = dense_map(address, bf16, {in_channels, taps, out_channels});
  map.box[0] = kBlockK, map.box[2] = box_rows;
  return map;
}

// [batch, a_height, a_width, depth]: 128 consecutive pixels of a phase at one tap, 64 channels.
inline TensorMapParameters im2col_map(const void* address, bool bf16, const Problem& problem,
                                      const Phase& phase) {
  TensorMapParameters map = dense_map(
      address, bf16, {problem.depth, problem.a_width, problem.a_height, problem.batch});
  map.im2col = true;
  map.element_step[1] = phase.w.base_step, map.element_step[2] = phase.h.base_step;
  // The box of filter bases ends exactly at the last one: `size` of them per axis, whatever rest
  // the stride leaves.
  map.lower[0] = phase.w.base, map.lower[1] = phase.h.base;
  map.upper[0] = phase.w.base + (phase.w.size - 1) * phase.w.base_step - (problem.a_width - 1);
  map.upper[1] = phase.h.base + (phase.h.size - 1) * phase.h.base_step - (problem.a_height - 1);
  map.channels = kBlockK;
  map.pixels = kBlockM;
  return map;
}

// What the driver's documentation demands; a map that violates it is refused before anything runs.
inline const char* refuse_map(const TensorMapParameters& map) {
  if (reinterpret_cast<uintptr_t>(map.address) % 16 != 0)
    return "an operand is not 16-byte aligned";
  for (int i = 0; i < map.rank; ++i) {
    if (map.size[i] == 0 || map.size[i] > uint64_t{1} << 32) return "an axis is empty or too long";
    if (i > 0 && (map.stride[i] % 16 != 0 || map.stride[i] >= uint64_t{1} << 40))
      return "channels are not a multiple of 8, or a tensor has more than 2**40 bytes";
    if (map.element_step[i] < 1 || map.element_step[i] > 8) return "the stride is above 8";
    if (!map.im2col && (map.box[i] == 0 || map.box[i] > 256)) return "a box is larger than 256";
  }
  if (2 * (map.im2col ? map.channels : map.box[0]) != 128)
    return "a row of a box is not the 128 bytes of its swizzle";
  if (!map.im2col) return nullptr;
  if (map.pixels == 0 || map.pixels > 1024) return "a box has more than 1024 pixels";
  for (int i = 0; i < 2; ++i) {
    if (map.lower[i] < -128 || map.lower[i] > 127 || map.upper[i] < -128 || map.upper[i] > 127)
      return "padding or filter reach beyond 128 pixels";
    if (static_cast<int64_t>(map.size[i + 1]) + map.upper[i] <= map.lower[i])
      return "the box of filter bases is empty";
  }
  return nullptr;
}

// Filter offsets of an im2col load have 8 bits per axis. 255 is not taken, though the manual does
// not exclude it: CUTLASS ends at 254, and no device has shown that it works.
inline const char* refuse_offsets(const Axis& axis) {
  constexpr int kMostOffset = 254;
  for (int k = 0; k < axis.taps; ++k)
    if (axis.offset(k) < 0 || axis.offset(k) > kMostOffset)
      return "the dilated filter is wider than 255";
  return nullptr;
}

}  // namespace wf
