// Hopper's instructions, in addition to csrc/device.h: mbarriers, TMA loads, wgmma, setmaxnreg. As
// there, one source for two worlds: PTX, and an emulation on the host that does what the PTX manual
// says and stops where it leaves things undefined:
//
// - a TMA load fills its box when it lands, at the latest when every thread waits; until then, its
//   bytes of shared memory may not be read or written; then it counts its bytes on its mbarrier;
// - wgmma reads shared memory through its descriptors (address, offsets, swizzle decoded as by the
//   hardware) at some time between issue and wait; until the wait, its accumulators read as NaN;
// - the warps of a warpgroup must issue the same wgmma in the same order; each warp's part is only
//   done when this warp has waited;
// - an mbarrier completes a phase when both its arrivals and its bytes are complete; a wait for a
//   parity behaves as the hardware's: a waiter two phases late is let through. It may be used by
//   others once its initialisation was fenced and all blocks of the cluster have met;
// - a block that has ended takes neither arrivals nor copies;
// - setmaxnreg moves registers within what the block was launched with, whole warpgroups at a time.
#pragma once

#include <algorithm>

#include "device.h"
#include "sm90_tensor_map.h"

#if defined(__CUDACC__)
#include <cuda.h>  // types only: no symbol of libcuda is linked
#define WF_SM90_ROLLED _Pragma("unroll 1")
#else
#define WF_SM90_ROLLED
#endif

namespace wf::sm90 {

#if defined(__CUDACC__)
using TensorMap = CUtensorMap;
#else
struct TensorMap {
  TensorMapParameters parameters;
};
#endif

constexpr int kWarpgroup = 128;

// --- clusters ---
//
// A cluster is two thread blocks that reach each other's shared memory. In the emulation it is one
// emulated block with twice the threads and twice the shared memory: addresses are those of a
// block's own half, as on a device, and `at_rank` finds the half.

#if !defined(__CUDACC__)
namespace emulated {

inline int block_threads() { return emulation::block().launch().threads / kCluster; }
inline int rank() { return thread_index() / block_threads(); }
inline uint32_t at_rank(uint32_t address, int rank) {
  const uint32_t half = emulation::block().launch().shared_bytes / kCluster;
  if (address >= half) emulation::block().fail("shared address outside of the block's own memory");
  return address + rank * half;
}
inline uint32_t own(uint32_t address) { return at_rank(address, rank()); }

}  // namespace emulated
#endif

// Thread of the block, block of the cluster, cluster of the grid.
WF_DEVICE int block_thread() {
#if defined(__CUDACC__)
  return thread_index();
#else
  return thread_index() % emulated::block_threads();
#endif
}

WF_DEVICE int cluster_rank() {
#if defined(__CUDACC__)
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
#else
  return emulated::rank();
#endif
}

WF_DEVICE int cluster_index() {
#if defined(__CUDACC__)
  return static_cast<int>(block_index()) / kCluster;
#else
  return static_cast<int>(block_index());
#endif
}

WF_DEVICE int cluster_count() {
#if defined(__CUDACC__)
  return static_cast<int>(grid_size()) / kCluster;
#else
  return static_cast<int>(grid_size());
#endif
}

// Named barriers 1 to 7 of this block.
WF_DEVICE void sync_block_named(int id, int threads) {
#if defined(__CUDACC__)
  sync_named(id, threads);
#else
  if (id < 1 || id > 7) emulation::block().fail("sync_block_named: barriers are 1 to 7");
  sync_named(id + emulated::rank() * 8, threads);
#endif
}
WF_DEVICE void arrive_block_named(int id, int threads) {
#if defined(__CUDACC__)
  arrive_named(id, threads);
#else
  if (id < 1 || id > 7) emulation::block().fail("arrive_block_named: barriers are 1 to 7");
  arrive_named(id + emulated::rank() * 8, threads);
#endif
}

// True for one lane of a warp whose lanes are all here. The compiler knows it to be one, and issues
// what this lane alone does without asking which lanes are there.
WF_DEVICE bool elect_one() {
#if defined(__CUDACC__)
  uint32_t elected;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.b32 %0, 1, 0, p;\n"
      "}\n"
      : "=r"(elected));
  return elected != 0;
#else
  emulation::meet_warp("elect_one");
  return thread_index() % 32 == 0;
#endif
}

// Address for load_shared and store_shared of a byte of this block's shared memory.
WF_DEVICE uint32_t own_shared(uint32_t address) {
#if defined(__CUDACC__)
  return address;
#else
  return emulated::own(address);
#endif
}

// --- emulation ---

#if !defined(__CUDACC__)
namespace emulated {

using emulation::Block;
using emulation::block;
using emulation::Completion;
using emulation::current_fiber;
using emulation::Rendezvous;

// Primitives that a test switches off, to see that the tests notice.
struct Broken {
  bool full_wait = false;     // mbarrier_wait returns at once: for barriers that count bytes
  bool empty_wait = false;    // for barriers that count arrivals only
  bool filter_wait = false;   // a kept filter is not waited for
  bool wgmma_wait = false;    // wgmma_wait waits for nothing
  bool sums_barrier = false;  // sync_warpgroup waits for nobody
  bool peer_arrival = false;  // arrivals at the other block's barriers go to the own one
  bool barrier_fence = false;  // fence_mbarrier_init fences nothing
  bool joint_exit = false;     // a block does not wait for the other one before it ends
};
inline Broken& broken() {
  static Broken instance;
  return instance;
}

struct Mbarriers {
  static constexpr int64_t kMostBytes = (1 << 20) - 1;
  struct State {
    int expected = 0;
    int pending = 0;
    int64_t bytes = 0;
    uint32_t phase = 0;
    bool counts_bytes = false;
    bool fenced = false, visible = false;  // the initialisation: to whom has it come through
    const char* error = nullptr;

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
    if (found->second.error) block().fail(found->second.error);
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

inline void check_memory(const TensorMapParameters& map, const char* what) {
  size_t bytes = 2 * map.size[0];
  for (int i = 1; i < map.rank; ++i) bytes += map.stride[i] * (map.size[i] - 1);
  block().global(map.address, bytes, false, what);
  if (const char* reason = refuse_map(map)) block().fail(std::string(what) + ": " + reason);
}

// Row of a box that starts at channel c of the pixel at `at` (null: outside).
inline void add_row(Box& box, const TensorMapParameters& map, const char* pixel, int64_t c) {
  const bool inside = pixel != nullptr && c >= 0 && c < static_cast<int64_t>(map.size[0]);
  const int64_t rest = inside ? 2 * (static_cast<int64_t>(map.size[0]) - c) : 0;
  box.sources.push_back(inside ? pixel + 2 * c : nullptr);
  box.bytes.push_back(static_cast<uint32_t>(rest < 128 ? rest : 128));
}

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

}  // namespace emulated
#endif

// All threads of both blocks.
WF_DEVICE void sync_cluster() {
#if defined(__CUDACC__)
  __syncwarp();
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;\n" ::
          : "memory");
#else
  sync_block();
  for (auto& [address, state] : emulated::mbarriers().at) state.visible |= state.fenced;
#endif
}

// --- mbarriers ---

WF_DEVICE void mbarrier_init(uint32_t barrier, int arrivals) {
#if defined(__CUDACC__)
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
#else
  if (barrier % 8 != 0) emulation::block().fail("mbarrier_init: address is not aligned to 8");
  if (arrivals < 1 || arrivals >= 1 << 20)
    emulation::block().fail("mbarrier_init: 1 to 2**20 - 1 arrivals");
  auto& state = emulated::mbarriers().at[emulated::own(barrier)];
  if (state.expected != 0) emulation::block().fail("mbarrier_init: initialised twice");
  state.expected = state.pending = arrivals;
#endif
}

// After mbarrier_init, before the cluster-wide barrier: initial values reach the TMA unit too.
WF_DEVICE void fence_mbarrier_init() {
#if defined(__CUDACC__)
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#else
  if (emulated::broken().barrier_fence) return;
  for (auto& [address, state] : emulated::mbarriers().at) state.fenced = true;
#endif
}

// At the barrier at this place of the cluster's block `rank`. What it orders are reads by wgmma,
// which are complete, and writes by TMA; ordinary accesses of one block are not made visible to the
// other: that (.release.cluster) would put a membar.gpu and an L1 invalidation into every slice.
WF_DEVICE void mbarrier_arrive(uint32_t barrier, int rank) {
#if defined(__CUDACC__)
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}\n" ::"r"(barrier),
      "r"(rank)
      : "memory");
#else
  if (emulated::broken().peer_arrival) rank = emulated::rank();
  emulated::check_alive(rank, "mbarrier_arrive");
  auto& state = emulated::mbarriers().get(emulated::at_rank(barrier, rank), "mbarrier_arrive");
  if (--state.pending < 0) emulation::block().fail("mbarrier_arrive: more arrivals than expected");
  state.settle(emulation::block());
#endif
}

// Announces `bytes` that TMA loads will bring, and arrives.
WF_DEVICE void mbarrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
#if defined(__CUDACC__)
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
#else
  auto& state = emulated::mbarriers().get(emulated::own(barrier), "mbarrier_arrive_expect");
  state.counts_bytes = true;
  state.bytes += bytes;
  if (--state.pending < 0)
    emulation::block().fail("mbarrier_arrive_expect: more arrivals than expected");
  state.settle(emulation::block());
#endif
}

#if defined(__CUDACC__) && defined(WF_DEADLINE)
// A build that looks for the wait that never ends: after WF_DEADLINE seconds it is an error, of one
// kind for the producer and of another for consumers (see tests/cuda/first_steps.py).
WF_DEVICE void wait_with_deadline(uint32_t barrier, uint32_t parity) {
  uint64_t start, now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(start));
  while (true) {
    uint32_t done;
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
        "selp.b32 %0, 1, 0, done;\n"
        "}\n"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
    if (done) return;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    if (now - start < WF_DEADLINE * 1000000000ull) continue;
    const bool producer = threadIdx.x / kWarpgroup == blockDim.x / kWarpgroup - 1;
    if (!producer) asm volatile("trap;");                      // "unspecified launch failure"
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(1), "r"(0));  // "misaligned address"
  }
}
#endif

// Waits until the phase of this parity is complete.
WF_DEVICE void mbarrier_wait(uint32_t barrier, uint32_t parity) {
#if defined(__CUDACC__) && defined(WF_DEADLINE)
  wait_with_deadline(barrier, parity);
#elif defined(__CUDACC__)
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "WAIT:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra DONE;\n"
      "bra WAIT;\n"
      "DONE:\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
#else
  auto& state = emulated::mbarriers().get(emulated::own(barrier), "mbarrier_wait");
  if (parity > 1) emulation::block().fail("mbarrier_wait: a parity is 0 or 1");
  const emulated::Broken& broken = emulated::broken();
  if (state.counts_bytes ? broken.full_wait : broken.empty_wait) return;
  emulation::block().wait_until(state.counts_bytes ? "mbarrier_wait (data)" : "mbarrier_wait",
                                [&state, parity] { return (state.phase & 1) != parity; });
#endif
}

// --- TMA ---

WF_DEVICE void prefetch_tensor_map(const TensorMap* map) {
#if defined(__CUDACC__)
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
#else
  if (map->parameters.rank == 0) emulation::block().fail("prefetch_tensor_map: no tensor map");
#endif
}

// Asks for `bytes` of global memory to be in L2 soon; address and size are multiples of 16.
WF_DEVICE void prefetch_l2(const void* address, uint32_t bytes) {
#if defined(__CUDACC__)
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(address), "r"(bytes) : "memory");
#else
  if (bytes % 16 != 0 || reinterpret_cast<uintptr_t>(address) % 16 != 0)
    emulation::block().fail("prefetch_l2: address and size must be multiples of 16");
  emulation::block().global(address, bytes, false, "prefetch_l2");
#endif
}

// A box of [rows, 64] from row r0, channel c, of a matrix.
WF_DEVICE void tma_load_matrix(uint32_t destination, const TensorMap* map, uint32_t barrier, int c,
                               int r0) {
#if defined(__CUDACC__)
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4}], [%2];" ::"r"(destination),
      "l"(map), "r"(barrier), "r"(c), "r"(r0)
      : "memory");
#else
  const TensorMapParameters& p = map->parameters;
  emulated::check_memory(p, "tma_load_matrix");
  if (p.rank != 2 || p.im2col) emulation::block().fail("tma_load_matrix: not a map of a matrix");
  emulated::Box box;
  for (int64_t r = r0; r < r0 + static_cast<int64_t>(p.box[1]); ++r) {
    const bool inside = r >= 0 && r < static_cast<int64_t>(p.size[1]);
    emulated::add_row(box, p,
                      inside ? static_cast<const char*>(p.address) + r * p.stride[1] : nullptr, c);
  }
  emulated::start_copy(box, destination, barrier, 1u << emulated::rank(), "tma_load_matrix");
#endif
}

// A box of [rows, 1, 64] of the filter, to all blocks of the cluster: out channels from o, one tap,
// in channels from c.
WF_DEVICE void tma_load_filter(uint32_t destination, const TensorMap* map, uint32_t barrier, int c,
                               int tap, int o) {
#if defined(__CUDACC__)
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(destination),
      "l"(map), "r"(barrier), "r"(c), "r"(tap), "r"(o),
      "h"(static_cast<uint16_t>((1 << kCluster) - 1))
      : "memory");
#else
  const TensorMapParameters& p = map->parameters;
  emulated::check_memory(p, "tma_load_filter");
  if (p.rank != 3 || p.im2col) emulation::block().fail("tma_load_filter: not a map of a filter");
  emulated::Box box;
  for (int64_t r = o; r < o + static_cast<int64_t>(p.box[2]); ++r) {
    const bool inside = r >= 0 && r < static_cast<int64_t>(p.size[2]) && tap >= 0 &&
                        tap < static_cast<int64_t>(p.size[1]);
    emulated::add_row(
        box, p,
        inside ? static_cast<const char*>(p.address) + r * p.stride[2] + tap * p.stride[1]
               : nullptr,
        c);
  }
  emulated::start_copy(box, destination, barrier, (1u << kCluster) - 1, "tma_load_filter");
#endif
}

// Pixels at (n, h, w) and behind it in the order of filter bases, each read at its distance
// (offset_h, offset_w) from the base; 64 channels from c.
WF_DEVICE void tma_load_im2col(uint32_t destination, const TensorMap* map, uint32_t barrier, int c,
                               int w, int h, int n, int offset_w, int offset_h) {
#if defined(__CUDACC__)
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5, %6}], [%2], {%7, %8};" ::"r"(destination),
      "l"(map), "r"(barrier), "r"(c), "r"(w), "r"(h), "r"(n), "h"(static_cast<uint16_t>(offset_w)),
      "h"(static_cast<uint16_t>(offset_h))
      : "memory");
#else
  const TensorMapParameters& p = map->parameters;
  emulated::check_memory(p, "tma_load_im2col");
  if (p.rank != 4 || !p.im2col) emulation::block().fail("tma_load_im2col: not an im2col map");
  if (offset_w < 0 || offset_w > 255 || offset_h < 0 || offset_h > 255)
    emulation::block().fail("tma_load_im2col: offsets have 8 bits");
  const int64_t last[2] = {static_cast<int64_t>(p.size[1]) - 1 + p.upper[0],
                           static_cast<int64_t>(p.size[2]) - 1 + p.upper[1]};
  if (w < p.lower[0] || w > last[0] || h < p.lower[1] || h > last[1])
    emulation::block().fail("tma_load_im2col: filter base outside of the bounding box");
  emulated::Box box;
  int64_t at_w = w, at_h = h, at_n = n;
  for (uint32_t i = 0; i < p.pixels; ++i) {
    const int64_t x = at_w + offset_w, y = at_h + offset_h;
    const bool inside = x >= 0 && x < static_cast<int64_t>(p.size[1]) && y >= 0 &&
                        y < static_cast<int64_t>(p.size[2]) && at_n >= 0 &&
                        at_n < static_cast<int64_t>(p.size[3]);
    emulated::add_row(box, p,
                      inside ? static_cast<const char*>(p.address) + at_n * p.stride[3] +
                                   y * p.stride[2] + x * p.stride[1]
                             : nullptr,
                      c);
    at_w += p.element_step[1];
    if (at_w > last[0]) {
      at_w = p.lower[0];
      at_h += p.element_step[2];
      if (at_h > last[1]) at_h = p.lower[1], ++at_n;
    }
  }
  emulated::start_copy(box, destination, barrier, 1u << emulated::rank(), "tma_load_im2col");
#endif
}

// --- wgmma ---

// Matrix descriptor of a 128-byte swizzled tile at a multiple of 1024 bytes (or 32 * i bytes into
// its rows, for the i-th 16 of K). `stride`: bytes from 8 rows to the next 8 rows; a row is 128
// bytes. `leading`: bytes from 64 elements of N to the next 64, for N-major operands only.
WF_HOST_DEVICE uint64_t wgmma_descriptor(uint32_t address, uint32_t leading, uint32_t stride) {
  return static_cast<uint64_t>(address >> 4 & 0x3FFF) |
         static_cast<uint64_t>(leading >> 4 & 0x3FFF) << 16 |
         static_cast<uint64_t>(stride >> 4 & 0x3FFF) << 32 | uint64_t{1} << 62;
}

// Before the first wgmma, and after registers of an accumulator were touched by other instructions.
WF_DEVICE void wgmma_fence() {
#if defined(__CUDACC__)
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#else
  emulation::meet_warp("wgmma_fence");
  auto& state = emulation::block().extension<emulated::WgmmaState>();
  state.warps[thread_index() / 32].fenced = true;
#endif
}

WF_DEVICE void wgmma_commit() {
#if defined(__CUDACC__)
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
  emulation::Fiber& self = *emulation::current_fiber();
  auto& queue = emulation::block().extension<emulated::WgmmaState>().warps[thread_index() / 32];
  emulation::block().meet(self.warp().rendezvous, "wgmma_commit", 32, self.lane(), nullptr,
                          [&](void* const*) {
                            queue.groups.push_back(std::move(queue.open));
                            queue.open.clear();
                          });
#endif
}

// Waits until at most kPending of the committed groups are at work.
template <int kPending>
WF_DEVICE void wgmma_wait() {
#if defined(__CUDACC__)
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#else
  if (emulated::broken().wgmma_wait) return;
  emulation::Fiber& self = *emulation::current_fiber();
  const int warp = thread_index() / 32;
  auto& queue = emulation::block().extension<emulated::WgmmaState>().warps[warp];
  emulation::block().meet(self.warp().rendezvous, "wgmma_wait", 32, self.lane(), nullptr,
                          [&](void* const*) {
                            while (queue.groups.size() > static_cast<size_t>(kPending)) {
                              for (const auto& op : queue.groups.front()) {
                                emulated::execute(queue, op, warp);
                                queue.deferred -= !op.done;
                              }
                              queue.groups.pop_front();
                            }
                            if (kPending == 0) queue.fenced = false;
                          });
#endif
}

// Keeps the compiler from moving accesses to accumulators across wgmma_fence and wgmma_wait.
template <int kCount>
WF_DEVICE void pin_registers(float (&registers)[kCount]) {
#if defined(__CUDACC__)
  WF_UNROLL
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
#else
  (void)registers;
#endif
}

#if defined(__CUDACC__)
#define WF_SM90_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define WF_SM90_D16(i) WF_SM90_D4(i), WF_SM90_D4(i + 4), WF_SM90_D4(i + 8), WF_SM90_D4(i + 12)
#define WF_SM90_REGISTERS_32                                                                    \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24," \
  "%25,%26,%27,%28,%29,%30,%31}"
#define WF_SM90_REGISTERS_64                                                                     \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,"  \
  "%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47," \
  "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}"
#endif

// d[64, N] += a[64, 16] * b[16, N] by a warpgroup; asynchronous. Warp w of it, lane l, holds in
// d[4 * j + 2 * h + i] row 16 * w + 8 * h + l / 4, column 8 * j + 2 * (l % 4) + i. `a` is K-major;
// `b` is K-major ([N, 16]) or, with kTransposedB, N-major ([16, N]). `accumulate` false: d = a * b.
template <class T, bool kTransposedB, int kCount>
WF_DEVICE void wgmma(float (&d)[kCount], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(kCount == 32 || kCount == 64, "N is 64 or 128");
  constexpr bool kBf16 = std::is_same_v<T, Bf16>;
#if defined(__CUDACC__)
#define WF_SM90_WGMMA(N, TYPE, REGISTERS, A, B, P, TB, ...)                                        \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P                                               \
               ", 0;\n"                                                                            \
               "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " " REGISTERS ", " A \
               ", " B ", p, 1, 1, 0, " TB ";\n}\n"                                                 \
               : __VA_ARGS__                                                                       \
               : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(kTransposedB ? 1 : 0))
  if constexpr (kCount == 64) {
    if constexpr (kBf16) {
      WF_SM90_WGMMA("128", "bf16", WF_SM90_REGISTERS_64, "%64", "%65", "%66", "%67", WF_SM90_D16(0),
                    WF_SM90_D16(16), WF_SM90_D16(32), WF_SM90_D16(48));
    } else {
      WF_SM90_WGMMA("128", "f16", WF_SM90_REGISTERS_64, "%64", "%65", "%66", "%67", WF_SM90_D16(0),
                    WF_SM90_D16(16), WF_SM90_D16(32), WF_SM90_D16(48));
    }
  } else {
    if constexpr (kBf16) {
      WF_SM90_WGMMA("64", "bf16", WF_SM90_REGISTERS_32, "%32", "%33", "%34", "%35", WF_SM90_D16(0),
                    WF_SM90_D16(16));
    } else {
      WF_SM90_WGMMA("64", "f16", WF_SM90_REGISTERS_32, "%32", "%33", "%34", "%35", WF_SM90_D16(0),
                    WF_SM90_D16(16));
    }
  }
#undef WF_SM90_WGMMA
#else
  struct Arguments {
    float* d;
    uint64_t a, b;
    bool accumulate;
  } mine{d, a, b, accumulate};
  emulation::Fiber& self = *emulation::current_fiber();
  emulation::Block& block = emulation::block();
  const int warp = thread_index() / 32;
  block.meet(self.warp().rendezvous, "wgmma", 32, self.lane(), &mine, [&](void* const* all) {
    auto& state = block.extension<emulated::WgmmaState>();
    emulated::WarpQueue& queue = state.warps[warp];
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
    emulated::Accumulator* accumulator = nullptr;
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
          accumulator->registers[lane][i] = not_a_number();
        }
      }
    }
    ++accumulator->pending;
    emulated::Wgmma op{a, b, kBf16, kTransposedB, accumulate, kCount * 2, id, false};
    const emulation::Completion when = block.launch().completion;
    if (queue.deferred == 0 &&
        (when == emulation::Completion::kEarly ||
         (when == emulation::Completion::kRandom && block.random().below(2) == 0))) {
      ++accumulator->pending;
      emulated::execute(queue, op, warp);
      op.done = true;
    } else {
      ++queue.deferred;
    }
    queue.open.push_back(op);
  });
#endif
}

// --- registers ---

#if !defined(__CUDACC__)
namespace emulated {

// Registers of a block: what each of its warpgroups has per thread, and what the launch gave it.
struct RegisterPools {
  std::map<int, Rendezvous> meeting;  // by warpgroup of the cluster
  std::map<int, int> of_warpgroup;

  int free(int rank, int threads) {
    const int warpgroups = threads / kWarpgroup;
    const int at_launch = std::min(65536 / threads / 8 * 8, 248);  // as __launch_bounds__ has it
    int rest = warpgroups * at_launch;
    for (int i = rank * warpgroups; i < (rank + 1) * warpgroups; ++i)
      rest -= of_warpgroup.try_emplace(i, at_launch).first->second;
    return rest;
  }
};

inline void move_registers(int registers, bool take) {
  Block& blk = block();
  auto& pools = blk.extension<RegisterPools>();
  const int warpgroup = thread_index() / kWarpgroup;
  const int threads = block_threads(), own_rank = rank();
  // All threads of the warpgroup: one that never comes shows as a deadlock.
  blk.meet(pools.meeting[warpgroup], take ? "setmaxnreg.inc" : "setmaxnreg.dec", kWarpgroup,
           thread_index() % kWarpgroup, nullptr, [&](void* const*) {
             pools.free(own_rank, threads);
             int& mine = pools.of_warpgroup.at(warpgroup);
             if (take ? registers < mine : registers > mine)
               blk.fail(take ? "setmaxnreg.inc: fewer registers than before"
                             : "setmaxnreg.dec: more registers than before");
             if (!take) mine = registers;
           });
  if (!take) return;
  int& mine = pools.of_warpgroup.at(warpgroup);
  blk.wait_until("setmaxnreg.inc", [&pools, &mine, own_rank, threads, registers] {
    if (mine == registers) return true;
    if (pools.free(own_rank, threads) < registers - mine) return false;
    mine = registers;
    return true;
  });
}

}  // namespace emulated
#endif

// Moves registers from the producer warpgroup to the consumers; once per warpgroup, all its
// threads.
template <int kRegisters>
WF_DEVICE void take_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256, "setmaxnreg");
#if defined(__CUDACC__)
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#else
  emulated::move_registers(kRegisters, true);
#endif
}
template <int kRegisters>
WF_DEVICE void give_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256, "setmaxnreg");
#if defined(__CUDACC__)
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#else
  emulated::move_registers(kRegisters, false);
#endif
}

}  // namespace wf::sm90
