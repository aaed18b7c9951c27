// mbarriers and TMA on the emulated device, as the PTX manual has them:
//
// - a TMA load fills its box when it lands, at the latest when every thread waits; until then, its
//   bytes of shared memory may not be read or written; then it counts its bytes on its mbarrier;
// - an mbarrier completes a phase when both its arrivals and its bytes are complete; a wait for a
//   parity behaves as the hardware's: a waiter two phases late is let through. It may be used by
//   others once its initialisation was fenced and all blocks of the cluster have met;
// - a block that has ended takes neither arrivals nor copies.
#pragma once

#include <initializer_list>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "instructions.h"
#include "tensor_map.h"

namespace wf {

struct TensorMap {
  TensorMapParameters parameters;
};

namespace emulation {

struct Mbarriers {
  static constexpr int64_t kMostBytes = (1 << 20) - 1;
  struct State {
    int expected = 0;
    int pending = 0;
    int64_t bytes = 0;
    uint32_t phase = 0;
    bool counts_bytes = false;
    bool fenced = false, visible = false;  // the initialisation: to whom has it come through

    // Bytes of the other block's copy may come before this block announces them: then `bytes` is
    // negative, and the arrival that announces them is still pending.
    void settle(Block& block) {
      if (bytes > kMostBytes || bytes < -kMostBytes)
        block.fail("mbarrier: more bytes announced or landed than it can count");
      if (pending > 0 || bytes != 0) return;
      pending = expected;
      ++phase;
    }
  };
  std::map<uint32_t, State> at;

  State& get(uint32_t address, const char* what) {
    auto found = at.find(address);
    if (found == at.end())
      block().fail(std::string(what) + ": no mbarrier was initialised at shared byte " +
                   std::to_string(address));
    if (!found->second.visible)
      block().fail(std::string(what) + ": the mbarrier's initialisation is not visible yet");
    return found->second;
  }
};

inline Mbarriers& mbarriers() { return block().extension<Mbarriers>(); }

// Shared memory of a block whose threads have all ended belongs to nobody, or to another block.
inline void check_alive(int rank, const char* what) {
  if (block().ended(rank * block_threads(), block_threads()))
    block().fail(std::string(what) + ": that block of the cluster has ended");
}

// 128-byte swizzle: bits 4-6 of a shared address are XORed with bits 7-9.
inline uint32_t swizzle_128(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

// One box on its way: rows of 128 bytes, `sources[i]` the global address of row i (or null: zeros),
// `bytes[i]` how much of it exists.
struct Box {
  std::vector<const char*> sources;
  std::vector<uint32_t> bytes;
};

// Copies to the same place of every block in `mask`, and counts on the mbarrier there.
inline void start_copy(const Box& box, uint32_t destination, uint32_t barrier, uint32_t mask,
                       const char* what) {
  Block& blk = block();
  const uint32_t total = static_cast<uint32_t>(box.sources.size()) * 128;
  if (destination % 1024 != 0)
    blk.fail(std::string(what) + ": a 128-byte swizzled box must begin at a multiple of 1024");
  if (mask == 0 || mask >> kCluster != 0) blk.fail(std::string(what) + ": no such block");
  for (int rank = 0; rank < kCluster; ++rank) {
    if ((mask >> rank & 1) == 0) continue;
    const uint32_t into = at_rank(destination, rank);
    const uint32_t counter = at_rank(barrier, rank);
    check_alive(rank, what);
    blk.shared_span(into, total, what);
    for (uint32_t at = 0; at < total; at += 16) blk.begin_write(into + at, 16, what);
    mbarriers().get(counter, what);
    Mbarriers* barriers = &mbarriers();
    const int first = rank * block_threads(), threads = block_threads();
    auto land = [box, total, into, counter, barriers, first, threads, &blk] {
      if (blk.ended(first, threads)) blk.fail("TMA load: it lands in a block that has ended");
      char* shared = blk.shared_span(into, total, "TMA load");
      for (size_t row = 0; row < box.sources.size(); ++row)
        for (uint32_t chunk = 0; chunk < 8; ++chunk) {
          const uint32_t at =
              swizzle_128(into + static_cast<uint32_t>(row) * 128 + chunk * 16) - into;
          const uint32_t valid = box.bytes[row] > chunk * 16 ? box.bytes[row] - chunk * 16 : 0;
          std::memset(shared + at, 0, 16);
          if (valid > 0)
            std::memcpy(shared + at, box.sources[row] + chunk * 16, valid < 16 ? valid : 16);
        }
      for (uint32_t at = 0; at < total; at += 16) blk.end_write(into + at, 16);
      Mbarriers::State& state = barriers->at.at(counter);
      state.bytes -= total;
      state.settle(blk);
    };
    if (blk.launch().completion == Completion::kEarly) {
      land();
    } else {
      blk.post(std::move(land));
    }
  }
}

inline const TensorMapParameters& checked(const TensorMap* map, int rank, const char* what) {
  const TensorMapParameters& p = map->parameters;
  size_t bytes = 2 * p.size[0];
  for (int i = 1; i < p.rank; ++i) bytes += p.stride[i] * (p.size[i] - 1);
  block().global(p.address, bytes, false, what);
  if (const char* reason = refuse_map(p)) block().fail(std::string(what) + ": " + reason);
  if (p.rank != rank) block().fail(std::string(what) + ": a map of another tensor");
  return p;
}

// Adds the row at channel c and coordinates `at` of the other axes: zeros outside.
inline void add_row(Box& box, const TensorMapParameters& p, int64_t c,
                    std::initializer_list<int64_t> at) {
  bool inside = c >= 0 && c < static_cast<int64_t>(p.size[0]);
  const char* source = static_cast<const char*>(p.address) + 2 * c;
  int axis = 1;
  for (const int64_t index : at) {
    inside &= index >= 0 && index < static_cast<int64_t>(p.size[axis]);
    source += index * static_cast<int64_t>(p.stride[axis++]);
  }
  const int64_t rest = inside ? 2 * (static_cast<int64_t>(p.size[0]) - c) : 0;
  box.sources.push_back(inside ? source : nullptr);
  box.bytes.push_back(static_cast<uint32_t>(rest < 128 ? rest : 128));
}

}  // namespace emulation

// All threads of both blocks.
WF_DEVICE void sync_cluster() {
  sync_block();
  for (auto& [address, state] : emulation::mbarriers().at) state.visible |= state.fenced;
}

// --- mbarriers ---

WF_DEVICE void mbarrier_init(uint32_t barrier, int arrivals) {
  if (barrier % 8 != 0) emulation::block().fail("mbarrier_init: address is not aligned to 8");
  if (arrivals < 1 || arrivals >= 1 << 20)
    emulation::block().fail("mbarrier_init: 1 to 2**20 - 1 arrivals");
  auto& state = emulation::mbarriers().at[emulation::own(barrier)];
  if (state.expected != 0) emulation::block().fail("mbarrier_init: initialised twice");
  state.expected = state.pending = arrivals;
}

WF_DEVICE void fence_mbarrier_init() {
  if (is_broken(Fault::kBarrierFence)) return;
  for (auto& [address, state] : emulation::mbarriers().at) state.fenced = true;
}

WF_DEVICE void mbarrier_arrive(uint32_t barrier, int rank) {
  if (is_broken(Fault::kPeerArrival)) rank = emulation::rank();
  emulation::check_alive(rank, "mbarrier_arrive");
  auto& state = emulation::mbarriers().get(emulation::at_rank(barrier, rank), "mbarrier_arrive");
  if (--state.pending < 0) emulation::block().fail("mbarrier_arrive: more arrivals than expected");
  state.settle(emulation::block());
}

WF_DEVICE void mbarrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  auto& state = emulation::mbarriers().get(emulation::own(barrier), "mbarrier_arrive_expect");
  state.counts_bytes = true;
  state.bytes += bytes;
  if (--state.pending < 0)
    emulation::block().fail("mbarrier_arrive_expect: more arrivals than expected");
  state.settle(emulation::block());
}

WF_DEVICE void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  auto& state = emulation::mbarriers().get(emulation::own(barrier), "mbarrier_wait");
  if (is_broken(state.counts_bytes ? Fault::kFullWait : Fault::kEmptyWait)) return;
  emulation::block().wait_until(state.counts_bytes ? "mbarrier_wait (data)" : "mbarrier_wait",
                                [&state, parity] { return (state.phase & 1) != parity; });
}

// --- TMA ---

WF_DEVICE void prefetch_tensor_map(const TensorMap* map) {
  if (map->parameters.rank == 0) emulation::block().fail("prefetch_tensor_map: no tensor map");
}

WF_DEVICE void prefetch_l2(const void* address, uint32_t bytes) {
  if (bytes % 16 != 0 || reinterpret_cast<uintptr_t>(address) % 16 != 0)
    emulation::block().fail("prefetch_l2: address and size must be multiples of 16");
  emulation::block().global(address, bytes, false, "prefetch_l2");
}

WF_DEVICE void tma_load_matrix(uint32_t destination, const TensorMap* map, uint32_t barrier, int c,
                               int r0) {
  const TensorMapParameters& p = emulation::checked(map, 2, "tma_load_matrix");
  emulation::Box box;
  for (uint32_t i = 0; i < p.box[1]; ++i) emulation::add_row(box, p, c, {int64_t{r0} + i});
  emulation::start_copy(box, destination, barrier, 1u << emulation::rank(), "tma_load_matrix");
}

WF_DEVICE void tma_load_filter(uint32_t destination, const TensorMap* map, uint32_t barrier, int c,
                               int tap, int o) {
  const TensorMapParameters& p = emulation::checked(map, 3, "tma_load_filter");
  emulation::Box box;
  for (uint32_t i = 0; i < p.box[2]; ++i) emulation::add_row(box, p, c, {tap, int64_t{o} + i});
  emulation::start_copy(box, destination, barrier, (1u << kCluster) - 1, "tma_load_filter");
}

WF_DEVICE void tma_load_im2col(uint32_t destination, const TensorMap* map, uint32_t barrier, int c,
                               int w, int h, int n, int offset_w, int offset_h) {
  const TensorMapParameters& p = emulation::checked(map, 4, "tma_load_im2col");
  if (offset_w < 0 || offset_w > 255 || offset_h < 0 || offset_h > 255)
    emulation::block().fail("tma_load_im2col: offsets have 8 bits");
  const int64_t last[2] = {static_cast<int64_t>(p.size[1]) - 1 + p.upper[0],
                           static_cast<int64_t>(p.size[2]) - 1 + p.upper[1]};
  if (w < p.lower[0] || w > last[0] || h < p.lower[1] || h > last[1])
    emulation::block().fail("tma_load_im2col: filter base outside of the bounding box");
  emulation::Box box;
  int64_t at_w = w, at_h = h, at_n = n;
  for (uint32_t i = 0; i < p.pixels; ++i) {
    emulation::add_row(box, p, c, {at_w + offset_w, at_h + offset_h, at_n});
    at_w += p.element_step[1];
    if (at_w <= last[0]) continue;
    at_w = p.lower[0];
    at_h += p.element_step[2];
    if (at_h > last[1]) at_h = p.lower[1], ++at_n;
  }
  emulation::start_copy(box, destination, barrier, 1u << emulation::rank(), "tma_load_im2col");
}

}  // namespace wf
