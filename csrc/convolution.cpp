// Checks of convolutions: everything that the kernels assume of sizes. What they assume of tensors
// (types, shapes, 16-byte alignment, which may be missing) wfnet/backends/cuda_launch.py sees to.
#include "convolution.h"

#include <stdexcept>

#include "tensor_map.h"

namespace wf {
namespace {

void require(const char* refusal) {
  if (refusal != nullptr) throw std::invalid_argument(refusal);
}

// Of the larger one of input and output.
int64_t most_pixels(const Convolution& conv) {
  const int64_t in = int64_t{conv.height} * conv.width;
  const int64_t out = int64_t{conv.out_height()} * conv.out_width();
  return conv.batch * (in > out ? in : out);
}

// What a problem, whose numbers have 32 bits, can be made of.
const char* refuse_sizes(const Convolution& conv) {
  if (conv.batch < 1 || conv.height < 1 || conv.width < 1 || conv.in_channels < 1 ||
      conv.out_channels < 1 || conv.filter_h < 1 || conv.filter_w < 1 || conv.dilation_h < 1 ||
      conv.dilation_w < 1 || conv.pad_h < 0 || conv.pad_w < 0 || conv.out_height() < 1 ||
      conv.out_width() < 1)
    return "the convolution is empty, or the filter does not fit into the image";
  if (conv.in_channels % 8 != 0 || conv.out_channels % 8 != 0)
    return "TMA needs channel counts that are multiples of 8";
  if (most_pixels(conv) > INT32_MAX - 2 * kCluster * kBlockM) return "more than 2**31 pixels";
  return nullptr;
}

const char* refuse(const Convolution& conv, const Problem& problem) {
  if ((most_pixels(conv) / kBlockM + kMostPhases) * problem.n_tiles > INT32_MAX - (1 << 16))
    return "more than 2**31 tiles";
  for (int i = 0; i < problem.num_phases; ++i) {
    const Phase& phase = problem.phases[i];
    if (const char* reason = refuse_offsets(phase.h)) return reason;
    if (const char* reason = refuse_offsets(phase.w)) return reason;
    if (!problem.tiled && phase.slices > 0 && phase.rows > 0)
      if (const char* reason = refuse_map(im2col_map(nullptr, true, problem, phase))) return reason;
  }
  return nullptr;
}

}  // namespace

const char* refuse_fprop(const Convolution& conv) {
  if (conv.stride_h > 8 || conv.stride_w > 8) return "the stride is above 8";
  if (conv.stride_h < 1 || conv.stride_w < 1) return "the stride is below 1";
  if (const char* reason = refuse_sizes(conv)) return reason;
  return refuse(conv, problem_of(conv, false));
}

const char* refuse_dgrad(const Convolution& conv) {
  if (conv.stride_h < 1 || conv.stride_w < 1) return "the stride is below 1";
  if (conv.stride_h * conv.stride_w > kMostPhases)
    return "the input gradient of strides whose product is above 4 has no Hopper kernel";
  if (const char* reason = refuse_sizes(conv)) return reason;
  return refuse(conv, problem_of(conv, true));
}

void fprop(const Convolution& conv, const Operands& operands, const ForwardEpilogue& e) {
  require(refuse_fprop(conv));
  launch_fprop(problem_of(conv, false, clusters_of(operands.processors)), operands, e);
}

void dgrad(const Convolution& conv, const Operands& operands, const BackwardEpilogue& e,
           const ColumnSums& sums) {
  require(refuse_dgrad(conv));
  const Problem problem = problem_of(conv, true, clusters_of(operands.processors));
  launch_dgrad(problem, operands, e);
  if (sums.t0 != nullptr || sums.t1 != nullptr)
    launch_column_sums(problem, e, sums, operands.place);
}

int dgrad_partial_rows(const Convolution& conv) {
  require(refuse_dgrad(conv));
  return problem_of(conv, true).partial_rows;
}

}  // namespace wf
