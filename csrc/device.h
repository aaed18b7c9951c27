// What the kernels are written in. One source for two worlds:
//
// - nvcc: PTX and CUDA built-ins (ptx.h), CUDA's launches (driver.h);
// - a host compiler: the same functions on an emulated device (emulation/), on which the tests run
//   whole kernels.
#pragma once

#if defined(__CUDACC__)
#include "driver.h"
#include "ptx.h"
#else
#include "emulation/host.h"
#include "emulation/products.h"
#endif
