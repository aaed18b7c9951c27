// wfnet._C: kernels by address, size and stream; the Python side owns all memory. An address of 0
// is no tensor. The same file makes the emulated module of the tests.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "convolution.h"
#if defined(WF_EMULATED)
#include "emulation/machine.h"
#endif

namespace wf {
namespace {

namespace py = pybind11;
// Of batch, in_channels, out_channels and two axes: (input, output, kernel, stride, padding,
// dilation).
Convolution convolution_of(const py::kwargs& given) {
  const auto number = [&](const char* name) { return given[name].cast<int>(); };
  const auto axis = [&](const char* name) { return given[name].cast<std::vector<int>>(); };
  const std::vector<int> h = axis("height"), w = axis("width");
  return Convolution{number("batch"), h[0], w[0], number("in_channels"), number("out_channels"),
                     h[2],            w[2], h[3], w[3],                  h[4],
                     w[4],            h[5], w[5]};
}

template <class T = void>
T* pointer(const py::kwargs& given, const char* name) {
  return reinterpret_cast<T*>(given[name].cast<uintptr_t>());
}

Operands operands_of(const py::kwargs& given, const char* a) {
  const Place place{given["device"].cast<int>(), given["stream"].cast<uintptr_t>()};
  return Operands{pointer(given, a), pointer(given, "weight"), given["bf16"].cast<bool>(),
                  given["processors"].cast<int>(), place};
}

void bound_fprop(const py::kwargs& given) {
  const ForwardEpilogue epilogue{pointer<float>(given, "scale"),    pointer<float>(given, "shift"),
                                 pointer(given, "residual"),        pointer(given, "branch"),
                                 pointer(given, "out"),             given["table_stride"].cast<int>(),
                                 given["relu"].cast<bool>()};
  fprop(convolution_of(given), operands_of(given, "x"), epilogue);
}

void bound_dgrad(const py::kwargs& given) {
  BackwardEpilogue e;
  e.skip = pointer(given, "skip");
  e.branch = pointer(given, "branch");
  e.activation = pointer(given, "activation");
  e.scale = pointer<float>(given, "scale");
  e.shift = pointer<float>(given, "shift");
  e.grad = pointer(given, "grad");
  e.scaled_grad = pointer(given, "scaled_grad");
  e.partial0 = pointer<float>(given, "partial0");
  e.partial1 = pointer<float>(given, "partial1");
  e.table_stride = given["table_stride"].cast<int>();
  e.relu = given["relu"].cast<bool>();
  const ColumnSums sums{pointer<float>(given, "t0"), pointer<float>(given, "t1"),
                        given["total_stride"].cast<int>()};
  dgrad(convolution_of(given), operands_of(given, "ag"), e, sums);
}

#if defined(WF_EMULATED)

// What tests steer the emulated device with.
void bind_emulation(py::module_& module) {
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
      .value("WGMMA_FENCE", Fault::kWgmmaFence)
      .value("STRIDE_OF_A", Fault::kStrideOfA)
      .value("STRIDE_OF_B", Fault::kStrideOfB)
      .value("LEADING_OF_B", Fault::kLeadingOfB)
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

#endif

// Adds the functions that the launchers call, all of them by name.
void bind_kernels(py::module_& module) {
  const auto of_sizes = [&](const char* name, auto function, const char* text) {
    module.def(
        name, [function](const py::kwargs& given) { return function(convolution_of(given)); },
        text);
  };
  of_sizes("refuse_fprop", &refuse_fprop, "Why the forward kernel cannot run this, or None.");
  of_sizes("refuse_dgrad", &refuse_dgrad, "Why the input-gradient kernel cannot, or None.");
  of_sizes("dgrad_slots", &dgrad_partial_rows,
           "Rows of the workspaces partial0 and partial1, [rows, in_channels] fp32.");
  module.def(
      "tile_columns",
      [](bool backward, int processors, const py::kwargs& given) {
        return problem_of(convolution_of(given), backward, clusters_of(processors)).block_n;
      },
      py::arg("backward"), py::arg("processors"), "Columns of a tile: 64, 128 or 256.");
  module.def("fprop", &bound_fprop, "out = act(scale * conv(x, weight) + shift + residual).");
  module.def("dgrad", &bound_dgrad,
             "g = (dx + skip) * act' of the layer below, scale * g, and both column sums.");
}

}  // namespace
}  // namespace wf

#define WF_TEXT_OF(token) #token
#define WF_TEXT(macro) WF_TEXT_OF(macro)
#if !defined(WF_MODULE)
#define WF_MODULE _C
#endif

PYBIND11_MODULE(WF_MODULE, module) {
  module.doc() = "Compiled kernels of wfnet; see wfnet/backends/cuda.py.";
  wf::bind_kernels(module);
#if defined(WF_EMULATED)
  module.attr("emulated") = true;
  wf::bind_emulation(module);
#else
  module.attr("emulated") = false;
  module.attr("sources") = WF_TEXT(WF_SOURCES);  // build.sources_digest() of csrc/build.py
#endif
}
