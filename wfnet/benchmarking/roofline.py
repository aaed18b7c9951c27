"""The roofline of an untraining step: floating-point operations and bytes, counted.

A network becomes a list of operations (GEMMs with what their epilogues may do, poolings,
attention, passes). An operation takes at least ``max(flops / rate, bytes / bandwidth)``; the
roofline of a step is the sum over its forward and input-gradient operations. Every elementwise
operation is part of a GEMM; operands are read, and results that somebody needs are written, among
them the branch v = A * u of every masked layer.

Bytes are counted per expanded sample, except for what comes before the first mask: that is read
(and computed) once per source image.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import wfnet
from wfnet import fusion
from wfnet.services.clock import timed


@dataclass(frozen=True)
class Operation:
    """One pass over memory with arithmetic: per image, and what is read once (weights)."""

    flops: float
    elements: float  # read and written, per image
    weights: float = 0  # elements read once
    at_source: bool = False  # computed per source image, not per sample
    source_elements: float = 0  # of `elements` of an expanded operation: read per source image


@dataclass(frozen=True)
class Rates:
    """What a device was measured to do."""

    flops: float  # per second
    bandwidth: float  # bytes per second
    element: int  # bytes of an element

    def seconds(self, flops: float, size: float) -> float:
        """Returns the least time of so many operations, and so many bytes moved."""
        return max(flops / self.flops, size / self.bandwidth)

    def as_json(self) -> dict[str, float]:
        """Returns the rates by the names that records have for them."""
        return {"flops_per_second": self.flops, "bytes_per_second": self.bandwidth}

    def __str__(self) -> str:
        products = f"{self.flops / 1e9:,.0f} GFLOP/s (product)"
        return f"{products}, {self.bandwidth / 1e9:,.1f} GB/s (copy)"


def least_seconds(operations: list[Operation], samples: int, sources: int, rates: Rates) -> float:
    """Returns the least time of a step over ``samples`` expanded samples of ``sources`` images."""
    total = 0.0
    for op in operations:
        images = sources if op.at_source else samples
        elements = op.weights + op.elements * images + op.source_elements * sources
        total += rates.seconds(op.flops * images, elements * rates.element)
    return total


def operations_of(net: wfnet.WFNet, image_size: int) -> list[Operation]:
    """Counts the operations of forward and backward of ``net``; its weights may be on ``meta``.

    Raises:
        ValueError: for a network that is neither a fusable CNN nor a timm vision transformer.
    """
    shapes = elements_per_image(net.model, image_size)
    if hasattr(net.model, "blocks") and hasattr(net.model, "patch_embed"):
        return _transformer(net.model, shapes)
    try:
        plan = fusion.make_plan(net.model)
    except fusion.NotFusable as error:
        name = type(net.model).__name__
        raise ValueError(f"no roofline is counted for {name}: {error}") from error
    return _convolutional(plan, shapes)


def elements_per_image(model: nn.Module, image_size: int) -> dict[nn.Module, tuple[int, int]]:
    """Returns elements of input and output of every module, without computing anything."""
    found: dict[nn.Module, tuple[int, int]] = {}

    def record(module: nn.Module, inputs: tuple, output: object) -> None:
        if inputs and isinstance(inputs[0], torch.Tensor) and isinstance(output, torch.Tensor):
            found[module] = (inputs[0].numel(), output.numel())

    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    meta = {name: torch.empty_like(t, device="meta") for name, t in tensors.items()}
    handles = [module.register_forward_hook(record) for module in model.modules()]
    try:
        with torch.no_grad(), wfnet.forgetting(None):
            torch.func.functional_call(
                model, meta, (torch.empty(1, 3, image_size, image_size, device="meta"),)
            )
    finally:
        for handle in handles:
            handle.remove()
    return found


def _convolutional(plan: fusion.Plan, shapes: dict) -> list[Operation]:
    operations = []
    for step in plan.convolutions:
        conv = step.layer
        i, o = shapes[conv]
        flops, weights = 2 * o * conv.weight[0].numel(), conv.weight.numel()
        read = {"source_elements": i} if step.at_source else {}
        x = 0 if step.at_source else i
        residual = 0 if step.residual is None else o
        operations.append(Operation(flops, x + 2 * o + residual, weights, **read))
        if step.at_source:
            continue
        # ag is read; v (or out) is read and ag of the layer below written.
        traffic = o + 2 * i
        below = step.below
        if below is not None and below.residual is not None:
            traffic += 3 * i  # skip in, g out; a mask beside v
        operations.append(Operation(flops, traffic, weights))
    for step in plan.steps:
        if isinstance(getattr(step, "call", None), nn.MaxPool2d):
            i, o = shapes[step.call]
            # Forward: in, out. Backward: gradient, input (or positions), gradient of the input.
            operations.append(Operation(0, i + o))
            operations.append(Operation(0, o + 2 * i))
    return operations


def _transformer(model: nn.Module, shapes: dict) -> list[Operation]:
    embed = model.patch_embed.proj
    image, patches = shapes[embed]
    blocks = list(model.blocks)
    e = shapes[blocks[0]][1]  # tokens x width
    width = model.embed_dim
    tokens = e // width
    operations = [Operation(2 * patches * embed.weight[0].numel(), image + e, at_source=True)]

    def gemm(fan_in: int, fan_out: int, elements: float) -> None:
        operations.append(Operation(2 * tokens * fan_in * fan_out, elements, fan_in * fan_out))

    def passes(elements: float, at_source: bool = False) -> None:
        operations.append(Operation(0, elements, at_source=at_source))

    for number, block in enumerate(blocks):
        hidden = block.mlp.fc1.out_features
        h = tokens * hidden
        first = number == 0
        # Forward. LayerNorm is a pass of its own in every roofline: a row of it spans all tiles.
        passes(2 * e, at_source=first)
        gemm(width, 3 * width, 7 * e)
        operations.append(Operation(4 * tokens * e, 4 * e))
        gemm(width, width, 3 * e)
        passes(2 * e)
        gemm(width, hidden, e + 2 * h)
        gemm(hidden, width, h + 2 * e)
        # Backward.
        gemm(hidden, width, e + 2 * h)
        gemm(width, hidden, h + e)
        passes(4 * e)
        gemm(width, width, 2 * e)
        operations.append(Operation(10 * tokens * e, 8 * e))
        if first:
            passes(6 * e)
        else:
            gemm(width, 3 * width, 4 * e)
            passes(4 * e)
    return operations


def measure_rates(device: torch.device, dtype: torch.dtype, repeats: int = 20) -> Rates:
    """Measures products and copies of this device, best of some: what else runs slows them.

    Of a matrix product and a convolution the faster one counts: on AMD's processors PyTorch's
    matrix product, which is not made for them, has less than half of a convolution's rate.

    On a processor whose caches hold a layer's tensors, less than the counted bytes reach memory,
    and a step may pass the roofline.
    """
    cuda = device.type == "cuda"
    size = 8192 if cuda else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    images, channels, pixels = (128, 256, 56) if cuda else (16, 256, 16)
    x = torch.randn(images, channels, pixels, pixels, device=device, dtype=dtype)
    weight = torch.randn(channels, channels, 3, 3, device=device, dtype=dtype)
    x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    source = torch.empty(2**30 if cuda else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def best(work: Callable[[], object]) -> float:
        return min(timed(work, device) for _ in range(repeats + 1)) / 1e3

    product = 2 * size**3 / best(lambda: a @ b)
    convolution = 2 * x.numel() * channels * 9 / best(lambda: F.conv2d(x, weight, padding=1))
    copied = best(lambda: target.copy_(source))
    return Rates(max(product, convolution), 2 * source.numel() / copied, dtype.itemsize)
