// Memory-bound passes: 16 bytes a lane, 8 lanes for 128 contiguous bytes of a pixel's channels.
#include "epilogue_bwd.h"

#include <stdexcept>
#include <string>

#include "column_sums.cuh"

namespace wf {
namespace {

constexpr int kStripRows = 64, kStripColumns = 64;

// A warp: a strip of 64 rows, 64 channels, 4 rows a visit.
template <class T, bool kPooled>
struct EpilogueBackward {
  using Params = EpilogueBackwardParams;
  static constexpr int kThreads = 128, kMinBlocks = 4;
  static constexpr uint32_t kSharedBytes = 0;
  static constexpr bool kBlockBarriersOnly = true;

  static int64_t blocks(const Params& p) {
    const int64_t strips = ceil_div<int64_t>(int64_t{p.batch} * p.pixels, kStripRows);
    return ceil_div<int64_t>(strips * ceil_div(p.columns, kStripColumns), kThreads / 32);
  }

  WF_DEVICE static void run(const Params& p) {
    const int lane = thread_index() % 32;
    const uint32_t warp = block_index() * (kThreads / 32) + thread_index() / 32;
    const uint32_t groups = ceil_div(p.columns, kStripColumns);
    const uint32_t strip = warp / groups;
    const int rows = p.batch * p.pixels;
    const int64_t first_row = int64_t{strip} * kStripRows;
    if (first_row >= rows) return;
    const int column = static_cast<int>(warp - strip * groups) * kStripColumns + lane % 8 * kVector;
    const bool column_ok = column < p.columns;
    const Divider by_pixels(p.pixels), by_width(kPooled ? p.pooled.width.input : 1);
    const BackwardEpilogue& epilogue = p.epilogue;
    const bool summed = epilogue.partial0 != nullptr || epilogue.partial1 != nullptr;
    ColumnSums sums(epilogue, int64_t{strip} * epilogue.span,
                    static_cast<int>(by_pixels(static_cast<uint32_t>(first_row))), p.columns,
                    column, column_ok);
    Channels a{}, c{};
    int loaded = -1;
    for (int visit = 0; visit < kStripRows / 4; ++visit) {
      const int low_row = static_cast<int>(first_row) + visit * 4;
      if (low_row >= rows) break;
      const int row = low_row + lane / 8;
      const bool row_ok = row < rows;
      const int sample = row_ok ? static_cast<int>(by_pixels(row)) : -1;
      Channels g{}, branch{};
      if (row_ok && column_ok) {
        if (sample != loaded) {
          const int64_t at = int64_t{sample} * epilogue.table_stride + column;
          if (epilogue.scale != nullptr) a = load_table(epilogue.scale + at);
          if (epilogue.shift != nullptr) c = load_table(epilogue.shift + at);
          loaded = sample;
        }
        const int pixel = row - sample * p.pixels;
        if constexpr (kPooled) {
          const int h = static_cast<int>(by_width(pixel));
          const int w = pixel - h * p.pooled.width.input;
          g = gather_pooled<T>(p.pooled, p.dout, sample, h, w, p.columns, column);
        } else {
          const int64_t from = sample * p.sample_stride + pixel * p.pixel_stride;
          g = unpack<T>(load_global<Vec16>(static_cast<const T*>(p.dout) + from + column));
        }
        const int64_t at = int64_t{row} * p.columns + column;
        backward_mask<T>(epilogue, g, branch, c, at);
        if (epilogue.grad != nullptr) store_channels<T>(epilogue.grad, at, g);
        if (epilogue.scaled_grad != nullptr)
          store_channels<T>(epilogue.scaled_grad, at, scaled(a, g));
      }
      if (summed) {
        const int last_row = low_row + 3 < rows ? low_row + 3 : rows - 1;
        sums.add(g, branch, column_ok ? sample : -1, static_cast<int>(by_pixels(low_row)),
                 static_cast<int>(by_pixels(last_row)));
      }
    }
    if (summed) sums.flush();
  }
};

// A thread: 8 channels of a pixel of an image.
template <class T>
struct SumBySource {
  using Params = SumBySourceParams;
  static constexpr int kThreads = 128, kMinBlocks = 8;
  static constexpr uint32_t kSharedBytes = 0;
  static constexpr bool kBlockBarriersOnly = true;

  static int64_t blocks(const Params& p) {
    return ceil_div<int64_t>(int64_t{p.images} * p.pixels * (p.columns / kVector), kThreads);
  }

  WF_DEVICE static void run(const Params& p) {
    const int chunks = p.columns / kVector;
    const int64_t index = int64_t{block_index()} * kThreads + thread_index();
    const int64_t row = index / chunks;
    const int column = static_cast<int>(index - row * chunks) * kVector;
    const int64_t image = row / p.pixels;
    if (image >= p.images) return;
    const int64_t pixel = row - image * p.pixels;
    Channels sum{};
    const int64_t last = load_global<int64_t>(p.first_of + image + 1);
    for (int64_t i = load_global<int64_t>(p.first_of + image); i < last; ++i) {
      const int64_t sample = load_global<int64_t>(p.order + i);
      const Channels a = load_table(p.scale + sample * p.table_stride + column);
      const int64_t at = (sample * p.pixels + pixel) * p.columns + column;
      const Channels g = unpack<T>(load_global<Vec16>(static_cast<const T*>(p.dout) + at));
      WF_UNROLL
      for (int k = 0; k < kVector; ++k) sum.value[k] += a.value[k] * g.value[k];
    }
    store_channels<T>(p.scaled, row * p.columns + column, sum);
  }
};

template <class T>
void launch_of(const EpilogueBackwardParams& p, Place place) {
  if (p.pooled.positions != nullptr)
    launch<EpilogueBackward<T, true>>(p, EpilogueBackward<T, true>::blocks(p), place);
  else
    launch<EpilogueBackward<T, false>>(p, EpilogueBackward<T, false>::blocks(p), place);
}

void require(bool holds, const std::string& otherwise) {
  if (!holds) throw std::invalid_argument(otherwise);
}

void check_sizes(int64_t samples, int pixels, int columns) {
  require(samples > 0 && pixels > 0 && columns > 0 && columns % kVector == 0,
          "the number of channels must be a multiple of 8, not " + std::to_string(columns));
  require(samples * pixels < int64_t{1} << 31, "more than 2**31 pixels are past 32-bit indexing");
}

}  // namespace

int64_t epilogue_bwd_slots(int batch, int pixels) {
  return ceil_div<int64_t>(int64_t{batch} * pixels, kStripRows) *
         strip_span(kStripRows, pixels, batch);
}

void launch_epilogue_bwd(const EpilogueBackwardParams& params, Type type, Place place) {
  EpilogueBackwardParams p = params;
  check_sizes(p.batch, p.pixels, p.columns);
  require(p.sample_stride % kVector == 0 && p.pixel_stride % kVector == 0,
          "dout's pixels must begin on 16 bytes");
  check_backward_epilogue(p.epilogue, p.columns, p.batch);
  p.epilogue.span = strip_span(kStripRows, p.pixels, p.batch);
  if (p.pooled.positions != nullptr) {
    check_window(p.pooled.height, p.pooled.width);
    require(p.pooled.height.input * p.pooled.width.input == p.pixels,
            "the pooling's input has other pixels than the layer");
  }
  type == Type::kBf16 ? launch_of<Bf16>(p, place) : launch_of<Fp16>(p, place);
}

void launch_epilogue_bwd_sums(const EpilogueBackwardParams& p, float* t0, float* t1,
                              int total_stride, Place place) {
  ColumnSumsParams sums;
  sums.partial[0] = p.epilogue.partial0, sums.partial[1] = p.epilogue.partial1;
  sums.total[0] = t0, sums.total[1] = t1, sums.total_stride = total_stride;
  sums.batch = p.batch, sums.columns = p.columns;
  sums.strip_rows = sums.block_rows = kStripRows;
  sums.span = strip_span(kStripRows, p.pixels, p.batch);
  sums.height = {p.pixels, p.pixels, 1, 1, 0, 1}, sums.width = {1, 1, 1, 1, 0, 1};
  launch<SumColumns>(sums, SumColumns::blocks(sums), place);
}

void launch_sum_by_source(const SumBySourceParams& p, Type type, Place place) {
  check_sizes(p.images, p.pixels, p.columns);
  require(p.table_stride % 4 == 0, "table rows must begin on 16 bytes");
  if (type == Type::kBf16)
    launch<SumBySource<Bf16>>(p, SumBySource<Bf16>::blocks(p), place);
  else
    launch<SumBySource<Fp16>>(p, SumBySource<Fp16>::blocks(p), place);
}

}  // namespace wf
