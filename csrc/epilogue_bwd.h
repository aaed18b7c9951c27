// The elementwise backward of a masked layer in one pass, where no GEMM epilogue covers it.
#pragma once

#include <cstdint>

#include "conv.h"
#include "epilogue.h"
#include "launch.h"
#include "max_pool.h"

namespace wf {

// g = (dout + skip) * act', A * g, T0 and T1 over rows (sample, pixel); see epilogue.h.
struct EpilogueBackwardParams {
  const void* dout = nullptr;  // channels contiguous
  int64_t sample_stride = 0, pixel_stride = 0;  // of dout, in elements; 0 for a broadcast
  int batch = 0, pixels = 0, columns = 0;
  Pooled pooled;  // where the layer is pooled: dout is [batch, P, Q, columns], contiguous
  BackwardEpilogue epilogue;  // the other tensors are [batch, pixels, columns], contiguous
};

// scaled[n, p, o] = sum over the samples b of image n, in order, of scale[b, o] * dout[b, p, o].
struct SumBySourceParams {
  const void* dout = nullptr;         // [batch, pixels, columns]
  const float* scale = nullptr;       // [batch, columns], rows table_stride apart
  const int64_t* order = nullptr;     // samples sorted by image
  const int64_t* first_of = nullptr;  // [images + 1]: where an image's samples begin in order
  void* scaled = nullptr;             // [images, pixels, columns]
  int images = 0, pixels = 0, columns = 0, table_stride = 0;
};

int64_t epilogue_bwd_slots(int batch, int pixels);  // of partial0 and partial1
void launch_epilogue_bwd(const EpilogueBackwardParams& params, Type type, Place place);
// t0, t1 [batch, columns], rows total_stride apart, from the partial sums; either may be null.
void launch_epilogue_bwd_sums(const EpilogueBackwardParams& params, float* t0, float* t1,
                              int total_stride, Place place);
void launch_sum_by_source(const SumBySourceParams& params, Type type, Place place);

}  // namespace wf
