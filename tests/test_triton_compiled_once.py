"""What Triton compiles, and when: not for another size of a batch, not again on another machine."""

import pytest
import torch

pytest.importorskip("triton")

import pretended_cuda
from wfnet.kernels import gate
from wfnet.kernels.conv_dgrad import conv_dgrad
from wfnet.kernels.conv_fprop import conv_fprop
from wfnet.kernels.epilogue_bwd import LayerBelow, epilogue_bwd
from wfnet.kernels.launch import interpreted
from wfnet.kernels.linear import linear_dgrad, linear_fprop

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real device"),
    pytest.mark.skipif(interpreted(gate.gate_rows_kernel), reason="TRITON_INTERPRET=1"),
]


def launch_all(batch: int) -> None:
    """Every kernel, on ``batch`` samples of a layer with and without descriptors."""
    for channels in (64, 3):
        x = torch.empty(batch, 28, 28, channels, device="cuda", dtype=torch.bfloat16)
        weight = torch.empty(64, 3, 3, channels, device="cuda", dtype=torch.bfloat16)
        scale, shift = torch.empty(2, batch, 64, device="cuda").unbind()
        out, branch = conv_fprop(x, weight, scale, shift, padding=(1, 1), save_branch=True)
        conv_dgrad(out, weight, (28, 28), padding=(1, 1))
    below = LayerBelow(branch, scale, shift, relu=True)
    want = ("scaled_grad", "t0", "t1")
    filters = torch.empty(64, 64, device="cuda", dtype=torch.bfloat16)
    linear_fprop(out.flatten(1, 2), filters, scale, shift)
    linear_dgrad(out.flatten(1, 2), filters, below.as_tokens(), want=want)
    epilogue_bwd(out.flatten(1, 2), below.as_tokens(), want=want)
    alpha = torch.empty(1000, 64, device="cuda")
    forget = torch.zeros(batch, 1, device="cuda", dtype=torch.int64)
    gate.gate_rows(alpha, forget, 1.0)
    gate.gate_rows_bwd(scale, alpha, forget)


def test_another_size_of_a_batch_compiles_nothing():
    """The last batch of an epoch, for one: sizes are not what kernels are specialised on."""
    with pretended_cuda.pretended_cuda(values=False) as device:
        kernels = pretended_cuda._jit_functions()

        def compiled() -> dict[str, int]:
            return {kernel.__name__: len(kernel.device_caches[0][0]) for kernel in kernels}

        launch_all(512)
        first = compiled()
        launched = {name for name, _ in device.launches}
        assert {"conv_fprop_kernel", "conv_fprop_gather_kernel", "conv_dgrad_kernel",
                "linear_fprop_kernel", "linear_dgrad_kernel", "epilogue_bwd_kernel",
                "column_sums_kernel", "gate_rows_kernel"} <= launched  # fmt: skip
        launch_all(500)
        assert compiled() == first
