// The Hopper kernels' Python functions; see sm90_bindings.h.
#include "sm90_bindings.h"

#include <string>

#include "sm90_ops.h"

namespace wf::sm90 {
namespace {

namespace py = pybind11;

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

py::object reason(const char* refusal) {
  return refusal == nullptr ? py::object(py::none()) : py::str(refusal);
}

}  // namespace

void bind(py::module_& module) {
  py::class_<Convolution>(module, "Convolution",
                          "Sizes of a convolution: batch, height, width, in_channels, out_channels, "
                          "then filter, stride, pad and dilation, each as (height, width).")
      .def(py::init([](int batch, int height, int width, int in_channels, int out_channels,
                       std::pair<int, int> filter, std::pair<int, int> stride,
                       std::pair<int, int> pad, std::pair<int, int> dilation) {
             return Convolution{batch,         height,        width,       in_channels,
                                out_channels,  filter.first,  filter.second, stride.first,
                                stride.second, pad.first,     pad.second,  dilation.first,
                                dilation.second};
           }),
           py::arg("batch"), py::arg("height"), py::arg("width"), py::arg("in_channels"),
           py::arg("out_channels"), py::arg("filter") = std::pair(1, 1),
           py::arg("stride") = std::pair(1, 1), py::arg("pad") = std::pair(0, 0),
           py::arg("dilation") = std::pair(1, 1))
      .def_property_readonly("out_height", &Convolution::out_height)
      .def_property_readonly("out_width", &Convolution::out_width);

  module.def("refuse_fprop", [](const Convolution& conv) { return reason(refuse_fprop(conv)); },
             "Why the forward kernel cannot run this, or None.");
  module.def("refuse_dgrad", [](const Convolution& conv) { return reason(refuse_dgrad(conv)); },
             "Why the input-gradient kernel cannot run this, or None.");
  module.def("partial_rows", &dgrad_partial_rows,
             "Rows of the fp32 partial sums [rows, in_channels] that dgrad writes.");

  module.def(
      "fprop",
      [](const Convolution& conv, uintptr_t x, uintptr_t filter, uintptr_t scale, uintptr_t shift,
         uintptr_t residual, uintptr_t branch, uintptr_t out, int table_stride, bool relu, bool bf16,
         int processors, int device, uintptr_t stream) {
        const Operands operands{pointer<void>(x), pointer<void>(filter), bf16, processors,
                                Place{device, stream}};
        fprop(conv, operands,
              ForwardEpilogue{pointer<float>(scale), pointer<float>(shift), pointer<void>(residual),
                              pointer<void>(branch), pointer<void>(out), table_stride, relu});
      },
      "out = act(scale * conv(x, filter) + shift + residual); pointers as integers, 0: absent.",
      py::kw_only(), py::arg("conv"), py::arg("x"), py::arg("filter"), py::arg("scale"),
      py::arg("shift") = 0, py::arg("residual") = 0, py::arg("branch") = 0, py::arg("out"),
      py::arg("table_stride"), py::arg("relu") = false, py::arg("bf16"), py::arg("processors"),
      py::arg("device") = 0, py::arg("stream") = 0);

  module.def(
      "dgrad",
      [](const Convolution& conv, uintptr_t scaled_grad_above, uintptr_t filter, uintptr_t skip,
         uintptr_t branch, uintptr_t activation, uintptr_t scale, uintptr_t shift, uintptr_t grad,
         uintptr_t scaled_grad, uintptr_t partial0, uintptr_t partial1, int table_stride, bool relu,
         bool bf16, int processors, int device, uintptr_t stream) {
        const Operands operands{pointer<void>(scaled_grad_above), pointer<void>(filter), bf16,
                                processors, Place{device, stream}};
        dgrad(conv, operands,
              BackwardEpilogue{pointer<void>(skip), pointer<void>(branch), pointer<void>(activation),
                               pointer<float>(scale), pointer<float>(shift), pointer<void>(grad),
                               pointer<void>(scaled_grad), pointer<float>(partial0),
                               pointer<float>(partial1), table_stride, 1, relu});
      },
      "g = (dx + skip) * act' of the layer below, its scale * g and partial column sums.",
      py::kw_only(), py::arg("conv"), py::arg("above"), py::arg("filter"), py::arg("skip") = 0,
      py::arg("branch") = 0, py::arg("activation") = 0, py::arg("scale") = 0, py::arg("shift") = 0,
      py::arg("grad") = 0, py::arg("scaled_grad") = 0, py::arg("partial0") = 0,
      py::arg("partial1") = 0, py::arg("table_stride") = 0, py::arg("relu") = false,
      py::arg("bf16"), py::arg("processors"), py::arg("device") = 0, py::arg("stream") = 0);

  module.def(
      "add_partials",
      [](const Convolution& conv, uintptr_t partial0, uintptr_t partial1, uintptr_t t0,
         uintptr_t t1, int total_stride, int device, uintptr_t stream) {
        add_partials(conv, pointer<float>(partial0), pointer<float>(partial1), pointer<float>(t0),
                     pointer<float>(t1), total_stride, Place{device, stream});
      },
      "t0 and t1 [batch, in_channels] from the partial sums of dgrad.", py::kw_only(),
      py::arg("conv"), py::arg("partial0") = 0, py::arg("partial1") = 0, py::arg("t0") = 0,
      py::arg("t1") = 0, py::arg("total_stride"), py::arg("device") = 0, py::arg("stream") = 0);
}

}  // namespace wf::sm90
