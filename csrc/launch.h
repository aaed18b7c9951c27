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

// Makes `device` current for a scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    if (device != previous_) check(cudaSetDevice(device), "cudaSetDevice");
    changed_ = device != previous_;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
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

template <class Kernel>
void launch(const typename Kernel::Params& params, int64_t grid, Place) {
  emulation::device().run(static_cast<uint32_t>(grid), Kernel::kThreads, Kernel::kSharedBytes,
                          Kernel::kBlockBarriersOnly, [&] { Kernel::run(params); });
}

#endif

}  // namespace wf
