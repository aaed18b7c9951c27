"""cuDNN's graph engine: a convolution and its whole epilogue in one kernel, forward only.

``relu(scale * conv(x) + shift + residual)`` with tables per sample and channel is a graph that
cuDNN's runtime fusion engine compiles into one kernel (a few seconds for each shape). It needs the
optional package ``nvidia-cudnn-frontend`` and is a candidate of :mod:`wfnet.backends.autotune`, not
a choice by name. No device has run it yet: see benchmarks/results/tuning.md for what was tried
without one.
"""

import importlib.util
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wfnet.backends.contract import Activation, ConvGeometry, Epilogue
from wfnet.backends.mixed import MixedEager
from wfnet.services.extras import require

INSTALLED = importlib.util.find_spec("cudnn") is not None
_CHANNELS = 8  # of 16-bit types in the 16 bytes that the engine loads at a time
_MOST_BATCHES = 8  # sizes of a batch that one convolution is compiled for in a process


class _Graph(NamedTuple):
    """A compiled graph, its tensors by the names of the operands, and bytes of its workspace."""

    graph: Any
    tensors: dict[str, Any]
    workspace: int


class CudnnGraph(MixedEager):
    """Forward convolutions by cuDNN's runtime fusion engine, in bf16 and fp16."""

    def __init__(self) -> None:
        self._graphs: dict[object, dict[int, _Graph]] = {}  # by layer, then by size of a batch
        self._handle = None

    def refuse_conv2d(self, x: Tensor, weight: Tensor, geometry: ConvGeometry) -> str | None:
        if x.dtype not in (torch.float16, torch.bfloat16) or x.device.type != "cuda":
            return f"cuDNN's graphs take 16-bit CUDA tensors, not {x.dtype} on {x.device}"
        if geometry.groups != 1 or any(channels % _CHANNELS for channels in weight.shape[:2]):
            return f"cuDNN's graphs take multiples of {_CHANNELS} channels in one group"
        return None

    def conv2d(
        self, x: Tensor, weight: Tensor, geometry: ConvGeometry, epilogue: Epilogue
    ) -> Activation:
        """One kernel; PyTorch's operations for more sizes of a batch than are compiled.

        ``epilogue`` has no ``source``.
        """
        size = geometry.output_size(*x.shape[2:], tuple(weight.shape[2:]))
        shape = (x.shape[0], weight.shape[0], *size)
        shift = torch.zeros_like(epilogue.scale) if epilogue.shift is None else epilogue.shift
        given = {"x": x, "weight": weight, "scale": epilogue.scale, "shift": shift}
        given["residual"] = epilogue.residual
        operands = {name: channels_last(t) for name, t in given.items() if t is not None}
        results = {
            name: x.new_empty(shape).to(memory_format=torch.channels_last)
            for name in ("branch", "out")
            if name == "out" or epilogue.save
        }
        made = self._graph(operands | results, geometry, epilogue.relu, x.device)
        if made is None:
            return super().conv2d(x, weight, geometry, epilogue)
        room = torch.empty(made.workspace, dtype=torch.uint8, device=x.device)
        buffers = {made.tensors[name]: t for name, t in (operands | results).items()}
        cudnn = require("cudnn", "cudnn")
        stream = torch.cuda.current_stream(x.device).cuda_stream
        cudnn.set_stream(handle=self._handle, stream=stream)
        made.graph.execute(buffers, room, handle=self._handle)
        masked = epilogue.save and epilogue.relu and epilogue.residual is not None
        out = results["out"]
        return Activation(out, results.get("branch"), out if masked else None)

    def _graph(
        self, operands: dict[str, Tensor], geometry: ConvGeometry, relu: bool, device: torch.device
    ) -> _Graph | None:
        """Compiles the graph, once for each shape; None for one batch size too many."""
        layer = tuple((name, t.dtype, t.shape[1:]) for name, t in operands.items())
        sizes = self._graphs.setdefault((layer, geometry, relu, device), {})
        batch = len(operands["x"])
        if batch not in sizes and len(sizes) < _MOST_BATCHES:
            cudnn = require("cudnn", "cudnn")
            if self._handle is None:
                self._handle = cudnn.create_handle()
            graph = cudnn.pygraph(handle=self._handle, **precisions(cudnn))
            tensors = describe(graph, cudnn, operands, geometry, relu)
            graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
            sizes[batch] = _Graph(graph, tensors, graph.get_workspace_size())
        return sizes.get(batch)


def channels_last(t: Tensor) -> Tensor:
    """Returns ``[N, C, H, W]``, or ``[N, C]`` as ``[N, C, 1, 1]``, in dense channels-last memory.

    All strides are its: PyTorch takes a 1x1 filter for channels-last, whatever these are.
    """
    dense = t.view(*t.shape, *(1,) * (4 - t.dim())).contiguous(memory_format=torch.channels_last)
    _, channels, height, width = dense.shape
    strides = (channels * height * width, 1, channels * width, channels)
    return dense.as_strided(dense.shape, strides)


def precisions(cudnn: Any) -> dict[str, Any]:
    """Returns the settings of a graph whose products and epilogues are in fp32."""
    wide = cudnn.data_type.FLOAT
    return {"intermediate_data_type": wide, "compute_data_type": wide}


def describe(
    graph: Any, cudnn: Any, operands: dict[str, Tensor], geometry: ConvGeometry, relu: bool
) -> dict[str, Any]:
    """Writes a convolution and its epilogue into a graph; returns its tensors by name.

    Args:
        operands: ``x``, ``weight``, ``scale`` and ``shift`` ``[B, O, 1, 1]``, perhaps ``residual``,
            and the results ``out`` and perhaps ``branch`` (``scale * u``). Only their shapes,
            strides and dtypes are read.
    """
    dtypes = {
        torch.float32: cudnn.data_type.FLOAT,
        torch.float16: cudnn.data_type.HALF,
        torch.bfloat16: cudnn.data_type.BFLOAT16,
    }
    tensors = {
        name: graph.tensor(
            name=name, dim=list(t.shape), stride=list(t.stride()), data_type=dtypes[t.dtype]
        )
        for name, t in operands.items()
        if name not in ("branch", "out")
    }
    y = graph.conv_fprop(
        image=tensors["x"],
        weight=tensors["weight"],
        padding=list(geometry.padding),
        stride=list(geometry.stride),
        dilation=list(geometry.dilation),
    )
    y = tensors["branch"] = graph.mul(a=y, b=tensors["scale"])
    y = graph.add(a=y, b=tensors["shift"])
    if "residual" in tensors:
        y = graph.add(a=y, b=tensors["residual"])
    tensors["out"] = graph.relu(y) if relu else y
    for name in ("branch", "out"):
        if name in operands:
            t = operands[name]
            tensors[name].set_output(True).set_data_type(dtypes[t.dtype])
            tensors[name].set_dim(list(t.shape)).set_stride(list(t.stride()))
    return tensors
