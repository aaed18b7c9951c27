"""Masked products as tests run them: operands, what comes out in fp64, and how close that must be.

Whatever has the signature of a backend's ``conv2d`` or ``conv2d_dgrad`` is checked: launchers of
kernels, interpreted and emulated ones, backends on a device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

import wfnet.functional as wf
from wfnet.backends.contract import Activation, ConvGeometry, Epilogue, LayerBelow, LayerGradient

# Relative to the fp64 result, over a whole tensor: a rounding or two of the dtype.
_ROUNDINGS = {torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
_TF32 = 1.5e-3  # of operands, which Triton before 3.7 truncates


def check(result: Tensor, truth: Tensor, bound: float | None = None) -> None:
    """Asserts that a result differs from ``truth`` by ``bound``, else a few of its roundings."""
    error = (result.double() - truth.double()).norm() / truth.double().norm().clamp_min(1e-30)
    bound = _ROUNDINGS[result.dtype] if bound is None else bound
    assert error <= bound, f"relative error {error:.2e}, bound {bound:.2e}"


def _per_pixel(table: Tensor | None) -> Tensor | float:
    return 0.0 if table is None else table.double()[:, :, None, None]


def sizes(batch: int, height: int, width: int, channels: int, columns: int, kernel=1, stride=1):
    """Of a convolution with as much padding as keeps its size at stride 1."""
    square = (kernel, kernel), (stride, stride), (kernel // 2,) * 2, (1, 1)
    return (batch, height, width, channels, columns, *square)


class _Product:
    """A convolution of (batch, height, width, in, out, filter, stride, padding, dilation)."""

    def __init__(self, sizes: tuple, dtype: torch.dtype, device: str):
        self.batch, height, width, channels, columns, kernel, *how = sizes
        self.dtype, self.device, self.geometry = dtype, device, ConvGeometry(*how)
        self.in_shape = (self.batch, channels, height, width)
        size = self.geometry.output_size(height, width, kernel)
        self.out_shape = (self.batch, columns, *size)
        weight = torch.randn(columns, channels, *kernel, device=device)
        self.weight = (weight / (channels * kernel[0] * kernel[1]) ** 0.5).to(dtype)
        exact = max(_ROUNDINGS[dtype], 2.0**-24 * weight[0].numel() ** 0.5)
        tf32 = dtype == torch.float32 and device == "cuda" and torch.backends.cudnn.allow_tf32
        self.bound = _TF32 if tf32 else exact
        self.sums_bound = _TF32 if tf32 else 4e-6

    def randn(self, shape: tuple[int, ...]) -> Tensor:
        drawn = torch.randn(shape, device=self.device).to(self.dtype)
        return drawn.contiguous(memory_format=torch.channels_last)


class Forward(_Product):
    """A forward product and what follows it; ``run`` is called as a backend's ``conv2d``."""

    def __init__(
        self,
        sizes,
        dtype=torch.float32,
        device="cpu",
        *,
        residual=True,
        shift=True,
        relu=True,
        save=True,
        source=None,
    ):
        super().__init__(sizes, dtype, device)
        self.x = self.randn(self.in_shape)
        samples = self.batch if source is None else len(source)
        table, out = (samples, self.out_shape[1]), (samples, *self.out_shape[1:])
        self.epilogue = Epilogue(
            scale=torch.rand(table, device=device) + 0.5,
            shift=torch.randn(table, device=device) if shift else None,
            residual=self.randn(out) if residual else None,
            relu=relu,
            source=source,
            save=save,
        )

    def truth(self) -> tuple[Tensor, Tensor]:
        """``out`` and the branch."""
        e, how = self.epilogue, self.geometry
        x = self.x if e.source is None else self.x[e.source]
        u = F.conv2d(x.double(), self.weight.double(), None, how.stride, how.padding, how.dilation)
        v = u * _per_pixel(e.scale)
        out = v.to(self.dtype).double() if e.save else v
        out = out + _per_pixel(e.shift) + (0 if e.residual is None else e.residual.double())
        return out.relu() if e.relu else out, v

    def run(self, run: Callable[..., Activation]) -> Activation:
        return run(self.x, self.weight, self.geometry, self.epilogue)

    def check(self, run: Callable[..., Activation]) -> None:
        """Compares what ``run`` makes of it with the truth."""
        found, (out, branch) = self.run(run), self.truth()
        check(found.out, out, bound=self.bound)
        e = self.epilogue
        assert (found.branch is not None) == e.save
        if e.save:
            check(found.branch, branch, bound=self.bound)
            assert (found.mask is not None) == (e.relu and e.residual is not None)


def layer_below(
    shape: tuple[int, ...],
    randn: Callable[[tuple[int, ...]], Tensor],
    *,
    mask: str = "branch",
    sums: bool = True,
    shift: bool = True,
    shortcut: bool = False,
    skip: Tensor | None = None,
    unscaled: bool = False,
) -> LayerBelow:
    """A layer with output ``[B, C, H, W]`` and room for its sums.

    Args:
        mask: where its ReLU is read from: ``branch``, ``kept`` (the output), ``none`` (no ReLU).
    """
    branch = randn(shape)

    def table() -> Tensor:
        return torch.randn(shape[:2], device=branch.device)

    other = None
    if shortcut:
        other = LayerBelow(table(), branch=randn(shape), t1=table(), t0=table())
    return LayerBelow(
        scale=table(),
        shift=table() if shift else None,
        branch=branch if sums or mask == "branch" else None,
        mask=randn(shape).relu() if mask == "kept" else None,
        relu=mask != "none",
        skip=skip,
        t1=table() if sums else None,
        t0=table() if sums else None,
        need_grad=mask != "branch",
        unscaled=unscaled,
        shortcut=other,
    )


def _v(layer: LayerBelow, below: LayerBelow) -> Tensor:
    """``A * u``, by the branch of ``below`` or its shortcut."""
    return layer.branch.double() * (_per_pixel(layer.scale) if below.unscaled else 1)


def check_gradient(
    found: LayerGradient,
    dout: Tensor,
    below: LayerBelow,
    bound: float | None = None,
    sums_bound: float = 4e-6,
) -> None:
    """Compares all that a gradient ``dout`` (fp64) of a layer's output ends in."""
    g = dout + (0 if below.skip is None else below.skip.double())
    if below.mask is not None:
        g = g * (below.mask > 0)
    elif below.relu:
        shift = 0 if below.shift is None else below.shift[:, :, None, None]
        g = g * (_v(below, below).float() + shift > 0)
    assert (found.grad is not None) == below.need_grad
    if below.need_grad:
        check(found.grad, g, bound=bound)
    layers = [(below, found.scaled_grad)]
    if below.shortcut is not None:
        layers.append((below.shortcut, found.shortcut))
    for layer, scaled in layers:
        check(scaled, _per_pixel(layer.scale) * g, bound=bound)
        if layer.t1 is not None:
            # A shortcut's pass of its own reads g as it was stored.
            stored = 0.0 if layer is below else _ROUNDINGS[layer.branch.dtype]
            limit = max(sums_bound, stored)
            check(layer.t0, g.sum((2, 3)), bound=limit)
            check(layer.t1, (g * _v(layer, below)).sum((2, 3)), bound=limit)


class Backward(_Product):
    """An input gradient and a layer below; ``run`` is called as a backend's ``conv2d_dgrad``."""

    def __init__(self, sizes, dtype=torch.float32, device="cpu", *, skip=True, **below):
        super().__init__(sizes, dtype, device)
        self.ag = self.randn(self.out_shape)
        skip = self.randn(self.in_shape) if skip else None
        self.below = layer_below(self.in_shape, self.randn, skip=skip, **below)

    def gradient(self) -> Tensor:
        """The product alone, in fp64."""
        how = self.geometry.stride, self.geometry.padding, self.geometry.dilation
        weight, ag = self.weight.double(), self.ag.double()
        return torch.nn.grad.conv2d_input(self.in_shape, weight, ag, *how)

    def run(self, run: Callable[..., LayerGradient]) -> tuple[LayerGradient, LayerBelow]:
        """Results, and the layer with sums of its own, which were NaN."""
        fresh = {}
        for name in ("t1", "t0"):
            sums = getattr(self.below, name)
            fresh[name] = None if sums is None else torch.full_like(sums, torch.nan)
        below = replace(self.below, **fresh)
        return run(self.ag, self.weight, self.in_shape, self.geometry, below), below

    def check(self, run: Callable[..., LayerGradient]) -> None:
        """Compares what ``run`` makes of it with the truth."""
        found, below = self.run(run)
        check_gradient(found, self.gradient(), below, self.bound, self.sums_bound)


def check_public(
    backend: str, x: Tensor, weight: Tensor, forget: Tensor, conv: tuple = (), source=None
) -> None:
    """Output and gradients of a public function against the reference in fp64.

    The bound is twice the error of ``eager`` in the same dtype, or a few roundings of fp32 sums.

    Args:
        conv: stride, padding, of a convolution.
    """
    bias = torch.randn(weight.shape[0], device=x.device).to(x.dtype)
    alphas = torch.randn(2, 5, weight.shape[0], device=x.device)
    dout = None

    def run(name: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        nonlocal dout
        wide = torch.promote_types(dtype, torch.float32)
        leaves = [x.to(dtype), alphas[0].to(wide), alphas[1].to(wide)]
        leaves = [t.detach().clone().requires_grad_() for t in leaves]
        call = wf.wf_conv2d if conv else wf.wf_linear
        fixed, filters = (weight.to(dtype), bias.to(dtype)), leaves[1:]
        options = {"gate_scale": 1.05, "source": source, "backend": name}
        y = call(leaves[0], *fixed, *filters, forget, *conv, **options)
        dout = torch.randn_like(y).to(x.dtype) if dout is None else dout
        return y, *torch.autograd.grad(y, leaves, dout.to(dtype))

    found = run(backend, x.dtype), run("eager", x.dtype), run("reference", torch.float64)
    for mine, theirs, truth in zip(*found, strict=True):
        error = ((theirs.double() - truth).norm() / truth.norm()).item()
        floor = _TF32 if x.dtype == torch.float32 and x.is_cuda else 3e-6
        check(mine, truth, bound=max(2 * error, floor))
