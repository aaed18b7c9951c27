// Entry points of the kernels: addresses and sizes in, launches out. They allocate nothing, run on
// the given stream, and can be captured in a CUDA graph. All tensors are dense and channels last,
// 16-bit, at 16-byte aligned addresses; tables are fp32 with rows a multiple of 16 bytes apart.
#pragma once

#include <cstdint>

#include "geometry.h"

namespace wf {

// Where a launch goes: CUDA device ordinal and stream, both as PyTorch knows them.
struct Place {
  int device = 0;
  uintptr_t stream = 0;
};

// One GEMM's operands and where to run it.
struct Operands {
  const void* a;       // x, or A * g
  const void* filter;  // [out_channels, R, S, in_channels]
  bool bf16;           // else fp16
  int processors;      // multiprocessors of the device: thread blocks of the persistent grid
  Place place;
};

// What follows a forward convolution, with u the accumulator:
//     v   = A * u                      rounded to its stored type where it is stored
//     out = act(v + C + residual)
// Tensors are [B, P, Q, columns]; tables [B, columns] with rows table_stride apart.
struct ForwardEpilogue {
  const float* scale = nullptr;    // A
  const float* shift = nullptr;    // C or null
  const void* residual = nullptr;  // or null
  void* branch = nullptr;          // v or null
  void* out = nullptr;
  int table_stride = 0;
  bool relu = false;
};

// What follows an input gradient: the elementwise backward of the layer below. With acc the
// gradient that reaches its output:
//     g  = (acc + skip) * act'         mask: activation > 0, or branch + C > 0
//     ag = A * g                       T0 = sum of g, T1 = sum of g * branch, per sample
struct BackwardEpilogue {
  const void* skip = nullptr;        // all null where there is none
  const void* branch = nullptr;      // v
  const void* activation = nullptr;  // out
  const float* scale = nullptr;      // A
  const float* shift = nullptr;      // C
  void* grad = nullptr;              // g
  void* scaled_grad = nullptr;       // A * g
  float* partial0 = nullptr;         // [dgrad_partial_rows(), columns] sums of g
  float* partial1 = nullptr;         // the same of g * v
  int table_stride = 0;
  bool relu = false;

  WF_HOST_DEVICE bool mask_from_branch() const { return relu && activation == nullptr; }
  WF_HOST_DEVICE bool needs_branch() const { return mask_from_branch() || partial1 != nullptr; }
};

// Where the column sums go: [batch, in_channels] fp32, rows `stride` apart; either may be null.
struct ColumnSums {
  float* t0 = nullptr;
  float* t1 = nullptr;
  int stride = 0;
};

// Why a convolution cannot run here, in words; null if it can.
const char* refuse_fprop(const Convolution& conv);
const char* refuse_dgrad(const Convolution& conv);

// Throws std::invalid_argument for what is refused, std::runtime_error where CUDA reports an error.
void fprop(const Convolution& conv, const Operands& operands, const ForwardEpilogue& epilogue);

// `sums` are added from the partial sums, by a second kernel.
void dgrad(const Convolution& conv, const Operands& operands, const BackwardEpilogue& epilogue,
           const ColumnSums& sums);

// Rows of the partial sums that dgrad writes: each of partial0 and partial1 is [rows, in_channels].
int dgrad_partial_rows(const Convolution& conv);

// --- kernels (gemm.cu): everything is checked ---

void launch_fprop(const Problem& problem, const Operands& operands,
                  const ForwardEpilogue& epilogue);
void launch_dgrad(const Problem& problem, const Operands& operands,
                  const BackwardEpilogue& epilogue);
void launch_column_sums(const Problem& problem, const BackwardEpilogue& epilogue,
                        const ColumnSums& sums, Place place);

}  // namespace wf
