// Python functions of the Hopper kernels: pointers, sizes and a stream, as integers.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace wf::sm90 {

// Adds refuse_fprop, refuse_dgrad, dgrad_slots, fprop and dgrad to `module`.
void bind(pybind11::module_& module);

}  // namespace wf::sm90
