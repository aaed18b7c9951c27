// What a consumer does with the accumulators of a tile: the epilogues, and the second stage of the
// column sums.
//
// Epilogues work on 16 bytes of one row per lane: quads of lanes first transpose their wgmma
// fragments (which hold 2 columns of 4 groups of 8) so that a quad reads and writes 64 contiguous
// bytes.
#pragma once

#include "convolution.h"
#include "device.h"
#include "geometry.h"

namespace wf {

// --- 8 consecutive channels of one pixel: what a lane of an epilogue reads and writes at a time ---

constexpr int kVector = 8;  // channels of one 16-byte access

struct Channels {
  float value[kVector];
};

template <class T>
WF_DEVICE Channels unpack(const Vec16& bits) {
  Channels channels;
  WF_UNROLL
  for (int i = 0; i < 4; ++i) {
    channels.value[2 * i] = low_half<T>(bits.word[i]);
    channels.value[2 * i + 1] = high_half<T>(bits.word[i]);
  }
  return channels;
}

template <class T>
WF_DEVICE Vec16 pack(const Channels& channels) {
  Vec16 bits;
  WF_UNROLL
  for (int i = 0; i < 4; ++i)
    bits.word[i] = pack<T>(channels.value[2 * i], channels.value[2 * i + 1]);
  return bits;
}

// 8 entries of an fp32 table row.
WF_DEVICE Channels load_table(const float* row) {
  const Vec16 low = load_constant(row), high = load_constant(row + 4);
  Channels channels;
  WF_UNROLL
  for (int i = 0; i < 4; ++i) {
    channels.value[i] = float_of_bits(low.word[i]);
    channels.value[4 + i] = float_of_bits(high.word[i]);
  }
  return channels;
}

WF_DEVICE Channels scaled(const Channels& factor, const Channels& channels) {
  Channels product;
  WF_UNROLL
  for (int i = 0; i < kVector; ++i) product.value[i] = factor.value[i] * channels.value[i];
  return product;
}

// 8 channels as they lie in memory: four words wait for their turn where eight floats would not
// fit.
template <class T>
WF_DEVICE Vec16 load_packed(const void* tensor, int64_t at) {
  return load_constant(static_cast<const T*>(tensor) + at);
}

template <class T>
WF_DEVICE void store_channels(void* tensor, int64_t at, const Channels& channels) {
  store_global(static_cast<T*>(tensor) + at, pack<T>(channels));
}

// Not maximum(): a NaN (a forget label out of range) must survive.
WF_DEVICE float rectified(float value) { return value < 0.0f ? 0.0f : value; }

// --- tiles ---

constexpr int kConsumers = 2;
constexpr int kThreads = kWarpgroup * (kConsumers + 1);

// Shared memory: stages of A and B (or of A, then the kept filter's slices of B), then column sums
// of both consumers, then the mbarriers. B is [kBlockN][64] (forward) or kBlockN / 64 times
// [64][64] (backward); each block of the cluster loads half of it, in one box of kFilterRows rows
// of 128 bytes.
template <int kBlockN_, bool kKeepFilter_>
struct Layout {
  static constexpr int kBlockN = kBlockN_;
  static constexpr bool kKeepFilter = kKeepFilter_;
  static constexpr bool kCooperative = kBlockN == 256;  // both consumers share a tile
  static constexpr int kParts = kCooperative ? 1 : 2;   // 64 rows each, of one consumer
  static constexpr int kTileWarps = kCooperative ? 8 : 4;
  // The epilogue goes step by step: four vectors of a lane, of kRows rows and kSpans of 32 columns.
  static constexpr int kRows = 2 * kParts;
  static constexpr int kSpans = 4 / kRows;
  static constexpr int kSteps = kBlockN / 32 / kSpans;
  static constexpr int kStages = kBlockN == 64 ? 8 : kBlockN == 128 ? 6 : 4;
  static constexpr uint32_t kABytes = kBlockM * kBlockK * 2;
  static constexpr uint32_t kBBytes = kBlockN * kBlockK * 2;
  static constexpr uint32_t kStageBytes = kKeepFilter ? kABytes : kABytes + kBBytes;
  static constexpr int kFilterRows = kBlockN / kCluster;
  // Who reads a stage: a tile's warps; of both blocks where half of B is the other one's.
  static constexpr int kReaders = kTileWarps * (kKeepFilter ? 1 : kCluster);
  static constexpr uint32_t kFilter = kStages * kStageBytes;
  static constexpr uint32_t kSums = kFilter + (kKeepFilter ? kMostKeptSlices * kBBytes : 0);
  static constexpr uint32_t kSumBytes = kTileWarps * 32 * 4;  // [warp][32 columns]
  static constexpr uint32_t kSumsBytes = 2 * 2 * kSumBytes;   // [buffer][sum], of one tile
  static constexpr uint32_t kBarriers = kSums + (kCooperative ? 1 : kConsumers) * kSumsBytes;
  // Rounded up: halves of the emulated cluster must begin at multiples of 1024.
  static constexpr uint32_t kBytes = (kBarriers + (2 * kStages + 1) * 8 + 1023) / 1024 * 1024;

  static WF_DEVICE uint32_t a(int stage) { return shared_base() + stage * kStageBytes; }
  static WF_DEVICE uint32_t b(int stage, int slice) {
    return kKeepFilter ? shared_base() + kFilter + slice * kBBytes : a(stage) + kABytes;
  }
  // First row of a consumer's parts within its tile.
  static WF_DEVICE int first_row(int consumer) { return kCooperative ? consumer * 64 : 0; }
  // Where the warps of a consumer's tile meet: the number of the tile among those at work.
  static WF_DEVICE int group(int consumer) { return kCooperative ? 0 : consumer; }
  static WF_DEVICE uint32_t full(int stage) { return shared_base() + kBarriers + stage * 8; }
  static WF_DEVICE uint32_t empty(int stage) { return full(stage) + kStages * 8; }
  static WF_DEVICE uint32_t filter() { return empty(kStages); }
};

// A consumer's accumulators: rows 64 * part + 16 * warp + 8 * i + lane / 4 of it, see wgmma().
template <class L>
struct Accumulators {
  float part[L::kParts][L::kBlockN / 2];
};

// The warps of a tile meet.
template <class L>
WF_DEVICE void sync_tile(int consumer) {
  if (is_broken(Fault::kSumsBarrier)) return;
  sync_block_named(3 + L::group(consumer), L::kTileWarps * 32);
}

// Brings a tile's rows of the tensors that its epilogue reads to L2 while the tile is multiplied:
// the epilogue's own loads, few at a time, then wait for L2 and not for memory.
template <class T, int kBlockN, int kCount>
WF_DEVICE void prefetch_rows(const Problem& problem, const Phase& phase, int m, int n,
                             const void* const (&tensors)[kCount]) {
  const int first = n * kBlockN;
  const int count = problem.columns - first < kBlockN ? problem.columns - first : kBlockN;
  const int row = m * kBlockM + block_thread() % kWarpgroup;
  if (count == problem.columns && phase.h.out_step * phase.w.out_step == 1) {
    // Rows are pixels in order, and a warp's are one piece: the unit takes requests one by one.
    const int warp_row = row / 32 * 32;
    if (warp_row >= phase.rows || !elect_one()) return;
    const int rows = phase.rows - warp_row < 32 ? phase.rows - warp_row : 32;
    WF_UNROLL
    for (int i = 0; i < kCount; ++i)
      if (tensors[i] != nullptr)
        prefetch_l2(static_cast<const T*>(tensors[i]) + int64_t{warp_row} * count,
                    rows * count * 2);
    return;
  }
  if (row >= phase.rows) return;
  const int64_t at = row_at(problem, phase, row).pixel * problem.columns + first;
  WF_UNROLL
  for (int i = 0; i < kCount; ++i)
    if (tensors[i] != nullptr) prefetch_l2(static_cast<const T*>(tensors[i]) + at, count * 2);
}

template <class T, int kBlockN>
WF_DEVICE void prefetch_tile(const Problem& problem, const ForwardEpilogue& e, const Phase& phase,
                             int m, int n) {
  prefetch_rows<T, kBlockN>(problem, phase, m, n, {e.residual});
}

template <class T, int kBlockN>
WF_DEVICE void prefetch_tile(const Problem& problem, const BackwardEpilogue& e, const Phase& phase,
                             int m, int n) {
  prefetch_rows<T, kBlockN>(
      problem, phase, m, n,
      {e.skip, e.needs_branch() ? e.branch : nullptr, e.relu ? e.activation : nullptr});
}

// Transposes the 4 x 4 blocks of 2 columns that a quad holds: lane q of it, which had columns 2q
// and 2q + 1 of four groups of 8 columns, gets the 8 columns of group q. `fragment` are 16
// accumulators: [group][row half][2]; `half` picks one of the two rows.
template <int kCount>
WF_DEVICE Channels gather_channels(const float (&fragment)[kCount], int first, int half) {
  const int lane = thread_index();
  float x[4][2];
  WF_UNROLL
  for (int group = 0; group < 4; ++group) WF_UNROLL
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
  Channels row;
  WF_UNROLL
  for (int group = 0; group < 4; ++group) WF_UNROLL
  for (int i = 0; i < 2; ++i) row.value[2 * group + i] = x[group][i];
  return row;
}

// The rows of a lane: which samples, where in memory. A row past the end has sample -1.
template <class L>
struct LaneRows {
  int sample[L::kRows];
  int pixel[L::kRows];  // below 2^31, see refuse(); its offset is not, and made when it is needed

  WF_DEVICE int64_t at(int row, const Problem& problem, int column) const {
    return static_cast<int64_t>(pixel[row]) * problem.columns + column;
  }
};

// m0: first row of the consumer's part of a tile.
template <class L>
WF_DEVICE LaneRows<L> lane_rows(const Problem& problem, const Phase& phase, int m0) {
  const int warp = block_thread() % kWarpgroup / 32;
  const int lane = thread_index() % 32;
  LaneRows<L> rows;
  WF_UNROLL
  for (int r = 0; r < L::kRows; ++r) {
    const int m = m0 + r / 2 * 64 + warp * 16 + r % 2 * 8 + lane / 4;
    if (m < phase.rows) {
      const Row row = row_at(problem, phase, m);
      rows.sample[r] = row.sample;
      rows.pixel[r] = static_cast<int>(row.pixel);
    } else {
      rows.sample[r] = -1;
      rows.pixel[r] = 0;
    }
  }
  return rows;
}

// Vector v of a step: row v % kRows of the lane, columns from first_column() on.
template <class L>
WF_DEVICE int first_column(int n, int step, int v) {
  return n * L::kBlockN + (step * L::kSpans + v / L::kRows) * 32 + thread_index() % 4 * 8;
}
template <class L>
WF_DEVICE Channels gather_vector(const Accumulators<L>& acc, int step, int v) {
  const int row = v % L::kRows;
  return gather_channels(acc.part[row / 2], (step * L::kSpans + v / L::kRows) * 16, row % 2);
}

// `m`, `n`: row and column tile of the phase.
template <class T, class L>
WF_DEVICE void finish_tile(const Accumulators<L>& acc, const Problem& problem,
                           const ForwardEpilogue& e, const Phase& phase, int m, int n,
                           int consumer) {
  const LaneRows<L> rows = lane_rows<L>(problem, phase, m * kBlockM + L::first_row(consumer));
  WF_UNROLL
  for (int step = 0; step < L::kSteps; ++step) {
    Vec16 residuals[4];  // four loads on their way before the first is needed
    if (e.residual != nullptr) {
      WF_UNROLL
      for (int v = 0; v < 4; ++v) {
        const int r = v % L::kRows, column = first_column<L>(n, step, v);
        if (column < problem.columns && rows.sample[r] >= 0)
          residuals[v] = load_packed<T>(e.residual, rows.at(r, problem, column));
      }
    }
    int loaded = -1;  // sample whose tables are loaded: mostly one for all rows
    Channels scale, shift;
    WF_UNROLL
    for (int v = 0; v < 4; ++v) {
      const int r = v % L::kRows, column = first_column<L>(n, step, v);
      Channels value = gather_vector<L>(acc, step, v);
      if (column >= problem.columns || rows.sample[r] < 0) continue;
      if (r == 0 || rows.sample[r] != loaded) {
        loaded = rows.sample[r];
        const int64_t at = static_cast<int64_t>(loaded) * e.table_stride + column;
        scale = load_table(e.scale + at);
        if (e.shift != nullptr) shift = load_table(e.shift + at);
      }
      value = scaled(scale, value);
      if (e.branch != nullptr) {
        // Backward takes the ReLU mask from the stored branch: forward sees the same numbers.
        const Vec16 stored = pack<T>(value);
        store_global(static_cast<T*>(e.branch) + rows.at(r, problem, column), stored);
        value = unpack<T>(stored);
      }
      Channels residual;
      if (e.residual != nullptr) residual = unpack<T>(residuals[v]);
      WF_UNROLL
      for (int i = 0; i < kVector; ++i) {
        float& x = value.value[i];
        if (e.shift != nullptr) x += shift.value[i];
        if (e.residual != nullptr) x += residual.value[i];
        if (e.relu) x = rectified(x);
      }
      store_channels<T>(e.out, rows.at(r, problem, column), value);
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

// Column sums of g and g * branch over a tile's rows, 32 columns from `column` on: those of one
// span of a step. All warps of the tile come; `buffer` is where they meet next.
template <class T, class L>
WF_DEVICE void store_sums(const Problem& problem, const Phase& phase, const BackwardEpilogue& e,
                          const LaneRows<L>& rows, const Channels (&g)[4],
                          const Vec16 (&branches)[4], int span, int m, int column, int consumer,
                          uint32_t& buffer) {
  const int warp = block_thread() % (L::kTileWarps * 32) / 32;
  const int lane = thread_index() % 32;
  const int m0 = m * kBlockM;
  const int last_row = (m0 + kBlockM < phase.rows ? m0 + kBlockM : phase.rows) - 1;
  const int last_sample = last_row / phase.pixels;
  // One pass per sample that has rows in this tile: one, or two where a sample ends.
  for (int sample = m0 / phase.pixels; sample <= last_sample; ++sample) {
    float part[16];
    WF_UNROLL
    for (int i = 0; i < 16; ++i) part[i] = 0.0f;
    WF_UNROLL
    for (int r = 0; r < L::kRows; ++r) {
      const int v = span * L::kRows + r;
      const bool mine = rows.sample[r] == sample;
      const Channels branch = unpack<T>(branches[v]);
      WF_UNROLL
      for (int i = 0; i < kVector; ++i) {
        part[i] += mine ? g[v].value[i] : 0.0f;
        part[8 + i] += mine ? g[v].value[i] * branch.value[i] : 0.0f;
      }
    }
    halve_sums<16, 8>(part);
    halve_sums<8, 4>(part);
    halve_sums<4, 2>(part);
    // Bit 4 of the lane chose g or g * branch, bits 3 and 2 two of the 8 columns. Two buffers:
    // nobody is two passes ahead of a barrier.
    const uint32_t base = own_shared(shared_base() + L::kSums + L::group(consumer) * L::kSumsBytes +
                                     buffer * 2 * L::kSumBytes);
    buffer ^= 1;
    const uint32_t at = base + (lane >> 4) * L::kSumBytes + warp * 128 +
                        (lane % 4 * 8 + (lane >> 3 & 1) * 4 + (lane >> 2 & 1) * 2) * 4;
    store_shared(at, part[0]);
    store_shared(at + 4, part[1]);
    sync_tile<L>(consumer);
    if (warp >= 2 || column + lane >= problem.columns) continue;
    float sum = 0.0f;
    WF_UNROLL
    for (int w = 0; w < L::kTileWarps; ++w)
      sum += load_shared(base + warp * L::kSumBytes + w * 128 + lane * 4);
    float* partial = warp == 0 ? e.partial0 : e.partial1;
    const int64_t row = partial_row(phase, m, sample);
    if (partial != nullptr) store_global(partial + row * problem.columns + column + lane, sum);
  }
}

template <class T, class L>
WF_DEVICE void finish_tile(const Accumulators<L>& acc, const Problem& problem,
                           const BackwardEpilogue& e, const Phase& phase, int m, int n,
                           int consumer) {
  if (m >= phase.m_tiles) return;
  const LaneRows<L> rows = lane_rows<L>(problem, phase, m * kBlockM + L::first_row(consumer));
  const bool sums = e.partial0 != nullptr || e.partial1 != nullptr;
  uint32_t buffer = 0;
  WF_UNROLL
  for (int step = 0; step < L::kSteps; ++step) {
    Channels g[4];
    Vec16 branches[4], skips[2];  // six loads on their way before the first is needed
    const auto exists = [&](int v) {
      return first_column<L>(n, step, v) < problem.columns && rows.sample[v % L::kRows] >= 0;
    };
    const auto place = [&](int v) {
      return rows.at(v % L::kRows, problem, first_column<L>(n, step, v));
    };
    const auto load_skip = [&](int v) {
      if (e.skip != nullptr && exists(v)) skips[v % 2] = load_packed<T>(e.skip, place(v));
    };
    WF_UNROLL
    for (int v = 0; v < 4; ++v) {
      branches[v] = Vec16{};
      if (e.needs_branch() && exists(v)) branches[v] = load_packed<T>(e.branch, place(v));
    }
    load_skip(0);
    load_skip(1);
    int loaded = -1;
    Channels scale, shift;
    WF_UNROLL
    for (int v = 0; v < 4; ++v) {
      const int r = v % L::kRows, column = first_column<L>(n, step, v);
      g[v] = gather_vector<L>(acc, step, v);
      if (!exists(v)) {
        // Rows past the end hold taps that reach back into the image: they are no pixels.
        WF_UNROLL
        for (int i = 0; i < kVector; ++i) g[v].value[i] = 0.0f;
        continue;
      }
      const int64_t at = place(v);
      if (r == 0 || rows.sample[r] != loaded) {
        loaded = rows.sample[r];
        const int64_t row = static_cast<int64_t>(loaded) * e.table_stride + column;
        if (e.scaled_grad != nullptr) scale = load_table(e.scale + row);
        if (e.mask_from_branch() && e.shift != nullptr) shift = load_table(e.shift + row);
      }
      if (e.skip != nullptr) {
        const Channels skip = unpack<T>(skips[v % 2]);
        if (v < 2) load_skip(v + 2);
        WF_UNROLL
        for (int i = 0; i < kVector; ++i) g[v].value[i] += skip.value[i];
      }
      if (e.mask_from_branch()) {
        const Channels branch = unpack<T>(branches[v]);
        WF_UNROLL
        for (int i = 0; i < kVector; ++i) {
          const float b = branch.value[i];
          const float alive = e.shift != nullptr ? b + shift.value[i] : b;
          g[v].value[i] = alive > 0.0f ? g[v].value[i] : 0.0f;
        }
      } else if (e.relu) {
        const Channels out = unpack<T>(load_packed<T>(e.activation, at));
        WF_UNROLL
        for (int i = 0; i < kVector; ++i)
          g[v].value[i] = out.value[i] > 0.0f ? g[v].value[i] : 0.0f;
      }
      if (e.grad != nullptr) store_channels<T>(e.grad, at, g[v]);
      if (e.scaled_grad != nullptr) store_channels<T>(e.scaled_grad, at, scaled(scale, g[v]));
    }
    if (!sums) continue;
    WF_UNROLL
    for (int span = 0; span < L::kSpans; ++span) {
      const int column = n * L::kBlockN + (step * L::kSpans + span) * 32;
      store_sums<T, L>(problem, phase, e, rows, g, branches, span, m, column, consumer, buffer);
    }
  }
  // The next tile of this consumer starts with buffer 0 again.
  if (sums) sync_tile<L>(consumer);
}

// Second stage of the column sums: [partial_rows, N] to [batch, N], always in the same order. One
// thread per sample and column.
constexpr int kSumThreads = 128;

struct SumParams {
  Problem problem;
  const float* partial0;
  const float* partial1;
  ColumnSums sums;
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
      if (params.sums.t0 != nullptr) sum0 += load_global<float>(params.partial0 + at);
      if (params.sums.t1 != nullptr) sum1 += load_global<float>(params.partial1 + at);
    }
  }
  const int64_t at = static_cast<int64_t>(sample) * params.sums.stride + column;
  if (params.sums.t0 != nullptr) store_global(params.sums.t0 + at, sum0);
  if (params.sums.t1 != nullptr) store_global(params.sums.t1 + at, sum1);
}

}  // namespace wf
