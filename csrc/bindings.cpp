// wfnet._C: kernels by address, size and stream; the Python side owns all memory. An address of 0
// is no tensor. The same file makes the emulated module of the tests.
#include "bindings.h"

#include <stdexcept>
#include <string>

#include "convolution.h"

namespace wf {
namespace {

namespace py = pybind11;
using Address = uintptr_t;

template <class T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// height, width: (input, output, kernel, stride, padding, dilation).
Convolution convolution_of(int batch, int in_channels, int out_channels, const py::tuple& height,
                           const py::tuple& width) {
  if (height.size() != 6 || width.size() != 6) throw std::invalid_argument("an axis has 6 numbers");
  const auto h = [&](int i) { return height[i].cast<int>(); };
  const auto w = [&](int i) { return width[i].cast<int>(); };
  if (h(3) < 1 || w(3) < 1) throw std::invalid_argument("strides must be positive");
  const Convolution conv{batch, h(0), w(0), in_channels, out_channels, h(2), w(2),
                         h(3),  w(3), h(4), w(4),        h(5),         w(5)};
  if (conv.out_height() != h(1) || conv.out_width() != w(1))
    throw std::invalid_argument("the output is " + std::to_string(conv.out_height()) + " x " +
                                std::to_string(conv.out_width()) + ", not " + std::to_string(h(1)) +
                                " x " + std::to_string(w(1)));
  return conv;
}

bool is_bf16(const std::string& dtype) {
  if (dtype != "bfloat16" && dtype != "float16")
    throw std::invalid_argument("the CUDA kernels take bfloat16 and float16, not " + dtype);
  return dtype == "bfloat16";
}

void bound_fprop(int batch, int in_channels, int out_channels, const py::tuple& height,
                 const py::tuple& width, Address x, Address weight, Address scale, Address shift,
                 int table_stride, Address residual, Address branch, Address out, bool relu,
                 const std::string& dtype, int processors, int device, Address stream) {
  const Operands operands{pointer(x), pointer(weight), is_bf16(dtype), processors,
                          Place{device, stream}};
  fprop(convolution_of(batch, in_channels, out_channels, height, width), operands,
        ForwardEpilogue{pointer<float>(scale), pointer<float>(shift), pointer(residual),
                        pointer(branch), pointer(out), table_stride, relu});
}

void bound_dgrad(int batch, int in_channels, int out_channels, const py::tuple& height,
                 const py::tuple& width, Address ag, Address weight, Address skip, Address branch,
                 Address activation, Address scale, Address shift, int table_stride, bool relu,
                 Address grad, Address scaled_grad, Address partial0, Address partial1, Address t0,
                 Address t1, int total_stride, const std::string& dtype, int processors, int device,
                 Address stream) {
  const Operands operands{pointer(ag), pointer(weight), is_bf16(dtype), processors,
                          Place{device, stream}};
  BackwardEpilogue e;
  e.skip = pointer(skip);
  e.branch = pointer(branch);
  e.activation = pointer(activation);
  e.scale = pointer<float>(scale);
  e.shift = pointer<float>(shift);
  e.grad = pointer(grad);
  e.scaled_grad = pointer(scaled_grad);
  e.partial0 = pointer<float>(partial0);
  e.partial1 = pointer<float>(partial1);
  e.table_stride = table_stride;
  e.relu = relu;
  dgrad(convolution_of(batch, in_channels, out_channels, height, width), operands, e,
        ColumnSums{pointer<float>(t0), pointer<float>(t1), total_stride});
}

// A function of the sizes of a convolution alone.
template <class Function>
auto of_sizes(Function function) {
  return [function](int batch, int in_channels, int out_channels, const py::tuple& height,
                    const py::tuple& width) {
    return function(convolution_of(batch, in_channels, out_channels, height, width));
  };
}

}  // namespace

void bind_kernels(py::module_& module) {
  using py::arg;
  module.def("refuse_fprop", of_sizes(&refuse_fprop), py::kw_only(), arg("batch"),
             arg("in_channels"), arg("out_channels"), arg("height"), arg("width"),
             "Why the forward kernel cannot run this, or None.");
  module.def("refuse_dgrad", of_sizes(&refuse_dgrad), py::kw_only(), arg("batch"),
             arg("in_channels"), arg("out_channels"), arg("height"), arg("width"),
             "Why the input-gradient kernel cannot run this, or None.");
  module.def("dgrad_slots", of_sizes(&dgrad_partial_rows), py::kw_only(), arg("batch"),
             arg("in_channels"), arg("out_channels"), arg("height"), arg("width"),
             "Rows of the workspaces partial0 and partial1, [rows, in_channels] fp32.");
  module.def("fprop", &bound_fprop, py::kw_only(), arg("batch"), arg("in_channels"),
             arg("out_channels"), arg("height"), arg("width"), arg("x"), arg("weight"),
             arg("scale"), arg("shift"), arg("table_stride"), arg("residual"), arg("branch"),
             arg("out"), arg("relu"), arg("dtype"), arg("processors"), arg("device"), arg("stream"),
             "out = act(scale * conv(x, weight) + shift + residual).");
  module.def("dgrad", &bound_dgrad, py::kw_only(), arg("batch"), arg("in_channels"),
             arg("out_channels"), arg("height"), arg("width"), arg("ag"), arg("weight"),
             arg("skip"), arg("branch"), arg("activation"), arg("scale"), arg("shift"),
             arg("table_stride"), arg("relu"), arg("grad"), arg("scaled_grad"), arg("partial0"),
             arg("partial1"), arg("t0"), arg("t1"), arg("total_stride"), arg("dtype"),
             arg("processors"), arg("device"), arg("stream"),
             "g = (dx + skip) * act' of the layer below, scale * g, and both column sums.");
}

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
