// Second stage of the column sums: the slots of a sample, added in a fixed order.
#pragma once

#include "device.h"
#include "geometry.h"
#include "launch.h"

namespace wf {

struct ColumnSumsParams {
  const float* partial[2] = {};  // [slots, columns]
  float* total[2] = {};          // [batch, columns]; null where not wanted
  int batch = 0, columns = 0;
  int total_stride = 0;  // between rows of the totals
  int strip_rows = 0, span = 1;
  int block_rows = 0;      // of the tiles that a phase begins with
  Axis height{}, width{};  // phases; strides of 1 for one phase of height.input * width.input rows
};

// A block: 32 channels of a sample. 8 slices of 32 threads take every eighth slot, then meet.
struct SumColumns {
  using Params = ColumnSumsParams;
  static constexpr int kSlices = 8, kColumns = 32;
  static constexpr int kThreads = kSlices * kColumns, kMinBlocks = 4;
  static constexpr uint32_t kSharedBytes = kThreads * 4;
  static constexpr bool kBlockBarriersOnly = true;

  WF_HOST_DEVICE static int64_t blocks(const Params& p) {
    return int64_t{p.batch} * ceil_div(p.columns, kColumns);
  }

  WF_DEVICE static void run(const Params& p) {
    const int groups = ceil_div(p.columns, kColumns);
    const int sample = static_cast<int>(block_index()) / groups;
    const int slice = thread_index() / kColumns, lane = thread_index() % kColumns;
    const int column = (static_cast<int>(block_index()) - sample * groups) * kColumns + lane;
    const bool column_ok = column < p.columns;
    for (int which = 0; which < 2; ++which) {
      if (p.total[which] == nullptr) continue;
      float sum = 0.0f;
      for_each_phase(p.height, p.width, p.batch, p.block_rows, [&](const Phase& phase, int64_t) {
        if (phase.pixels() == 0) return true;
        const int64_t first_strip = phase.first_tile * (p.block_rows / p.strip_rows);
        const StripRange range = strips_of_sample(p.strip_rows, phase.pixels(), sample);
        for (int64_t strip = range.first + slice; strip <= range.last; strip += kSlices) {
          const int64_t slot = first_strip * p.span +
                               slot_of(strip, p.strip_rows, phase.pixels(), p.span, sample);
          if (column_ok) sum += load_global<float>(p.partial[which] + slot * p.columns + column);
        }
        return true;
      });
      store_shared(shared_base() + thread_index() * 4, sum);
      sync_block();
      if (slice == 0) {
        for (int other = 1; other < kSlices; ++other)
          sum += load_shared<float>(shared_base() + (other * kColumns + lane) * 4);
        if (column_ok)
          store_global(p.total[which] + int64_t{sample} * p.total_stride + column, sum);
      }
      sync_block();
    }
  }
};

}  // namespace wf
