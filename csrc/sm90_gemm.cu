// Checks, tensor maps and launches of the Hopper kernels; see sm90_gemm.h for what they do.
#include <stdexcept>
#include <string>

#include "sm90_ops.h"

namespace wf::sm90 {

template <class T, int kBlockN, bool kKeepFilter, Direction kDirection>
struct GemmKernel {
  using Layout = sm90::Layout<kBlockN, kKeepFilter>;
  using Params = sm90::Params<kDirection>;
  static constexpr int kThreads = sm90::kThreads;
  static constexpr uint32_t kSharedBytes = Layout::kBytes;
  static_assert(kSharedBytes <= 227 * 1024, "more shared memory than a Hopper block can have");
  static_assert(sizeof(Params) <= 4096, "parameters of a kernel have 4 KB");

  static WF_DEVICE void run(const Params& params) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
    gemm<T, Layout, kDirection>(params);
#endif
  }
};

// launch() of launch.h, for clusters; within a DeviceGuard.
#if defined(__CUDACC__)
template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, 1)
    cluster_entry(const __grid_constant__ typename Kernel::Params params) {
  Kernel::run(params);
}

template <class Kernel>
void launch_clusters(const typename Kernel::Params& params, int clusters, Place place) {
  check(cudaFuncSetAttribute(cluster_entry<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(Kernel::kSharedBytes)),
        "cudaFuncSetAttribute");
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {kCluster, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(clusters * kCluster);
  config.blockDim = dim3(Kernel::kThreads);
  config.dynamicSmemBytes = Kernel::kSharedBytes;
  config.stream = reinterpret_cast<cudaStream_t>(place.stream);
  config.attrs = &cluster;
  config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, cluster_entry<Kernel>, params), "kernel launch");
}
#else
template <class Kernel>
void launch_clusters(const typename Kernel::Params& params, int clusters, Place) {
  emulation::device().run(clusters, Kernel::kThreads * kCluster, Kernel::kSharedBytes * kCluster,
                          false, [&] { Kernel::run(params); });
}
#endif

struct SumKernel {
  using Params = SumParams;
  static constexpr int kThreads = kSumThreads;
  static constexpr int kMinBlocks = 1;
  static constexpr uint32_t kSharedBytes = 0;
  static constexpr bool kBlockBarriersOnly = true;

  static WF_DEVICE void run(const Params& params) { sum_partials(params); }
};

namespace {

#if defined(__CUDACC__)

TensorMap encode(const TensorMapParameters& p) {
  static const auto encode_tiled =
      driver_function<decltype(&cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled");
  static const auto encode_im2col =
      driver_function<decltype(&cuTensorMapEncodeIm2col)>("cuTensorMapEncodeIm2col");
  const CUtensorMapDataType type =
      p.bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  void* address = const_cast<void*>(p.address);
  TensorMap map;
  CUresult result;
  if (p.im2col) {
    result = encode_im2col(&map, type, p.rank, address, p.size, p.stride + 1, p.lower, p.upper,
                           p.channels, p.pixels, p.element_step, CU_TENSOR_MAP_INTERLEAVE_NONE,
                           CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                           CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  } else {
    result = encode_tiled(&map, type, p.rank, address, p.size, p.stride + 1, p.box, p.element_step,
                          CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                          CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  }
  if (result != CUDA_SUCCESS)
    throw std::runtime_error("the CUDA driver refused a tensor map (error " +
                             std::to_string(static_cast<int>(result)) + ")");
  return map;
}

#else

TensorMap encode(const TensorMapParameters& parameters) {
  if (emulation::device().contexts == 0)
    throw std::runtime_error("a tensor map is encoded on a thread without a context");
  return TensorMap{parameters};
}

#endif

TensorMap checked_map(const TensorMapParameters& parameters) {
  if (const char* reason = refuse_map(parameters)) throw std::invalid_argument(reason);
  return encode(parameters);
}

void require(const char* refusal) {
  if (refusal != nullptr) throw std::invalid_argument(refusal);
}

void require_aligned(const void* pointer, const char* name) {
  if (reinterpret_cast<uintptr_t>(pointer) % 16 != 0)
    throw std::invalid_argument(std::string(name) + " is not 16-byte aligned");
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
      conv.out_channels < 1 || conv.filter_h < 1 || conv.filter_w < 1 || conv.stride_h < 1 ||
      conv.stride_w < 1 || conv.dilation_h < 1 || conv.dilation_w < 1 || conv.pad_h < 0 ||
      conv.pad_w < 0 || conv.out_height() < 1 || conv.out_width() < 1)
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

template <Direction kDirection>
Params<kDirection> make_params(const Problem& problem, const Convolution& conv,
                               const Operands& operands) {
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
  const int box_rows = problem.block_n / kCluster;  // Layout::kFilterRows
  params.b = checked_map(filter_map(operands.filter, operands.bf16, conv.out_channels,
                                    conv.filter_h * conv.filter_w, conv.in_channels, box_rows));
  return params;
}

template <Direction kDirection, class Epilogue>
void launch_gemm(const Problem& problem, const Convolution& conv, const Operands& operands,
                 const Epilogue& epilogue) {
  const DeviceGuard guard(operands.place.device);  // the driver encodes the tensor maps
  Params<kDirection> params = make_params<kDirection>(problem, conv, operands);
  params.epilogue = epilogue;
  const int most = operands.processors > kCluster ? operands.processors / kCluster : 1;
  const int clusters = problem.tile_slots < most ? problem.tile_slots : most;
  const auto run = [&](auto kernel) {
    launch_clusters<decltype(kernel)>(params, clusters, operands.place);
  };
  if (problem.block_n == 128) {
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

const char* refuse_fprop(const Convolution& conv) {
  if (conv.stride_h > 8 || conv.stride_w > 8) return "the stride is above 8";
  if (conv.stride_h < 1 || conv.stride_w < 1) return "the stride is below 1";
  if (const char* reason = refuse_sizes(conv)) return reason;
  return refuse(conv, fprop_problem(conv));
}

const char* refuse_dgrad(const Convolution& conv) {
  if (conv.stride_h < 1 || conv.stride_w < 1) return "the stride is below 1";
  if (conv.stride_h * conv.stride_w > kMostPhases)
    return "the input gradient of strides whose product is above 4 has no Hopper kernel";
  if (const char* reason = refuse_sizes(conv)) return reason;
  return refuse(conv, dgrad_problem(conv));
}

void fprop(const Convolution& conv, const Operands& operands, const ForwardEpilogue& epilogue) {
  require(refuse_fprop(conv));
  if (epilogue.scale == nullptr || epilogue.out == nullptr)
    throw std::invalid_argument("scale and out are needed");
  if (epilogue.table_stride % 4 != 0)
    throw std::invalid_argument("rows of the tables are not 16-byte aligned");
  require_aligned(epilogue.scale, "scale");
  require_aligned(epilogue.shift, "shift");
  require_aligned(epilogue.residual, "residual");
  require_aligned(epilogue.branch, "branch");
  require_aligned(epilogue.out, "out");
  launch_gemm<Direction::kForward>(fprop_problem(conv), conv, operands, epilogue);
}

void dgrad(const Convolution& conv, const Operands& operands, const BackwardEpilogue& epilogue) {
  require(refuse_dgrad(conv));
  const BackwardEpilogue& e = epilogue;
  if (e.scaled_grad != nullptr && e.scale == nullptr)
    throw std::invalid_argument("scaled_grad needs scale");
  if (e.branch == nullptr && (e.partial1 != nullptr || (e.relu && e.activation == nullptr)))
    throw std::invalid_argument("t1 and a ReLU without its output need the branch");
  if (e.table_stride % 4 != 0)
    throw std::invalid_argument("rows of the tables are not 16-byte aligned");
  require_aligned(e.skip, "skip");
  require_aligned(e.branch, "branch");
  require_aligned(e.activation, "activation");
  require_aligned(e.scale, "scale");
  require_aligned(e.shift, "shift");
  require_aligned(e.grad, "grad");
  require_aligned(e.scaled_grad, "scaled_grad");
  launch_gemm<Direction::kBackward>(dgrad_problem(conv), conv, operands, epilogue);
}

int dgrad_partial_rows(const Convolution& conv) {
  require(refuse_dgrad(conv));
  return dgrad_problem(conv).partial_rows;
}

void add_partials(const Convolution& conv, const float* partial0, const float* partial1, float* t0,
                  float* t1, int total_stride, Place place) {
  require(refuse_dgrad(conv));
  const SumParams params{dgrad_problem(conv), partial0, partial1, t0, t1, total_stride};
  const int64_t sums = int64_t{conv.batch} * conv.in_channels;
  launch<SumKernel>(params, (sums + kSumThreads - 1) / kSumThreads, place);
}

}  // namespace wf::sm90
