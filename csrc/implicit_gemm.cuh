// Portable tensor-core convolution (sm_80 and later): implicit GEMM, forward and input gradient.
//
//     C[m, n] = sum_k A[m, k] * B[k, n]      m = (sample, pixel), n = channel, k = (tap, channel)
//
// A block of 4 warps computes kBlockM x kBlockN in steps of 32 along k. cp.async copies 16 bytes at
// a time into a ring of kStages stages; what lies outside of image, filter or channels arrives as
// zeros and is not read. 64-byte rows of a stage are swizzled so that neither the copies nor
// ldmatrix meet a bank twice. A 1x1 filter makes this a plain GEMM, which is what linear maps use.
//
// The epilogue goes through shared memory: fragments become rows, each lane gets 8 channels of a
// pixel, and residual, branch, masks and results are read and written 16 bytes at a time, 128
// contiguous bytes for 8 lanes. Each warp handles its own 64 columns without block barriers.
#pragma once

#include "conv.h"
#include "device.h"
#include "epilogue.h"
#include "geometry.h"
#include "launch.h"

namespace wf {

enum class Direction { kForward, kInputGradient };

// Address of 16-byte piece `chunk` (0 to 3) of row `row` in a tile of 64-byte rows.
WF_HOST_DEVICE uint32_t swizzle_64(int row, int chunk) {
  return static_cast<uint32_t>(row * 64 + ((chunk ^ ((row >> 1) & 3)) << 4));
}

// The same in a tile of rows of 128 bytes or a multiple of it.
WF_HOST_DEVICE uint32_t swizzle_wide(int row, int chunk, int row_bytes) {
  return static_cast<uint32_t>(row * row_bytes + ((chunk ^ (row & 7)) << 4));
}

// A warp's fp32 accumulators on their way to rows of 64 columns: pieces of 4 columns (0 to 15).
WF_HOST_DEVICE uint32_t swizzle_staging(int row, int piece) {
  return static_cast<uint32_t>(row * 256 + ((piece ^ ((row & 3) << 1)) << 4));
}

template <class T, Direction kDirection, int kBlockM_, int kBlockN_, int kMinBlocks_>
struct ImplicitGemm {
  using Params = ConvParams;
  static constexpr bool kForward = kDirection == Direction::kForward;
  static constexpr int kBlockM = kBlockM_, kBlockN = kBlockN_, kBlockK = 32, kStages = 4;
  static constexpr int kWarps = 4, kThreads = kWarps * 32, kMinBlocks = kMinBlocks_;
  static constexpr int kWarpN = 64, kWarpsN = kBlockN / kWarpN, kWarpsM = kWarps / kWarpsN;
  static constexpr int kWarpM = kBlockM / kWarpsM;
  static constexpr int kTilesM = kWarpM / 16, kTilesN = kWarpN / 8;
  static constexpr uint32_t kBytesA = kBlockM * kBlockK * 2, kBytesB = kBlockN * kBlockK * 2;
  static constexpr uint32_t kStageBytes = kBytesA + kBytesB;
  static constexpr uint32_t kStagingBytes = kBlockM * kBlockN * 4;
  static constexpr uint32_t kSharedBytes =
      kStages * kStageBytes > kStagingBytes ? kStages * kStageBytes : kStagingBytes;
  static constexpr bool kBlockBarriersOnly = true;
  static_assert(kWarpsN * kWarpN == kBlockN && kWarpM % 16 == 0, "whole warp tiles");

  // 16-byte copies per thread and step.
  static constexpr int kCopiesA = kBlockM * 4 / kThreads, kCopiesB = kBlockN * 4 / kThreads;
  static constexpr int kRowChunksB = kBlockN / 8;  // of a row of B, gradient only

  // --- where this block works --------------------------------------------------------------------

  struct Tile {
    Phase phase;     // forward: the whole output
    int row;         // first row (sample, pixel) of the phase
    int rows;        // of the phase
    int column;      // first channel
    int64_t strip;   // first strip of this tile, over all phases
    Taps taps_h, taps_w;
    int step_h, step_w;
  };

  WF_DEVICE static Tile locate(const Params& p) {
    const uint32_t columns = ceil_div<uint32_t>(p.columns, kBlockN);
    const uint32_t row_tile = block_index() / columns;
    Tile tile;
    tile.column = static_cast<int>(block_index() - row_tile * columns) * kBlockN;
    tile.strip = int64_t{row_tile} * kWarpsM;
    if constexpr (kForward) {
      tile.phase.rows_h = p.height.output, tile.phase.rows_w = p.width.output;
      tile.taps_h = forward_taps(p.height), tile.taps_w = forward_taps(p.width);
      tile.step_h = p.height.stride, tile.step_w = p.width.stride;
    } else {
      for_each_phase(p.height, p.width, p.batch, kBlockM, [&](const Phase& phase, int64_t tiles) {
        tile.phase = phase;
        return row_tile >= phase.first_tile + tiles;
      });
      tile.taps_h = gradient_taps(p.height, tile.phase.h);
      tile.taps_w = gradient_taps(p.width, tile.phase.w);
      tile.step_h = tile.step_w = 1;
    }
    tile.row = static_cast<int>(row_tile - tile.phase.first_tile) * kBlockM;
    tile.rows = p.batch * tile.phase.pixels();
    return tile;
  }

  WF_DEVICE static Divider by_pixels(const Params& p, const Tile& tile) {
    if (kForward || (p.height.stride == 1 && p.width.stride == 1)) return p.by_pixels;
    return Divider(tile.phase.pixels());
  }
  WF_DEVICE static Divider by_width(const Params& p, const Tile& tile) {
    if (kForward || (p.height.stride == 1 && p.width.stride == 1)) return p.by_width;
    return Divider(tile.phase.rows_w);
  }

  // --- copies from global to shared memory -------------------------------------------------------

  // Rows of A that this thread copies (row thread / 4 + 32 * i, piece thread % 4), and where it is
  // along k.
  struct CopyA {
    uint32_t image[kCopiesA];
    int h[kCopiesA], w[kCopiesA];  // pixel of tap offset 0; far outside where the row is none
    int tap_h = 0, tap_w = 0;
    int channel;
    int offset[kCopiesA];  // of the tap's pixel from the image's first element
    uint32_t inside;       // bit i: that pixel of row i exists
  };

  WF_DEVICE static CopyA start_a(const Params& p, const Tile& tile) {
    CopyA a;
    const int thread = thread_index();
    const Divider pixels = by_pixels(p, tile), width = by_width(p, tile);
    WF_UNROLL
    for (int i = 0; i < kCopiesA; ++i) {
      const int row = tile.row + thread / 4 + i * (kThreads / 4);
      a.image[i] = 0;
      a.h[i] = a.w[i] = -(1 << 29);
      if (row >= tile.rows) continue;
      const int sample = static_cast<int>(pixels(row));
      const int pixel = row - sample * tile.phase.pixels();
      const int y = static_cast<int>(width(pixel)), x = pixel - y * tile.phase.rows_w;
      a.image[i] = static_cast<uint32_t>(sample);
      a.h[i] = y * tile.step_h, a.w[i] = x * tile.step_w;
    }
    a.channel = thread % 4 * 8;
    if (kForward)
      while (a.channel >= p.depth) a.channel -= p.depth, next_tap(a, tile);
    place_a(p, tile, a);
    return a;
  }

  WF_DEVICE static void next_tap(CopyA& a, const Tile& tile) {
    if (++a.tap_w == tile.taps_w.count) a.tap_w = 0, ++a.tap_h;
  }

  // Where the current tap lies for each row.
  WF_DEVICE static void place_a(const Params& p, const Tile& tile, CopyA& a) {
    const int in_height = kForward ? p.height.input : p.height.output;
    const int in_width = kForward ? p.width.input : p.width.output;
    const bool exists = a.tap_h < tile.taps_h.count;
    a.inside = 0;
    const int dh = tile.taps_h.offset + a.tap_h * tile.taps_h.offset_step;
    const int dw = tile.taps_w.offset + a.tap_w * tile.taps_w.offset_step;
    WF_UNROLL
    for (int i = 0; i < kCopiesA; ++i) {
      const int h = a.h[i] + dh, w = a.w[i] + dw;
      const bool inside = exists && static_cast<uint32_t>(h) < static_cast<uint32_t>(in_height) &&
                          static_cast<uint32_t>(w) < static_cast<uint32_t>(in_width);
      a.inside |= uint32_t{inside} << i;
      a.offset[i] = inside ? (h * in_width + w) * p.depth : 0;
    }
  }

  WF_DEVICE static void copy_a(const Params& p, const CopyA& a, uint32_t stage) {
    const int thread = thread_index();
    const bool channel_ok = kForward || a.channel < p.depth;
    const int channel = channel_ok ? a.channel : 0;
    const uint32_t image_size = kForward ? p.height.input * p.width.input * p.depth
                                         : p.height.output * p.width.output * p.depth;
    WF_UNROLL
    for (int i = 0; i < kCopiesA; ++i) {
      const int row = thread / 4 + i * (kThreads / 4);
      const T* image = static_cast<const T*>(p.input) + uint64_t{a.image[i]} * image_size;
      cp_async_16(stage + swizzle_64(row, thread % 4), image + (a.offset[i] + channel),
                  (a.inside >> i & 1) && channel_ok);
    }
  }

  // Forward runs through (tap, channel) without a gap; a gradient starts each tap on a new step, so
  // that its rows of B belong to one tap.
  WF_DEVICE static void advance_a(const Params& p, const Tile& tile, CopyA& a) {
    a.channel += kBlockK;
    if constexpr (kForward) {
      if (a.channel < p.depth) return;
      while (a.channel >= p.depth) a.channel -= p.depth, next_tap(a, tile);
    } else {
      if (a.channel - thread_index() % 4 * 8 < p.depth) return;
      a.channel = thread_index() % 4 * 8;
      next_tap(a, tile);
    }
    place_a(p, tile, a);
  }

  // B, forward: rows are columns n of the result, k contiguous. Gradient: rows are k, n contiguous.
  WF_DEVICE static void copy_b(const Params& p, const Tile& tile, const CopyA& a, int step,
                               uint32_t stage) {
    const int thread = thread_index();
    const T* filter = static_cast<const T*>(p.filter);
    if constexpr (kForward) {
      const int depth = p.height.kernel * p.width.kernel * p.depth;
      const int k = step * kBlockK + thread % 4 * 8;
      WF_UNROLL
      for (int i = 0; i < kCopiesB; ++i) {
        const int row = thread / 4 + i * (kThreads / 4), n = tile.column + row;
        const bool ok = n < p.columns && k < depth;
        cp_async_16(stage + swizzle_64(row, thread % 4), filter + (ok ? int64_t{n} * depth + k : 0),
                    ok);
      }
    } else {
      const int tap = (tile.taps_h.first + a.tap_h * tile.taps_h.step) * p.width.kernel +
                      tile.taps_w.first + a.tap_w * tile.taps_w.step;
      const int taps = p.height.kernel * p.width.kernel;
      const int k0 = a.channel - thread % 4 * 8;
      WF_UNROLL
      for (int i = 0; i < kCopiesB; ++i) {
        const int row = thread / kRowChunksB + i * (kThreads / kRowChunksB), k = k0 + row;
        const int chunk = thread % kRowChunksB, n = tile.column + chunk * 8;
        const bool ok = n < p.columns && k < p.depth;
        cp_async_16(stage + swizzle_wide(row, chunk, kBlockN * 2),
                    filter + (ok ? (int64_t{k} * taps + tap) * p.columns + n : 0), ok);
      }
    }
  }

  WF_DEVICE static int count_steps(const Params& p, const Tile& tile) {
    const int taps = tile.taps_h.count * tile.taps_w.count;
    return kForward ? ceil_div(taps * p.depth, kBlockK) : taps * ceil_div(p.depth, kBlockK);
  }

  // --- the product -------------------------------------------------------------------------------

  struct Fragments {
    uint32_t a[kTilesM][4];
    uint32_t b[kTilesN / 2][4];  // two tiles of 8 columns each
  };

  // Operands of half a step (k = 16 * half ...) from a stage.
  WF_DEVICE static void load_fragments(Fragments& fragments, uint32_t stage, int half) {
    const int lane = thread_index() % 32, warp = thread_index() / 32;
    const int warp_m = warp / kWarpsN, warp_n = warp % kWarpsN;
    WF_UNROLL
    for (int i = 0; i < kTilesM; ++i)
      ldmatrix_x4(fragments.a[i], stage + swizzle_64(warp_m * kWarpM + i * 16 + lane % 16,
                                                     half * 2 + lane / 16));
    const uint32_t stage_b = stage + kBytesA;
    WF_UNROLL
    for (int j = 0; j < kTilesN / 2; ++j) {
      if constexpr (kForward) {
        const int row = warp_n * kWarpN + j * 16 + lane % 8 + lane / 16 * 8;
        ldmatrix_x4(fragments.b[j], stage_b + swizzle_64(row, half * 2 + lane / 8 % 2));
      } else {
        const int chunk = warp_n * (kWarpN / 8) + j * 2 + lane / 16;
        ldmatrix_x4_trans(fragments.b[j],
                          stage_b + swizzle_wide(half * 16 + lane % 16, chunk, kBlockN * 2));
      }
    }
  }

  using Accumulators = float[kTilesM][kTilesN][4];

  WF_DEVICE static void multiply(Accumulators& sums, const Fragments& fragments) {
    WF_UNROLL
    for (int i = 0; i < kTilesM; ++i) {
      WF_UNROLL
      for (int j = 0; j < kTilesN; ++j)
        mma_16x8x16<T>(sums[i][j], fragments.a[i], fragments.b[j / 2][j % 2 * 2],
                       fragments.b[j / 2][j % 2 * 2 + 1]);
    }
  }

  WF_DEVICE static void product(const Params& p, const Tile& tile, Accumulators& sums) {
    const uint32_t base = shared_base();
    const int steps = count_steps(p, tile);
    CopyA a = start_a(p, tile);
    int copied = 0;
    auto copy_step = [&](int slot) {
      if (copied < steps) {
        const uint32_t stage = base + slot * kStageBytes;
        copy_a(p, a, stage);
        copy_b(p, tile, a, copied, stage + kBytesA);
        advance_a(p, tile, a);
        ++copied;
      }
      cp_async_commit();  // an empty group keeps the count of the waits
    };
    WF_UNROLL
    for (int slot = 0; slot < kStages - 1; ++slot) copy_step(slot);
    int slot = 0;
    for (int step = 0; step < steps; ++step) {
      cp_async_wait<kStages - 2>();
      sync_block();  // everybody's copies have landed, and the slot below is no longer read
      const uint32_t stage = base + slot * kStageBytes;
      Fragments first;
      load_fragments(first, stage, 0);
      copy_step(slot == 0 ? kStages - 1 : slot - 1);
      Fragments second;
      load_fragments(second, stage, 1);
      multiply(sums, first);
      multiply(sums, second);
      slot = slot == kStages - 1 ? 0 : slot + 1;
    }
    cp_async_wait<0>();
    sync_block();
  }

  // --- from accumulators to rows -----------------------------------------------------------------

  WF_DEVICE static uint32_t staging() {
    return shared_base() + thread_index() / 32 * (kWarpM * kWarpN * 4);
  }

  WF_DEVICE static void stage_sums(const Accumulators& sums) {
    const int lane = thread_index() % 32;
    WF_UNROLL
    for (int i = 0; i < kTilesM; ++i) {
      WF_UNROLL
      for (int j = 0; j < kTilesN; ++j) {
        WF_UNROLL
        for (int half = 0; half < 2; ++half) {
          const int row = i * 16 + half * 8 + lane / 4;
          const uint32_t at = staging() + swizzle_staging(row, j * 2 + lane % 4 / 2);
          store_shared(at + lane % 2 * 8, Vec8{bits_of_float(sums[i][j][half * 2]),
                                               bits_of_float(sums[i][j][half * 2 + 1])});
        }
      }
    }
    sync_warp();
  }

  // 8 columns of a row of this warp's tile. Half of the lanes read their upper piece first, so that
  // 8 lanes meet 8 different groups of banks.
  WF_DEVICE static Channels staged(int row, int chunk) {
    const int swap = chunk >> 2;
    const Vec16 first = load_shared<Vec16>(staging() + swizzle_staging(row, chunk * 2 + swap));
    const Vec16 second =
        load_shared<Vec16>(staging() + swizzle_staging(row, chunk * 2 + (swap ^ 1)));
    Channels channels;
    WF_UNROLL
    for (int i = 0; i < 4; ++i) {
      channels.value[i] = float_of_bits(swap ? second.word[i] : first.word[i]);
      channels.value[4 + i] = float_of_bits(swap ? first.word[i] : second.word[i]);
    }
    return channels;
  }

  // The part of this warp that every epilogue needs.
  struct WarpRows {
    int first_row;   // of this warp's rows; none if it is past tile.rows
    int lane_row;    // of 4 consecutive rows, the lane's
    int chunk;       // 8 columns of 64
    int column;
    bool column_ok;
    Divider by_pixels;
  };

  WF_DEVICE static WarpRows warp_rows(const Params& p, const Tile& tile) {
    const int lane = thread_index() % 32, warp = thread_index() / 32;
    WarpRows mine;
    mine.first_row = tile.row + warp / kWarpsN * kWarpM;
    mine.lane_row = lane / 8, mine.chunk = lane % 8;
    mine.column = tile.column + warp % kWarpsN * kWarpN + mine.chunk * kVector;
    mine.column_ok = mine.column < p.columns;
    mine.by_pixels = by_pixels(p, tile);
    return mine;
  }

  // Samples of the result that image `image` becomes.
  struct Variants {
    int64_t first;
    int count;
  };
  WF_DEVICE static Variants variants_of(const Params& p, int image) {
    if (p.order == nullptr) return {image, 1};
    const int64_t first = load_global<int64_t>(p.first_of + image);
    return {first, static_cast<int>(load_global<int64_t>(p.first_of + image + 1) - first)};
  }

  WF_DEVICE static void finish_forward(const Params& p, const Tile& tile) {
    const WarpRows mine = warp_rows(p, tile);
    if (mine.first_row >= tile.rows || !mine.column_ok) return;
    const int left = tile.rows - mine.first_row;  // first_row + kWarpM may be past 2^31
    const int end = mine.first_row + (left < kWarpM ? left : kWarpM);
    const int pixels = tile.phase.pixels();
    int most = 1;  // variants of an image of these rows
    if (p.order != nullptr) {
      most = 0;
      const int last_image = static_cast<int>(mine.by_pixels(end - 1));
      for (int image = static_cast<int>(mine.by_pixels(mine.first_row)); image <= last_image;
           ++image) {
        const int count = variants_of(p, image).count;
        most = count > most ? count : most;
      }
    }
    for (int variant = 0; variant < most; ++variant) {
      Channels scale{}, shift{};
      Variants variants{};
      int64_t sample = 0;
      int loaded = -1;  // image whose sample and table rows these are
      for (int row = mine.first_row + mine.lane_row; row < end; row += 4) {
        const int image = static_cast<int>(mine.by_pixels(row));
        if (image != loaded) {
          loaded = image;
          variants = variants_of(p, image);
          if (variant < variants.count) {
            sample = variants.first + variant;
            if (p.order != nullptr) sample = load_global<int64_t>(p.order + sample);
            const int64_t at = sample * p.forward.table_stride + mine.column;
            scale = load_table(p.forward.scale + at);
            if (p.forward.shift != nullptr) shift = load_table(p.forward.shift + at);
          }
        }
        if (variant >= variants.count) continue;
        const int64_t at = (sample * pixels + (row - image * pixels)) * p.columns + mine.column;
        forward_channels<T>(p.forward, staged(row - mine.first_row, mine.chunk), scale, shift,
                            at);
      }
    }
  }

  // Offset of a pixel's channels in the result of a gradient.
  WF_DEVICE static int64_t gradient_offset(const Params& p, const Tile& tile,
                                           const Divider& by_width, int row, int sample) {
    if (p.height.stride == 1 && p.width.stride == 1) return int64_t{row} * p.columns;
    const int pixel = row - sample * tile.phase.pixels();
    const int y = static_cast<int>(by_width(pixel)), x = pixel - y * tile.phase.rows_w;
    const int h = y * p.height.stride + tile.phase.h, w = x * p.width.stride + tile.phase.w;
    return ((int64_t{sample} * p.height.input + h) * p.width.input + w) * p.columns;
  }

  WF_DEVICE static void finish_backward(const Params& p, const Tile& tile) {
    const WarpRows mine = warp_rows(p, tile);
    if (mine.first_row >= tile.rows) return;
    const BackwardEpilogue& epilogue = p.backward;
    const int warp_m = thread_index() / 32 / kWarpsN;
    const Divider width = by_width(p, tile);
    ColumnSums sums(epilogue, (tile.strip + warp_m) * epilogue.span,
                    static_cast<int>(mine.by_pixels(mine.first_row)), p.columns, mine.column,
                    mine.column_ok);
    const bool summed = epilogue.partial0 != nullptr || epilogue.partial1 != nullptr;
    Channels scale{}, shift{};
    int loaded = -1;  // sample whose table rows these are
    for (int visit = 0; visit < kWarpM / 4; ++visit) {
      const int low_row = mine.first_row + visit * 4;
      if (low_row >= tile.rows) break;
      const int row = low_row + mine.lane_row;
      const bool row_ok = row < tile.rows;
      const int sample = row_ok ? static_cast<int>(mine.by_pixels(row)) : -1;
      Channels g = staged(visit * 4 + mine.lane_row, mine.chunk), branch{};
      if (row_ok && mine.column_ok) {
        if (sample != loaded) {
          const int64_t at = int64_t{sample} * epilogue.table_stride + mine.column;
          if (epilogue.scale != nullptr) scale = load_table(epilogue.scale + at);
          if (epilogue.shift != nullptr) shift = load_table(epilogue.shift + at);
          loaded = sample;
        }
        const int64_t at = gradient_offset(p, tile, width, row, sample) + mine.column;
        backward_mask<T>(epilogue, g, branch, shift, at);
        if (epilogue.grad != nullptr) store_channels<T>(epilogue.grad, at, g);
        if (epilogue.scaled_grad != nullptr)
          store_channels<T>(epilogue.scaled_grad, at, scaled(scale, g));
      }
      if (summed) {
        const int last_row = low_row + 3 < tile.rows ? low_row + 3 : tile.rows - 1;
        sums.add(g, branch, mine.column_ok ? sample : -1,
                 static_cast<int>(mine.by_pixels(low_row)),
                 static_cast<int>(mine.by_pixels(last_row)));
      }
    }
    if (summed) sums.flush();
  }

  WF_DEVICE static void run(const Params& p) {
    const Tile tile = locate(p);
    Accumulators sums;
    WF_UNROLL
    for (int i = 0; i < kTilesM; ++i) {
      WF_UNROLL
      for (int j = 0; j < kTilesN; ++j) {
        WF_UNROLL
        for (int k = 0; k < 4; ++k) sums[i][j][k] = 0.0f;
      }
    }
    product(p, tile, sums);
    stage_sums(sums);
    if constexpr (kForward)
      finish_forward(p, tile);
    else
      finish_backward(p, tile);
  }
};

// The tiles that are compiled: 250 and 164 registers a thread, so that 2 and 3 blocks (8 and 12
// warps) share a multiprocessor's 65,536 registers and 64 or 48 KB of its shared memory each.
template <class T>
using FpropWide = ImplicitGemm<T, Direction::kForward, 128, 128, 2>;
template <class T>
using FpropNarrow = ImplicitGemm<T, Direction::kForward, 128, 64, 3>;
template <class T>
using DgradWide = ImplicitGemm<T, Direction::kInputGradient, 128, 128, 2>;
template <class T>
using DgradNarrow = ImplicitGemm<T, Direction::kInputGradient, 128, 64, 3>;

}  // namespace wf
