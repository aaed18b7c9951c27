// Instances of the portable input gradient, and the second stage of its column sums.
#include "column_sums.cuh"
#include "implicit_gemm.cuh"

namespace wf {
namespace {

constexpr int kBlockRows = DgradWide<Bf16>::kBlockM;
static_assert(kBlockRows == DgradNarrow<Bf16>::kBlockM, "phases begin with whole blocks of both");

template <class T>
void launch_typed(const ConvParams& p, Place place) {
  const auto run = [&](auto kernel) {
    using Kernel = decltype(kernel);
    launch<Kernel>(p,
                   gradient_row_tiles(p.height, p.width, p.batch, Kernel::kBlockM) *
                       ceil_div(p.columns, Kernel::kBlockN),
                   place);
  };
  narrow_tiles(p.columns) ? run(DgradNarrow<T>{}) : run(DgradWide<T>{});
}

}  // namespace

int conv_dgrad_strip_rows(int columns) {
  return narrow_tiles(columns) ? DgradNarrow<Bf16>::kWarpM : DgradWide<Bf16>::kWarpM;
}

int conv_dgrad_span(const ConvParams& p) {
  int pixels = p.height.input * p.width.input;  // of the smallest phase: the most samples a strip
  for_each_phase(p.height, p.width, p.batch, kBlockRows, [&](const Phase& phase, int64_t) {
    if (phase.pixels() > 0 && phase.pixels() < pixels) pixels = phase.pixels();
    return true;
  });
  return strip_span(conv_dgrad_strip_rows(p.columns), pixels, p.batch);
}

int64_t conv_dgrad_slots(const ConvParams& p) {
  return gradient_row_tiles(p.height, p.width, p.batch, kBlockRows) *
         (kBlockRows / conv_dgrad_strip_rows(p.columns)) * conv_dgrad_span(p);
}

void launch_conv_dgrad(const ConvParams& params, Type type, Place place) {
  check_conv_dgrad(params);
  ConvParams p = params;
  p.backward.span = conv_dgrad_span(p);
  p.by_pixels = Divider(p.height.input * p.width.input), p.by_width = Divider(p.width.input);
  type == Type::kBf16 ? launch_typed<Bf16>(p, place) : launch_typed<Fp16>(p, place);
}

void launch_conv_dgrad_sums(const ConvParams& p, float* t0, float* t1, int total_stride,
                            Place place) {
  ColumnSumsParams sums;
  sums.partial[0] = p.backward.partial0, sums.partial[1] = p.backward.partial1;
  sums.total[0] = t0, sums.total[1] = t1, sums.total_stride = total_stride;
  sums.batch = p.batch, sums.columns = p.columns;
  sums.strip_rows = conv_dgrad_strip_rows(p.columns), sums.span = conv_dgrad_span(p);
  sums.block_rows = kBlockRows;
  sums.height = p.height, sums.width = p.width;
  launch<SumColumns>(sums, SumColumns::blocks(sums), place);
}

}  // namespace wf
