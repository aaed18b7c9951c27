// wfnet._C: kernels by address, size and stream. The Python side owns all memory.
//
// Tensor arguments are addresses (0: none). The same file makes the emulated module of the tests,
// which has, beyond this, the controls at its end.
#include <pybind11/pybind11.h>

#include <string>

#include "conv.h"
#include "epilogue_bwd.h"
#include "gate.h"
#include "sm90_bindings.h"

namespace py = pybind11;
using Address = uintptr_t;

namespace {

template <class T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

wf::Type type_of(const std::string& name) {
  if (name == "bfloat16") return wf::Type::kBf16;
  if (name == "float16") return wf::Type::kFp16;
  throw std::invalid_argument("the CUDA kernels take bfloat16 and float16, not " + name);
}

// (input, output, kernel, stride, padding, dilation)
wf::Axis axis_of(const py::tuple& t) {
  if (t.size() != 6) throw std::invalid_argument("an axis has 6 numbers");
  return {t[0].cast<int>(), t[1].cast<int>(), t[2].cast<int>(),
          t[3].cast<int>(), t[4].cast<int>(), t[5].cast<int>()};
}

void conv_fprop(Address x, Address weight, int batch, Address order, Address first_of, int samples,
                int in_channels, int out_channels, const py::tuple& height,
                const py::tuple& width, Address scale,
                Address shift, int table_stride, Address residual, Address branch, Address out,
                bool relu, const std::string& dtype, int device, Address stream) {
  wf::ConvParams p;
  p.input = pointer(x), p.filter = pointer(weight);
  p.batch = batch, p.depth = in_channels, p.columns = out_channels;
  p.order = pointer<int64_t>(order), p.first_of = pointer<int64_t>(first_of), p.samples = samples;
  p.height = axis_of(height), p.width = axis_of(width);
  p.forward = {pointer<float>(scale), pointer<float>(shift), pointer(residual), pointer(branch),
               pointer(out),          table_stride,          relu};
  wf::launch_conv_fprop(p, type_of(dtype), {device, stream});
}

// Partial sums and totals come together, per sum.
void conv_dgrad(Address ag, Address weight, int batch, int in_channels, int out_channels,
                const py::tuple& height, const py::tuple& width, Address skip, Address branch,
                Address activation, Address scale, Address shift, int table_stride, bool relu,
                Address grad, Address scaled_grad, Address partial0, Address partial1, Address t0,
                Address t1, int total_stride, const std::string& dtype, int device,
                Address stream) {
  if ((partial0 == 0) != (t0 == 0) || (partial1 == 0) != (t1 == 0))
    throw std::invalid_argument("a column sum needs its partial sums as workspace");
  wf::ConvParams p;
  p.input = pointer(ag), p.filter = pointer(weight);
  p.samples = p.batch = batch, p.depth = out_channels, p.columns = in_channels;
  p.height = axis_of(height), p.width = axis_of(width);
  wf::BackwardEpilogue& e = p.backward;
  e.skip = pointer(skip), e.branch = pointer(branch), e.activation = pointer(activation);
  e.scale = pointer<float>(scale), e.shift = pointer<float>(shift), e.table_stride = table_stride;
  e.relu = relu, e.grad = pointer(grad), e.scaled_grad = pointer(scaled_grad);
  e.partial0 = pointer<float>(partial0), e.partial1 = pointer<float>(partial1);
  wf::launch_conv_dgrad(p, type_of(dtype), {device, stream});
  if (t0 != 0 || t1 != 0)
    wf::launch_conv_dgrad_sums(p, pointer<float>(t0), pointer<float>(t1), total_stride,
                               {device, stream});
}

int64_t conv_dgrad_slots(int batch, int in_channels, const py::tuple& height,
                         const py::tuple& width) {
  wf::ConvParams p;
  p.batch = batch, p.columns = in_channels;
  p.height = axis_of(height), p.width = axis_of(width);
  return wf::conv_dgrad_slots(p);
}

void max_pool(Address x, Address out, Address positions, int batch, int columns,
              const py::tuple& height, const py::tuple& width, const std::string& dtype, int device,
              Address stream) {
  wf::MaxPoolParams p;
  p.x = pointer(x), p.out = pointer(out), p.positions = pointer<uint8_t>(positions);
  p.batch = batch, p.columns = columns;
  p.height = axis_of(height), p.width = axis_of(width);
  wf::launch_max_pool(p, type_of(dtype), {device, stream});
}

// With positions, dout is that of a pooling over (height, width).
void epilogue_bwd(Address dout, Address positions, const py::object& height,
                  const py::object& width, int64_t sample_stride, int64_t pixel_stride, int batch,
                  int pixels, int columns, Address skip, Address branch, Address activation, Address scale,
                  Address shift, int table_stride, bool relu, Address grad, Address scaled_grad,
                  Address partial0, Address partial1, Address t0, Address t1, int total_stride,
                  const std::string& dtype, int device, Address stream) {
  if ((partial0 == 0) != (t0 == 0) || (partial1 == 0) != (t1 == 0))
    throw std::invalid_argument("a column sum needs its partial sums as workspace");
  wf::EpilogueBackwardParams p;
  p.dout = pointer(dout), p.sample_stride = sample_stride, p.pixel_stride = pixel_stride;
  p.batch = batch, p.pixels = pixels, p.columns = columns;
  if (positions != 0)
    p.pooled = {pointer<uint8_t>(positions), axis_of(py::tuple(height)), axis_of(py::tuple(width))};
  wf::BackwardEpilogue& e = p.epilogue;
  e.skip = pointer(skip), e.branch = pointer(branch), e.activation = pointer(activation);
  e.scale = pointer<float>(scale), e.shift = pointer<float>(shift), e.table_stride = table_stride;
  e.relu = relu, e.grad = pointer(grad), e.scaled_grad = pointer(scaled_grad);
  e.partial0 = pointer<float>(partial0), e.partial1 = pointer<float>(partial1);
  wf::launch_epilogue_bwd(p, type_of(dtype), {device, stream});
  if (t0 != 0 || t1 != 0)
    wf::launch_epilogue_bwd_sums(p, pointer<float>(t0), pointer<float>(t1), total_stride,
                                 {device, stream});
}

void sum_by_source(Address dout, Address scale, int table_stride, Address order, Address first_of,
                   Address scaled, int images, int pixels, int columns, const std::string& dtype,
                   int device, Address stream) {
  wf::launch_sum_by_source({pointer(dout), pointer<float>(scale), pointer<int64_t>(order),
                            pointer<int64_t>(first_of), pointer(scaled), images, pixels, columns,
                            table_stride},
                           type_of(dtype), {device, stream});
}

void gate_rows(Address alpha, Address forget, float gate_scale, Address scales, Address factor,
               Address rows, int batch, int labels, int classes, int columns, int alpha_stride,
               int row_stride, int device, Address stream) {
  wf::launch_gate_rows({pointer<float>(alpha), pointer<int64_t>(forget), gate_scale,
                        pointer<float>(scales), pointer<float>(factor), pointer<float>(rows), batch,
                        labels, classes, columns, alpha_stride, row_stride},
                       {device, stream});
}

void gate_rows_bwd(Address t, Address products, Address chosen, Address alpha, Address forget,
                   Address dalpha, int batch, int labels, int classes, int columns,
                   int alpha_stride, int row_stride, int gradient_stride, int device,
                   Address stream) {
  wf::launch_gate_rows_bwd({pointer<float>(t), pointer<float>(products), pointer<float>(chosen),
                            pointer<float>(alpha), pointer<int64_t>(forget), pointer<float>(dalpha),
                            batch, labels, classes, columns, alpha_stride, row_stride,
                            gradient_stride},
                           {device, stream});
}

}  // namespace

#define WF_TEXT_OF(token) #token
#define WF_TEXT(macro) WF_TEXT_OF(macro)
#if !defined(WF_MODULE)
#define WF_MODULE _C
#endif

PYBIND11_MODULE(WF_MODULE, module) {
  module.doc() = "Compiled kernels of wfnet; see wfnet/backends/cuda.py.";
  using py::arg;
  module.def("conv_fprop", &conv_fprop, py::kw_only(), arg("x"), arg("weight"), arg("batch"),
             arg("order"), arg("first_of"), arg("samples"), arg("in_channels"),
             arg("out_channels"), arg("height"), arg("width"), arg("scale"), arg("shift"),
             arg("table_stride"), arg("residual"),
             arg("branch"), arg("out"), arg("relu"), arg("dtype"), arg("device"), arg("stream"));
  module.def("conv_dgrad", &conv_dgrad, py::kw_only(), arg("ag"), arg("weight"), arg("batch"),
             arg("in_channels"), arg("out_channels"), arg("height"), arg("width"), arg("skip"),
             arg("branch"), arg("activation"), arg("scale"), arg("shift"), arg("table_stride"),
             arg("relu"), arg("grad"), arg("scaled_grad"), arg("partial0"), arg("partial1"),
             arg("t0"), arg("t1"), arg("total_stride"), arg("dtype"), arg("device"),
             arg("stream"));
  module.def("conv_dgrad_slots", &conv_dgrad_slots, py::kw_only(), arg("batch"),
             arg("in_channels"), arg("height"), arg("width"));
  module.def("narrow_tiles", &wf::narrow_tiles, arg("columns"));
  module.def("max_pool", &max_pool, py::kw_only(), arg("x"), arg("out"), arg("positions"),
             arg("batch"), arg("columns"), arg("height"), arg("width"), arg("dtype"),
             arg("device"), arg("stream"));
  module.def("epilogue_bwd", &epilogue_bwd, py::kw_only(), arg("dout"), arg("positions"),
             arg("height"), arg("width"), arg("sample_stride"),
             arg("pixel_stride"), arg("batch"), arg("pixels"), arg("columns"), arg("skip"),
             arg("branch"), arg("activation"), arg("scale"), arg("shift"), arg("table_stride"),
             arg("relu"), arg("grad"), arg("scaled_grad"), arg("partial0"), arg("partial1"),
             arg("t0"), arg("t1"), arg("total_stride"), arg("dtype"), arg("device"),
             arg("stream"));
  module.def("epilogue_bwd_slots", &wf::epilogue_bwd_slots, py::kw_only(), arg("batch"),
             arg("pixels"));
  module.def("sum_by_source", &sum_by_source, py::kw_only(), arg("dout"), arg("scale"),
             arg("table_stride"), arg("order"), arg("first_of"), arg("scaled"), arg("images"),
             arg("pixels"), arg("columns"), arg("dtype"), arg("device"), arg("stream"));
  module.def("gate_rows", &gate_rows, py::kw_only(), arg("alpha"), arg("forget"),
             arg("gate_scale"), arg("scales"), arg("factor"), arg("rows"), arg("batch"),
             arg("labels"), arg("classes"), arg("columns"), arg("alpha_stride"),
             arg("row_stride"), arg("device"), arg("stream"));
  module.def("gate_rows_bwd", &gate_rows_bwd, py::kw_only(), arg("t"), arg("products"),
             arg("chosen"), arg("alpha"), arg("forget"), arg("dalpha"), arg("batch"),
             arg("labels"), arg("classes"), arg("columns"), arg("alpha_stride"),
             arg("row_stride"), arg("gradient_stride"), arg("device"), arg("stream"));
  py::module_ sm90 = module.def_submodule("sm90", "Hopper kernels (sm_90a).");
  wf::sm90::bind(sm90);
#if !defined(WF_EMULATED)
  module.attr("emulated") = false;
  module.attr("archs") = WF_ARCHS;  // targets of this build, "8.0 9.0a 10.0"
  module.attr("sources") = WF_TEXT(WF_SOURCES);  // build.sources_digest() of csrc/build.py
#else
  module.attr("emulated") = true;
  module.def("register_memory", [](Address address, size_t bytes, bool writable, std::string name) {
    wf::emulation::device().memory.add(address, bytes, writable, std::move(name));
  });
  module.def("clear_memory", [] { wf::emulation::device().memory.clear(); });
  module.def("set_schedule", [](uint64_t seed, int completion, bool count_conflicts) {
    wf::emulation::Device& device = wf::emulation::device();
    device.seed = seed, device.count_conflicts = count_conflicts;
    device.completion = static_cast<wf::emulation::Completion>(completion);
    device.conflicts = {};
  });
  module.def("conflicts", [] {
    const wf::emulation::Conflicts& conflicts = wf::emulation::device().conflicts;
    return std::make_pair(conflicts.ideal, conflicts.passes);
  });
#endif
}
