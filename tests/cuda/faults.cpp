// Small kernels with one fault each: the emulation must name it. Run by tests/test_cuda_emulated.py.
#include <pybind11/pybind11.h>

#include "launch.h"

namespace {

struct FaultParams {
  const uint32_t* input;  // [128]
  uint32_t* output;       // [128]
};

struct Faulty {
  using Params = FaultParams;
  static constexpr int kThreads = 64, kMinBlocks = 1;
  static constexpr uint32_t kSharedBytes = 1024;
  static constexpr bool kBlockBarriersOnly = true;
};

// Thread i passes its number to thread 63 - i, which writes it; correct with all its barriers.
template <bool kBarrier>
struct Exchange : Faulty {
  WF_DEVICE static void run(const Params& params) {
    const int thread = wf::thread_index();
    wf::store_shared<uint32_t>(wf::shared_base() + 4 * thread,
                               wf::load_global<uint32_t>(params.input + thread));
    if (kBarrier) wf::sync_block();
    wf::store_global(params.output + thread,
                     wf::load_shared<uint32_t>(wf::shared_base() + 4 * (63 - thread)));
  }
};

template <bool kWait>
struct Copy : Faulty {
  WF_DEVICE static void run(const Params& params) {
    const int thread = wf::thread_index();
    if (thread < 32) {
      wf::cp_async_16(wf::shared_base() + 16 * thread, params.input + 4 * thread, thread != 7);
      wf::cp_async_commit();
      if (kWait) wf::cp_async_wait<0>();
    }
    wf::sync_block();
    wf::store_global(params.output + thread,
                     wf::load_shared<uint32_t>(wf::shared_base() + 4 * thread));
    if (thread < 32 && !kWait) wf::cp_async_wait<0>();
  }
};

struct ReadsOutside : Faulty {
  WF_DEVICE static void run(const Params& params) {
    wf::store_global(params.output + wf::thread_index(),
                     wf::load_global<uint32_t>(params.input + 128 + wf::thread_index()));
  }
};

struct WritesInput : Faulty {
  WF_DEVICE static void run(const Params& params) {
    wf::store_global(const_cast<uint32_t*>(params.input) + wf::thread_index(), 0u);
  }
};

struct WritesTwice : Faulty {
  WF_DEVICE static void run(const Params& params) {
    wf::store_global(params.output + wf::thread_index() % 63, 0u);
  }
};

struct SharedOutside : Faulty {
  WF_DEVICE static void run(const Params&) {
    wf::store_shared<uint32_t>(wf::shared_base() + 16 * (wf::thread_index() + 1), 0u);
  }
};

struct Misaligned : Faulty {
  WF_DEVICE static void run(const Params& params) {
    wf::load_global<wf::Vec16>(params.input + 1);
  }
};

struct Deadlock : Faulty {
  WF_DEVICE static void run(const Params&) {
    if (wf::thread_index() < 32) wf::sync_block();
  }
};

struct Diverged : Faulty {
  WF_DEVICE static void run(const Params&) {
    if (wf::thread_index() % 32 == 3)
      wf::shuffle_xor(1.0f, 1);
    else
      wf::sync_warp();
  }
};

// Never written shared memory is NaN.
struct Uninitialised : Faulty {
  WF_DEVICE static void run(const Params& params) {
    wf::store_global(params.output + wf::thread_index(),
                     wf::load_shared<uint32_t>(wf::shared_base() + 4 * wf::thread_index()));
  }
};

struct Conflicting : Faulty {
  WF_DEVICE static void run(const Params&) {
    if (wf::thread_index() < 8)
      wf::store_shared<uint32_t>(wf::shared_base() + 128 * wf::thread_index(), 0u);
  }
};

}  // namespace

PYBIND11_MODULE(faults, module) {
  module.def("run", [](const std::string& name, uintptr_t input, uintptr_t output, uint64_t seed,
                       int completion) {
    wf::emulation::Device& device = wf::emulation::device();
    device.memory.clear();
    device.memory.add(input, 512, false, "input");
    device.memory.add(output, 512, true, "output");
    device.seed = seed;
    device.completion = static_cast<wf::emulation::Completion>(completion);
    device.count_conflicts = true;
    device.conflicts = {};
    const FaultParams params{reinterpret_cast<const uint32_t*>(input),
                             reinterpret_cast<uint32_t*>(output)};
    const auto launch = [&](auto kernel) { wf::launch<decltype(kernel)>(params, 1, {}); };
    if (name == "exchange") launch(Exchange<true>{});
    if (name == "missing barrier") launch(Exchange<false>{});
    if (name == "copy") launch(Copy<true>{});
    if (name == "missing wait") launch(Copy<false>{});
    if (name == "reads outside") launch(ReadsOutside{});
    if (name == "writes input") launch(WritesInput{});
    if (name == "writes twice") launch(WritesTwice{});
    if (name == "shared outside") launch(SharedOutside{});
    if (name == "misaligned") launch(Misaligned{});
    if (name == "deadlock") launch(Deadlock{});
    if (name == "diverged") launch(Diverged{});
    if (name == "uninitialised") launch(Uninitialised{});
    if (name == "conflicting") launch(Conflicting{});
    return std::make_pair(device.conflicts.ideal, device.conflicts.passes);
  });
}
