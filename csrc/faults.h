// What tests leave out on the emulated device, to see that they notice.
#pragma once

namespace wf {

enum class Fault {
  kNone,
  kFullWait,      // a wait for bytes returns at once
  kEmptyWait,     // a wait for arrivals alone does
  kFilterWait,    // a kept filter is not waited for
  kWgmmaWait,     // wgmma_wait waits for nothing
  kWgmmaFence,    // wgmma_fence fences nothing
  kStrideOfA,     // wgmma's descriptor of A has half of its stride
  kStrideOfB,     // that of B
  kLeadingOfB,    // and half of its leading offset
  kSumsBarrier,   // sync_warpgroup waits for nobody
  kPeerArrival,   // arrivals at the other block's barriers go to the own one
  kBarrierFence,  // fence_mbarrier_init fences nothing
  kJointExit,     // a block does not wait for the other one before it ends
};

}  // namespace wf
