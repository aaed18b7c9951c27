"""Triton kernels of wfnet; this folder installs as the sub-package ``wfnet.kernels``.

One file per kernel family, one launcher per kernel. A launcher checks its tensors, picks a config
(``config.py``), builds a :class:`wfnet.kernels.launch.Launch` and runs it; ``aot.py`` compiles the
very same launches ahead of time, without a device.

    epilogue      what every GEMM does with its accumulator; epilogue_arguments is its host side
    conv_fprop    implicit GEMM with the scale, shift, residual and activation in its epilogue
    conv_dgrad    input gradient, with the layer below's elementwise backward in its epilogue
    linear        both directions for linear maps and for 1x1 convolutions of stride 1
    epilogue_bwd  the elementwise backward where no GEMM epilogue covers it, and its column sums
    max_pool      pooling forward, and back with the elementwise backward of the layer below
    gate          filter matrices to rows of gates, all layers in one launch, and back
    row_adam      Adam over the rows that occurred in a step
"""
