// The host's side of CUDA: errors, contexts, tensor maps, launches. csrc/emulation/host.h has the
// same functions for the emulated device.
//
// A kernel is a struct:
//     using Params = ...;                        plain data, passed by value
//     static constexpr int kThreads;
//     static constexpr uint32_t kSharedBytes;    dynamic shared memory
//     WF_DEVICE static void run(const Params& params);
#pragma once

#include <cuda.h>  // types only: no symbol of libcuda is linked
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "convolution.h"
#include "tensor_map.h"

namespace wf {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // an error that is not sticky must not surface in somebody else's call
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Looked up when first needed: nothing links to libcuda, and importing needs no driver.
template <class Function>
Function driver_function(const char* name) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  check(cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &found),
        "cudaGetDriverEntryPointByVersion");
  if (found != cudaDriverEntryPointSuccess)
    throw std::runtime_error(std::string("the CUDA driver has no ") + name +
                             "; it must be 12.0 or newer");
  return reinterpret_cast<Function>(function);
}

// Makes `device` current for a scope, and leaves the thread with a context: launches bind one by
// themselves, the driver's own functions refuse a thread that has none, and the thread on which
// autograd runs a backward may have launched nothing yet.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    changed_ = device != previous_;
    if (changed_ || !has_context()) check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  static bool has_context() {
    static const auto current = driver_function<decltype(&cuCtxGetCurrent)>("cuCtxGetCurrent");
    CUcontext context = nullptr;
    return current(&context) == CUDA_SUCCESS && context != nullptr;
  }

  int previous_ = 0;
  bool changed_ = false;
};

// The tensor map of these parameters; within a DeviceGuard.
inline CUtensorMap encode_tensor_map(const TensorMapParameters& p) {
  static const auto encode_tiled =
      driver_function<decltype(&cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled");
  static const auto encode_im2col =
      driver_function<decltype(&cuTensorMapEncodeIm2col)>("cuTensorMapEncodeIm2col");
  const CUtensorMapDataType type =
      p.bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  void* address = const_cast<void*>(p.address);
  CUtensorMap map;
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

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, 1)
    kernel_entry(const __grid_constant__ typename Kernel::Params params) {
  Kernel::run(params);
}

// Launches `clusters` clusters of `blocks_per_cluster` thread blocks; within a DeviceGuard.
template <class Kernel>
void launch(const typename Kernel::Params& params, int64_t clusters, int blocks_per_cluster,
            Place place) {
  if (clusters == 0) return;
  if (clusters * blocks_per_cluster > INT32_MAX)
    throw std::invalid_argument("more than 2**31 thread blocks");
  check(cudaFuncSetAttribute(kernel_entry<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(Kernel::kSharedBytes)),
        "cudaFuncSetAttribute");
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(blocks_per_cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(clusters * blocks_per_cluster));
  config.blockDim = dim3(Kernel::kThreads);
  config.dynamicSmemBytes = Kernel::kSharedBytes;
  config.stream = reinterpret_cast<cudaStream_t>(place.stream);
  config.attrs = &cluster;
  config.numAttrs = blocks_per_cluster > 1;
  check(cudaLaunchKernelEx(&config, kernel_entry<Kernel>, params), "kernel launch");
}

}  // namespace wf
