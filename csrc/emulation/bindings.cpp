// What tests steer the emulated device with.
#include "bindings.h"

#include "machine.h"

namespace wf {

void bind_emulation(pybind11::module_& module) {
  namespace py = pybind11;
  using emulation::Completion;
  using emulation::device;
  py::enum_<Completion>(module, "Completion")
      .value("LATE", Completion::kLate)
      .value("EARLY", Completion::kEarly)
      .value("RANDOM", Completion::kRandom);
  py::enum_<Fault>(module, "Fault")
      .value("NONE", Fault::kNone)
      .value("FULL_WAIT", Fault::kFullWait)
      .value("EMPTY_WAIT", Fault::kEmptyWait)
      .value("FILTER_WAIT", Fault::kFilterWait)
      .value("WGMMA_WAIT", Fault::kWgmmaWait)
      .value("SUMS_BARRIER", Fault::kSumsBarrier)
      .value("PEER_ARRIVAL", Fault::kPeerArrival)
      .value("BARRIER_FENCE", Fault::kBarrierFence)
      .value("JOINT_EXIT", Fault::kJointExit);
  module.def("register_memory",
             [](uintptr_t address, size_t bytes, bool writable, std::string name) {
               device().memory.add(address, bytes, writable, std::move(name));
             });
  module.def("clear_memory", [] { device().memory.clear(); });
  module.def("set_schedule", [](uint64_t seed, Completion completion) {
    device().seed = seed;
    device().completion = completion;
  });
  module.def("leave_out", [](Fault fault) { device().broken = fault; });
}

}  // namespace wf
