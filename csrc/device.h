// The instructions that the kernels are written in. Two worlds, one source:
//
// - nvcc: PTX and CUDA built-ins;
// - a host compiler: the emulation of csrc/emulation.h, on which the tests run whole kernels.
//
// Shared memory is addressed by 32-bit numbers in both (shared_base() + offset). Fragments have the
// layouts of the PTX manual for mma.m16n8k16 and ldmatrix.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#define WF_HOST_DEVICE __host__ __device__ __forceinline__
#define WF_DEVICE __device__ __forceinline__
#define WF_UNROLL _Pragma("unroll")
#else
#include "emulation.h"
#define WF_HOST_DEVICE inline
#define WF_DEVICE inline
#define WF_UNROLL
#endif

namespace wf {

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
struct alignas(8) Vec8 {
  uint32_t word[2];
};

WF_HOST_DEVICE float float_of_bits(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
#endif
}

WF_HOST_DEVICE uint32_t bits_of_float(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
#endif
}

WF_HOST_DEVICE float not_a_number() { return float_of_bits(0x7FC00000u); }

WF_HOST_DEVICE float to_float(Bf16 value) { return float_of_bits(uint32_t{value.bits} << 16); }

WF_HOST_DEVICE float to_float(Fp16 value) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
#else
  const uint32_t sign = uint32_t{value.bits & 0x8000u} << 16;
  const uint32_t exponent = (value.bits >> 10) & 31, fraction = value.bits & 0x3FFu;
  if (exponent == 31) return float_of_bits(sign | 0x7F800000u | fraction << 13);
  if (exponent != 0) return float_of_bits(sign | (exponent + 112) << 23 | fraction << 13);
  const float magnitude = static_cast<float>(fraction) * (1.0f / 16777216.0f);
  return sign ? -magnitude : magnitude;
#endif
}

WF_HOST_DEVICE float to_float(float value) { return value; }

// Round to nearest even; NaN stays NaN.
template <class T>
WF_HOST_DEVICE T from_float(float value);

template <>
WF_HOST_DEVICE Bf16 from_float<Bf16>(float value) {
#if defined(__CUDA_ARCH__)
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return {bits};
#else
  const uint32_t bits = bits_of_float(value);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return {static_cast<uint16_t>(0x7FFF)};
  return {static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1)) >> 16)};
#endif
}

template <>
WF_HOST_DEVICE Fp16 from_float<Fp16>(float value) {
#if defined(__CUDA_ARCH__)
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return {bits};
#else
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
#endif
}

template <>
WF_HOST_DEVICE float from_float<float>(float value) {
  return value;
}

// Two 16-bit numbers in one word, `low` at the lower address.
template <class T>
WF_HOST_DEVICE uint32_t pack(float low, float high) {
#if defined(__CUDA_ARCH__)
  uint32_t word;
  if constexpr (std::is_same_v<T, Bf16>)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
#else
  return uint32_t{from_float<T>(low).bits} | uint32_t{from_float<T>(high).bits} << 16;
#endif
}

template <class T>
WF_HOST_DEVICE float low_half(uint32_t word) {
  return to_float(T{static_cast<uint16_t>(word & 0xFFFFu)});
}
template <class T>
WF_HOST_DEVICE float high_half(uint32_t word) {
  return to_float(T{static_cast<uint16_t>(word >> 16)});
}

// --- threads -------------------------------------------------------------------------------------

WF_DEVICE int thread_index() {
#if defined(__CUDACC__)
  return static_cast<int>(threadIdx.x);
#else
  return emulation::current_fiber()->thread;
#endif
}

WF_DEVICE uint32_t block_index() {
#if defined(__CUDACC__)
  return blockIdx.x;
#else
  return emulation::block().index();
#endif
}

WF_DEVICE uint32_t grid_size() {
#if defined(__CUDACC__)
  return gridDim.x;
#else
  return emulation::block().launch().grid;
#endif
}

WF_DEVICE void sync_block() {
#if defined(__CUDACC__)
  __syncthreads();
#else
  emulation::Block& block = emulation::block();
  block.meet(block.barriers()[0], "sync_block", block.launch().threads, thread_index(), nullptr,
             [&](void* const*) { block.next_epoch(); });
#endif
}

#if !defined(__CUDACC__)
namespace emulation {

// What .aligned and .sync demand: the lanes of a warp come together.
inline void meet_warp(const char* what) {
  Fiber& self = *current_fiber();
  block().meet(self.warp().rendezvous, what, kWarp, self.lane(), nullptr, [](void* const*) {});
}

}  // namespace emulation
#endif

// Barrier `id` (1 to 15) of `threads` threads, whole warps whose lanes are all here.
WF_DEVICE void sync_named(int id, int threads) {
#if defined(__CUDACC__)
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#else
  emulation::Block& block = emulation::block();
  if (threads % 32 != 0) block.fail("sync_named: whole warps only");
  emulation::meet_warp("sync_named");
  block.meet(block.barriers()[id], "sync_named", threads, 0, nullptr, [](void* const*) {});
#endif
}

// Counts at a named barrier without waiting for it.
WF_DEVICE void arrive_named(int id, int threads) {
#if defined(__CUDACC__)
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
#else
  emulation::Block& block = emulation::block();
  emulation::meet_warp("arrive_named");
  block.arrive(block.barriers()[id], "sync_named", threads);
#endif
}

WF_DEVICE void sync_warp() {
#if defined(__CUDACC__)
  __syncwarp();
#else
  emulation::meet_warp("sync_warp");
#endif
}

// The value of lane `lane ^ mask`.
WF_DEVICE float shuffle_xor(float value, int mask) {
#if defined(__CUDACC__)
  return __shfl_xor_sync(0xFFFFFFFFu, value, mask);
#else
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
#endif
}

// The value of lane `from`.
WF_DEVICE int shuffle(int value, int from) {
#if defined(__CUDACC__)
  return __shfl_sync(0xFFFFFFFFu, value, from);
#else
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
#endif
}

// Bit l: `vote` of lane l.
WF_DEVICE uint32_t ballot(bool vote) {
#if defined(__CUDACC__)
  return __ballot_sync(0xFFFFFFFFu, vote);
#else
  struct Arguments {
    bool vote;
    uint32_t result;
  } mine{vote, 0};
  emulation::Fiber& self = *emulation::current_fiber();
  emulation::block().meet(self.warp().rendezvous, "ballot", 32, self.lane(), &mine,
                          [](void* const* all) {
                            uint32_t votes = 0;
                            for (int lane = 0; lane < 32; ++lane)
                              votes |= uint32_t{static_cast<Arguments*>(all[lane])->vote} << lane;
                            for (int lane = 0; lane < 32; ++lane)
                              static_cast<Arguments*>(all[lane])->result = votes;
                          });
  return mine.result;
#endif
}

// Position of the lowest set bit of a number that is not 0.
WF_HOST_DEVICE int lowest_bit(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __ffs(static_cast<int>(bits)) - 1;
#else
  return __builtin_ctz(bits);
#endif
}

// --- global memory -------------------------------------------------------------------------------

// V: any type of 1, 2, 4, 8 or 16 bytes that is aligned to its size.
template <class V>
WF_DEVICE V load_global(const void* pointer) {
#if !defined(__CUDACC__)
  emulation::block().global(pointer, sizeof(V), false, "load_global");
#endif
  return *static_cast<const V*>(pointer);
}

// Through the read-only cache: for memory that nobody writes while the kernel runs.
template <class V>
WF_DEVICE V load_constant(const void* pointer) {
  static_assert(sizeof(V) == 4 || sizeof(V) == 8 || sizeof(V) == 16, "4, 8 or 16 bytes");
#if defined(__CUDACC__)
  V value;
  uint32_t words[sizeof(V) / 4];
  if constexpr (sizeof(V) == 4) {
    asm("ld.global.nc.b32 %0, [%1];" : "=r"(words[0]) : "l"(pointer));
  } else if constexpr (sizeof(V) == 8) {
    asm("ld.global.nc.v2.b32 {%0, %1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "l"(pointer));
  } else {
    asm("ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];"
        : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
        : "l"(pointer));
  }
  memcpy(&value, words, sizeof(V));
  return value;
#else
  return load_global<V>(pointer);
#endif
}

template <class V>
WF_DEVICE void store_global(void* pointer, V value) {
#if !defined(__CUDACC__)
  emulation::block().global(pointer, sizeof(V), true, "store_global");
#endif
  *static_cast<V*>(pointer) = value;
}

// --- shared memory -------------------------------------------------------------------------------

#if defined(__CUDACC__)
extern __shared__ __align__(1024) unsigned char dynamic_shared[];
#endif

// Address of the block's dynamic shared memory.
WF_DEVICE uint32_t shared_base() {
#if defined(__CUDACC__)
  return static_cast<uint32_t>(__cvta_generic_to_shared(dynamic_shared));
#else
  return 0;
#endif
}

template <class V>
WF_DEVICE V load_shared(uint32_t address) {
#if defined(__CUDACC__)
  static_assert(sizeof(V) == 4 || sizeof(V) == 8 || sizeof(V) == 16, "4, 8 or 16 bytes");
  uint32_t words[sizeof(V) / 4];
  if constexpr (sizeof(V) == 4) {
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(words[0]) : "r"(address) : "memory");
  } else if constexpr (sizeof(V) == 8) {
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];"
                 : "=r"(words[0]), "=r"(words[1])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address)
                 : "memory");
  }
  V value;
  memcpy(&value, words, sizeof(V));
  return value;
#else
  V value;
  emulation::block().note_access(*emulation::current_fiber(), address, sizeof(V));
  emulation::block().shared_read(address, &value, sizeof(V), "load_shared");
  return value;
#endif
}

template <class V>
WF_DEVICE void store_shared(uint32_t address, V value) {
#if defined(__CUDACC__)
  static_assert(sizeof(V) == 4 || sizeof(V) == 8 || sizeof(V) == 16, "4, 8 or 16 bytes");
  uint32_t words[sizeof(V) / 4];
  memcpy(words, &value, sizeof(V));
  if constexpr (sizeof(V) == 4) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(words[0]) : "memory");
  } else if constexpr (sizeof(V) == 8) {
    asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(address), "r"(words[0]), "r"(words[1])
                 : "memory");
  } else {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(words[0]),
                 "r"(words[1]), "r"(words[2]), "r"(words[3])
                 : "memory");
  }
#else
  emulation::block().note_access(*emulation::current_fiber(), address, sizeof(V));
  emulation::block().shared_write(address, &value, sizeof(V), "store_shared");
#endif
}

// --- asynchronous copies (cp.async, sm_80) -------------------------------------------------------

#if !defined(__CUDACC__)
namespace emulation {

// The queue of copies of one thread: cp.async groups complete in order, at the wait at the latest.
struct AsyncCopies {
  static void finish(Block& block, Fiber::Copy& copy) {
    if (copy.done) return;
    copy.done = true;
    block.end_write(copy.destination, 16);
    unsigned char bytes[16] = {};
    if (copy.valid_bytes > 0) {
      block.global(copy.source, copy.valid_bytes, false, "cp_async_16");
      std::memcpy(bytes, copy.source, copy.valid_bytes);
    }
    block.shared_write(copy.destination, bytes, 16, "cp_async_16");
  }
};

}  // namespace emulation
#endif

// 16 bytes from global memory, or 16 zero bytes and no read of `source` where not `valid`.
WF_DEVICE void cp_async_16(uint32_t destination, const void* source, bool valid) {
#if defined(__CUDACC__)
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(destination), "l"(source),
               "r"(bytes)
               : "memory");
#else
  emulation::Block& block = emulation::block();
  emulation::Fiber& self = *emulation::current_fiber();
  block.note_access(self, destination, 16);
  block.begin_write(destination, 16, "cp_async_16");
  self.open_group.push_back({destination, source, valid ? 16u : 0u, false});
  const emulation::Completion when = block.launch().completion;
  if (when == emulation::Completion::kEarly ||
      (when == emulation::Completion::kRandom && block.random().below(2) == 0))
    emulation::AsyncCopies::finish(block, self.open_group.back());
#endif
}

WF_DEVICE void cp_async_commit() {
#if defined(__CUDACC__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  emulation::Fiber& self = *emulation::current_fiber();
  self.groups.push_back(std::move(self.open_group));
  self.open_group.clear();
#endif
}

// Waits until at most kPending of this thread's groups are in flight.
template <int kPending>
WF_DEVICE void cp_async_wait() {
#if defined(__CUDACC__)
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#else
  emulation::Fiber& self = *emulation::current_fiber();
  while (self.groups.size() > static_cast<size_t>(kPending)) {
    for (emulation::Fiber::Copy& copy : self.groups.front())
      emulation::AsyncCopies::finish(emulation::block(), copy);
    self.groups.pop_front();
  }
#endif
}

// --- tensor cores (mma.sync, sm_80) --------------------------------------------------------------

#if !defined(__CUDACC__)
namespace emulation {

struct LdmatrixArguments {
  uint32_t address;
  uint32_t* fragment;
};

inline void ldmatrix(uint32_t (&fragment)[4], uint32_t address, bool transposed) {
  LdmatrixArguments mine{address, fragment};
  Fiber& self = *current_fiber();
  Block& emulated = block();
  emulated.note_access(self, address, 16);
  emulated.meet(
      self.warp().rendezvous, transposed ? "ldmatrix_x4_trans" : "ldmatrix_x4", 32, self.lane(),
      &mine, [&](void* const* all) {
        uint16_t matrix[4][8][8];
        for (int lane = 0; lane < 32; ++lane)
          emulated.shared_read(static_cast<LdmatrixArguments*>(all[lane])->address,
                               matrix[lane / 8][lane % 8], 16, "ldmatrix");
        for (int lane = 0; lane < 32; ++lane)
          for (int i = 0; i < 4; ++i) {
            const int major = lane / 4, minor = lane % 4 * 2;
            const uint16_t low = transposed ? matrix[i][minor][major] : matrix[i][major][minor];
            const uint16_t high =
                transposed ? matrix[i][minor + 1][major] : matrix[i][major][minor + 1];
            static_cast<LdmatrixArguments*>(all[lane])->fragment[i] = low | uint32_t{high} << 16;
          }
      });
}

}  // namespace emulation
#endif

// Four 8x8 matrices of 16-bit numbers; lane l gives the address of row l % 8 of matrix l / 8.
WF_DEVICE void ldmatrix_x4(uint32_t (&fragment)[4], uint32_t address) {
#if defined(__CUDACC__)
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(address)
               : "memory");
#else
  emulation::ldmatrix(fragment, address, false);
#endif
}

// The same, each matrix transposed.
WF_DEVICE void ldmatrix_x4_trans(uint32_t (&fragment)[4], uint32_t address) {
#if defined(__CUDACC__)
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(address)
               : "memory");
#else
  emulation::ldmatrix(fragment, address, true);
#endif
}

// d[16, 8] += a[16, 16] * b[16, 8], fp32 accumulation. Lane l holds, with g = l / 4 and t = l % 4:
// a: rows g, g + 8 (a[0], a[1]), columns 2t, 2t + 1; the same 8 columns on (a[2], a[3]);
// b: rows 2t, 2t + 1 (b[0]) and 8 rows on (b[1]) of column g; d: rows g (d[0], d[1]) and g + 8.
template <class T>
WF_DEVICE void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  static_assert(sizeof(T) == 2, "16-bit operands");
#if defined(__CUDACC__)
  if constexpr (std::is_same_v<T, Bf16>) {
    asm(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
#else
  struct Arguments {
    const uint32_t* a;
    uint32_t b[2];
    float* d;
  } mine{a, {b0, b1}, d};
  emulation::Fiber& self = *emulation::current_fiber();
  emulation::block().meet(
      self.warp().rendezvous, "mma_16x8x16", 32, self.lane(), &mine, [](void* const* all) {
        float left[16][16], right[16][8], sum[16][8];
        for (int lane = 0; lane < 32; ++lane) {
          const Arguments& mine = *static_cast<Arguments*>(all[lane]);
          const int g = lane / 4, t = lane % 4 * 2;
          for (int i = 0; i < 4; ++i) {
            const int row = g + i % 2 * 8, column = t + i / 2 * 8;
            left[row][column] = low_half<T>(mine.a[i]);
            left[row][column + 1] = high_half<T>(mine.a[i]);
            sum[g + i / 2 * 8][t + i % 2] = mine.d[i];
          }
          for (int i = 0; i < 2; ++i) {
            right[t + i * 8][g] = low_half<T>(mine.b[i]);
            right[t + i * 8 + 1][g] = high_half<T>(mine.b[i]);
          }
        }
        for (int row = 0; row < 16; ++row)
          for (int k = 0; k < 16; ++k)
            for (int column = 0; column < 8; ++column)
              sum[row][column] += left[row][k] * right[k][column];
        for (int lane = 0; lane < 32; ++lane)
          for (int i = 0; i < 4; ++i)
            static_cast<Arguments*>(all[lane])->d[i] =
                sum[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
      });
#endif
}

}  // namespace wf
