// Python functions of the kernels: addresses, sizes and a stream, as integers.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace wf {

// Adds refuse_fprop, refuse_dgrad, dgrad_slots, fprop and dgrad to `module`.
void bind_kernels(pybind11::module_& module);

// Adds what tests steer the emulated device with; there only (csrc/emulation/bindings.cpp).
void bind_emulation(pybind11::module_& module);

}  // namespace wf
