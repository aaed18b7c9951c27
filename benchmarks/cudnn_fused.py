"""cuDNN's runtime fusion of a masked convolution: the bar for fused forward epilogues.

    out = relu(scale * conv(x, weight) + shift + residual)      scale, shift: [N, K, 1, 1]

One graph through the package ``nvidia-cudnn-frontend`` (an optional import), heuristic plan A.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Unsupported(RuntimeError):
    """The package is missing, or cuDNN has no plan for the problem."""


def fused_convolution(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor,
    stride: int,
    padding: int,
) -> Callable[[], Tensor]:
    """The fused convolution as a function of nothing, which returns ``out`` ``[N, K, P, Q]``.

    Args:
        x: ``[N, C, H, W]`` channels-last, bf16 or fp16, on a CUDA device.
        weight: ``[K, C, R, S]`` channels-last.
        scale, shift: ``[N, K]`` fp32.
        residual: ``[N, K, P, Q]`` channels-last.

    Raises:
        Unsupported: without the package, or where cuDNN has no plan.
    """
    try:
        import cudnn
    except ImportError:
        raise Unsupported("nvidia-cudnn-frontend is not installed") from None
    kinds = {
        torch.bfloat16: cudnn.data_type.BFLOAT16,
        torch.float16: cudnn.data_type.HALF,
        torch.float32: cudnn.data_type.FLOAT,
    }
    out = torch.empty_like(residual)
    memory = {
        "x": x,
        "weight": weight,
        "scale": scale.contiguous(),
        "shift": shift.contiguous(),
        "residual": residual,
    }
    handle = cudnn.create_handle()
    cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
    graph = cudnn.pygraph(
        handle=handle,
        io_data_type=kinds[x.dtype],
        intermediate_data_type=cudnn.data_type.FLOAT,
        compute_data_type=cudnn.data_type.FLOAT,
    )

    def operand(name: str):
        tensor = memory[name]
        if tensor.dim() == 2:  # a table: [N, K, 1, 1], channels-last
            columns = tensor.shape[1]
            dim, strides = [*tensor.shape, 1, 1], [columns, 1, columns, columns]
        else:
            dim, strides = list(tensor.shape), list(tensor.stride())
        return graph.tensor(name=name, dim=dim, stride=strides, data_type=kinds[tensor.dtype])

    node = {name: operand(name) for name in memory}
    u = graph.conv_fprop(
        image=node["x"],
        weight=node["weight"],
        padding=[padding] * 2,
        stride=[stride] * 2,
        dilation=[1, 1],
    )
    masked = graph.add(a=graph.mul(a=u, b=node["scale"]), b=node["shift"])
    result = graph.relu(input=graph.add(a=masked, b=node["residual"]))
    result.set_output(True).set_data_type(kinds[x.dtype])
    try:
        graph.build([cudnn.heur_mode.A])
    except Exception as error:  # the package has error classes of several names over its versions
        raise Unsupported(f"cuDNN has no plan: {error}") from error
    workspace = torch.empty(graph.get_workspace_size(), dtype=torch.uint8, device=x.device)
    pack = {**{node[name]: tensor for name, tensor in memory.items()}, result: out}

    def run() -> Tensor:
        graph.execute(pack, workspace, handle=handle)
        return out

    return run
