// Checks of convolutions: everything the kernels assume, in one place.
#include "conv.h"

#include <stdexcept>
#include <string>

namespace wf {
namespace {

constexpr int64_t kMostRows = int64_t{1} << 31;

void require(bool holds, const std::string& otherwise) {
  if (!holds) throw std::invalid_argument(otherwise);
}

void check_pointer(const void* pointer, const char* name, bool needed) {
  require(!needed || pointer != nullptr, std::string(name) + " is missing");
  require(reinterpret_cast<uintptr_t>(pointer) % 16 == 0,
          std::string(name) + " does not begin on 16 bytes");
}

void check_axis(const Axis& axis, const char* name) {
  require(axis.input > 0 && axis.kernel > 0 && axis.stride > 0 && axis.dilation > 0 &&
              axis.padding >= 0,
          std::string(name) + ": sizes, stride and dilation must be positive");
  require(axis.expected_output() == axis.output && axis.output > 0,
          std::string(name) + ": " + std::to_string(axis.input) + " pixels give " +
              std::to_string(axis.expected_output()) + ", not " + std::to_string(axis.output));
}

void check_table_stride(int stride, int columns, int batch) {
  require(stride >= columns && stride % 4 == 0,
          "table rows must be 16-byte aligned and hold all channels, not " +
              std::to_string(stride) + " apart for " + std::to_string(columns));
  require(int64_t{stride} * batch < kMostRows, "a table is past 32-bit indexing");
}

void check_common(const ConvParams& p) {
  require(p.batch > 0 && p.samples > 0, "the batch is empty");
  require(p.depth > 0 && p.depth % 8 == 0 && p.columns > 0 && p.columns % 8 == 0,
          "channel counts must be multiples of 8, not " + std::to_string(p.depth) + " and " +
              std::to_string(p.columns));
  check_axis(p.height, "height");
  check_axis(p.width, "width");
  check_pointer(p.input, "input", true);
  check_pointer(p.filter, "filter", true);
  const int64_t in = int64_t{p.height.input} * p.width.input;
  const int64_t out = int64_t{p.height.output} * p.width.output;
  const int64_t larger = in > out ? in : out;
  require(p.batch * larger < kMostRows && p.samples * larger < kMostRows,
          "more than 2**31 pixels are past 32-bit indexing");
  require(larger * (p.depth > p.columns ? p.depth : p.columns) < kMostRows,
          "an image of more than 2**31 elements is past 32-bit indexing");
  require(int64_t{p.height.kernel} * p.width.kernel * p.depth < kMostRows / 2,
          "the filter is past 32-bit indexing");
}

}  // namespace

void check_conv_fprop(const ConvParams& p) {
  check_common(p);
  const ForwardEpilogue& e = p.forward;
  check_pointer(e.scale, "scale", true);
  check_pointer(e.shift, "shift", false);
  check_pointer(e.residual, "residual", false);
  check_pointer(e.branch, "branch", false);
  check_pointer(e.out, "out", true);
  check_table_stride(e.table_stride, p.columns, p.samples);
  require((p.order == nullptr) == (p.first_of == nullptr), "order and first_of come together");
  require(p.order != nullptr || p.samples == p.batch, "without order every sample is an image");
}

void check_conv_dgrad(const ConvParams& p) {
  check_common(p);
  require(p.order == nullptr && p.samples == p.batch, "an input gradient expands nothing");
  check_backward_epilogue(p.backward, p.columns, p.batch);
}

void check_backward_epilogue(const BackwardEpilogue& e, int columns, int batch) {
  check_pointer(e.skip, "skip", false);
  check_pointer(e.branch, "branch", e.needs_branch());
  check_pointer(e.activation, "activation", false);
  check_pointer(e.scale, "scale", e.scaled_grad != nullptr);
  check_pointer(e.shift, "shift", false);
  check_pointer(e.grad, "grad", false);
  check_pointer(e.scaled_grad, "scaled_grad", false);
  check_pointer(e.partial0, "partial0", false);
  check_pointer(e.partial1, "partial1", false);
  if (e.scale != nullptr || e.shift != nullptr)
    check_table_stride(e.table_stride, columns, batch);
  require(e.grad || e.scaled_grad || e.partial0 || e.partial1, "no result is asked for");
}

}  // namespace wf
