// The Hopper kernels of wfnet: one persistent, warp-specialised implicit GEMM with two epilogues.
//
// Everything here is ours, written on the primitives of sm90_primitives.h (no CUTLASS): the kernels
// compile in seconds, and the same source runs on the host's emulation, tested against plain loops.
//
// A thread block of 384 threads stays on its multiprocessor for the whole launch:
//
//   producer     1 thread loads 64-deep slices of A (128 rows) and B (64 or 128 columns) by TMA into a
//                ring of 6 or 8 stages; it runs ahead over tile borders, so that the next tile's
//                operands arrive during this tile's epilogue
//   consumer 0   tiles 0, 2, 4, ... of the block: wgmma, then the epilogue, from registers
//   consumer 1   tiles 1, 3, 5, ...; takes turns with consumer 0 at the tensor cores (ping-pong)
//
// Per 128 x 128 x 64 slice: 2.1 MFLOP in 512 tensor-core cycles for 32 KB from L2. A 3x3 layer with 64
// channels has 9 slices per tile: 2,304 cycles (128 x 64) in which the epilogue of another tile moves
// 128 x 64 x 2 B x 3 (residual, v, out) = 48 KB; at 132 multiprocessors' share of 4.3 TB/s, 18 B per
// cycle, those take 2,700 cycles. The layer is bound by memory, and only because the epilogue is hidden.
//
// Epilogues work on 16 bytes of one row per lane: quads of lanes first transpose their wgmma fragments
// (which hold 2 columns of 4 groups of 8) so that a quad reads and writes 64 contiguous bytes.
#pragma once

#include "sm90_geometry.h"
#include "sm90_primitives.h"

namespace wf::sm90 {

constexpr int kConsumers = 2;
constexpr int kThreads = kWarpgroup * (kConsumers + 1);
constexpr int kProducerRegisters = 40;
constexpr int kConsumerRegisters = 232;  // 2 * 128 * 232 + 128 * 40 = 64,512 of 65,536

enum class Direction { kForward, kBackward };

// v = A * u; out = act(v + C + residual). Tensors [pixels, N] of the GEMM's element type.
struct ForwardEpilogue {
  const float* scale;     // A: [batch, N], rows table_stride apart
  const float* shift;     // C: the same, or null
  const void* residual;   // or null
  void* branch;           // v, or null
  void* out;
  int table_stride;
  int relu;
};

// g = (dx + skip) * act'; A * g; per tile and sample the column sums of g and g * v.
struct BackwardEpilogue {
  const void* skip;        // or null
  const void* branch;      // v of the layer below; or null
  const void* activation;  // its output: the ReLU mask is activation > 0, or else v + C > 0
  const float* scale;      // A: [batch, N], rows table_stride apart; or null
  const float* shift;      // C: or null
  void* grad;              // g, or null
  void* scaled_grad;       // A * g, or null
  float* partial0;         // sums of g: [problem.partial_rows, N], or null
  float* partial1;         // sums of g * v, or null
  int table_stride;
  int relu;
};

template <Direction kDirection>
struct EpilogueOf;
template <>
struct EpilogueOf<Direction::kForward> {
  using Type = ForwardEpilogue;
};
template <>
struct EpilogueOf<Direction::kBackward> {
  using Type = BackwardEpilogue;
};

template <Direction kDirection>
struct Params {
  TensorMap a[kMostPhases];
  TensorMap b;
  Problem problem;
  typename EpilogueOf<kDirection>::Type epilogue;
};

// Shared memory: stages of A and B, then column sums of both consumers, then the mbarriers.
template <int kBlockN>
struct Layout {
  static constexpr int kStages = kBlockN == 64 ? 8 : 6;
  static constexpr uint32_t kABytes = kBlockM * kBlockK * 2;
  static constexpr uint32_t kBBytes = kBlockN * kBlockK * 2;
  static constexpr uint32_t kStageBytes = kABytes + kBBytes;
  static constexpr uint32_t kSums = kStages * kStageBytes;
  static constexpr uint32_t kSumsBytes = 2 * 2 * 4 * 32 * 4;  // [buffer][sum][warp][32 columns]
  static constexpr uint32_t kBarriers = kSums + kConsumers * kSumsBytes;
  static constexpr uint32_t kBytes = kBarriers + 2 * kStages * 8;

  static WF_DEVICE uint32_t a(int stage) { return shared_base() + stage * kStageBytes; }
  static WF_DEVICE uint32_t b(int stage) { return a(stage) + kABytes; }
  static WF_DEVICE uint32_t full(int stage) { return shared_base() + kBarriers + stage * 8; }
  static WF_DEVICE uint32_t empty(int stage) { return full(stage) + kStages * 8; }
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

// Barriers 1 and 2: a consumer's turn at the tensor cores. 3 and 4: its four warps.
WF_DEVICE void wait_for_turn(int consumer) { sync_named(1 + consumer, 2 * kWarpgroup); }
WF_DEVICE void give_turn(int consumer) { arrive_named(2 - consumer, 2 * kWarpgroup); }
WF_DEVICE void sync_warpgroup(int consumer) {
#if !defined(__CUDACC__)
  if (emulated::broken().sums_barrier) return;
#endif
  sync_named(3 + consumer, kWarpgroup);
}

// ---- producer -------------------------------------------------------------------------------------

template <int kBlockN, Direction kDirection>
WF_DEVICE void produce(const Params<kDirection>& params) {
  using L = Layout<kBlockN>;
  const Problem& problem = params.problem;
  RingPosition<L::kStages> ring;
  const int step = static_cast<int>(grid_size());
  for (Tile tile = next_tile(problem, static_cast<int>(block_index()), step);
       tile.slot < problem.tile_slots; tile = next_tile(problem, tile.slot + step, step)) {
    const Phase& phase = problem.phases[tile.phase];
    const TensorMap* map_a = &params.a[tile.phase];
    const int m0 = tile.m * kBlockM;
    const int n0 = tile.n * kBlockN;
    const Base base = base_at(phase, m0);
    for (int i = 0; i < phase.slices; ++i, ring.advance()) {
      const Slice slice = slice_at(problem, phase, i);
      mbarrier_wait(L::empty(ring.stage), ring.parity ^ 1);
      const uint32_t full = L::full(ring.stage);
      mbarrier_arrive_expect(full, L::kStageBytes);
      if (problem.tiled) {
        tma_load_matrix(L::a(ring.stage), map_a, full, slice.channel, m0);
      } else {
        tma_load_im2col(L::a(ring.stage), map_a, full, slice.channel, base.w, base.h, base.sample,
                        slice.offset_w, slice.offset_h);
      }
      if constexpr (kDirection == Direction::kForward) {
        tma_load_filter(L::b(ring.stage), &params.b, full, slice.channel, slice.tap, n0);
      } else {
        WF_UNROLL
        for (int j = 0; j < kBlockN / 64; ++j)
          tma_load_filter(L::b(ring.stage) + j * kBlockK * 128, &params.b, full, n0 + j * 64,
                          slice.tap, slice.channel);
      }
    }
  }
}

// ---- consumers ------------------------------------------------------------------------------------

// Accumulators of one tile: rows 64 * half + 16 * warp + 8 * i + lane / 4, see wgmma().
template <int kBlockN>
struct Accumulators {
  float half[2][kBlockN / 2];
};

// Issues the wgmma of a tile; all but those of the last slice are complete. Returns its stage, which
// finish_multiply() waits for and frees.
template <class T, int kBlockN, bool kTransposedB>
WF_DEVICE int multiply(Accumulators<kBlockN>& acc, RingPosition<Layout<kBlockN>::kStages>& ring,
                       int slices) {
  using L = Layout<kBlockN>;
  const bool signals = thread_index() % 32 == 0;
  int previous = 0;
  for (int i = 0; i < slices; ++i) {
    mbarrier_wait(L::full(ring.stage), ring.parity);
    pin_registers(acc.half[0]);
    pin_registers(acc.half[1]);
    wgmma_fence();
    WF_UNROLL
    for (int k = 0; k < kBlockK / 16; ++k) {
      // A: 8 rows of 128 bytes per swizzle atom, 16 of K are 32 bytes within its rows. B forward: the
      // same. B backward, [64 of K][64 columns] per box: 16 of K are two atoms, boxes follow.
      const uint64_t b = kTransposedB
                             ? wgmma_descriptor(L::b(ring.stage) + k * 2048, kBlockK * 128, 1024)
                             : wgmma_descriptor(L::b(ring.stage) + k * 32, 16, 1024);
      WF_UNROLL
      for (int half = 0; half < 2; ++half)
        wgmma<T, kTransposedB>(
            acc.half[half], wgmma_descriptor(L::a(ring.stage) + half * 8192 + k * 32, 16, 1024), b,
            (i | k) != 0);
    }
    wgmma_commit();
    if (i > 0) {
      wgmma_wait<1>();
      if (signals) mbarrier_arrive(L::empty(previous));
    }
    previous = ring.stage;
    ring.advance();
  }
  return previous;
}

template <int kBlockN>
WF_DEVICE void finish_multiply(Accumulators<kBlockN>& acc, int last_stage, int slices) {
  wgmma_wait<0>();
  pin_registers(acc.half[0]);
  pin_registers(acc.half[1]);
  if (slices > 0 && thread_index() % 32 == 0) mbarrier_arrive(Layout<kBlockN>::empty(last_stage));
}

// ---- epilogues ------------------------------------------------------------------------------------

// 8 consecutive columns of one row, fp32.
struct Row8 {
  float at[8];
};

template <class T>
WF_DEVICE Row8 load_row8(const void* tensor, int64_t offset) {
  const Vec16 words = load_constant<Vec16>(static_cast<const T*>(tensor) + offset);
  Row8 row;
  WF_UNROLL
  for (int i = 0; i < 4; ++i) {
    row.at[2 * i] = low_half<T>(words.word[i]);
    row.at[2 * i + 1] = high_half<T>(words.word[i]);
  }
  return row;
}

template <class T>
WF_DEVICE Vec16 pack_row8(const Row8& row) {
  Vec16 words;
  WF_UNROLL
  for (int i = 0; i < 4; ++i) words.word[i] = pack<T>(row.at[2 * i], row.at[2 * i + 1]);
  return words;
}

template <class T>
WF_DEVICE void store_row8(void* tensor, int64_t offset, const Row8& row) {
  store_global<Vec16>(static_cast<T*>(tensor) + offset, pack_row8<T>(row));
}

WF_DEVICE Row8 load_table8(const float* table, int64_t offset) {
  Row8 row;
  WF_UNROLL
  for (int half = 0; half < 2; ++half) {
    const Vec16 words = load_constant<Vec16>(table + offset + 4 * half);
    WF_UNROLL
    for (int i = 0; i < 4; ++i) row.at[4 * half + i] = float_of_bits(words.word[i]);
  }
  return row;
}

// Transposes the 4 x 4 blocks of 2 columns that a quad holds: lane q of it, which had columns 2q and
// 2q + 1 of four groups of 8 columns, gets the 8 columns of group q. `fragment` are 16 accumulators:
// [group][row half][2]; `half` picks one of the two rows.
template <int kCount>
WF_DEVICE Row8 gather_row8(const float (&fragment)[kCount], int first, int half) {
  const int lane = thread_index();
  float x[4][2];
  WF_UNROLL
  for (int group = 0; group < 4; ++group)
    WF_UNROLL
    for (int i = 0; i < 2; ++i) x[group][i] = fragment[first + group * 4 + half * 2 + i];
  WF_UNROLL
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool upper = lane & bit;
    WF_UNROLL
    for (int group = 0; group < 4; ++group) {
      if (group & bit) continue;
      WF_UNROLL
      for (int i = 0; i < 2; ++i) {
        const float sent = upper ? x[group][i] : x[group | bit][i];
        const float received = shuffle_xor(sent, bit);
        x[group][i] = upper ? received : x[group][i];
        x[group | bit][i] = upper ? x[group | bit][i] : received;
      }
    }
  }
  Row8 row;
  WF_UNROLL
  for (int group = 0; group < 4; ++group)
    WF_UNROLL
    for (int i = 0; i < 2; ++i) row.at[2 * group + i] = x[group][i];
  return row;
}

// The four rows of a lane: which samples, where in memory. A row past the end has sample -1.
struct LaneRows {
  int sample[4];
  int64_t offset[4];  // of the row's first column
};

WF_DEVICE LaneRows lane_rows(const Problem& problem, const Phase& phase, int m0) {
  const int warp = thread_index() % kWarpgroup / 32;
  const int lane = thread_index() % 32;
  LaneRows rows;
  WF_UNROLL
  for (int r = 0; r < 4; ++r) {
    const int m = m0 + r / 2 * 64 + warp * 16 + r % 2 * 8 + lane / 4;
    if (m < phase.rows) {
      const Row row = row_at(problem, phase, m);
      rows.sample[r] = row.sample;
      rows.offset[r] = row.pixel * problem.columns;
    } else {
      rows.sample[r] = -1;
      rows.offset[r] = 0;
    }
  }
  return rows;
}

template <class T, int kBlockN>
WF_DEVICE void finish_tile(const Accumulators<kBlockN>& acc, const Problem& problem,
                           const ForwardEpilogue& e, const Tile& tile, int /*consumer*/) {
  const Phase& phase = problem.phases[tile.phase];
  const LaneRows rows = lane_rows(problem, phase, tile.m * kBlockM);
  WF_UNROLL
  for (int chunk = 0; chunk < kBlockN / 32; ++chunk) {
    const int column = tile.n * kBlockN + chunk * 32 + thread_index() % 4 * 8;
    const bool column_ok = column < problem.columns;
    Row8 residual[4];
    if (e.residual != nullptr) {
      WF_UNROLL
      for (int r = 0; r < 4; ++r)
        if (column_ok && rows.sample[r] >= 0)
          residual[r] = load_row8<T>(e.residual, rows.offset[r] + column);
    }
    int loaded = -1;  // sample whose tables are loaded: mostly one for all four rows
    Row8 scale, shift;
    WF_UNROLL
    for (int r = 0; r < 4; ++r) {
      Row8 value = gather_row8(acc.half[r / 2], chunk * 16, r % 2);
      if (!column_ok || rows.sample[r] < 0) continue;
      if (rows.sample[r] != loaded) {
        loaded = rows.sample[r];
        const int64_t at = static_cast<int64_t>(loaded) * e.table_stride + column;
        scale = load_table8(e.scale, at);
        if (e.shift != nullptr) shift = load_table8(e.shift, at);
      }
      WF_UNROLL
      for (int i = 0; i < 8; ++i) value.at[i] *= scale.at[i];
      if (e.branch != nullptr) {
        const Vec16 words = pack_row8<T>(value);
        store_global<Vec16>(static_cast<T*>(e.branch) + rows.offset[r] + column, words);
        // Backward takes the ReLU mask from the stored branch: forward sees the same numbers.
        WF_UNROLL
        for (int i = 0; i < 4; ++i) {
          value.at[2 * i] = low_half<T>(words.word[i]);
          value.at[2 * i + 1] = high_half<T>(words.word[i]);
        }
      }
      WF_UNROLL
      for (int i = 0; i < 8; ++i) {
        float x = value.at[i];
        if (e.shift != nullptr) x += shift.at[i];
        if (e.residual != nullptr) x += residual[r].at[i];
        // A NaN (a forget label out of range) survives.
        value.at[i] = e.relu && x < 0.0f ? 0.0f : x;
      }
      store_row8<T>(e.out, rows.offset[r] + column, value);
    }
  }
}

// Adds the lanes l and l ^ kBit: a lane keeps half of the 2 * kCount sums, the upper lane the upper
// half, and gets the other lane's part of them.
template <int kBit, int kCount>
WF_DEVICE void halve_sums(float (&sums)[16]) {
  const bool upper = thread_index() & kBit;
  WF_UNROLL
  for (int i = 0; i < kCount; ++i) {
    const float sent = upper ? sums[i] : sums[i + kCount];
    const float kept = upper ? sums[i + kCount] : sums[i];
    sums[i] = kept + shuffle_xor(sent, kBit);
  }
}

template <class T, int kBlockN>
WF_DEVICE void finish_tile(const Accumulators<kBlockN>& acc, const Problem& problem,
                           const BackwardEpilogue& e, const Tile& tile, int consumer) {
  using L = Layout<kBlockN>;
  const Phase& phase = problem.phases[tile.phase];
  const int m0 = tile.m * kBlockM;
  const LaneRows rows = lane_rows(problem, phase, m0);
  const int warp = thread_index() % kWarpgroup / 32;
  const int lane = thread_index() % 32;
  const bool sums = e.partial0 != nullptr || e.partial1 != nullptr;
  const bool mask_from_branch = e.relu && e.activation == nullptr;
  const bool needs_branch = mask_from_branch || e.partial1 != nullptr;
  const int first_sample = m0 / phase.pixels;
  const int last_row = (m0 + kBlockM < phase.rows ? m0 + kBlockM : phase.rows) - 1;
  const int last_sample = last_row / phase.pixels;
  uint32_t buffer = 0;
  WF_UNROLL
  for (int chunk = 0; chunk < kBlockN / 32; ++chunk) {
    const int column = tile.n * kBlockN + chunk * 32 + lane % 4 * 8;
    const bool column_ok = column < problem.columns;
    Row8 g[4], v[4];
    WF_UNROLL
    for (int r = 0; r < 4; ++r) {
      const bool ok = column_ok && rows.sample[r] >= 0;
      WF_UNROLL
      for (int i = 0; i < 8; ++i) v[r].at[i] = 0.0f;
      if (ok && needs_branch) v[r] = load_row8<T>(e.branch, rows.offset[r] + column);
    }
    int loaded = -1;
    Row8 scale, shift;
    WF_UNROLL
    for (int r = 0; r < 4; ++r) {
      g[r] = gather_row8(acc.half[r / 2], chunk * 16, r % 2);
      if (!column_ok || rows.sample[r] < 0) {
        // Rows past the end hold taps that reach back into the image: they are no pixels.
        WF_UNROLL
        for (int i = 0; i < 8; ++i) g[r].at[i] = 0.0f;
        continue;
      }
      const int64_t at = rows.offset[r] + column;
      if (rows.sample[r] != loaded) {
        loaded = rows.sample[r];
        const int64_t row = static_cast<int64_t>(loaded) * e.table_stride + column;
        if (e.scaled_grad != nullptr) scale = load_table8(e.scale, row);
        if (mask_from_branch && e.shift != nullptr) shift = load_table8(e.shift, row);
      }
      if (e.skip != nullptr) {
        const Row8 skip = load_row8<T>(e.skip, at);
        WF_UNROLL
        for (int i = 0; i < 8; ++i) g[r].at[i] += skip.at[i];
      }
      if (mask_from_branch) {
        WF_UNROLL
        for (int i = 0; i < 8; ++i) {
          const float alive = e.shift != nullptr ? v[r].at[i] + shift.at[i] : v[r].at[i];
          g[r].at[i] = alive > 0.0f ? g[r].at[i] : 0.0f;
        }
      } else if (e.relu) {
        const Row8 alive = load_row8<T>(e.activation, at);
        WF_UNROLL
        for (int i = 0; i < 8; ++i) g[r].at[i] = alive.at[i] > 0.0f ? g[r].at[i] : 0.0f;
      }
      if (e.grad != nullptr) store_row8<T>(e.grad, at, g[r]);
      if (e.scaled_grad != nullptr) {
        Row8 scaled;
        WF_UNROLL
        for (int i = 0; i < 8; ++i) scaled.at[i] = scale.at[i] * g[r].at[i];
        store_row8<T>(e.scaled_grad, at, scaled);
      }
    }
    if (!sums) continue;
    // One pass per sample that has rows in this tile: one, or two where a sample ends.
    for (int sample = first_sample; sample <= last_sample; ++sample) {
      float part[16];
      WF_UNROLL
      for (int i = 0; i < 16; ++i) part[i] = 0.0f;
      WF_UNROLL
      for (int r = 0; r < 4; ++r) {
        const bool mine = rows.sample[r] == sample;
        WF_UNROLL
        for (int i = 0; i < 8; ++i) {
          part[i] += mine ? g[r].at[i] : 0.0f;
          part[8 + i] += mine ? g[r].at[i] * v[r].at[i] : 0.0f;
        }
      }
      halve_sums<16, 8>(part);
      halve_sums<8, 4>(part);
      halve_sums<4, 2>(part);
      // Bit 4 of the lane chose g or g * v, bits 3 and 2 two of the 8 columns. Two buffers: nobody
      // is two passes ahead of a barrier.
      const uint32_t base = shared_base() + L::kSums + consumer * L::kSumsBytes + buffer * 1024;
      buffer ^= 1;
      const uint32_t at = base + (lane >> 4) * 512 + warp * 128 +
                          (lane % 4 * 8 + (lane >> 3 & 1) * 4 + (lane >> 2 & 1) * 2) * 4;
      store_shared<float>(at, part[0]);
      store_shared<float>(at + 4, part[1]);
      sync_warpgroup(consumer);
      const int thread = thread_index() % kWarpgroup;
      if (thread < 64) {
        float sum = 0.0f;
        WF_UNROLL
        for (int w = 0; w < 4; ++w)
          sum += load_shared<float>(base + thread / 32 * 512 + w * 128 + thread % 32 * 4);
        const int c = tile.n * kBlockN + chunk * 32 + thread % 32;
        float* partial = thread < 32 ? e.partial0 : e.partial1;
        if (partial != nullptr && c < problem.columns)
          store_global<float>(
              partial + static_cast<int64_t>(partial_row(phase, tile.m, sample)) * problem.columns +
                  c,
              sum);
      }
    }
  }
  // The next tile of this consumer starts with buffer 0 again.
  if (sums) sync_warpgroup(consumer);
}

template <class T, int kBlockN, Direction kDirection>
WF_DEVICE void consume(const Params<kDirection>& params, int consumer) {
  const Problem& problem = params.problem;
  RingPosition<Layout<kBlockN>::kStages> ring;
  const int step = static_cast<int>(grid_size());
  Tile tile = next_tile(problem, static_cast<int>(block_index()), step);
  for (int i = 0; tile.slot < problem.tile_slots; ++i) {
    const Tile next = next_tile(problem, tile.slot + step, step);
    const int slices = problem.phases[tile.phase].slices;
    if (i % kConsumers == consumer) {
      Accumulators<kBlockN> acc;
      WF_UNROLL
      for (int half = 0; half < 2; ++half)
        WF_UNROLL
        for (int j = 0; j < kBlockN / 2; ++j) acc.half[half][j] = 0.0f;
      if (i > 0) wait_for_turn(consumer);
      const int last =
          multiply<T, kBlockN, kDirection == Direction::kBackward>(acc, ring, slices);
      // The other consumer issues its first wgmma while the last ones of this tile are at work.
      if (next.slot < problem.tile_slots) give_turn(consumer);
      finish_multiply<kBlockN>(acc, last, slices);
      finish_tile<T, kBlockN>(acc, problem, params.epilogue, tile, consumer);
    } else {
      ring.skip(slices);
    }
    tile = next;
  }
}

// ---- the kernel -----------------------------------------------------------------------------------

template <class T, int kBlockN, Direction kDirection>
WF_DEVICE void gemm(const Params<kDirection>& params) {
  using L = Layout<kBlockN>;
  if (thread_index() == 0) {
    for (int stage = 0; stage < L::kStages; ++stage) {
      mbarrier_init(L::full(stage), 1);
      mbarrier_init(L::empty(stage), 4);  // the warps of the consumer that read it
    }
    fence_mbarrier_init();
  }
  sync_block();
  const int role = shuffle(thread_index() / kWarpgroup, 0);  // the same for a warp, and known to be
  if (role == kConsumers) {
    give_registers<kProducerRegisters>();
    if (thread_index() == kConsumers * kWarpgroup) {
      for (int i = 0; i < params.problem.num_phases; ++i) prefetch_tensor_map(&params.a[i]);
      prefetch_tensor_map(&params.b);
      produce<kBlockN, kDirection>(params);
    }
  } else {
    take_registers<kConsumerRegisters>();
    consume<T, kBlockN, kDirection>(params, role);
  }
}

// Second stage of the column sums: [partial_rows, N] to [batch, N], always in the same order. One
// thread per sample and column.
constexpr int kSumThreads = 128;

struct SumParams {
  Problem problem;
  const float* partial0;
  const float* partial1;
  float* t0;  // [batch, N], rows t_stride apart
  float* t1;
};

WF_DEVICE void sum_partials(const SumParams& params) {
  const Problem& problem = params.problem;
  const int64_t index = static_cast<int64_t>(block_index()) * kSumThreads + thread_index();
  if (index >= static_cast<int64_t>(problem.batch) * problem.columns) return;
  const int sample = static_cast<int>(index / problem.columns);
  const int column = static_cast<int>(index - static_cast<int64_t>(sample) * problem.columns);
  float sum0 = 0.0f, sum1 = 0.0f;
  for (int i = 0; i < problem.num_phases; ++i) {
    const Phase& phase = problem.phases[i];
    if (phase.pixels == 0) continue;
    const TileRange tiles = tiles_of_sample(phase, sample);
    for (int m = tiles.first; m <= tiles.last; ++m) {
      const int64_t at =
          static_cast<int64_t>(partial_row(phase, m, sample)) * problem.columns + column;
      if (params.t0 != nullptr) sum0 += load_global<float>(params.partial0 + at);
      if (params.t1 != nullptr) sum1 += load_global<float>(params.partial1 + at);
    }
  }
  if (params.t0 != nullptr) store_global<float>(params.t0 + index, sum0);
  if (params.t1 != nullptr) store_global<float>(params.t1 + index, sum1);
}

}  // namespace wf::sm90
