// Maximum pooling: the largest of a window, which of its taps that was, and the way back.
//
// PyTorch keeps positions in eight bytes and writes the input's gradient, which the elementwise
// backward of the layer below then reads again. Here a position is one byte, and that backward
// (epilogue_bwd.cu) gathers its gradient from the windows that a pixel lies in, always in the same
// order.
#pragma once

#include <cstdint>

#include "conv.h"
#include "epilogue.h"
#include "geometry.h"
#include "launch.h"

namespace wf {

constexpr int kMostTaps = 255;  // of a window: a position is a byte

// Positions of 8 channels of one pixel, one byte each.
struct alignas(8) Positions {
  uint8_t tap[kVector];
};

// All tensors contiguous, channels last. Axes have no dilation.
struct MaxPoolParams {
  const void* x = nullptr;       // [batch, H, W, columns]
  void* out = nullptr;           // [batch, P, Q, columns]
  uint8_t* positions = nullptr;  // [batch, P, Q, columns]; null where not wanted
  int batch = 0, columns = 0;
  Axis height{}, width{};
};

// Where the gradient of a layer that is pooled comes from.
struct Pooled {
  const uint8_t* positions = nullptr;  // [batch, P, Q, columns]; null: the layer is not pooled
  Axis height{}, width{};
};

void launch_max_pool(const MaxPoolParams& params, Type type, Place place);

// Throws std::invalid_argument for a window that does not fit its image, or has too many taps.
void check_window(const Axis& height, const Axis& width);

// Gradient of 8 channels, from `column` on, of pixel (h, w) of a sample: the sum of dout
// [batch, P, Q, columns] over the windows whose maximum the pixel is.
template <class T>
WF_DEVICE Channels gather_pooled(const Pooled& pooled, const void* dout, int sample, int h, int w,
                                 int columns, int column) {
  Channels sum{};
  const Axis& height = pooled.height;
  const Axis& width = pooled.width;
  // The last window that begins at or before the pixel, then those before it.
  const int last_p = (h + height.padding) / height.stride;
  const int last_q = (w + width.padding) / width.stride;
  for (int p = last_p; p >= 0; --p) {
    const int r = h + height.padding - p * height.stride;
    if (r >= height.kernel) break;
    if (p >= height.output) continue;
    for (int q = last_q; q >= 0; --q) {
      const int s = w + width.padding - q * width.stride;
      if (s >= width.kernel) break;
      if (q >= width.output) continue;
      const int64_t window = (int64_t{sample} * height.output + p) * width.output + q;
      const int64_t at = window * columns + column;
      const Positions where = load_global<Positions>(pooled.positions + at);
      const Channels g = unpack<T>(load_global<Vec16>(static_cast<const T*>(dout) + at));
      const int tap = r * width.kernel + s;
      WF_UNROLL
      for (int i = 0; i < kVector; ++i)
        sum.value[i] += where.tap[i] == tap ? g.value[i] : 0.0f;
    }
  }
  return sum;
}

}  // namespace wf
