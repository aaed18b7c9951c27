// wgmma and setmaxnreg on the emulated device, as the PTX manual has them:
//
// - wgmma reads shared memory through its descriptors (address, offsets, swizzle decoded as by the
//   hardware) at some time between issue and wait; until the wait, its accumulators read as NaN;
// - the warps of a warpgroup must issue the same wgmma in the same order; each warp's part is only
//   done when this warp has waited;
// - setmaxnreg is met by whole warpgroups.
#pragma once

#include <algorithm>
#include <deque>
#include <map>
#include <type_traits>
#include <utility>
#include <vector>

#include "copies.h"

namespace wf {
namespace emulation {

struct Wgmma {
  uint64_t a, b;
  bool bf16, transposed_b, accumulate;
  int columns;
  size_t accumulator;
  bool done;  // executed at its issue; what is left is to show the result at the wait
};

// A warp's share of 64 x N accumulators while wgmma is at work on them.
struct Accumulator {
  float* registers[32];
  int count;
  std::vector<float> value;
  int pending = 0;
};

struct WarpQueue {
  std::map<size_t, Accumulator> accumulators;
  size_t next_accumulator = 0;
  std::vector<Wgmma> open;
  std::deque<std::vector<Wgmma>> groups;
  size_t deferred = 0;  // issued, not executed: wgmma executes in order
  bool fenced = false;
  size_t issued = 0;
};

struct WgmmaState {
  std::map<int, WarpQueue> warps;
  std::map<int, std::vector<std::pair<uint64_t, uint64_t>>> log;  // per warpgroup
};

// The 8 numbers at a 16-byte chunk of a swizzled tile.
inline void read_chunk(uint32_t address, bool bf16, float (&into)[8]) {
  uint16_t bits[8];
  block().shared_read(swizzle_128(address), bits, 16, "wgmma");
  for (int i = 0; i < 8; ++i) into[i] = bf16 ? to_float(Bf16{bits[i]}) : to_float(Fp16{bits[i]});
}

// 16 x `count` numbers of an operand, [k][row], as its descriptor describes them: rows are M or N.
inline void read_operand(uint64_t descriptor, bool transposed, bool bf16, int first, int count,
                         std::vector<float>& into) {
  const uint32_t start = own(static_cast<uint32_t>(descriptor & 0x3FFF) << 4);
  const uint32_t leading = static_cast<uint32_t>(descriptor >> 16 & 0x3FFF) << 4;
  const uint32_t stride = static_cast<uint32_t>(descriptor >> 32 & 0x3FFF) << 4;
  if (descriptor >> 62 != 1) block().fail("wgmma: descriptor has no 128-byte swizzle");
  if (descriptor >> 49 & 7) block().fail("wgmma: descriptor has a base offset");
  // Which the hardware wants where the first row is not the first of a 1024-byte atom.
  if (start >> 7 & 7) block().fail("wgmma: descriptor begins within an atom of the swizzle");
  into.resize(static_cast<size_t>(count) * 16);
  float chunk[8];
  if (transposed) {  // an atom of the swizzle is 8 of K by 64 rows, rows contiguous
    for (uint32_t k = 0; k < 16; ++k)
      for (int row = 0; row < count; row += 8) {
        const uint32_t r = first + row;
        read_chunk(start + r / 64 * leading + r % 64 * 2 + k / 8 * stride + k % 8 * 128, bf16,
                   chunk);
        std::memcpy(&into[k * count + row], chunk, sizeof chunk);
      }
  } else {  // 8 rows by 64 of K, K contiguous
    for (int row = 0; row < count; ++row)
      for (int half = 0; half < 2; ++half) {
        const uint32_t r = first + row;
        read_chunk(start + r / 8 * stride + r % 8 * 128 + half * 16, bf16, chunk);
        for (int i = 0; i < 8; ++i) into[(half * 8 + i) * count + row] = chunk[i];
      }
  }
}

inline void execute(WarpQueue& queue, const Wgmma& op, int warp) {
  Accumulator& acc = queue.accumulators.at(op.accumulator);
  if (!op.done) {
    std::vector<float> a, b, sum(op.columns);
    read_operand(op.a, false, op.bf16, warp % 4 * 16, 16, a);
    read_operand(op.b, op.transposed_b, op.bf16, 0, op.columns, b);
    for (int row = 0; row < 16; ++row) {
      std::fill(sum.begin(), sum.end(), 0.0f);
      for (int k = 0; k < 16; ++k)
        for (int column = 0; column < op.columns; ++column)
          sum[column] += a[k * 16 + row] * b[k * op.columns + column];
      for (int column = 0; column < op.columns; ++column) {
        const int lane = row % 8 * 4 + column % 8 / 2;
        float& d = acc.value[lane * acc.count + column / 8 * 4 + row / 8 * 2 + column % 2];
        d = (op.accumulate ? d : 0.0f) + sum[column];
      }
    }
  }
  if (--acc.pending == 0) {
    for (int lane = 0; lane < 32; ++lane)
      std::memcpy(acc.registers[lane], &acc.value[static_cast<size_t>(lane) * acc.count],
                  sizeof(float) * acc.count);
    queue.accumulators.erase(op.accumulator);
  }
}

}  // namespace emulation

// --- wgmma ---

WF_DEVICE void wgmma_fence() {
  if (is_broken(Fault::kWgmmaFence)) return;
  emulation::meet_warp("wgmma_fence");
  auto& state = emulation::block().extension<emulation::WgmmaState>();
  state.warps[thread_index() / 32].fenced = true;
}

WF_DEVICE void wgmma_commit() {
  auto& queue = emulation::block().extension<emulation::WgmmaState>().warps[thread_index() / 32];
  emulation::meet_warp("wgmma_commit", nullptr, [&](void* const*) {
    queue.groups.push_back(std::move(queue.open));
    queue.open.clear();
  });
}

template <int kPending>
WF_DEVICE void wgmma_wait() {
  if (is_broken(Fault::kWgmmaWait)) return;
  const int warp = thread_index() / 32;
  auto& queue = emulation::block().extension<emulation::WgmmaState>().warps[warp];
  emulation::meet_warp("wgmma_wait", nullptr, [&](void* const*) {
    while (queue.groups.size() > static_cast<size_t>(kPending)) {
      for (const auto& op : queue.groups.front()) {
        emulation::execute(queue, op, warp);
        queue.deferred -= !op.done;
      }
      queue.groups.pop_front();
    }
    if (kPending == 0) queue.fenced = false;
  });
}

template <int kCount>
WF_DEVICE void pin_registers(float (&)[kCount]) {}

template <class T, bool kTransposedB, int kCount>
WF_DEVICE void wgmma(float (&d)[kCount], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(kCount == 32 || kCount == 64 || kCount == 128, "N is 64, 128 or 256");
  constexpr bool kBf16 = std::is_same_v<T, Bf16>;
  if (is_broken(Fault::kStrideOfA)) a -= uint64_t{512 >> 4} << 32;
  if (is_broken(Fault::kStrideOfB)) b -= uint64_t{512 >> 4} << 32;
  if (is_broken(Fault::kLeadingOfB)) b -= uint64_t{4096 >> 4} << 16;
  struct Arguments {
    float* d;
    uint64_t a, b;
    bool accumulate;
  } mine{d, a, b, accumulate};
  emulation::Block& block = emulation::block();
  const int warp = thread_index() / 32;
  emulation::meet_warp("wgmma", &mine, [&](void* const* all) {
    auto& state = block.extension<emulation::WgmmaState>();
    emulation::WarpQueue& queue = state.warps[warp];
    if (!queue.fenced) block.fail("wgmma: no wgmma_fence since the accumulators were touched");
    for (int lane = 0; lane < 32; ++lane) {
      const Arguments& other = *static_cast<Arguments*>(all[lane]);
      if (other.a != a || other.b != b || other.accumulate != accumulate)
        block.fail("wgmma: lanes of a warp pass different descriptors");
    }
    auto& log = state.log[warp / 4];
    if (queue.issued == log.size()) log.push_back({a, b});
    if (log[queue.issued++] != std::make_pair(a, b))
      block.fail("wgmma: warps of a warpgroup pass different descriptors");
    emulation::Accumulator* accumulator = nullptr;
    size_t id = 0;
    for (auto& [key, candidate] : queue.accumulators)
      if (candidate.registers[0] == static_cast<Arguments*>(all[0])->d)
        accumulator = &candidate, id = key;
    if (accumulator == nullptr) {
      id = queue.next_accumulator++;
      accumulator = &queue.accumulators[id];
      accumulator->count = kCount;
      accumulator->value.resize(32 * kCount);
      for (int lane = 0; lane < 32; ++lane) {
        accumulator->registers[lane] = static_cast<Arguments*>(all[lane])->d;
        for (int i = 0; i < kCount; ++i) {
          accumulator->value[lane * kCount + i] = accumulator->registers[lane][i];
          accumulator->registers[lane][i] = float_of_bits(0x7FC00000u);
        }
      }
    }
    ++accumulator->pending;
    emulation::Wgmma op{a, b, kBf16, kTransposedB, accumulate, kCount * 2, id, false};
    const emulation::Completion when = block.launch().completion;
    if (queue.deferred == 0 &&
        (when == emulation::Completion::kEarly ||
         (when == emulation::Completion::kRandom && block.random().below(2) == 0))) {
      ++accumulator->pending;
      emulation::execute(queue, op, warp);
      op.done = true;
    } else {
      ++queue.deferred;
    }
    queue.open.push_back(op);
  });
}

// --- registers ---
//
// Budgets are checked by static assertions (gemm.h) and by ptxas; here, that whole warpgroups come.

namespace emulation {

inline void move_registers(const char* what) {
  auto& meetings = block().extension<std::map<int, Rendezvous>>();  // of warpgroups
  block().meet(meetings[thread_index() / kWarpgroup], what, kWarpgroup,
               thread_index() % kWarpgroup, nullptr, [](void* const*) {});
}

}  // namespace emulation

template <int kRegisters>
WF_DEVICE void take_registers() {
  emulation::move_registers("setmaxnreg.inc");
}
template <int kRegisters>
WF_DEVICE void give_registers() {
  emulation::move_registers("setmaxnreg.dec");
}

}  // namespace wf
