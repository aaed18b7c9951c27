// Index arithmetic of csrc/geometry.h for tests/test_cuda_host.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>
#include <vector>

#include "conv.h"
#include "device.h"
#include "geometry.h"
#include "implicit_gemm.cuh"

namespace py = pybind11;
using AxisTuple = std::tuple<int, int, int, int, int, int>;

static wf::Axis axis(const AxisTuple& t) {
  return {std::get<0>(t), std::get<1>(t), std::get<2>(t),
          std::get<3>(t), std::get<4>(t), std::get<5>(t)};
}

static py::tuple listed(const wf::Taps& t) {
  return py::make_tuple(t.first, t.step, t.count, t.offset, t.offset_step);
}

PYBIND11_MODULE(geometry, module) {
  module.def("divide", [](uint32_t divisor, const std::vector<uint32_t>& numbers) {
    const wf::Divider divider(divisor);
    std::vector<uint32_t> quotients;
    for (uint32_t n : numbers) quotients.push_back(divider(n));
    return quotients;
  });
  module.def("expected_output", [](const AxisTuple& t) { return axis(t).expected_output(); });
  module.def("forward_taps", [](const AxisTuple& t) { return listed(wf::forward_taps(axis(t))); });
  module.def("gradient_taps",
             [](const AxisTuple& t, int phase) { return listed(wf::gradient_taps(axis(t), phase)); });
  module.def("phase_pixels",
             [](const AxisTuple& t, int phase) { return wf::phase_pixels(axis(t), phase); });
  module.def("phases", [](const AxisTuple& h, const AxisTuple& w, int batch, int rows) {
    std::vector<std::tuple<int, int, int, int, int64_t, int64_t>> found;
    wf::for_each_phase(axis(h), axis(w), batch, rows, [&](const wf::Phase& p, int64_t tiles) {
      found.emplace_back(p.h, p.w, p.rows_h, p.rows_w, p.first_tile, tiles);
      return true;
    });
    return found;
  });
  module.def("row_tiles", [](const AxisTuple& h, const AxisTuple& w, int batch, int rows) {
    return wf::gradient_row_tiles(axis(h), axis(w), batch, rows);
  });
  module.def("span", &wf::strip_span);
  module.def("strips", [](int strip_rows, int pixels, int sample) {
    const wf::StripRange range = wf::strips_of_sample(strip_rows, pixels, sample);
    return std::make_pair(range.first, range.last);
  });
  module.def("slot", &wf::slot_of);
  module.def("narrow_tiles", &wf::narrow_tiles);
  // Threads, blocks that shall share a multiprocessor, shared memory: per tile, as compiled.
  module.def("kernels", [] {
    py::list found;
    const auto add = [&](const char* name, auto kernel) {
      using Kernel = decltype(kernel);
      found.append(py::make_tuple(name, Kernel::kThreads, Kernel::kMinBlocks,
                                  uint32_t{Kernel::kSharedBytes}));
    };
    add("E0ELi128ELi128E", wf::FpropWide<wf::Bf16>{});
    add("E0ELi128ELi64E", wf::FpropNarrow<wf::Bf16>{});
    add("E1ELi128ELi128E", wf::DgradWide<wf::Bf16>{});
    add("E1ELi128ELi64E", wf::DgradNarrow<wf::Bf16>{});
    return found;
  });
  module.def("swizzle_64", &wf::swizzle_64);
  module.def("swizzle_wide", &wf::swizzle_wide);
  module.def("swizzle_staging", &wf::swizzle_staging);
  module.def("round_trip", [](uint32_t bits, bool bf16) {
    const float value = wf::float_of_bits(bits);
    return wf::bits_of_float(bf16 ? wf::to_float(wf::from_float<wf::Bf16>(value))
                                  : wf::to_float(wf::from_float<wf::Fp16>(value)));
  });
}
