// The kernels' instances and their launches; see gemm.h for what they do.
#include <stdexcept>

#include "gemm.h"

namespace wf {

template <class T, int kBlockN, bool kKeepFilter, Direction kDirection>
struct GemmKernel {
  using Layout = wf::Layout<kBlockN, kKeepFilter>;
  using Params = wf::Params<kDirection>;
  static constexpr int kThreads = wf::kThreads;
  static constexpr uint32_t kSharedBytes = Layout::kBytes;
  static_assert(kSharedBytes <= 227 * 1024, "more shared memory than a Hopper block can have");
  static_assert(sizeof(Params) <= 4096, "parameters of a kernel have 4 KB");

  static WF_DEVICE void run(const Params& params) { gemm<T, Layout, kDirection>(params); }
};

struct SumKernel {
  using Params = SumParams;
  static constexpr int kThreads = kSumThreads;
  static constexpr uint32_t kSharedBytes = 0;

  static WF_DEVICE void run(const Params& params) { sum_partials(params); }
};

namespace {

TensorMap checked_map(const TensorMapParameters& parameters) {
  if (const char* reason = refuse_map(parameters)) throw std::invalid_argument(reason);
  return encode_tensor_map(parameters);
}

template <Direction kDirection>
Params<kDirection> make_params(const Problem& problem, const Operands& operands) {
  Params<kDirection> params{};
  params.problem = problem;
  for (int i = 0; i < problem.num_phases; ++i) {
    const Phase& phase = problem.phases[i];
    if (problem.tiled) {
      params.a[i] =
          checked_map(matrix_map(operands.a, operands.bf16, phase.rows, problem.depth, kBlockM));
    } else if (phase.slices > 0 && phase.rows > 0) {
      params.a[i] = checked_map(im2col_map(operands.a, operands.bf16, problem, phase));
    }
  }
  const bool forward = kDirection == Direction::kForward;
  const int out_channels = forward ? problem.columns : problem.depth;
  const int in_channels = forward ? problem.depth : problem.columns;
  // Layout::kFilterRows; backward, those of the depth.
  const int share = problem.block_n / kCluster;
  const int box_rows = forward || share < kBlockK ? share : kBlockK;
  params.b = checked_map(filter_map(operands.filter, operands.bf16, out_channels,
                                    problem.filter_h * problem.filter_w, in_channels, box_rows));
  return params;
}

template <Direction kDirection, class Epilogue>
void launch_gemm(const Problem& problem, const Operands& operands, const Epilogue& epilogue) {
  const DeviceGuard guard(operands.place.device);  // the driver encodes the tensor maps
  Params<kDirection> params = make_params<kDirection>(problem, operands);
  params.epilogue = epilogue;
  const int most = clusters_of(operands.processors);
  const int clusters = problem.tile_slots < most ? problem.tile_slots : most;
  const auto run = [&](auto kernel) {
    launch<decltype(kernel)>(params, clusters, kCluster, operands.place);
  };
  if (problem.block_n == 256) {
    operands.bf16 ? run(GemmKernel<Bf16, 256, false, kDirection>{})
                  : run(GemmKernel<Fp16, 256, false, kDirection>{});
  } else if (problem.block_n == 128) {
    operands.bf16 ? run(GemmKernel<Bf16, 128, false, kDirection>{})
                  : run(GemmKernel<Fp16, 128, false, kDirection>{});
  } else if (!problem.keep_filter) {
    operands.bf16 ? run(GemmKernel<Bf16, 64, false, kDirection>{})
                  : run(GemmKernel<Fp16, 64, false, kDirection>{});
  } else {
    operands.bf16 ? run(GemmKernel<Bf16, 64, true, kDirection>{})
                  : run(GemmKernel<Fp16, 64, true, kDirection>{});
  }
}

}  // namespace

void launch_fprop(const Problem& problem, const Operands& operands,
                  const ForwardEpilogue& epilogue) {
  launch_gemm<Direction::kForward>(problem, operands, epilogue);
}

void launch_dgrad(const Problem& problem, const Operands& operands,
                  const BackwardEpilogue& epilogue) {
  launch_gemm<Direction::kBackward>(problem, operands, epilogue);
}

void launch_column_sums(const Problem& problem, const BackwardEpilogue& epilogue,
                        const ColumnSums& sums, Place place) {
  const DeviceGuard guard(place.device);
  const SumParams params{problem, epilogue.partial0, epilogue.partial1, sums};
  const int64_t count = int64_t{problem.batch} * problem.columns;
  launch<SumKernel>(params, (count + kSumThreads - 1) / kSumThreads, 1, place);
}

}  // namespace wf
