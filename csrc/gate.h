// Filter matrices to scales and back.
//
//     gate[l, o]  = gate_scale[o] * sigmoid(alpha[l, o])              exactly 1 within 4 ulp of 1
//     rows[b, o]  = factor[o] * prod over the distinct labels l of forget[b, :] of gate[l, o]
//     dalpha[l, o] = (1 - sigmoid(alpha[l, o])) * sum over b with l in forget[b, :] of t[b, o]
//
// A label of -1 selects no row. A label out of range gives NaN for its sample, takes no gradient,
// and is never used as an index. The sum runs over samples in ascending order: equal bits on every
// run.
#pragma once

#include <cstdint>

#include "launch.h"

namespace wf {

constexpr int kMostLabels = 16;

struct GateParams {
  const float* alpha = nullptr;     // [classes, columns], rows alpha_stride apart
  const int64_t* forget = nullptr;  // [batch, labels]
  float gate_scale = 1.0f;          // unless scales is given
  const float* scales = nullptr;    // [columns] or null
  const float* factor = nullptr;    // [columns] or null (1)
  float* rows = nullptr;            // [batch, columns], rows row_stride apart
  int batch = 0, labels = 0, classes = 0, columns = 0;
  int alpha_stride = 0, row_stride = 0;
};

struct GateGradientParams {
  const float* t = nullptr;  // [batch, columns], rows row_stride apart
  // Where chosen[o] is not 0, t[b, o] is multiplied by products[b, o] first; both null: nowhere.
  const float* products = nullptr;
  const float* chosen = nullptr;
  const float* alpha = nullptr;
  const int64_t* forget = nullptr;
  float* dalpha = nullptr;  // [classes, columns], rows gradient_stride apart
  int batch = 0, labels = 0, classes = 0, columns = 0;
  int alpha_stride = 0, row_stride = 0, gradient_stride = 0;
};

void launch_gate_rows(const GateParams& params, Place place);
void launch_gate_rows_bwd(const GateGradientParams& params, Place place);

}  // namespace wf
