// 8 consecutive channels of one pixel: what a lane of an epilogue reads, computes and writes (one
// 16-byte access).
#pragma once

#include <cstdint>

#include "device.h"

namespace wf {

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

}  // namespace wf
