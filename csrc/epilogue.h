// What follows a convolution, for the 8 consecutive channels of one pixel (one 16-byte access).
//
// Forward, with u the accumulator:
//     v   = A * u                      rounded to its stored type where it is stored
//     out = act(v + C + residual)
// Backward, with acc the gradient that reaches a layer's output:
//     g  = (acc + skip) * act'         mask: activation > 0, or branch + C > 0
//     ag = A * g                       T0 = sum of g, T1 = sum of g * branch, per sample
#pragma once

#include <cstdint>

#include "device.h"

namespace wf {

constexpr int kVector = 8;  // channels of one 16-byte access

struct Channels {
  float value[kVector];
};

template <class T>
WF_HOST_DEVICE Channels unpack(const Vec16& bits) {
  Channels channels;
  WF_UNROLL
  for (int i = 0; i < 4; ++i) {
    channels.value[2 * i] = low_half<T>(bits.word[i]);
    channels.value[2 * i + 1] = high_half<T>(bits.word[i]);
  }
  return channels;
}

template <class T>
WF_HOST_DEVICE Vec16 pack(const Channels& channels) {
  Vec16 bits;
  WF_UNROLL
  for (int i = 0; i < 4; ++i)
    bits.word[i] = pack<T>(channels.value[2 * i], channels.value[2 * i + 1]);
  return bits;
}

// 8 entries of an fp32 table row.
WF_DEVICE Channels load_table(const float* row) {
  const Vec16 low = load_constant<Vec16>(row), high = load_constant<Vec16>(row + 4);
  Channels channels;
  WF_UNROLL
  for (int i = 0; i < 4; ++i) {
    channels.value[i] = float_of_bits(low.word[i]);
    channels.value[4 + i] = float_of_bits(high.word[i]);
  }
  return channels;
}

WF_DEVICE void store_floats(float* row, const Channels& channels) {
  Vec16 low, high;
  WF_UNROLL
  for (int i = 0; i < 4; ++i) {
    low.word[i] = bits_of_float(channels.value[i]);
    high.word[i] = bits_of_float(channels.value[4 + i]);
  }
  store_global(row, low);
  store_global(row + 4, high);
}

WF_HOST_DEVICE Channels scaled(const Channels& factor, const Channels& channels) {
  Channels product;
  WF_UNROLL
  for (int i = 0; i < kVector; ++i) product.value[i] = factor.value[i] * channels.value[i];
  return product;
}

// Tensors are [B, P, Q, columns] of T; tables [B, columns] fp32 with rows table_stride apart.
struct ForwardEpilogue {
  const float* scale = nullptr;    // A
  const float* shift = nullptr;    // C or null
  const void* residual = nullptr;  // or null
  void* branch = nullptr;          // v or null
  void* out = nullptr;
  int table_stride = 0;
  bool relu = false;
};

struct BackwardEpilogue {
  const void* skip = nullptr;        // all null where there is none
  const void* branch = nullptr;      // v
  const void* activation = nullptr;  // out
  const float* scale = nullptr;      // A
  const float* shift = nullptr;      // C
  void* grad = nullptr;              // g
  void* scaled_grad = nullptr;       // A * g
  float* partial0 = nullptr;         // [slots, columns] sums of g
  float* partial1 = nullptr;         // [slots, columns] sums of g * v
  int table_stride = 0;
  int span = 1;  // samples that a strip of rows may touch
  bool relu = false;

  WF_HOST_DEVICE bool mask_from_branch() const { return relu && activation == nullptr; }
  WF_HOST_DEVICE bool needs_branch() const { return mask_from_branch() || partial1 != nullptr; }
};

// Not maximum(): a NaN (a forget label out of range) must survive.
WF_HOST_DEVICE float rectified(float value) { return value < 0.0f ? 0.0f : value; }

// `at`: offset of the 8 elements in the tensors. The tables' rows of this sample come as `scale`
// and `shift`, loaded once for consecutive pixels.
template <class T>
WF_DEVICE void forward_channels(const ForwardEpilogue& epilogue, const Channels& u,
                                const Channels& scale, const Channels& shift, int64_t at) {
  Channels value = scaled(scale, u);
  if (epilogue.branch != nullptr) {
    // Backward takes the ReLU mask from the stored branch: forward sees the same number.
    const Vec16 stored = pack<T>(value);
    store_global(static_cast<T*>(epilogue.branch) + at, stored);
    value = unpack<T>(stored);
  }
  if (epilogue.shift != nullptr) {
    WF_UNROLL
    for (int i = 0; i < kVector; ++i) value.value[i] += shift.value[i];
  }
  if (epilogue.residual != nullptr) {
    const Channels residual =
        unpack<T>(load_global<Vec16>(static_cast<const T*>(epilogue.residual) + at));
    WF_UNROLL
    for (int i = 0; i < kVector; ++i) value.value[i] += residual.value[i];
  }
  if (epilogue.relu) {
    WF_UNROLL
    for (int i = 0; i < kVector; ++i) value.value[i] = rectified(value.value[i]);
  }
  store_global(static_cast<T*>(epilogue.out) + at, pack<T>(value));
}

// Turns the accumulator into g, in place, and gives the branch (zeros where nothing needs it).
template <class T>
WF_DEVICE void backward_mask(const BackwardEpilogue& epilogue, Channels& g, Channels& branch,
                             const Channels& shift, int64_t at) {
  if (epilogue.skip != nullptr) {
    const Channels skip = unpack<T>(load_global<Vec16>(static_cast<const T*>(epilogue.skip) + at));
    WF_UNROLL
    for (int i = 0; i < kVector; ++i) g.value[i] += skip.value[i];
  }
  if (epilogue.relu && epilogue.activation != nullptr) {
    const Channels out =
        unpack<T>(load_global<Vec16>(static_cast<const T*>(epilogue.activation) + at));
    WF_UNROLL
    for (int i = 0; i < kVector; ++i) g.value[i] = out.value[i] > 0.0f ? g.value[i] : 0.0f;
  }
  if (epilogue.needs_branch())
    branch = unpack<T>(load_global<Vec16>(static_cast<const T*>(epilogue.branch) + at));
  if (epilogue.mask_from_branch()) {
    WF_UNROLL
    for (int i = 0; i < kVector; ++i)
      g.value[i] = branch.value[i] + shift.value[i] > 0.0f ? g.value[i] : 0.0f;
  }
}

template <class T>
WF_DEVICE void store_channels(void* tensor, int64_t at, const Channels& channels) {
  store_global(static_cast<T*>(tensor) + at, pack<T>(channels));
}

// Sums over the pixels of one sample after the other, for a warp that visits rows in order: lane l
// has the channels of row first + l / 8 (8 lanes a row, 4 rows a visit).
class ColumnSums {
 public:
  // `column_ok`: this lane's 8 channels exist; `at`: their first channel.
  WF_DEVICE ColumnSums(const BackwardEpilogue& epilogue, int64_t first_slot, int first_sample,
                       int columns, int at, bool column_ok)
      : epilogue_(epilogue),
        first_slot_(first_slot),
        first_sample_(first_sample),
        current_(first_sample),
        columns_(columns),
        at_(at),
        column_ok_(column_ok) {
    clear();
  }

  // Rows of this visit belong to samples [low, high]; this lane's to `sample`, or to none (-1).
  WF_DEVICE void add(const Channels& g, const Channels& branch, int sample, int low, int high) {
    if (low > current_) {
      flush();
      current_ = low;
    }
    while (true) {
      if (sample == current_) {
        WF_UNROLL
        for (int i = 0; i < kVector; ++i) {
          sum0_.value[i] += g.value[i];
          sum1_.value[i] += g.value[i] * branch.value[i];
        }
      }
      if (current_ == high) break;
      flush();
      ++current_;
    }
  }

  // Writes the sums of the current sample to its slot; lanes of a column in a fixed order.
  WF_DEVICE void flush() {
    WF_UNROLL
    for (int i = 0; i < kVector; ++i) {
      WF_UNROLL
      for (int mask = 8; mask < 32; mask *= 2) {
        sum0_.value[i] += shuffle_xor(sum0_.value[i], mask);
        sum1_.value[i] += shuffle_xor(sum1_.value[i], mask);
      }
    }
    if (column_ok_ && thread_index() % 32 < 8) {
      const int64_t at = (first_slot_ + (current_ - first_sample_)) * columns_ + at_;
      if (epilogue_.partial0 != nullptr) store_floats(epilogue_.partial0 + at, sum0_);
      if (epilogue_.partial1 != nullptr) store_floats(epilogue_.partial1 + at, sum1_);
    }
    clear();
  }

 private:
  WF_DEVICE void clear() {
    WF_UNROLL
    for (int i = 0; i < kVector; ++i) sum0_.value[i] = sum1_.value[i] = 0.0f;
  }

  const BackwardEpilogue& epilogue_;
  int64_t first_slot_;
  int first_sample_, current_, columns_, at_;
  bool column_ok_;
  Channels sum0_, sum1_;
};

}  // namespace wf
