// What the kernels compute and in which order: convolutions as implicit GEMMs, their tiles,
// and the schedule of the persistent thread blocks. Plain integers, the same on host and device;
// tested exhaustively on the host (tests/csrc/test_geometry.py).
//
// One GEMM for everything:
//
//   out[m, n] = sum over taps and depth of A[pixel(m) + tap, k] * B[tap, k, n]
//
//              A            rows m               taps         depth k        columns n
//   fprop      x            samples x P x Q      R x S        in channels    out channels
//   dgrad      A * g        samples x H x W      R x S        out channels   in channels
//   linear     x or A * g   samples x tokens     1            in / out       out / in
//
// The pixels of dgrad with stride s fall into s x s phases (h % s, w % s). A pixel of one phase
// sees a fixed subset of the taps, and within a phase
//
//   dx[f + s*i] = sum of ag[i + d / s] * w[r] over taps r whose d = f + pad - r*dilation divides
//
// is a convolution with stride 1: no product with a zero is ever computed, and all phases are tiles
// of one launch.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define WF_HOST_DEVICE __host__ __device__ inline
#else
#define WF_HOST_DEVICE inline
#endif

namespace wf {

// One tile is 128 rows. Tiles of 64 and 128 columns belong to one consumer warpgroup: two m64 wgmma
// that share B. Two warpgroups work on different tiles (ping-pong): one multiplies while the other
// runs its epilogue, which moves up to five tensors of 16 bits per element and is what the
// memory-bound layers wait for. Tiles of 256 columns belong to both, 64 rows each (cooperative).
// 128 x 128 fp32 accumulators take 128 of a thread's 232 registers, and so do 64 x 256.
//
// Two thread blocks form a cluster and take two tiles of neighbouring rows; each loads half of B
// for both: 24 KB from L2 for a 128 x 128 x 64 slice, where a block alone would need 32.
constexpr int kBlockM = 128;
constexpr int kBlockK = 64;  // 128 bytes: one swizzle row
constexpr int kMostPhases = 4;
constexpr int kCluster = 2;  // thread blocks of a cluster

// Slices of a filter of 64 columns that fit into shared memory beside 8 stages of A: 72 KB, a 3x3
// filter of 64 channels. Loaded for every tile again, they would be a third of what arrives.
constexpr int kMostKeptSlices = 9;

// Slices of a sum from which a cooperative tile gains more than it loses. A slice of it saves 256
// cycles (operands from L2 at 10 TB/s) to 526 (at 6) over two of 128 columns; its epilogue, counted
// as 5,000 cycles, hides behind no other tile's multiplication.
constexpr int kLongSum = 18;

// A cross-correlation of [batch, height, width, in_channels] with [out_channels, filter_h,
// filter_w, in_channels]; all memory dense, channels last.
struct Convolution {
  int batch, height, width, in_channels, out_channels;
  int filter_h, filter_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;

  WF_HOST_DEVICE int out_height() const {
    return (height + 2 * pad_h - dilation_h * (filter_h - 1) - 1) / stride_h + 1;
  }
  WF_HOST_DEVICE int out_width() const {
    return (width + 2 * pad_w - dilation_w * (filter_w - 1) - 1) / stride_w + 1;
  }
};

// One spatial axis of one phase.
struct Axis {
  int size;                       // pixels of the output in this phase
  int out_first, out_step;        // position of pixel i in the output: out_first + i * out_step
  int base, base_step;            // filter base of pixel i in A: base + i * base_step
  int taps;                       // taps that this phase sees
  int tap_first, tap_step;        // filter index of the k-th of them
  int offset_first, offset_step;  // its distance from the filter base in A, never negative

  WF_HOST_DEVICE int tap(int k) const { return tap_first + k * tap_step; }
  WF_HOST_DEVICE int offset(int k) const { return offset_first + k * offset_step; }
};

WF_HOST_DEVICE Axis fprop_axis(int out_size, int filter, int stride, int pad, int dilation) {
  return Axis{out_size, 0, 1, -pad, stride, filter, 0, 1, 0, dilation};
}

WF_HOST_DEVICE Axis dgrad_axis(int phase, int in_size, int filter, int stride, int pad,
                               int dilation) {
  Axis axis{};
  axis.size = in_size > phase ? (in_size - phase + stride - 1) / stride : 0;
  axis.out_first = phase;
  axis.out_step = stride;
  axis.base_step = 1;
  axis.tap_step = 1;
  // Taps r0, r0 + tap_step, ... divide: r * dilation runs through the residues of stride.
  while (axis.tap_step * dilation % stride != 0) ++axis.tap_step;
  int first = 0;
  while (first < axis.tap_step && (phase + pad - first * dilation) % stride != 0) ++first;
  if (first == axis.tap_step || first >= filter) return axis;  // no taps: this phase gets zeros
  axis.taps = (filter - 1 - first) / axis.tap_step + 1;
  axis.tap_first = first;
  const int step = axis.tap_step * dilation / stride;
  axis.offset_first = (axis.taps - 1) * step;
  axis.offset_step = -step;
  axis.base = (phase + pad - first * dilation) / stride - axis.offset_first;
  return axis;
}

struct Phase {
  Axis h, w;
  int rows;              // batch * h.size * w.size
  int pixels;            // h.size * w.size
  int m_tiles;           // ceil(rows / kBlockM)
  int slices;            // 64-deep slices of one tile's sum: taps * ceil(depth / 64)
  int samples_per_tile;  // most samples that the rows of one tile belong to
  int first_partial;     // row of this phase's first tile in the partial column sums
};

struct Problem {
  Phase phases[kMostPhases];
  int num_phases;
  int batch, out_height, out_width;  // of the tensor that is written
  int a_height, a_width;             // of the tensor that A is
  int depth, columns;
  int filter_h, filter_w;
  int depth_slices;
  int block_n, n_tiles;
  int m_pairs;      // pairs of row tiles, most of any phase
  int tiled;        // A is read as the matrix [rows, depth], without im2col
  int keep_filter;  // all tiles need the same slices of B, and these fit: they are loaded once
  int tile_slots;   // m_pairs * num_phases * n_tiles; a few of them may be empty
  int partial_rows;
};

WF_HOST_DEVICE void finish_problem(Problem& problem, int block_n) {
  problem.block_n = block_n;
  problem.n_tiles = (problem.columns + block_n - 1) / block_n;
  problem.depth_slices = (problem.depth + kBlockK - 1) / kBlockK;
  problem.m_pairs = 0;
  problem.partial_rows = 0;
  for (int i = 0; i < problem.num_phases; ++i) {
    Phase& phase = problem.phases[i];
    phase.pixels = phase.h.size * phase.w.size;
    phase.rows = problem.batch * phase.pixels;
    phase.m_tiles = (phase.rows + kBlockM - 1) / kBlockM;
    phase.slices = phase.h.taps * phase.w.taps * problem.depth_slices;
    const int most = phase.pixels > 0 ? (kBlockM - 2) / phase.pixels + 2 : 0;
    phase.samples_per_tile = most < problem.batch ? most : problem.batch;
    phase.first_partial = problem.partial_rows;
    problem.partial_rows += phase.m_tiles * phase.samples_per_tile;
    const int pairs = (phase.m_tiles + kCluster - 1) / kCluster;
    if (pairs > problem.m_pairs) problem.m_pairs = pairs;
  }
  problem.tile_slots = problem.m_pairs * problem.num_phases * problem.n_tiles;
  problem.keep_filter = block_n == 64 && problem.n_tiles * problem.num_phases == 1 &&
                        problem.phases[0].slices <= kMostKeptSlices;
}

WF_HOST_DEVICE int clusters_of(int processors) {
  return processors > kCluster ? processors / kCluster : 1;
}

// 128 columns, unless that computes more than a quarter too many: for 64 and 192 channels.
WF_HOST_DEVICE int choose_narrow(int columns) {
  const int wide = (columns + 127) / 128 * 128;
  const int narrow = (columns + 63) / 64 * 64;
  return 4 * wide > 5 * narrow ? 64 : 128;
}

// Whether a problem that has tiles of 128 columns is better off with 256: sums are long, and
// neither the last column tile nor the last round of tiles over the clusters costs more than an
// eighth.
WF_HOST_DEVICE bool is_wide(const Problem& problem, int clusters) {
  int slices = 0;
  for (int i = 0; i < problem.num_phases; ++i) slices += problem.phases[i].slices;
  if (problem.block_n != 128 || clusters < 1 || slices < kLongSum * problem.num_phases)
    return false;
  const int64_t n_tiles = (problem.columns + 255) / 256;
  const int64_t slots = problem.tile_slots / problem.n_tiles * n_tiles;
  const int64_t rounds = (slots + clusters - 1) / clusters;
  const int64_t rounds_of_narrow = (int64_t{problem.tile_slots} + clusters - 1) / clusters;
  return 8 * 2 * n_tiles <= 9 * problem.n_tiles && 8 * 2 * rounds <= 9 * rounds_of_narrow;
}

WF_HOST_DEVICE bool is_matrix(const Convolution& conv) {
  return conv.filter_h * conv.filter_w * conv.stride_h * conv.stride_w == 1 && conv.pad_h == 0 &&
         conv.pad_w == 0;
}

// `clusters`: how many work at once, which the width of tiles depends on; 0: tiles of 128 columns
// at most. Nothing that callers allocate depends on it.
WF_HOST_DEVICE Problem problem_of(const Convolution& conv, bool backward, int clusters = 0) {
  Problem problem{};
  problem.num_phases = backward ? conv.stride_h * conv.stride_w : 1;
  for (int i = 0; i < problem.num_phases && i < kMostPhases; ++i) {
    Phase& phase = problem.phases[i];
    if (backward) {
      phase.h = dgrad_axis(i / conv.stride_w, conv.height, conv.filter_h, conv.stride_h, conv.pad_h,
                           conv.dilation_h);
      phase.w = dgrad_axis(i % conv.stride_w, conv.width, conv.filter_w, conv.stride_w, conv.pad_w,
                           conv.dilation_w);
    } else {
      phase.h =
          fprop_axis(conv.out_height(), conv.filter_h, conv.stride_h, conv.pad_h, conv.dilation_h);
      phase.w =
          fprop_axis(conv.out_width(), conv.filter_w, conv.stride_w, conv.pad_w, conv.dilation_w);
    }
  }
  problem.batch = conv.batch;
  problem.out_height = backward ? conv.height : conv.out_height();
  problem.out_width = backward ? conv.width : conv.out_width();
  problem.a_height = backward ? conv.out_height() : conv.height;
  problem.a_width = backward ? conv.out_width() : conv.width;
  problem.depth = backward ? conv.out_channels : conv.in_channels;
  problem.columns = backward ? conv.in_channels : conv.out_channels;
  problem.filter_h = conv.filter_h;
  problem.filter_w = conv.filter_w;
  problem.tiled = is_matrix(conv);
  finish_problem(problem, choose_narrow(problem.columns));
  if (is_wide(problem, clusters)) finish_problem(problem, 256);
  return problem;
}

// --- schedule ---

// What a cluster works on at a time: row tiles 2 * pair and 2 * pair + 1, one for each of its
// blocks. Where the number of tiles is odd, the last one does not exist; its block loads zeros,
// multiplies along, because the other one needs its half of B, and writes nothing.
struct Work {
  int slot;  // position in the order of all work; problem.tile_slots or more: no more work
  int phase, pair, n;
};

// Column tiles are neighbours: they run at the same time and share their rows of A in L2 (A is read
// from memory once, the filter stays in L2). Then come the phases of the same rows, which share A
// too. They have 1, 2, 2 and 4 taps for a 3x3 filter: the order rotates with the rows, so that no
// cluster meets the same phase again and again.
WF_HOST_DEVICE Work work_at(const Problem& problem, int slot) {
  Work work{slot, 0, 0, 0};
  const int row = slot / problem.n_tiles;
  work.n = slot - row * problem.n_tiles;
  work.pair = row / problem.num_phases;
  work.phase = (row + work.pair) % problem.num_phases;
  return work;
}

// The first work that exists at `slot` or `step`, 2*step, ... behind it.
WF_HOST_DEVICE Work next_work(const Problem& problem, int slot, int step) {
  while (slot < problem.tile_slots) {
    const Work work = work_at(problem, slot);
    if (work.pair * kCluster < problem.phases[work.phase].m_tiles) return work;
    slot += step;
  }
  return Work{slot, 0, 0, 0};
}

// A slice of a tile's sum: which tap of the phase, which 64 channels. Slices are walked by
// additions to numbers of its own: divisions, or a phase's numbers read again for every slice,
// would take the producer longer than the slice takes to multiply.
struct Slice {
  int channel = 0;         // first channel
  int tap;                 // of the filter
  int offset_h, offset_w;  // its distance from the filter base in A

  WF_HOST_DEVICE Slice(const Problem& problem, const Phase& phase)
      : tap(phase.h.tap_first * problem.filter_w + phase.w.tap_first),
        offset_h(phase.h.offset_first),
        offset_w(phase.w.offset_first),
        depth(problem.depth),
        row_taps(phase.w.taps),
        left(phase.w.taps),
        tap_step(phase.w.tap_step),
        step_w(phase.w.offset_step),
        step_h(phase.h.offset_step),
        next_row(phase.h.tap_step * problem.filter_w - (phase.w.taps - 1) * phase.w.tap_step) {}

  WF_HOST_DEVICE void advance() {
    channel += kBlockK;
    if (channel < depth) return;
    channel = 0;
    if (--left > 0) {
      tap += tap_step, offset_w += step_w;
      return;
    }
    left = row_taps;
    tap += next_row, offset_w -= (row_taps - 1) * step_w, offset_h += step_h;
  }

 private:
  int depth, row_taps, left, tap_step, step_w, step_h;
  int next_row;  // from the last tap of a row of the filter to the first of the next one
};

// A row of a tile: its sample and its pixel in the tensor that is written.
struct Row {
  int sample;
  int64_t pixel;
};

WF_HOST_DEVICE Row row_at(const Problem& problem, const Phase& phase, int row) {
  const int sample = row / phase.pixels;
  const int pixel = row - sample * phase.pixels;
  const int i = pixel / phase.w.size;
  const int h = phase.h.out_first + i * phase.h.out_step;
  const int w = phase.w.out_first + (pixel - i * phase.w.size) * phase.w.out_step;
  return Row{sample,
             (static_cast<int64_t>(sample) * problem.out_height + h) * problem.out_width + w};
}

// Filter base of the first row of a tile, as im2col loads want it.
struct Base {
  int sample, h, w;
};

WF_HOST_DEVICE Base base_at(const Phase& phase, int row) {
  const int sample = row / phase.pixels;
  const int pixel = row - sample * phase.pixels;
  const int i = pixel / phase.w.size;
  const int j = pixel - i * phase.w.size;
  return Base{sample, phase.h.base + i * phase.h.base_step, phase.w.base + j * phase.w.base_step};
}

// --- column sums ---

// Partial sums are kept per tile and sample: row first_partial + m * samples_per_tile + j holds the
// sum over the rows of tile m that belong to the j-th sample of that tile. The second stage adds a
// sample's rows phase by phase, tile by tile: always in the same order, whichever block computed
// them.
WF_HOST_DEVICE int partial_row(const Phase& phase, int m, int sample) {
  return phase.first_partial + m * phase.samples_per_tile + sample - m * kBlockM / phase.pixels;
}

struct TileRange {
  int first, last;  // inclusive
};

WF_HOST_DEVICE TileRange tiles_of_sample(const Phase& phase, int sample) {
  return TileRange{sample * phase.pixels / kBlockM, ((sample + 1) * phase.pixels - 1) / kBlockM};
}

}  // namespace wf
