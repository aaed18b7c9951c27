// What the kernels' plain instructions do on the emulated device: numbers, threads, memory,
// clusters. Names and meanings are those of csrc/ptx.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "geometry.h"
#include "machine.h"

#define WF_DEVICE inline
#define WF_UNROLL
#define WF_ROLLED

#include "words.h"

namespace wf {

inline bool is_broken(Fault fault) { return emulation::device().broken == fault; }

// --- numbers ---

WF_DEVICE float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

WF_DEVICE uint32_t bits_of_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

WF_DEVICE float to_float(Bf16 value) { return float_of_bits(uint32_t{value.bits} << 16); }

WF_DEVICE float to_float(Fp16 value) {
  const uint32_t sign = uint32_t{value.bits & 0x8000u} << 16;
  const uint32_t exponent = (value.bits >> 10) & 31, fraction = value.bits & 0x3FFu;
  if (exponent == 31) return float_of_bits(sign | 0x7F800000u | fraction << 13);
  if (exponent != 0) return float_of_bits(sign | (exponent + 112) << 23 | fraction << 13);
  const float magnitude = static_cast<float>(fraction) * (1.0f / 16777216.0f);
  return sign ? -magnitude : magnitude;
}

// Round to nearest even; NaN stays NaN.
template <class T>
WF_DEVICE T from_float(float value) {
  constexpr bool kBf16 = std::is_same_v<T, Bf16>;
  constexpr int kFraction = kBf16 ? 7 : 10, kLeast = kBf16 ? -126 : -14;  // of normal numbers
  constexpr double kInfinity = kBf16 ? 0x7F80 : 0x7C00;
  if (value != value) return {static_cast<uint16_t>(0x7FFF)};
  double bits = kInfinity;
  if (!std::isinf(value)) {
    const int exponent = value == 0.0f ? kLeast : std::max(std::ilogb(value), kLeast);
    const double steps = std::nearbyint(std::ldexp(std::fabs(double{value}), kFraction - exponent));
    bits = std::min(std::ldexp(exponent - kLeast, kFraction) + steps, kInfinity);
  }
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  return {static_cast<uint16_t>(sign | static_cast<uint16_t>(bits))};
}

// Two 16-bit numbers in one word, `low` at the lower address.
template <class T>
WF_DEVICE uint32_t pack(float low, float high) {
  return uint32_t{from_float<T>(low).bits} | uint32_t{from_float<T>(high).bits} << 16;
}

// --- threads ---

WF_DEVICE int thread_index() { return emulation::current_fiber()->thread; }

WF_DEVICE uint32_t block_index() { return emulation::block().index(); }

// All threads of all blocks of a cluster.
WF_DEVICE void sync_block() {
  emulation::Block& block = emulation::block();
  block.meet(block.barriers()[0], "sync_block", block.launch().threads, thread_index(), nullptr,
             [](void* const*) {});
}

namespace emulation {

// What .aligned and .sync demand: the lanes of a warp come together, the last one calls
// complete(arguments by lane).
template <class Complete>
void meet_warp(const char* what, void* argument, Complete complete) {
  Fiber& self = *current_fiber();
  block().meet(self.warp(), what, kWarp, self.lane(), argument, complete);
}
inline void meet_warp(const char* what) {
  meet_warp(what, nullptr, [](void* const*) {});
}

}  // namespace emulation

WF_DEVICE void sync_warp() { emulation::meet_warp("sync_warp"); }

namespace emulation {

// The value of lane `from` for every lane of the warp.
template <class T>
T exchange(T value, int from, const char* what) {
  struct Arguments {
    T value, result;
    int from;
  } mine{value, value, from};
  meet_warp(what, &mine, [](void* const* all) {
    for (int lane = 0; lane < kWarp; ++lane) {
      Arguments& a = *static_cast<Arguments*>(all[lane]);
      a.result = static_cast<Arguments*>(all[a.from])->value;
    }
  });
  return mine.result;
}

}  // namespace emulation

WF_DEVICE float shuffle_xor(float value, int mask) {
  return emulation::exchange(value, (thread_index() % 32) ^ mask, "shuffle_xor");
}

WF_DEVICE int shuffle(int value, int from) { return emulation::exchange(value, from, "shuffle"); }

// --- global memory ---

template <class V>
WF_DEVICE V load_global(const void* pointer) {
  emulation::block().global(pointer, sizeof(V), false, "load_global");
  return *static_cast<const V*>(pointer);
}

WF_DEVICE Vec16 load_constant(const void* pointer) { return load_global<Vec16>(pointer); }

template <class V>
WF_DEVICE void store_global(void* pointer, V value) {
  emulation::block().global(pointer, sizeof(V), true, "store_global");
  *static_cast<V*>(pointer) = value;
}

// --- shared memory ---

WF_DEVICE uint32_t shared_base() { return 0; }

WF_DEVICE float load_shared(uint32_t address) {
  float value;
  emulation::block().shared_read(address, &value, sizeof value, "load_shared");
  return value;
}

WF_DEVICE void store_shared(uint32_t address, float value) {
  emulation::block().shared_write(address, &value, sizeof value, "store_shared");
}

// --- clusters ---
//
// A cluster is two thread blocks that reach each other's shared memory. In the emulation it is one
// emulated block with twice the threads and twice the shared memory: addresses are those of a
// block's own half, as on a device, and `at_rank` finds the half.

namespace emulation {

inline int block_threads() { return emulation::block().launch().threads / kCluster; }
inline int rank() { return thread_index() / block_threads(); }
inline uint32_t at_rank(uint32_t address, int rank) {
  const uint32_t half = emulation::block().launch().shared_bytes / kCluster;
  if (address >= half) emulation::block().fail("shared address outside of the block's own memory");
  return address + rank * half;
}
inline uint32_t own(uint32_t address) { return at_rank(address, rank()); }

}  // namespace emulation

WF_DEVICE int block_thread() { return thread_index() % emulation::block_threads(); }

WF_DEVICE int cluster_rank() { return emulation::rank(); }

WF_DEVICE int cluster_index() { return static_cast<int>(block_index()); }

WF_DEVICE int cluster_count() { return static_cast<int>(emulation::block().launch().grid); }

namespace emulation {

// Named barrier `id` of this block; whole warps whose lanes are all here.
inline Rendezvous& named_barrier(int id, int threads, const char* what) {
  if (id < 1 || id > 7) block().fail(std::string(what) + ": barriers are 1 to 7");
  if (threads % kWarp != 0) block().fail(std::string(what) + ": whole warps only");
  meet_warp(what);
  return block().barriers()[id + rank() * 8];
}

}  // namespace emulation

WF_DEVICE void sync_block_named(int id, int threads) {
  emulation::Rendezvous& barrier = emulation::named_barrier(id, threads, "sync_named");
  emulation::block().meet(barrier, "sync_named", threads, 0, nullptr, [](void* const*) {});
}
WF_DEVICE void arrive_block_named(int id, int threads) {
  emulation::Rendezvous& barrier = emulation::named_barrier(id, threads, "arrive_named");
  emulation::block().arrive(barrier, "sync_named", threads);
}

WF_DEVICE bool elect_one() {
  emulation::meet_warp("elect_one");
  return thread_index() % 32 == 0;
}

WF_DEVICE uint32_t own_shared(uint32_t address) { return emulation::own(address); }

}  // namespace wf
