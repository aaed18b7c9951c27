// Convolutions with fused epilogues: what a launch is told, and who checks it.
#pragma once

#include <cstdint>

#include "epilogue.h"
#include "geometry.h"
#include "launch.h"

namespace wf {

enum class Type { kBf16 = 0, kFp16 = 1 };

// All tensors contiguous, channels last, bases on 16 bytes; a linear map is height T, width 1.
struct ConvParams {
  const void* input = nullptr;   // forward: x [images, H, W, depth]; gradient: ag [B, P, Q, depth]
  const void* filter = nullptr;  // [O, R, S, C]
  int batch = 0;                 // samples of the input
  // Forward, label expansion: image n is convolved once and written under the tables of the samples
  // order[first_of[n]] to order[first_of[n + 1] - 1]. Null: image n is sample n.
  const int64_t* order = nullptr;     // [samples]
  const int64_t* first_of = nullptr;  // [batch + 1]
  int samples = 0;                    // of the result; batch without order
  int depth = 0;                    // channels of the input
  int columns = 0;                  // channels of the result
  Axis height{}, width{};           // in the sense of the forward convolution
  Divider by_pixels, by_width;      // of the result, where all of it is one phase; set at launch
  ForwardEpilogue forward;
  BackwardEpilogue backward;
};

// Throws std::invalid_argument with one sentence for what the kernels cannot take.
void check_conv_fprop(const ConvParams& params);
void check_conv_dgrad(const ConvParams& params);
void check_backward_epilogue(const BackwardEpilogue& epilogue, int columns, int batch);

// Whether tiles of 64 columns waste less than tiles of 128.
WF_HOST_DEVICE bool narrow_tiles(int columns) {
  const int rest = columns % 128;
  return rest > 0 && rest <= 64 && columns < 384;
}

// The result of a gradient is summed strip by strip (geometry.h): rows of a strip, samples that it
// may touch, slots of partial0 and partial1.
int conv_dgrad_strip_rows(int columns);
int conv_dgrad_span(const ConvParams& params);
int64_t conv_dgrad_slots(const ConvParams& params);

void launch_conv_fprop(const ConvParams& params, Type type, Place place);
void launch_conv_dgrad(const ConvParams& params, Type type, Place place);

// t0, t1 [B, columns], rows total_stride apart, from the partial sums that launch_conv_dgrad left;
// either may be null.
void launch_conv_dgrad_sums(const ConvParams& params, float* t0, float* t1, int total_stride,
                            Place place);

}  // namespace wf
