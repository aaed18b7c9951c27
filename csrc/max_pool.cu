// Maximum pooling forward: 16 bytes a lane, one output pixel a thread and 8 channels.
#include "max_pool.h"

#include <stdexcept>
#include <string>

namespace wf {
namespace {

template <class T>
struct MaxPool {
  using Params = MaxPoolParams;
  static constexpr int kThreads = 128, kMinBlocks = 8;
  static constexpr uint32_t kSharedBytes = 0;
  static constexpr bool kBlockBarriersOnly = true;

  static int64_t blocks(const Params& p) {
    const int64_t pixels = int64_t{p.batch} * p.height.output * p.width.output;
    return ceil_div<int64_t>(pixels * (p.columns / kVector), kThreads);
  }

  WF_DEVICE static void run(const Params& p) {
    const int chunks = p.columns / kVector;
    const int64_t index = int64_t{block_index()} * kThreads + thread_index();
    const int64_t row = index / chunks;
    const int column = static_cast<int>(index - row * chunks) * kVector;
    const int pixels = p.height.output * p.width.output;
    const int64_t sample = row / pixels;
    if (sample >= p.batch) return;
    const int pixel = static_cast<int>(row - sample * pixels);
    const int h0 = pixel / p.width.output * p.height.stride - p.height.padding;
    const int w0 = pixel % p.width.output * p.width.stride - p.width.padding;
    Channels best{};
    Positions where{};
    bool any = false;
    for (int r = 0; r < p.height.kernel; ++r) {
      const int h = h0 + r;
      if (h < 0 || h >= p.height.input) continue;
      for (int s = 0; s < p.width.kernel; ++s) {
        const int w = w0 + s;
        if (w < 0 || w >= p.width.input) continue;
        const int64_t from = ((sample * p.height.input + h) * p.width.input + w) * p.columns;
        const Channels x =
            unpack<T>(load_global<Vec16>(static_cast<const T*>(p.x) + from + column));
        WF_UNROLL
        for (int i = 0; i < kVector; ++i) {
          // The first of equal ones, and a NaN above all, as PyTorch has it.
          const bool better = !any || x.value[i] > best.value[i] || x.value[i] != x.value[i];
          best.value[i] = better ? x.value[i] : best.value[i];
          where.tap[i] = better ? static_cast<uint8_t>(r * p.width.kernel + s) : where.tap[i];
        }
        any = true;
      }
    }
    const int64_t at = row * p.columns + column;
    store_channels<T>(p.out, at, best);
    if (p.positions != nullptr) store_global(p.positions + at, where);
  }
};

}  // namespace

void check_window(const Axis& height, const Axis& width) {
  for (const Axis* axis : {&height, &width})
    if (axis->dilation != 1 || axis->stride < 1 || axis->padding < 0 ||
        2 * axis->padding > axis->kernel || axis->input < 1 || axis->output < 1 ||
        (axis->output - 1) * axis->stride >= axis->input + axis->padding)
      throw std::invalid_argument("the pooling's window does not fit its image");
  if (height.kernel * width.kernel > kMostTaps)
    throw std::invalid_argument("a window has more than " + std::to_string(kMostTaps) + " taps");
}

void launch_max_pool(const MaxPoolParams& p, Type type, Place place) {
  check_window(p.height, p.width);
  if (p.batch < 1 || p.columns < 1 || p.columns % kVector != 0)
    throw std::invalid_argument("the number of channels must be a multiple of 8, not " +
                                std::to_string(p.columns));
  if (type == Type::kBf16)
    launch<MaxPool<Bf16>>(p, MaxPool<Bf16>::blocks(p), place);
  else
    launch<MaxPool<Fp16>>(p, MaxPool<Fp16>::blocks(p), place);
}

}  // namespace wf
