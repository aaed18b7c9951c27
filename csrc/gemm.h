// The kernels of wfnet._C, for compute capability 9.0: one persistent, warp-specialised implicit
// GEMM with two epilogues.
//
// Everything here is ours, written on the instructions of device.h (no CUTLASS): the kernels
// compile in seconds, and the same source runs on the host's emulation, tested against plain loops.
//
// Thread blocks of 384 threads, in clusters of two, stay on their multiprocessors for the whole
// launch:
//
//   producer     1 thread loads 64-deep slices of A (128 rows) and B (64, 128 or 256 columns) by
//                TMA into a ring of 8, 6 or 4 stages, B half by half for both blocks of the cluster;
//                it runs ahead over tile borders: the next tile's operands come in this epilogue.
//                A filter of 64 columns and few slices is loaded once and kept for all tiles
//   consumer 0   tiles 0, 2, 4, ... of the block: wgmma, then the epilogue, from registers
//   consumer 1   tiles 1, 3, 5, ...; takes turns with consumer 0 at the tensor cores (ping-pong)
//
// A tile of 256 columns is multiplied by both consumers, the upper and the lower 64 rows.
//
// What bounds it, counted: benchmarks/results/tuning.md.
#pragma once

#include <type_traits>

#include "tile_epilogue.h"

namespace wf {

constexpr int kProducerRegisters = 40;
constexpr int kConsumerRegisters = 232;
// setmaxnreg moves registers within the block: what it has at entry, 65,536 / 384 each.
static_assert(kConsumers * kConsumerRegisters + kProducerRegisters <=
                  (kConsumers + 1) * (65536 / kThreads / 8 * 8),
              "more registers than the block has");

enum class Direction { kForward, kBackward };

template <Direction kDirection>
using EpilogueOf = std::conditional_t<kDirection == Direction::kForward, ForwardEpilogue,
                                      BackwardEpilogue>;

template <Direction kDirection>
struct Params {
  TensorMap a[kMostPhases];
  TensorMap b;
  Problem problem;
  EpilogueOf<kDirection> epilogue;
};

// Position in the ring of stages: every role walks it slice by slice.
template <int kStages>
struct RingPosition {
  int stage = 0;
  uint32_t parity = 0;

  WF_DEVICE void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
  // Over the slices of a tile that the other consumer takes.
  WF_DEVICE void skip(int slices) {
    stage += slices;
    parity ^= stage / kStages & 1;
    stage %= kStages;
  }
};

// Barriers 1 and 2: a consumer's turn at the tensor cores. 3 and 4: the warps of a tile.
WF_DEVICE void wait_for_turn(int consumer) { sync_block_named(1 + consumer, 2 * kWarpgroup); }
WF_DEVICE void give_turn(int consumer) { arrive_block_named(2 - consumer, 2 * kWarpgroup); }

// --- producer ---

// This block's half of a slice of B, for both blocks of the cluster; n0: first column.
template <class L, Direction kDirection>
WF_DEVICE void load_filter(const Params<kDirection>& params, uint32_t b, uint32_t barrier,
                           const Slice& slice, int n0, int rank) {
  b += rank * L::kFilterRows * 128;
  if constexpr (kDirection == Direction::kForward) {  // rows are columns of the result
    tma_load_filter(b, &params.b, barrier, slice.channel, slice.tap, n0 + rank * L::kFilterRows);
  } else if constexpr (L::kBlockN >= 128) {  // rows are depth; half of the columns, 64 to a box
    WF_UNROLL
    for (int i = 0; i < L::kFilterRows; i += 64)
      tma_load_filter(b + i * kBlockK * 2, &params.b, barrier, n0 + rank * L::kFilterRows + i,
                      slice.tap, slice.channel);
  } else {  // rows are depth; each block has 32 of them
    tma_load_filter(b, &params.b, barrier, n0, slice.tap, slice.channel + rank * L::kFilterRows);
  }
}

template <class L, Direction kDirection>
WF_DEVICE void produce(const Params<kDirection>& params) {
  const Problem& problem = params.problem;
  const int rank = cluster_rank();
  const int step = cluster_count();
  if constexpr (L::kKeepFilter) {
    const Phase& phase = problem.phases[0];  // the only one
    mbarrier_arrive_expect(L::filter(), phase.slices * L::kBBytes);
    Slice slice(problem, phase);
    WF_ROLLED
    for (int i = 0; i < phase.slices; ++i, slice.advance())
      load_filter<L, kDirection>(params, L::b(0, i), L::filter(), slice, 0, rank);
  }
  RingPosition<L::kStages> ring;
  for (Work work = next_work(problem, cluster_index(), step); work.slot < problem.tile_slots;
       work = next_work(problem, work.slot + step, step)) {
    const Phase& phase = problem.phases[work.phase];
    const TensorMap* map_a = &params.a[work.phase];
    const int m0 = (work.pair * kCluster + rank) * kBlockM;
    const Base base = base_at(phase, m0);
    Slice slice(problem, phase);
    WF_ROLLED
    for (int left = phase.slices; left > 0; --left) {
      mbarrier_wait(L::empty(ring.stage), ring.parity ^ 1);
      const uint32_t full = L::full(ring.stage);
      mbarrier_arrive_expect(full, L::kStageBytes);
      if (problem.tiled) {
        tma_load_matrix(L::a(ring.stage), map_a, full, slice.channel, m0);
      } else {
        tma_load_im2col(L::a(ring.stage), map_a, full, slice.channel, base.w, base.h, base.sample,
                        slice.offset_w, slice.offset_h);
      }
      if constexpr (!L::kKeepFilter)
        load_filter<L, kDirection>(params, L::b(ring.stage, 0), full, slice, work.n * L::kBlockN,
                                   rank);
      ring.advance();
      slice.advance();
    }
  }
}

// --- consumers ---

// Frees a stage: one arrival per warp (its own share of wgmma is done) at each block whose producer
// writes into it, which is both blocks of the cluster where they share B.
template <class L>
WF_DEVICE void free_stage(int stage) {
  const int lane = thread_index() % 32;
  if constexpr (L::kKeepFilter) {
    if (lane == 0) mbarrier_arrive(L::empty(stage), cluster_rank());
  } else {
    if (lane < kCluster) mbarrier_arrive(L::empty(stage), lane);
  }
}

// From the second tile on it is there.
template <class L>
WF_DEVICE void wait_for_filter() {
  if (is_broken(Fault::kFilterWait)) return;
  mbarrier_wait(L::filter(), 0);
}

template <class L>
WF_DEVICE void pin_accumulators(Accumulators<L>& acc) {
  WF_UNROLL
  for (int part = 0; part < L::kParts; ++part) pin_registers(acc.part[part]);
}

// Issues the wgmma of a consumer's rows of a tile; all but those of the last slice are complete.
// Returns its stage, which finish_multiply() waits for and frees.
template <class T, class L, bool kTransposedB>
WF_DEVICE int multiply(Accumulators<L>& acc, RingPosition<L::kStages>& ring, int slices,
                       int consumer) {
  int previous = 0;
  WF_ROLLED
  for (int i = 0; i < slices; ++i) {
    mbarrier_wait(L::full(ring.stage), ring.parity);
    pin_accumulators<L>(acc);
    wgmma_fence();
    const uint32_t a = L::a(ring.stage) + L::first_row(consumer) * 128;
    WF_UNROLL
    for (int k = 0; k < kBlockK / 16; ++k) {
      // A: 8 rows of 128 bytes per swizzle atom, 16 of K are 32 bytes within its rows. B forward:
      // the same. B backward, [64 of K][64 columns] per box: 16 of K are two atoms, boxes follow.
      const uint32_t at = L::b(ring.stage, i);
      const uint64_t b = kTransposedB ? wgmma_descriptor(at + k * 2048, kBlockK * 128, 1024)
                                      : wgmma_descriptor(at + k * 32, 16, 1024);
      WF_UNROLL
      for (int part = 0; part < L::kParts; ++part)
        wgmma<T, kTransposedB>(acc.part[part], wgmma_descriptor(a + part * 8192 + k * 32, 16, 1024),
                               b, (i | k) != 0);
    }
    wgmma_commit();
    if (i > 0) {
      wgmma_wait<1>();
      free_stage<L>(previous);
    }
    previous = ring.stage;
    ring.advance();
  }
  return previous;
}

template <class L>
WF_DEVICE void finish_multiply(Accumulators<L>& acc, int last_stage, int slices) {
  wgmma_wait<0>();
  pin_accumulators<L>(acc);
  if (slices > 0) free_stage<L>(last_stage);
}

template <class T, class L, Direction kDirection>
WF_DEVICE void consume(const Params<kDirection>& params, int consumer) {
  const Problem& problem = params.problem;
  RingPosition<L::kStages> ring;
  const int step = cluster_count();
  Work work = next_work(problem, cluster_index(), step);
  for (int i = 0; work.slot < problem.tile_slots; ++i) {
    const Work next = next_work(problem, work.slot + step, step);
    const Phase& phase = problem.phases[work.phase];
    if (L::kCooperative || i % kConsumers == consumer) {
      Accumulators<L> acc;
      WF_UNROLL
      for (int part = 0; part < L::kParts; ++part) WF_UNROLL
      for (int j = 0; j < L::kBlockN / 2; ++j) acc.part[part][j] = 0.0f;
      const int m = work.pair * kCluster + cluster_rank();
      if (!L::kCooperative || consumer == 0)
        prefetch_tile<T, L::kBlockN>(problem, params.epilogue, phase, m, work.n);
      if (L::kKeepFilter) wait_for_filter<L>();
      if (!L::kCooperative && i > 0) wait_for_turn(consumer);
      const int last =
          multiply<T, L, kDirection == Direction::kBackward>(acc, ring, phase.slices, consumer);
      // The other consumer issues its first wgmma while the last ones of this tile are at work.
      if (!L::kCooperative && next.slot < problem.tile_slots) give_turn(consumer);
      finish_multiply<L>(acc, last, phase.slices);
      finish_tile<T, L>(acc, problem, params.epilogue, phase, m, work.n, consumer);
    } else {
      ring.skip(phase.slices);
    }
    work = next;
  }
}

// --- the kernel ---

template <class T, class L, Direction kDirection>
WF_DEVICE void gemm(const Params<kDirection>& params) {
  if (block_thread() == 0) {
    for (int stage = 0; stage < L::kStages; ++stage) {
      mbarrier_init(L::full(stage), 1);
      mbarrier_init(L::empty(stage), L::kReaders);
    }
    if (L::kKeepFilter) mbarrier_init(L::filter(), 1);
    fence_mbarrier_init();
  }
  sync_cluster();
  const int uniform_warp = shuffle(block_thread() / 32, 0);  // uniform, and known to be
  const int role = uniform_warp / 4;
  if (role == kConsumers) {
    give_registers<kProducerRegisters>();
    if (uniform_warp == kConsumers * 4 && elect_one()) {
      for (int i = 0; i < params.problem.num_phases; ++i)
        if (params.problem.phases[i].slices > 0 && params.problem.phases[i].rows > 0)
          prefetch_tensor_map(&params.a[i]);
      prefetch_tensor_map(&params.b);
      produce<L, kDirection>(params);
    }
  } else {
    take_registers<kConsumerRegisters>();
    consume<T, L, kDirection>(params, role);
  }
  if (is_broken(Fault::kJointExit)) return;
  // Until both are done, the other block may still arrive at barriers of this one.
  sync_cluster();
}

}  // namespace wf
