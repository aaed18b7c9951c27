// What Python tests look at beside the kernels' results: host-side arithmetic, and misuses that the
// emulated device must name.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <utility>

#include "gemm.h"

namespace py = pybind11;
using namespace wf;

namespace {

struct Memory {
  float* input;   // [32]
  float* output;  // [32]
};

// One fault each, in a cluster of two blocks of a warpgroup: the emulation must name it.
void misuse(const std::string& name, const Memory& memory) {
  const uint32_t barrier = 0;
  if (block_thread() == 0) mbarrier_init(barrier, 1);
  fence_mbarrier_init();
  sync_cluster();
  if (name == "lanes apart at a shuffle") {
    if (thread_index() % 32 == 3) shuffle_xor(1.0f, 1);
    sync_warp();
  }
  if (name == "a warp waits alone" && thread_index() < 32) sync_block();
  if (name == "shared outside") store_shared(16 * (block_thread() + 64), 0.0f);
  if (name == "misaligned") load_constant(memory.input + 1);
  if (name == "reads outside") load_global<float>(memory.input + 32);
  if (name == "writes input") store_global(memory.input + thread_index() % 32, 0.0f);
  if (name == "writes twice") store_global(memory.output + thread_index() % 31, 0.0f);
  if (name == "unwritten is a number" && load_shared(16) == load_shared(16))
    emulation::block().fail("shared memory begins as a number");
  if (name == "arrival at an ended block") {
    if (cluster_rank() == 1) return;
    for (int i = 0; i < 1000; ++i) sync_warp();  // long enough for the other block to end
    if (block_thread() == 0) mbarrier_arrive(barrier, 1);
  }
}

}  // namespace

PYBIND11_MODULE(inspection, module) {
  // Made of a tuple: batch, height, width, channels in and out, and four pairs.
  py::class_<Convolution>(module, "Convolution").def(py::init([](const py::tuple& t) {
    const auto number = [&](int i) { return t[i].cast<int>(); };
    const auto pair = [&](int i) { return t[i].cast<std::pair<int, int>>(); };
    const auto [filter, stride, pad, dilation] = std::array{pair(5), pair(6), pair(7), pair(8)};
    return Convolution{number(0),    number(1),      number(2),      number(3),     number(4),
                       filter.first, filter.second,  stride.first,   stride.second, pad.first,
                       pad.second,   dilation.first, dilation.second};
  }));
  py::implicitly_convertible<py::tuple, Convolution>();

  module.def("as_float", [](uint32_t bits, bool bf16) {
    const float value = float_of_bits(bits);
    return bits_of_float(bf16 ? to_float(from_float<Bf16>(value))
                              : to_float(from_float<Fp16>(value)));
  });

  module.def("misuse", [](const std::string& name) {
    alignas(16) float input[64] = {}, output[64] = {};
    const Memory memory{input, output};
    emulation::Device& device = emulation::device();
    device.memory.clear();
    device.memory.add(reinterpret_cast<uintptr_t>(input), 128, false, "input");
    device.memory.add(reinterpret_cast<uintptr_t>(output), 128, true, "output");
    device.run(1, kCluster * kWarpgroup, kCluster * 1024, [&] { misuse(name, memory); });
  });
  module.def("problem", [](const Convolution& conv, bool backward, int clusters) {
    const Problem problem = problem_of(conv, backward, clusters);
    py::dict fields;
    py::list rows, slices;
    for (int i = 0; i < problem.num_phases; ++i) {
      rows.append(problem.phases[i].rows);
      slices.append(problem.phases[i].slices);
    }
    fields["rows"] = rows;
    fields["slices"] = slices;
    fields["block_n"] = problem.block_n;
    fields["partial_rows"] = problem.partial_rows;
    return fields;
  }, py::arg("conv"), py::arg("backward"), py::arg("clusters") = 0);
  // Slices that every cluster multiplies.
  module.def("work_of", [](const Convolution& conv, bool backward, int clusters) {
    const Problem problem = problem_of(conv, backward);
    std::vector<int> slices(clusters);
    for (int cluster = 0; cluster < clusters; ++cluster)
      for (Work work = next_work(problem, cluster, clusters); work.slot < problem.tile_slots;
           work = next_work(problem, work.slot + clusters, clusters))
        slices[cluster] += problem.phases[work.phase].slices;
    return slices;
  });
  // (sample, pixel) that the last row of a phase writes, and the sample, h, w that it begins at.
  module.def("last_row", [](const Convolution& conv, bool backward, int phase) {
    const Problem problem = problem_of(conv, backward);
    const Phase& p = problem.phases[phase];
    const Row row = row_at(problem, p, p.rows - 1);
    const Base base = base_at(p, p.rows - 1);
    return std::make_tuple(row.sample, row.pixel, base.sample, base.h, base.w);
  });
  // The product of one channel by the geometry's numbers alone: every row of every phase, every tap.
  module.def("convolve", [](const Convolution& conv, bool backward, uintptr_t a, uintptr_t filter,
                            uintptr_t out) {
    const Problem problem = problem_of(conv, backward);
    const double* input = reinterpret_cast<double*>(a);
    const double* taps = reinterpret_cast<double*>(filter);
    double* output = reinterpret_cast<double*>(out);
    for (int i = 0; i < problem.num_phases; ++i) {
      const Phase& phase = problem.phases[i];
      for (int m = 0; m < phase.rows; ++m) {
        const Base base = base_at(phase, m);
        Slice slice(problem, phase);
        double sum = 0.0;
        for (int k = 0; k < phase.slices; ++k, slice.advance()) {
          const int h = base.h + slice.offset_h, w = base.w + slice.offset_w;
          if (slice.channel != 0 || h < 0 || w < 0 || h >= problem.a_height || w >= problem.a_width)
            continue;
          const int row = base.sample * problem.a_height + h;
          sum += input[row * problem.a_width + w] * taps[slice.tap];
        }
        output[row_at(problem, phase, m).pixel] += sum;
      }
    }
  });
}
