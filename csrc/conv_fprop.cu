// Instances of the portable forward convolution.
#include "implicit_gemm.cuh"

namespace wf {
namespace {

template <class T>
void launch_typed(const ConvParams& p, Place place) {
  const int64_t rows = int64_t{p.batch} * p.height.output * p.width.output;
  const auto run = [&](auto kernel) {
    using Kernel = decltype(kernel);
    launch<Kernel>(
        p, ceil_div<int64_t>(rows, Kernel::kBlockM) * ceil_div(p.columns, Kernel::kBlockN), place);
  };
  narrow_tiles(p.columns) ? run(FpropNarrow<T>{}) : run(FpropWide<T>{});
}

}  // namespace

void launch_conv_fprop(const ConvParams& params, Type type, Place place) {
  check_conv_fprop(params);
  ConvParams p = params;
  p.by_pixels = Divider(p.height.output * p.width.output), p.by_width = Divider(p.width.output);
  type == Type::kBf16 ? launch_typed<Bf16>(p, place) : launch_typed<Fp16>(p, place);
}

}  // namespace wf
