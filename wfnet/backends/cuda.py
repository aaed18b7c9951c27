"""Backend ``cuda``: compiled tensor-core kernels; the masks live in GEMM epilogues.

Forward is one implicit GEMM that writes ``out`` and, where backward needs it, the branch
``v = scale * u``. In a fused network each input-gradient GEMM finishes the layer below it: skip
gradient, ReLU mask, both column sums and ``scale * g``. Launchers:
:mod:`wfnet.backends.cuda_launch`; kernels: csrc/.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from wfnet import gates
from wfnet.backends import cuda_launch
from wfnet.backends.contract import (
    Activation,
    Backend,
    ConvGeometry,
    Epilogue,
    LayerBelow,
    LayerGradient,
    PoolGeometry,
)
from wfnet.backends.cuda_launch import Axis, Gradient, Layer, Want
from wfnet.gate_tables import GatedLayer, GateTables, StepTables, side_by_side

_MOST_LABELS = 16
_MOST_ROWS = 2**31
_FIRST_ARCH = 8


def _refuse_tensor(x: Tensor) -> str | None:
    """What both operations refuse; device, dtype and platform only, so that it can be traced."""
    library = cuda_launch.library()
    if library.missing is not None:
        return library.missing
    if x.dtype not in cuda_launch.DTYPES:
        return cuda_launch.REFUSED_DTYPE.format(x.dtype)
    if library.emulated:
        if x.device.type != "cpu":
            return f"WFNET_CUDA_EMULATE runs the kernels on the CPU, and x is on {x.device}"
        return None
    if x.device.type != "cuda":
        return f"the CUDA kernels need a CUDA tensor, and x is on {x.device}"
    if torch.version.hip is not None:
        return "the CUDA kernels are written for NVIDIA devices"
    capability = torch.cuda.get_device_capability(x.device)
    if not _runs_on(capability, library.module.archs):
        return (
            f"wfnet._C was built for {library.module.archs}, and the device has compute capability "
            f"{capability[0]}.{capability[1]}; rebuild with WFNET_CUDA_ARCHS"
        )
    return None


def _runs_on(capability: tuple[int, int], archs: str) -> bool:
    """Whether machine code for ``archs`` (``"8.0 9.0a 10.0"``) or its PTX runs on a device."""
    portable = []
    for arch in archs.split():
        major, minor = (int(number) for number in arch.rstrip("af").split("."))
        if arch[-1].isdigit():
            portable.append((major, minor))
            if capability[0] == major and capability[1] >= minor:
                return True
        elif capability == (major, minor):
            return True
    return bool(portable) and capability >= max(portable)  # by the newest one's PTX


def _refuse_sizes(rows: int, image: int) -> str | None:
    if rows >= _MOST_ROWS:
        return f"{rows} pixels are past the kernels' 32-bit indexing (2**31)"
    if image >= _MOST_ROWS:
        return f"an image of {image} elements is past the kernels' 32-bit indexing (2**31)"
    return None


def _refuse_columns(columns: int) -> str | None:
    if columns % cuda_launch.VECTOR:
        return f"the CUDA kernels need output channels in multiples of 8, not {columns}"
    return None


class CudaBackend(Backend):
    """Implicit GEMM with the per-sample scale and shift in its epilogue.

    ``saved`` is the branch ``v = scale * u`` of the expanded batch, in the dtype of ``x``.
    """

    name = "cuda"

    def refuse_conv2d(self, x: Tensor, weight: Tensor, geometry: ConvGeometry) -> str | None:
        reason = _refuse_tensor(x) or _refuse_columns(weight.shape[0])
        if reason is not None:
            return reason
        if geometry.groups != 1:
            return f"the CUDA kernels have no grouped convolution (groups={geometry.groups})"
        height, width = geometry.output_size(x.shape[2], x.shape[3], tuple(weight.shape[2:]))
        if height < 1 or width < 1:
            return f"the filter {list(weight.shape)} does not fit into {list(x.shape)}"
        pixels = max(height * width, x.shape[2] * x.shape[3])
        channels = max(weight.shape[0], x.shape[1] + cuda_launch.VECTOR)
        return _refuse_sizes(x.shape[0] * pixels, pixels * channels)

    def refuse_linear(self, x: Tensor, weight: Tensor) -> str | None:
        reason = _refuse_tensor(x) or _refuse_columns(weight.shape[0])
        if reason is not None:
            return reason
        channels = max(weight.shape[0], x.shape[2] + cuda_launch.VECTOR)
        return _refuse_sizes(x.shape[0] * x.shape[1], x.shape[1] * channels)

    def explain_conv2d(
        self, x: Tensor, weight: Tensor, geometry: ConvGeometry, batch: int | None = None
    ) -> str:
        """Kernels of forward and input gradient, or the refusal."""
        reason = self.refuse_conv2d(x, weight, geometry)
        if reason is not None:
            return f"refused: {reason}"
        height, width = _axes(x.shape, tuple(weight.shape[2:]), geometry)
        return _explained(x, weight, height, width, batch is not None)

    def explain_linear(self, x: Tensor, weight: Tensor, batch: int | None = None) -> str:
        """Kernels of forward and input gradient, or the refusal."""
        reason = self.refuse_linear(x, weight)
        if reason is not None:
            return f"refused: {reason}"
        pixels = _pixels_of(x)
        return _explained(pixels, weight, *_token_axes(x.shape[1]), batch is not None)

    def conv2d(
        self, x: Tensor, weight: Tensor, geometry: ConvGeometry, epilogue: Epilogue
    ) -> Activation:
        height, width = _axes(x.shape, tuple(weight.shape[2:]), geometry)
        out, branch = cuda_launch.conv_fprop(
            _channels_last(x),
            _channels_last(weight),
            height,
            width,
            epilogue.scale,
            epilogue.shift,
            residual=_channels_last(epilogue.residual),
            relu=epilogue.relu,
            source=epilogue.source,
            save_branch=epilogue.save,
        )
        out, branch = _channels_first(out), _channels_first(branch)
        masked = epilogue.save and epilogue.relu and epilogue.residual is not None
        return Activation(out, branch, out if masked else None)

    def linear(self, x: Tensor, weight: Tensor, epilogue: Epilogue) -> Activation:
        height, width = _token_axes(x.shape[1])
        out, branch = cuda_launch.conv_fprop(
            x.contiguous().unsqueeze(2),
            _pointwise(weight),
            height,
            width,
            epilogue.scale,
            epilogue.shift,
            source=epilogue.source,
            save_branch=epilogue.save,
        )
        return Activation(out.squeeze(2), None if branch is None else branch.squeeze(2))

    pools_with_epilogue = True

    def epilogue_backward(
        self,
        dout: Tensor,
        below: LayerBelow,
        skip: Tensor | None = None,
        may_overwrite: bool = False,
    ) -> LayerGradient:
        """One pass over ``dout``; a projection shortcut takes a second one over ``g``."""
        layer, want = _layer_below(below, skip)
        sums_sources = below.source is not None and below.need_scaled_grad
        if sums_sources:
            want = replace(want, scaled_grad=False)
        gradient = Gradient(None, None)
        if want.grad or want.scaled_grad or want.t0 is not None or want.t1 is not None:
            dtype = dout.dtype if below.branch is None else below.branch.dtype
            gradient = cuda_launch.epilogue_bwd(dout.to(dtype).permute(0, 2, 3, 1), layer, want)
        finished = _finished(gradient, below)
        if not sums_sources:
            return finished
        scaled = cuda_launch.sum_by_source(
            _channels_last(dout), below.scale, below.source, below.images
        )
        return finished._replace(scaled_grad=_channels_first(scaled))

    def max_pool2d(
        self, x: Tensor, window: PoolGeometry, save: bool
    ) -> tuple[Tensor, Tensor | None]:
        """One pass; positions take a byte."""
        fits = x.dtype in cuda_launch.DTYPES and x.shape[1] % cuda_launch.VECTOR == 0
        if not (fits and window.takes_bytes):
            return super().max_pool2d(x, window, save)
        axes = _pool_axes(x.shape, window)
        out, positions = cuda_launch.max_pool(_channels_last(x), *axes, save)
        return _channels_first(out), _channels_first(positions)

    def max_pool2d_backward(
        self,
        dout: Tensor,
        positions: Tensor,
        like: Tensor,
        window: PoolGeometry,
        skip: Tensor | None = None,
        below: LayerBelow | None = None,
    ) -> LayerGradient:
        """One pass, the elementwise backward of the layer below included."""
        if positions.dtype != torch.uint8:  # another one's
            return super().max_pool2d_backward(dout, positions, like, window, skip, below)
        pooling = cuda_launch.Pooling(_channels_last(positions), *_pool_axes(like.shape, window))
        layer, want = _layer_or_none(below, skip)
        gradient = cuda_launch.epilogue_bwd(_channels_last(dout), layer, want, pooling)
        return _finished(gradient, below)

    def conv2d_dgrad(
        self,
        scaled_grad: Tensor,
        weight: Tensor,
        input_shape: tuple[int, ...],
        geometry: ConvGeometry,
        skip: Tensor | None = None,
        below: LayerBelow | None = None,
    ) -> LayerGradient:
        """One GEMM; its epilogue is the elementwise backward of the layer below."""
        layer, want = _layer_or_none(below, skip)
        height, width = _axes(input_shape, tuple(weight.shape[2:]), geometry)
        gradient = cuda_launch.conv_dgrad(
            _channels_last(scaled_grad), _channels_last(weight), height, width, layer, want
        )
        return _finished(gradient, below)

    def gate_tables(self, layers: Sequence[GatedLayer]) -> GateTables:
        """One launch each way for all layers, where filters and constants are fp32."""
        tensors = [t for layer in layers for t in vars(layer).values() if isinstance(t, Tensor)]
        if all(t.dtype == torch.float32 for t in tensors):
            return _Tables(layers)
        return super().gate_tables(layers)

    def linear_backward(
        self, dout: Tensor, layer: LayerBelow, weight: Tensor, input_shape: tuple[int, ...]
    ) -> Tensor | None:
        pixels = replace(layer, branch=None if layer.branch is None else _pixels_of(layer.branch))
        scaled = self.epilogue_backward(_pixels_of(dout), pixels).scaled_grad
        if scaled is None:
            return None
        height, width = _token_axes(input_shape[1])
        return cuda_launch.conv_dgrad(
            _channels_last(scaled), _pointwise(weight), height, width, Layer(), Want(grad=True)
        ).grad.squeeze(2)

    def gate_rows(self, alpha: Tensor, forget: Tensor, gate_scale: float) -> Tensor:
        if not _takes_gates(alpha, forget):
            return gates.gate_rows(alpha, forget, gate_scale)
        return cuda_launch.gate_rows(alpha.float(), forget, gate_scale)

    def gate_rows_backward(self, t: Tensor, alpha: Tensor, forget: Tensor) -> Tensor:
        if not _takes_gates(alpha, forget) or t.dtype != torch.float32:
            return gates.gate_rows_backward(t, alpha, forget)
        return cuda_launch.gate_rows_bwd(t, alpha.float(), forget).to(alpha.dtype)


def _takes_gates(alpha: Tensor, forget: Tensor) -> bool:
    return (
        alpha.dtype != torch.float64
        and alpha.shape[1] % 4 == 0
        and forget.shape[1] in range(1, _MOST_LABELS + 1)
        and (alpha.device.type == "cpu") == cuda_launch.library().emulated
    )


def _explained(x: Tensor, weight: Tensor, height: Axis, width: Axis, expands: bool) -> str:
    """Which kernels run, for ``x`` ``[N, C, H, W]`` and ``weight`` ``[O, C, ...]``."""
    columns, channels = weight.shape[:2]
    padded = -(-channels // cuda_launch.VECTOR) * cuda_launch.VECTOR
    sizes = {"batch": max(x.shape[0], 1), "in_channels": padded, "out_channels": columns,
             "height": height, "width": width}  # fmt: skip
    processors = cuda_launch.hopper_processors(x.device)

    def kernel(backward: bool, result: int) -> str:
        expanded = expands and not backward
        refusal = cuda_launch.hopper_refuses(backward, 0 if expanded else processors, sizes)
        tile = f"tiles of 128 x {64 if cuda_launch.narrow_tiles(result) else 128}"
        if refusal is None:
            return "persistent implicit GEMM (TMA, wgmma, clusters of two blocks)"
        why = "label expansion" if expanded else refusal
        return f"implicit GEMM (mma.sync), {tile}" + (f" ({why})" if processors else "")

    note = "" if channels == padded else ", input channels padded to 8"
    return f"forward: {kernel(False, columns)}{note}; input gradient: {kernel(True, padded)}"


def _channels_last(x: Tensor | None) -> Tensor | None:
    """``[N, C, H, W]`` as contiguous ``[N, H, W, C]``: a view of channels-last memory."""
    return None if x is None else x.permute(0, 2, 3, 1).contiguous()


def _channels_first(x: Tensor | None) -> Tensor | None:
    """``[N, H, W, C]`` as a ``[N, C, H, W]`` view, channels-last in memory."""
    return None if x is None else x.permute(0, 3, 1, 2)


def _pixels_of(tokens: Tensor) -> Tensor:
    """``[B, T, C]`` as ``[B, C, T, 1]``, channels-last in memory."""
    return tokens.unsqueeze(2).permute(0, 3, 1, 2)


def _pointwise(weight: Tensor) -> Tensor:
    """``[O, C]`` as the filter ``[O, 1, 1, C]``."""
    return weight.contiguous()[:, None, None]


def _token_axes(tokens: int) -> tuple[Axis, Axis]:
    return Axis(tokens, tokens, 1), Axis(1, 1, 1)


def _axes(
    input_shape: Sequence[int], kernel: tuple[int, int], geometry: ConvGeometry
) -> tuple[Axis, Axis]:
    size = tuple(input_shape[2:])
    numbers = zip(
        size, geometry.output_size(*size, kernel), kernel, geometry.stride, geometry.padding,
        geometry.dilation, strict=True,
    )  # fmt: skip
    height, width = (Axis(*axis) for axis in numbers)
    return height, width


def _layer_below(below: LayerBelow, skip: Tensor | None) -> tuple[Layer, Want]:
    layer = Layer(
        branch=_channels_last(below.branch),
        scale=below.scale,
        shift=below.shift,
        activation=_channels_last(below.mask),
        skip=None if skip is None else _channels_last(skip.to(below.branch.dtype)),
        relu=below.relu,
    )
    want = Want(
        grad=below.need_grad or below.shortcut is not None,
        scaled_grad=below.need_scaled_grad,
        t0=below.t0,
        t1=below.t1,
    )
    return layer, want


def _layer_or_none(below: LayerBelow | None, skip: Tensor | None) -> tuple[Layer, Want]:
    """As :func:`_layer_below`; without a layer the gradient itself is all that is wanted."""
    if below is not None:
        return _layer_below(below, skip)
    return Layer(skip=_channels_last(skip)), Want(grad=True)


def _pool_axes(shape: Sequence[int], window: PoolGeometry) -> tuple[Axis, Axis]:
    """Of a pooling over ``[B, C, H, W]``."""
    numbers = zip(shape[2:], window.output_size(*shape[2:]), *window[:4], strict=True)
    height, width = (Axis(*axis) for axis in numbers)
    return height, width


def _finished(gradient: Gradient, below: LayerBelow | None) -> LayerGradient:
    grad, scaled = _channels_first(gradient.grad), _channels_first(gradient.scaled_grad)
    if below is None or below.shortcut is None:
        return LayerGradient(grad, scaled)
    shortcut = backend.epilogue_backward(grad, below.shortcut)
    return LayerGradient(grad if below.need_grad else None, scaled, shortcut.scaled_grad)


class _Tables(GateTables):
    """The gates of all layers in one launch, and all filter gradients in another."""

    def __init__(self, layers: Sequence[GatedLayer]):
        super().__init__([replace(layer, **_detached(layer)) for layer in layers])
        total = self.factor.shape[0]
        self.chosen = torch.zeros(total, dtype=torch.float32, device=self.factor.device)
        for part in self.of_bias:
            if part is not None:
                self.chosen[part] = 1.0

    def __call__(self, forget: Tensor, save: bool = False) -> StepTables:
        flat = side_by_side(self.filters)
        if not _takes_gates(flat, forget):
            return super().__call__(forget, save)
        return _StepTables(self, flat, forget, save)


def _detached(layer: GatedLayer) -> dict[str, Tensor]:
    return {n: t.detach() for n, t in vars(layer).items() if isinstance(t, Tensor)}


class _StepTables(StepTables):
    """Scales and shifts are columns of two ``[B, total]`` matrices, which kernels read in place."""

    def __init__(self, tables: _Tables, flat: Tensor, forget: Tensor, save: bool):
        self.tables, self.flat, self.forget = tables, flat, forget
        self.products = cuda_launch.gate_rows(flat, forget, tables.gate_scale, tables.factor)
        # Rows as far apart as those of the products, so that one stride serves both tables.
        shift = torch.empty_like(self.products)[:, : tables.beta.shape[0]]
        shift.copy_(tables.beta)
        for bias, layer in zip(tables.of_bias, tables.of_layer, strict=True):
            if bias is not None:
                shift[:, layer] += self.products[:, bias]
        self.scales = [self.products[:, part] for part in tables.of_weight]
        self.shifts = [shift[:, part] for part in tables.of_layer]
        self.t1, self.t0 = [], []
        if save:
            self.sums = torch.zeros_like(self.products)
            self.t1 = [self.sums[:, part] for part in tables.of_weight]
            self.t0 = [None if part is None else self.sums[:, part] for part in tables.of_bias]

    def gradients(self, into: Tensor | None = None) -> list[Tensor]:
        gradient = cuda_launch.gate_rows_bwd(
            self.sums, self.flat, self.forget, self.products, self.tables.chosen, into
        )
        return [gradient[:, part] for part in self.tables.columns]


backend = CudaBackend()
