"""The Hopper kernels on a device for the first time: one thing at a time, easiest steps first.

Every step adds what only a device can settle: a descriptor, an order of corners, a barrier. Its
line says which reading of the manual it rests on. Without a device the steps run on the emulated
one.

A step that hangs waits without an end. A consumer that waits for data: bytes announced (expect_tx)
are not the bytes that land, a multicast reaches the wrong block, or a load was never made. The
producer that waits for a free stage: arrivals are missing, of the other block (mapa) or of a warp.
Else turns of the consumers (named barriers), setmaxnreg, or sync_cluster(). cuda-gdb says where
each warp is.
"""

import threading

import pytest
import torch
from masked_products import Backward, Forward, check, sizes

from wfnet.backends import cuda, cuda_launch

ON_DEVICE = torch.cuda.is_available()
DEVICE = "cuda" if ON_DEVICE else "cpu"
BATCH, SIZE = (64, 56) if ON_DEVICE else (2, 9)


@pytest.fixture(autouse=True)
def kernels(request, nan_memory):
    """The kernels on this device, or on the emulated one."""
    if not ON_DEVICE:
        request.getfixturevalue("emulated_cuda")
    elif refusal := cuda._refuse_tensor(torch.empty(0, device="cuda").bfloat16()):
        pytest.skip(refusal)


def forward(*case, **epilogue: bool):
    plain = {"residual": False, "relu": False, "save": False, **epilogue}
    return Forward(case, torch.bfloat16, DEVICE, **plain)


def gradient(*case, **below):
    """The product alone, times the scale of the layer below."""
    alone = {"skip": False, "mask": "none", "sums": False, **below}
    return Backward(case, torch.bfloat16, DEVICE, **alone)


def epilogue(*case):
    return forward(*case, residual=True, relu=True, save=True)


def chain(*case):
    return gradient(*case, skip=True, mask="kept", sums=True)


ONE = (1, 1)
STEPS = {
    # wgmma descriptors (K-major, 128-byte swizzle), multicast of the filter, fragment layout
    "one slice": (forward, sizes(1, 16, 16, 64, 64)),
    # parities of full and empty over the ring of stages
    "many slices": (forward, sizes(1, 16, 16, 712, 64)),
    # the second half of the filter's stage
    "128 columns": (forward, sizes(1, 16, 16, 128, 128)),
    # boxes beyond the tensor are zeros that count
    "ragged": (forward, sizes(3, 10, 9, 72, 136)),
    # corners of the box of filter bases, offsets, the order of rows and images
    "im2col 3x3": (forward, sizes(3, 9, 9, 64, 64, 3)),
    # a tile that begins behind the last image, in the second block, is zeros that count
    "im2col past the end": (forward, sizes(1, 10, 9, 64, 64, 3)),
    # corners are {W, H}, as CUTLASS and Triton pass them; the manual writes {H, W}
    "im2col 1x5": (forward, (2, 6, 11, 64, 64, (1, 5), ONE, (0, 2), ONE)),
    # element strides, and which filter base is the last of a row
    "im2col stride (1, 2)": (forward, (2, 8, 13, 64, 64, (3, 3), (1, 2), ONE, ONE)),
    # offsets are in pixels
    "im2col dilation 2": (forward, (2, 12, 11, 64, 64, (3, 3), ONE, (2, 2), (2, 2))),
    # residual, branch and ReLU
    "epilogue": (epilogue, sizes(3, 9, 9, 64, 64, 3)),
    # the N-major operand of wgmma (tnspB)
    "gradient of 64 columns": (gradient, sizes(1, 16, 16, 64, 64)),
    # its leading byte offset
    "gradient of 128 columns": (gradient, sizes(1, 16, 16, 128, 128)),
    # filter bases of a gradient
    "gradient of 3x3": (gradient, sizes(3, 9, 9, 64, 128, 3)),
    # phases
    "gradient of 3x3 stride 2": (gradient, sizes(3, 13, 12, 64, 64, 3, 2)),
    # phases without taps: tiles without a slice
    "gradient of 1x1 stride 2": (gradient, sizes(3, 9, 8, 64, 64, 1, 2)),
    # masks, and column sums between the warps of a consumer
    "chain": (chain, sizes(3, 9, 9, 64, 64, 3)),
    # turns of the consumers over many tiles
    "persistent 64": (epilogue, sizes(BATCH, SIZE, SIZE, 64, 64, 3)),
    "persistent 128, gradient": (chain, sizes(BATCH, SIZE // 2, SIZE // 2, 128, 128, 3)),
    # both consumers on one tile, wgmma of 256 columns (a device alone has so many rows)
    "persistent 256": (epilogue, sizes(BATCH, SIZE // 2, SIZE // 2, 256, 256, 3)),
    "persistent 256, gradient": (chain, sizes(BATCH, SIZE // 2, SIZE // 2, 256, 256, 3)),
}


@pytest.mark.parametrize("step", STEPS)
def test_steps(step):
    make, case = STEPS[step]
    made = make(*case)
    made.check(cuda_launch.conv2d if isinstance(made, Forward) else cuda_launch.conv2d_dgrad)


def test_cold_thread():
    """cuTensorMapEncode needs a context: autograd's thread may have called nothing before."""
    case = gradient(*sizes(2, 16, 16, 64, 64, 3))
    where = case.weight, case.in_shape, case.geometry
    torch.empty(case.in_shape, device=DEVICE).bfloat16()  # a cached block: nothing is allocated
    torch.utils.deterministic.fill_uninitialized_memory = False  # nor launched before ours
    found = []
    run = lambda: found.append(cuda_launch.conv2d_dgrad(case.ag, *where).grad)  # noqa: E731
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    check(found[0], case.gradient())
