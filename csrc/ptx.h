// The instructions that the kernels are written in, as PTX and CUDA built-ins. The functions of
// csrc/emulation/ have the same names and do on the host what these do on a device; csrc/device.h
// chooses between the two.
//
// Shared memory is addressed by 32-bit numbers in both worlds (shared_base() + offset).
#pragma once

#include <cuda.h>  // types only: no symbol of libcuda is linked
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "faults.h"
#include "tensor_map.h"

#define WF_DEVICE __device__ __forceinline__
#define WF_UNROLL _Pragma("unroll")
#define WF_ROLLED _Pragma("unroll 1")

#include "words.h"

namespace wf {

using TensorMap = CUtensorMap;

// Nothing is ever left out here.
WF_DEVICE constexpr bool is_broken(Fault) { return false; }

// --- numbers ---

WF_DEVICE float float_of_bits(uint32_t bits) { return __uint_as_float(bits); }

WF_DEVICE uint32_t bits_of_float(float value) { return __float_as_uint(value); }

WF_DEVICE float to_float(Bf16 value) { return float_of_bits(uint32_t{value.bits} << 16); }

WF_DEVICE float to_float(Fp16 value) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
}

// Two 16-bit numbers in one word, `low` at the lower address.
template <class T>
WF_DEVICE uint32_t pack(float low, float high) {
  uint32_t word;
  if constexpr (std::is_same_v<T, Bf16>)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

// --- threads ---

WF_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }

WF_DEVICE uint32_t block_index() { return blockIdx.x; }

// The value of lane `lane ^ mask`.
WF_DEVICE float shuffle_xor(float value, int mask) {
  return __shfl_xor_sync(0xFFFFFFFFu, value, mask);
}

// The value of lane `from`.
WF_DEVICE int shuffle(int value, int from) { return __shfl_sync(0xFFFFFFFFu, value, from); }

// --- global memory ---

// V: float or Vec16.
template <class V>
WF_DEVICE V load_global(const void* pointer) {
  return *static_cast<const V*>(pointer);
}

// 16 bytes through the read-only cache: of memory that nobody writes while the kernel runs.
WF_DEVICE Vec16 load_constant(const void* pointer) {
  Vec16 value;
  asm("ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];"
      : "=r"(value.word[0]), "=r"(value.word[1]), "=r"(value.word[2]), "=r"(value.word[3])
      : "l"(pointer));
  return value;
}

template <class V>
WF_DEVICE void store_global(void* pointer, V value) {
  *static_cast<V*>(pointer) = value;
}

// --- shared memory ---

extern __shared__ __align__(1024) unsigned char dynamic_shared[];

// Address of the block's dynamic shared memory.
WF_DEVICE uint32_t shared_base() {
  return static_cast<uint32_t>(__cvta_generic_to_shared(dynamic_shared));
}

WF_DEVICE float load_shared(uint32_t address) {
  float value;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
  return value;
}

WF_DEVICE void store_shared(uint32_t address, float value) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}

// --- clusters: two thread blocks that reach each other's shared memory ---

// Address for load_shared and store_shared of a byte of this block's shared memory.
WF_DEVICE uint32_t own_shared(uint32_t address) { return address; }

// Thread of the block, block of the cluster, cluster of the grid.
WF_DEVICE int block_thread() { return thread_index(); }

WF_DEVICE int cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}

WF_DEVICE int cluster_index() { return static_cast<int>(block_index()) / kCluster; }

WF_DEVICE int cluster_count() { return static_cast<int>(gridDim.x) / kCluster; }

// Named barriers 1 to 7 of this block; whole warps whose lanes are all here.
WF_DEVICE void sync_block_named(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// Counts at a named barrier without waiting for it.
WF_DEVICE void arrive_block_named(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// True for one lane of a warp whose lanes are all here. The compiler knows it to be one, and issues
// what this lane alone does without asking which lanes are there.
WF_DEVICE bool elect_one() {
  uint32_t elected;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.b32 %0, 1, 0, p;\n"
      "}\n"
      : "=r"(elected));
  return elected != 0;
}

// All threads of both blocks.
WF_DEVICE void sync_cluster() {
  __syncwarp();
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;\n" ::
          : "memory");
}

// --- mbarriers ---

WF_DEVICE void mbarrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// After mbarrier_init, before the cluster-wide barrier: initial values reach the TMA unit too.
WF_DEVICE void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// At the barrier at this place of the cluster's block `rank`. What it orders are reads by wgmma,
// which are complete, and writes by TMA; ordinary accesses of one block are not made visible to the
// other: that (.release.cluster) would put a membar.gpu and an L1 invalidation into every slice.
WF_DEVICE void mbarrier_arrive(uint32_t barrier, int rank) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}\n" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

// Announces `bytes` that TMA loads will bring, and arrives.
WF_DEVICE void mbarrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// Waits until the phase of this parity is complete.
WF_DEVICE void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "WAIT:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra DONE;\n"
      "bra WAIT;\n"
      "DONE:\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// --- TMA ---

WF_DEVICE void prefetch_tensor_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Asks for `bytes` of global memory to be in L2 soon; address and size are multiples of 16.
WF_DEVICE void prefetch_l2(const void* address, uint32_t bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(address), "r"(bytes) : "memory");
}

// A box of [rows, 64] from row r0, channel c, of a matrix.
WF_DEVICE void tma_load_matrix(uint32_t destination, const TensorMap* map, uint32_t barrier, int c,
                               int r0) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4}], [%2];" ::"r"(destination),
      "l"(map), "r"(barrier), "r"(c), "r"(r0)
      : "memory");
}

// A box of [rows, 1, 64] of the filter, to all blocks of the cluster: out channels from o, one tap,
// in channels from c.
WF_DEVICE void tma_load_filter(uint32_t destination, const TensorMap* map, uint32_t barrier, int c,
                               int tap, int o) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(destination),
      "l"(map), "r"(barrier), "r"(c), "r"(tap), "r"(o),
      "h"(static_cast<uint16_t>((1 << kCluster) - 1))
      : "memory");
}

// Pixels at (n, h, w) and behind it in the order of filter bases, each read at its distance
// (offset_h, offset_w) from the base; 64 channels from c.
WF_DEVICE void tma_load_im2col(uint32_t destination, const TensorMap* map, uint32_t barrier, int c,
                               int w, int h, int n, int offset_w, int offset_h) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5, %6}], [%2], {%7, %8};" ::"r"(destination),
      "l"(map), "r"(barrier), "r"(c), "r"(w), "r"(h), "r"(n), "h"(static_cast<uint16_t>(offset_w)),
      "h"(static_cast<uint16_t>(offset_h))
      : "memory");
}

// --- wgmma ---

// Before the first wgmma, and after registers of an accumulator were touched by other instructions.
WF_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

WF_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most kPending of the committed groups are at work.
template <int kPending>
WF_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving accesses to accumulators across wgmma_fence and wgmma_wait.
template <int kCount>
WF_DEVICE void pin_registers(float (&registers)[kCount]) {
  WF_UNROLL
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

#define WF_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define WF_D16(i) WF_D4(i), WF_D4(i + 4), WF_D4(i + 8), WF_D4(i + 12)
#define WF_D64(i) WF_D16(i), WF_D16(i + 16), WF_D16(i + 32), WF_D16(i + 48)
#define WF_REGISTERS_32                                                                         \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24," \
  "%25,%26,%27,%28,%29,%30,%31}"
#define WF_REGISTERS_64                                                                          \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,"  \
  "%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47," \
  "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}"

#define WF_REGISTERS_128                                                                        \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24," \
  "%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,"    \
  "%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,%64,%65,%66,%67,%68,"    \
  "%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,"    \
  "%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,"      \
  "%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127}"

// d[64, N] += a[64, 16] * b[16, N] by a warpgroup; asynchronous. Warp w of it, lane l, holds in
// d[4 * j + 2 * h + i] row 16 * w + 8 * h + l / 4, column 8 * j + 2 * (l % 4) + i. `a` is K-major;
// `b` is K-major ([N, 16]) or, with kTransposedB, N-major ([16, N]). `accumulate` false: d = a * b.
template <class T, bool kTransposedB, int kCount>
WF_DEVICE void wgmma(float (&d)[kCount], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(kCount == 32 || kCount == 64 || kCount == 128, "N is 64, 128 or 256");
  constexpr bool kBf16 = std::is_same_v<T, Bf16>;
#define WF_WGMMA(N, TYPE, REGISTERS, A, B, P, TB, ...)                                             \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P                                               \
               ", 0;\n"                                                                            \
               "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " " REGISTERS ", " A \
               ", " B ", p, 1, 1, 0, " TB ";\n}\n"                                                 \
               : __VA_ARGS__                                                                       \
               : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(kTransposedB ? 1 : 0))
  if constexpr (kCount == 128) {
    if constexpr (kBf16) {
      WF_WGMMA("256", "bf16", WF_REGISTERS_128, "%128", "%129", "%130", "%131", WF_D64(0),
               WF_D64(64));
    } else {
      WF_WGMMA("256", "f16", WF_REGISTERS_128, "%128", "%129", "%130", "%131", WF_D64(0),
               WF_D64(64));
    }
  } else if constexpr (kCount == 64) {
    if constexpr (kBf16) {
      WF_WGMMA("128", "bf16", WF_REGISTERS_64, "%64", "%65", "%66", "%67", WF_D64(0));
    } else {
      WF_WGMMA("128", "f16", WF_REGISTERS_64, "%64", "%65", "%66", "%67", WF_D64(0));
    }
  } else {
    if constexpr (kBf16) {
      WF_WGMMA("64", "bf16", WF_REGISTERS_32, "%32", "%33", "%34", "%35", WF_D16(0), WF_D16(16));
    } else {
      WF_WGMMA("64", "f16", WF_REGISTERS_32, "%32", "%33", "%34", "%35", WF_D16(0), WF_D16(16));
    }
  }
#undef WF_WGMMA
}

// --- registers ---

// Moves registers from the producer warpgroup to the consumers; once per warpgroup, all its
// threads.
template <int kRegisters>
WF_DEVICE void take_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256, "setmaxnreg");
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
WF_DEVICE void give_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256, "setmaxnreg");
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace wf
