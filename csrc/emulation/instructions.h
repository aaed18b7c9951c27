// What the kernels' plain instructions do on the emulated device: numbers, threads, memory,
// clusters. Names and meanings are those of csrc/ptx.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "geometry.h"
#include "machine.h"

#define WF_DEVICE inline
#define WF_UNROLL
#define WF_ROLLED

namespace wf {

constexpr int kWarpgroup = 128;

inline bool is_broken(Fault fault) { return emulation::device().broken == fault; }

// --- numbers ---

// 16-bit numbers as they lie in memory; arithmetic is in fp32.
struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

struct alignas(16) Vec16 {
  uint32_t word[4];
};

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

WF_DEVICE float not_a_number() { return float_of_bits(0x7FC00000u); }

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
WF_DEVICE T from_float(float value);

template <>
WF_DEVICE Bf16 from_float<Bf16>(float value) {
  const uint32_t bits = bits_of_float(value);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return {static_cast<uint16_t>(0x7FFF)};
  return {static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1)) >> 16)};
}

template <>
WF_DEVICE Fp16 from_float<Fp16>(float value) {
  const uint32_t bits = bits_of_float(value);
  const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return {static_cast<uint16_t>(0x7FFF)};
  if (magnitude >= 0x477FF000u) return {static_cast<uint16_t>(sign | 0x7C00u)};  // 65520 and more
  uint32_t result, rest, half;
  if (magnitude < 0x38800000u) {  // subnormal: a multiple of 2^-24
    const uint32_t exponent = magnitude >> 23;
    if (exponent < 102) return {static_cast<uint16_t>(sign)};
    const uint32_t shift = 126 - exponent;
    const uint32_t fraction = (magnitude & 0x7FFFFFu) | 0x800000u;
    result = fraction >> shift, rest = fraction & ((1u << shift) - 1), half = 1u << (shift - 1);
  } else {
    result = (magnitude - 0x38000000u) >> 13, rest = magnitude & 0x1FFFu, half = 0x1000u;
  }
  result += rest > half || (rest == half && (result & 1));
  return {static_cast<uint16_t>(sign | result)};
}

// Two 16-bit numbers in one word, `low` at the lower address.
template <class T>
WF_DEVICE uint32_t pack(float low, float high) {
  return uint32_t{from_float<T>(low).bits} | uint32_t{from_float<T>(high).bits} << 16;
}

template <class T>
WF_DEVICE float low_half(uint32_t word) {
  return to_float(T{static_cast<uint16_t>(word & 0xFFFFu)});
}
template <class T>
WF_DEVICE float high_half(uint32_t word) {
  return to_float(T{static_cast<uint16_t>(word >> 16)});
}

// --- threads ---

WF_DEVICE int thread_index() { return emulation::current_fiber()->thread; }

WF_DEVICE uint32_t block_index() { return emulation::block().index(); }

WF_DEVICE uint32_t grid_size() { return emulation::block().launch().grid; }

// All threads of all blocks of a cluster.
WF_DEVICE void sync_block() {
  emulation::Block& block = emulation::block();
  block.meet(block.barriers()[0], "sync_block", block.launch().threads, thread_index(), nullptr,
             [](void* const*) {});
}

namespace emulation {

// What .aligned and .sync demand: the lanes of a warp come together.
inline void meet_warp(const char* what) {
  Fiber& self = *current_fiber();
  block().meet(self.warp().rendezvous, what, kWarp, self.lane(), nullptr, [](void* const*) {});
}

}  // namespace emulation

// Barrier `id` (1 to 15) of `threads` threads, whole warps whose lanes are all here.
WF_DEVICE void sync_named(int id, int threads) {
  emulation::Block& block = emulation::block();
  if (threads % 32 != 0) block.fail("sync_named: whole warps only");
  emulation::meet_warp("sync_named");
  block.meet(block.barriers()[id], "sync_named", threads, 0, nullptr, [](void* const*) {});
}

// Counts at a named barrier without waiting for it.
WF_DEVICE void arrive_named(int id, int threads) {
  emulation::Block& block = emulation::block();
  emulation::meet_warp("arrive_named");
  block.arrive(block.barriers()[id], "sync_named", threads);
}

WF_DEVICE void sync_warp() { emulation::meet_warp("sync_warp"); }

// The value of lane `lane ^ mask`.
WF_DEVICE float shuffle_xor(float value, int mask) {
  struct Arguments {
    float value, result;
    int mask;
  } mine{value, 0.0f, mask};
  emulation::Fiber& self = *emulation::current_fiber();
  emulation::block().meet(self.warp().rendezvous, "shuffle_xor", 32, self.lane(), &mine,
                          [](void* const* all) {
                            for (int lane = 0; lane < 32; ++lane) {
                              Arguments& a = *static_cast<Arguments*>(all[lane]);
                              a.result = static_cast<Arguments*>(all[lane ^ a.mask])->value;
                            }
                          });
  return mine.result;
}

// The value of lane `from`.
WF_DEVICE int shuffle(int value, int from) {
  struct Arguments {
    int value, result, from;
  } mine{value, 0, from};
  emulation::Fiber& self = *emulation::current_fiber();
  emulation::block().meet(self.warp().rendezvous, "shuffle", 32, self.lane(), &mine,
                          [](void* const* all) {
                            for (int lane = 0; lane < 32; ++lane) {
                              Arguments& a = *static_cast<Arguments*>(all[lane]);
                              a.result = static_cast<Arguments*>(all[a.from])->value;
                            }
                          });
  return mine.result;
}

// --- global memory ---

// V: float or Vec16.
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

// Thread of the block, block of the cluster, cluster of the grid.
WF_DEVICE int block_thread() { return thread_index() % emulation::block_threads(); }

WF_DEVICE int cluster_rank() { return emulation::rank(); }

WF_DEVICE int cluster_index() { return static_cast<int>(block_index()); }

WF_DEVICE int cluster_count() { return static_cast<int>(grid_size()); }

// Named barriers 1 to 7 of this block.
WF_DEVICE void sync_block_named(int id, int threads) {
  if (id < 1 || id > 7) emulation::block().fail("sync_block_named: barriers are 1 to 7");
  sync_named(id + emulation::rank() * 8, threads);
}
WF_DEVICE void arrive_block_named(int id, int threads) {
  if (id < 1 || id > 7) emulation::block().fail("arrive_block_named: barriers are 1 to 7");
  arrive_named(id + emulation::rank() * 8, threads);
}

// True for one lane of a warp whose lanes are all here. The compiler knows it to be one, and issues
// what this lane alone does without asking which lanes are there.
WF_DEVICE bool elect_one() {
  emulation::meet_warp("elect_one");
  return thread_index() % 32 == 0;
}

// Address for load_shared and store_shared of a byte of this block's shared memory.
WF_DEVICE uint32_t own_shared(uint32_t address) { return emulation::own(address); }

}  // namespace wf
