// Gate tables and their gradient, 4 columns (16 bytes) a thread.
#include "gate.h"

#include <cmath>
#include <initializer_list>
#include <stdexcept>

#include "geometry.h"

namespace wf {
namespace {

struct alignas(16) Float4 {
  float value[4];
};

constexpr float kNearOne = 4.0f * 1.1920929e-7f;

WF_HOST_DEVICE float sigmoid(float x) {
#if defined(__CUDA_ARCH__)
  return 1.0f / (1.0f + expf(-x));
#else
  return 1.0f / (1.0f + std::exp(-x));
#endif
}

// Whether label j of a row was there before: a label counts once.
WF_DEVICE bool repeated(const int64_t* row, int j, int64_t label) {
  for (int i = 0; i < j; ++i)
    if (load_global<int64_t>(row + i) == label) return true;
  return false;
}

// A thread: one sample, 4 columns.
struct GateRows {
  using Params = GateParams;
  static constexpr int kThreads = 128, kMinBlocks = 8;
  static constexpr uint32_t kSharedBytes = 0;
  static constexpr bool kBlockBarriersOnly = true;

  WF_DEVICE static void run(const Params& p) {
    const int quads = p.columns / 4;
    const int64_t index = int64_t{block_index()} * kThreads + thread_index();
    const int sample = static_cast<int>(index / quads);
    const int column = static_cast<int>(index - int64_t{sample} * quads) * 4;
    if (sample >= p.batch) return;
    Float4 scale{{p.gate_scale, p.gate_scale, p.gate_scale, p.gate_scale}};
    if (p.scales != nullptr) scale = load_constant<Float4>(p.scales + column);
    Float4 product{{1.0f, 1.0f, 1.0f, 1.0f}};
    const int64_t* labels = p.forget + int64_t{sample} * p.labels;
    for (int j = 0; j < p.labels; ++j) {
      const int64_t label = load_global<int64_t>(labels + j);
      if (label == -1 || repeated(labels, j, label)) continue;
      const bool inside = label >= 0 && label < p.classes;
      Float4 alpha{};
      if (inside) alpha = load_constant<Float4>(p.alpha + label * p.alpha_stride + column);
      WF_UNROLL
      for (int i = 0; i < 4; ++i) {
        float gate = scale.value[i] * sigmoid(alpha.value[i]);
        if (fabsf(gate - 1.0f) <= kNearOne) gate = 1.0f;
        product.value[i] *= inside ? gate : not_a_number();
      }
    }
    if (p.factor != nullptr) {
      const Float4 factor = load_constant<Float4>(p.factor + column);
      WF_UNROLL
      for (int i = 0; i < 4; ++i) product.value[i] *= factor.value[i];
    }
    store_global(p.rows + int64_t{sample} * p.row_stride + column, product);
  }
};

// A block: one label, 4 columns a thread. Each warp asks 32 samples at a time whether they forget
// the label, and adds those that do, in order.
struct GateRowsBackward {
  using Params = GateGradientParams;
  static constexpr int kThreads = 128, kMinBlocks = 8;
  static constexpr uint32_t kSharedBytes = 0;
  static constexpr bool kBlockBarriersOnly = true;

  WF_DEVICE static void run(const Params& p) {
    const int groups = ceil_div(p.columns / 4, kThreads);
    const int label = static_cast<int>(block_index()) / groups;
    const int column =
        ((static_cast<int>(block_index()) - label * groups) * kThreads + thread_index()) * 4;
    const bool column_ok = column < p.columns;
    Float4 chosen{};
    if (column_ok && p.chosen != nullptr) chosen = load_constant<Float4>(p.chosen + column);
    Float4 sum{};
    for (int first = 0; first < p.batch; first += 32) {
      const int mine = first + thread_index() % 32;
      bool found = false;
      for (int j = 0; j < p.labels && mine < p.batch; ++j)
        found |= load_global<int64_t>(p.forget + int64_t{mine} * p.labels + j) == label;
      for (uint32_t votes = ballot(found); votes != 0; votes &= votes - 1) {
        if (!column_ok) continue;
        const int64_t at = int64_t{first + lowest_bit(votes)} * p.row_stride + column;
        Float4 t = load_global<Float4>(p.t + at);
        if (p.products != nullptr) {
          const Float4 product = load_global<Float4>(p.products + at);
          WF_UNROLL
          for (int i = 0; i < 4; ++i)
            if (chosen.value[i] != 0.0f) t.value[i] *= product.value[i];
        }
        WF_UNROLL
        for (int i = 0; i < 4; ++i) sum.value[i] += t.value[i];
      }
    }
    if (!column_ok) return;
    const Float4 alpha = load_constant<Float4>(p.alpha + int64_t{label} * p.alpha_stride + column);
    WF_UNROLL
    for (int i = 0; i < 4; ++i) sum.value[i] *= sigmoid(-alpha.value[i]);
    store_global(p.dalpha + int64_t{label} * p.gradient_stride + column, sum);
  }
};

void require(bool holds, const char* otherwise) {
  if (!holds) throw std::invalid_argument(otherwise);
}

template <class Params>
void check(const Params& p, std::initializer_list<const void*> tensors,
           std::initializer_list<int> strides) {
  require(p.columns > 0 && p.columns % 4 == 0, "the number of columns must be a multiple of 4");
  require(p.labels >= 1 && p.labels <= kMostLabels, "1 to 16 forget labels a sample");
  require(p.classes > 0 && p.batch > 0, "a filter matrix and a batch must not be empty");
  for (const void* tensor : tensors)
    require(reinterpret_cast<uintptr_t>(tensor) % 16 == 0, "tensors must begin on 16 bytes");
  for (int stride : strides)
    require(stride % 4 == 0 && stride >= p.columns, "rows must be a multiple of 4 columns apart");
}

}  // namespace

void launch_gate_rows(const GateParams& p, Place place) {
  check(p, {p.alpha, p.scales, p.factor, p.rows}, {p.alpha_stride, p.row_stride});
  const int64_t threads = int64_t{p.batch} * (p.columns / 4);
  launch<GateRows>(p, ceil_div<int64_t>(threads, GateRows::kThreads), place);
}

void launch_gate_rows_bwd(const GateGradientParams& p, Place place) {
  check(p, {p.t, p.products, p.chosen, p.alpha, p.dalpha},
        {p.alpha_stride, p.row_stride, p.gradient_stride});
  require((p.products == nullptr) == (p.chosen == nullptr), "products and chosen come together");
  const int64_t groups = ceil_div(p.columns / 4, GateRowsBackward::kThreads);
  launch<GateRowsBackward>(p, groups * p.classes, place);
}

}  // namespace wf
