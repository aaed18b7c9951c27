// Entry points of the Hopper kernels: raw pointers and sizes in, launches out. They allocate
// nothing, run on the given stream, and can be captured in a CUDA graph. All tensors are dense and
// channels last, 16-bit, at 16-byte aligned addresses; tables are fp32.
#pragma once

#include <cstdint>

#include "launch.h"
#include "sm90_gemm.h"

namespace wf::sm90 {

// One GEMM's operands and where to run it.
struct Operands {
  const void* a;       // x, or A * g
  const void* filter;  // [out_channels, R, S, in_channels]
  bool bf16;           // else fp16
  int processors;      // multiprocessors of the device: thread blocks of the persistent grid
  Place place;
};

// Why a convolution cannot run here, in words; null if it can.
const char* refuse_fprop(const Convolution& conv);
const char* refuse_dgrad(const Convolution& conv);

// out = act(scale * u + shift + residual), u = conv(x, filter); see ForwardEpilogue.
// Throws std::invalid_argument for what is refused, std::runtime_error where CUDA reports an error.
void fprop(const Convolution& conv, const Operands& operands, const ForwardEpilogue& epilogue);

// g = (dx + skip) * act', A * g and partial column sums of the layer below; see BackwardEpilogue.
void dgrad(const Convolution& conv, const Operands& operands, const BackwardEpilogue& epilogue);

// Rows of the partial sums that dgrad writes: each of partial0 and partial1 is [rows, in_channels].
int dgrad_partial_rows(const Convolution& conv);

// Second stage: t0 and t1, [batch, in_channels] with rows total_stride apart, from the partial sums
// of dgrad; either may be null.
void add_partials(const Convolution& conv, const float* partial0, const float* partial1, float* t0,
                  float* t1, int total_stride, Place place);

}  // namespace wf::sm90
