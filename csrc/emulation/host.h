// The host's side of the emulated device: the functions of csrc/driver.h.
#pragma once

#include <stdexcept>

#include "convolution.h"
#include "copies.h"

namespace wf {

// What a thread may ask of the driver, it may ask within such a scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int) { ++emulation::device().contexts; }
  ~DeviceGuard() { --emulation::device().contexts; }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
};

inline TensorMap encode_tensor_map(const TensorMapParameters& parameters) {
  if (emulation::device().contexts == 0)
    throw std::runtime_error("a tensor map is encoded on a thread without a context");
  return TensorMap{parameters};
}

// A cluster is one emulated block with the threads and the shared memory of all its blocks.
template <class Kernel>
void launch(const typename Kernel::Params& params, int64_t clusters, int blocks_per_cluster,
            Place) {
  emulation::device().run(static_cast<uint32_t>(clusters), Kernel::kThreads * blocks_per_cluster,
                          Kernel::kSharedBytes * blocks_per_cluster, [&] { Kernel::run(params); });
}

}  // namespace wf
