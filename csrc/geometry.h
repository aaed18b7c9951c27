// Index arithmetic of convolutions as GEMMs; host and device.
//
// Forward and input gradient are the same product: output row (b, i, j), depth (tap, channel),
//     sum over taps (a, b) of input[b, i * step + offset_h(a), j * step + offset_w(b), :] * filter
//
// - forward: every output pixel, step = stride, offset = tap * dilation - padding;
// - input gradient: pixel h of the input receives from output row p where p * stride =
//   h + padding - r * dilation. For the pixels of one phase, h = i * stride + phase, the taps r
//   that divide are an arithmetic progression and p = i + offset: a convolution of step 1 over
//   fewer taps, so that a stride costs no wasted multiplication. A phase may have no tap at all.
#pragma once

#include <cstdint>

#include "device.h"

namespace wf {

template <class Integer>
WF_HOST_DEVICE Integer ceil_div(Integer a, Integer b) {
  return (a + b - 1) / b;
}

// n / divisor for 0 <= n < 2^31 by one multiplication.
struct Divider {
  uint32_t divisor = 1, multiplier = 0, shift = 0;

  Divider() = default;
  WF_HOST_DEVICE explicit Divider(uint32_t d) : divisor(d) {
    if (d <= 1) return;
    uint32_t log = 0;
    while ((1ull << log) < d) ++log;
    const uint64_t power = 1ull << (31 + log);
    multiplier = static_cast<uint32_t>((power + d - 1) / d);
    shift = log - 1;
  }
  WF_HOST_DEVICE uint32_t operator()(uint32_t n) const {
    if (divisor == 1) return n;
#if defined(__CUDA_ARCH__)
    return __umulhi(n, multiplier) >> shift;
#else
    return static_cast<uint32_t>((uint64_t{n} * multiplier) >> 32) >> shift;
#endif
  }
};

// One dimension of a convolution.
struct Axis {
  int input;   // pixels of x
  int output;  // pixels of the result
  int kernel, stride, padding, dilation;

  // Pixels that the result must have; 0 where the filter does not fit.
  WF_HOST_DEVICE int expected_output() const {
    const int reach = input + 2 * padding - dilation * (kernel - 1) - 1;
    return reach < 0 ? 0 : reach / stride + 1;
  }
};

// Taps that contribute, filter position first + n * step, to the pixel at offset + n * offset_step.
struct Taps {
  int first = 0, step = 1, count = 0, offset = 0, offset_step = 0;
};

WF_HOST_DEVICE Taps forward_taps(const Axis& axis) {
  return {0, 1, axis.kernel, -axis.padding, axis.dilation};
}

WF_HOST_DEVICE Taps gradient_taps(const Axis& axis, int phase) {
  Taps taps;
  int found = 0;
  for (int r = 0; r < axis.kernel && found < 2; ++r) {
    const int reach = phase + axis.padding - r * axis.dilation;
    if (reach % axis.stride != 0) continue;
    if (found == 0)
      taps.first = r, taps.step = axis.kernel, taps.offset = reach / axis.stride;
    else
      taps.step = r - taps.first, taps.offset_step = reach / axis.stride - taps.offset;
    ++found;
  }
  if (found > 0) taps.count = (axis.kernel - taps.first - 1) / taps.step + 1;
  return taps;
}

// Pixels h = i * stride + phase of a dimension.
WF_HOST_DEVICE int phase_pixels(const Axis& axis, int phase) {
  return phase < axis.input ? (axis.input - phase - 1) / axis.stride + 1 : 0;
}

// Rows of the GEMM that one phase contributes: (b, i, j) in order.
struct Phase {
  int h = 0, w = 0;              // of the pixels
  int rows_h = 0, rows_w = 0;    // pixels of a sample
  int64_t first_tile = 0;        // tiles of all phases before
  WF_HOST_DEVICE int pixels() const { return rows_h * rows_w; }
};

// Calls visit(phase, tiles) for the phases of an input gradient, in order, until it returns false.
#if defined(__CUDACC__)
#pragma nv_exec_check_disable  // visitors are host or device functions, as their callers are
#endif
template <class Visit>
WF_HOST_DEVICE void for_each_phase(const Axis& height, const Axis& width, int batch, int block_rows,
                                   Visit visit) {
  Phase phase;
  for (int h = 0; h < height.stride; ++h)
    for (int w = 0; w < width.stride; ++w) {
      phase.h = h, phase.w = w;
      phase.rows_h = phase_pixels(height, h), phase.rows_w = phase_pixels(width, w);
      const int64_t tiles =
          ceil_div<int64_t>(int64_t{batch} * phase.rows_h * phase.rows_w, block_rows);
      if (!visit(phase, tiles)) return;
      phase.first_tile += tiles;
    }
}

WF_HOST_DEVICE int64_t gradient_row_tiles(const Axis& height, const Axis& width, int batch,
                                          int block_rows) {
  int64_t total = 0;
  for_each_phase(height, width, batch, block_rows, [&](const Phase&, int64_t tiles) {
    total += tiles;
    return true;
  });
  return total;
}

// --- column sums ---------------------------------------------------------------------------------
//
// Rows (b, pixel) are summed per sample in strips of consecutive rows. A strip touches up to `span`
// samples and writes the sum of each to a slot of its own: slot = strip * span + (sample - first).
// A second kernel adds the slots of a sample in order: the same bits on every run.

WF_HOST_DEVICE int strip_span(int strip_rows, int pixels, int batch) {
  if (pixels <= 0) return 1;
  const int touched = (strip_rows + pixels - 2) / pixels + 1;
  return touched < batch ? touched : (batch > 0 ? batch : 1);
}

// Strips of the rows of a sample, first to last.
struct StripRange {
  int64_t first, last;
};
WF_HOST_DEVICE StripRange strips_of_sample(int strip_rows, int pixels, int sample) {
  const int64_t begin = int64_t{sample} * pixels;
  return {begin / strip_rows, (begin + pixels - 1) / strip_rows};
}

WF_HOST_DEVICE int64_t slot_of(int64_t strip, int strip_rows, int pixels, int span, int sample) {
  const int first = static_cast<int>(strip * strip_rows / pixels);
  return strip * span + (sample - first);
}

}  // namespace wf
