// One way to start a kernel, on a device and in the emulation.
//
// A kernel is a struct:
//     using Params = ...;                     plain data, passed by value
//     static constexpr int kThreads, kMinBlocks;             blocks per multiprocessor to aim for
//     static constexpr uint32_t kSharedBytes;                dynamic shared memory
//     static constexpr bool kBlockBarriersOnly;              the emulation may check for races
//     WF_DEVICE static void run(const Params& params);
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "device.h"

#if defined(__CUDACC__)
#include <cuda.h>  // types only: no symbol of libcuda is linked
#endif

namespace wf {

// Where a launch goes: CUDA device ordinal and stream, both as PyTorch knows them.
struct Place {
  int device = 0;
  uintptr_t stream = 0;
};

#if defined(__CUDACC__)

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

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kMinBlocks)
    kernel_entry(const __grid_constant__ typename Kernel::Params params) {
  Kernel::run(params);
}

template <class Kernel>
void launch(const typename Kernel::Params& params, int64_t grid, Place place) {
  if (grid == 0) return;
  if (grid > INT32_MAX) throw std::invalid_argument("more than 2**31 thread blocks");
  DeviceGuard guard(place.device);
  if constexpr (Kernel::kSharedBytes > 48 * 1024)
    check(cudaFuncSetAttribute(kernel_entry<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(Kernel::kSharedBytes)),
          "cudaFuncSetAttribute");
  kernel_entry<Kernel><<<static_cast<uint32_t>(grid), Kernel::kThreads, Kernel::kSharedBytes,
                         reinterpret_cast<cudaStream_t>(place.stream)>>>(params);
  check(cudaGetLastError(), "kernel launch");
}

#else

// What a thread may ask of the driver, it may ask within such a scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int) { ++emulation::device().contexts; }
  ~DeviceGuard() { --emulation::device().contexts; }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
};

template <class Kernel>
void launch(const typename Kernel::Params& params, int64_t grid, Place) {
  emulation::device().run(static_cast<uint32_t>(grid), Kernel::kThreads, Kernel::kSharedBytes,
                          Kernel::kBlockBarriersOnly, [&] { Kernel::run(params); });
}

#endif

}  // namespace wf
