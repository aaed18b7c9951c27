"""Backends: who computes a masked convolution or linear map.

Every backend implements :class:`Backend` in one file and registers itself by name. A backend that
is asked for by name runs or raises; ``auto`` asks :func:`choose`.
"""

from __future__ import annotations

import importlib
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from wfnet import gate_tables as tables
from wfnet import gates


@dataclass(frozen=True)
class ConvGeometry:
    """Stride, zero padding, dilation and groups of a convolution, each as (height, width)."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def output_size(self, height: int, width: int, kernel: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the output for an input of ``height`` x ``width``."""
        return tuple(
            (size + 2 * pad - dil * (k - 1) - 1) // step + 1
            for size, pad, dil, k, step in zip(
                (height, width), self.padding, self.dilation, kernel, self.stride, strict=True
            )
        )


_MOST_TAPS = 255  # of a pooling's window, where a position is a byte and 255 is none


class PoolGeometry(NamedTuple):
    """A maximum pooling, each as (height, width): what PyTorch's operators take, in their order."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    ceil_mode: bool = False

    @property
    def takes_bytes(self) -> bool:
        """Whether the kernels take it: no dilation, and a byte tells which of its taps it was."""
        return self.dilation == (1, 1) and math.prod(self.kernel) <= _MOST_TAPS

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the result for ``height`` x ``width``, by PyTorch's rule."""
        sizes = zip((height, width), *self[:4], strict=True)
        return tuple(self._output_size(*numbers) for numbers in sizes)

    def _output_size(self, size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
        rest = size + 2 * padding - dilation * (kernel - 1) - 1
        count = (rest + (stride - 1 if self.ceil_mode else 0)) // stride + 1
        # With ceil_mode the last window must begin inside of the image or its left padding.
        return count - int(self.ceil_mode and (count - 1) * stride >= size + padding)


@dataclass(frozen=True)
class Below:
    """A layer whose output a gradient reaches: what its elementwise backward reads and writes.

    The four tables are ``[B, O]``, fp32 (fp64 for fp64 activations), columns contiguous.

    Attributes:
        branch: what ``t1`` is summed from, as :meth:`FusedConvolutions.fused_conv2d` returned it.
        mask: where the ReLU is open, as returned there; None: ``scale * u + shift > 0``.
        scale, shift: the layer's tables ``A`` and ``C``.
        relu: whether its activation is a ReLU (else identity).
        t1: written: ``sum_p g * v`` with ``v = scale * u``.
        t0: written: ``sum_p g``; None where the layer has no bias.
        source: ``[B]``, the sources of the forward pass, only for a first masked layer.
        need_grad: whether ``g`` itself is wanted (its residual reads it).
        need_scaled_grad: whether ``scale * g`` is wanted (the layer is no first masked layer).
        shortcut: the layer whose output is this one's residual and read by nobody else (a
            projection shortcut: identity activation, no residual); it receives the same ``g``.
    """

    branch: Tensor
    mask: Tensor | None
    scale: Tensor
    shift: Tensor
    relu: bool
    t1: Tensor
    t0: Tensor | None
    source: Tensor | None = None
    need_grad: bool = False
    need_scaled_grad: bool = True
    shortcut: Below | None = None


class Finished(NamedTuple):
    """Results of :meth:`FusedConvolutions.finish`, ``[B, O, P, Q]``; None for what is not wanted.

    The column sums are in ``below.t1`` and ``below.t0`` (and in those of ``below.shortcut``).
    """

    grad: Tensor | None  # g
    scaled_grad: Tensor | None  # scale * g
    shortcut: Tensor | None = None  # scale * g with the scale of below.shortcut


class FusedConvolutions:
    """Convolutions of a frozen network with all that follows, and the backward chain.

    What a fused plan is run by: every :class:`Backend` that can, and
    :class:`wfnet.backends.measured.MeasuredConvolutions`, which asks several of them. Shapes as in
    :class:`Backend`.
    """

    name: str

    # Whether fused_conv2d, finish and conv2d_dgrad exist.
    fuses = False

    # Whether the branch that fused_conv2d keeps is `v = scale * u` of every sample and the mask is
    # `out` itself: such backends can finish each other's layers.
    shares_branch = False

    # Whether max_pool2d_backward finishes a layer in its own pass: elsewhere finish() comes after
    # it, when positions and gradient of the pooling are gone.
    finishes_pooled = False

    def refuse_finish(self, channels: int) -> str | None:
        """Why this backend cannot finish a layer of so many channels; None if it can."""
        return None

    def fused_conv2d(
        self,
        x: Tensor,
        weight: Tensor,
        scale: Tensor,
        shift: Tensor,
        residual: Tensor | None,
        relu: bool,
        source: Tensor | None,
        geometry: ConvGeometry,
        save: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """``out = act(scale * u + shift + residual)`` with ``u = conv(x[source], weight)``.

        Shapes as in the class; ``residual`` is ``[B, O, P, Q]``; ``act`` is ReLU or identity.

        Returns:
            ``out``; if ``save``, the branch that ``t1`` is summed from and the mask of the ReLU
            (None where branch, scale and shift tell it): :attr:`Below.branch`, :attr:`Below.mask`.
        """
        raise NotImplementedError(f"backend {self.name!r} has no fused convolutions")

    def finish(
        self, dout: Tensor, below: Below, skip: Tensor | None = None, may_overwrite: bool = False
    ) -> Finished:
        """The elementwise backward of one layer, at the top of a chain (after a pooling, say)::

            g  = (dout + skip) * act'(out)
            t1 = sum_p g * v                    t0 = sum_p g            into below.t1, below.t0
            scaled_grad = scale * g             the input of the layer's own dgrad

        and the same ``g`` through ``below.shortcut`` if there is one.

        Args:
            dout: ``[B, O, P, Q]``, any strides (a pooling's gradient may be an expanded view).
            below: the layer that ``dout`` reaches, and what is wanted of it.
            skip: gradient that reaches the same output another way, or None.
            may_overwrite: ``dout`` is not needed afterwards and may become a result.
        """
        raise NotImplementedError(f"backend {self.name!r} has no fused convolutions")

    def conv2d_dgrad(
        self,
        scaled_grad: Tensor,
        weight: Tensor,
        input_shape: tuple[int, ...],
        geometry: ConvGeometry,
        skip: Tensor | None = None,
        below: Below | None = None,
    ) -> Finished:
        """One input-gradient GEMM whose epilogue finishes the layer below: a link of the chain.

        Equal to ``finish(dx, below, skip)`` with ``dx = conv_transpose(scaled_grad, weight)``.

        Args:
            scaled_grad: ``[B, O, P, Q]`` of this layer, as :meth:`finish` or the link above
                returned it; it is not needed afterwards.
            weight: ``[O, C / groups, R, S]``.
            input_shape: ``(B, C, H, W)`` of ``dx``.
            skip: ``[B, C, H, W]``, gradient that reaches the same input another way, or None.
            below: the layer whose output is this layer's input and whose gradients have all
                arrived with this one; None where something else comes before: the result then is
                ``grad = dx + skip`` alone.
        """
        raise NotImplementedError(f"backend {self.name!r} has no fused convolutions")

    def max_pool2d(
        self, x: Tensor, window: PoolGeometry, save: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The largest value of every window, and where it was, for :meth:`max_pool2d_backward`.

        Args:
            x: ``[B, C, H, W]``.
            save: whether the positions are wanted; only their backend reads them.
        """
        out, positions = torch.ops.aten.max_pool2d_with_indices(x, *window)
        return out, positions if save else None

    def max_pool2d_backward(
        self,
        dout: Tensor,
        positions: Tensor,
        like: Tensor,
        window: PoolGeometry,
        skip: Tensor | None = None,
        below: Below | None = None,
    ) -> Finished:
        """Gradient by a pooling's input; its pass may finish the layer below.

        Equal to ``finish(dx, below, skip)`` with ``dx`` the pooling's input gradient.

        Args:
            dout: ``[B, C, P, Q]``, any strides.
            positions: from :meth:`max_pool2d`.
            like: shape, strides, dtype and device of the input ``[B, C, H, W]``; on ``meta``.
            skip, below: as in :meth:`conv2d_dgrad`.
        """
        # Only shape and layout of the input are read; its pages are never touched.
        x = dout.new_empty_strided(like.shape, like.stride())
        dx = torch.ops.aten.max_pool2d_with_indices_backward(dout, x, *window, positions)
        if below is not None:
            return self.finish(dx, below, skip, may_overwrite=True)
        return Finished(dx if skip is None else dx.add_(skip), None)

    def gate_tables(self, layers: Sequence[tables.GatedLayer]) -> tables.GateTables:
        """What makes scale and shift of all ``layers``, and filter gradients of their sums."""
        return tables.GateTables(layers)


class Backend(FusedConvolutions, ABC):
    """One implementation of the scaled convolution and the scaled linear map.

    With ``u = conv(x[source], weight)`` (no bias) a backend computes
    ``out[b, o] = scale[b, o] * u[b, o] + shift[b, o]`` and its backward. The weight is frozen: no
    weight gradient exists, and backward gets no ``x``, only what forward put into ``saved``.

    Shapes (convolution; for the linear map pixels are tokens and ``x`` is ``[N, T, C]``):
        x: ``[N, C, H, W]``, contiguous or channels-last.
        weight: ``[O, C / groups, R, S]``.
        scale, shift: ``[B, O]``, fp32 (fp64 for fp64 ``x``); ``shift`` may be None.
        source: ``[B]`` int64, positions in ``x``, or None (then ``B == N``).
        out: ``[B, O, P, Q]``, dtype of ``x``, fresh memory, no alias of ``x`` or ``saved``.
        t1: ``[B, O]``, ``sum_p dout * scale * u``: derivative by the *log* of the scale.
        t0: ``[B, O]``, ``sum_p dout``.
    """

    def refuse_conv2d(self, x: Tensor, weight: Tensor, geometry: ConvGeometry) -> str | None:
        """Why this backend cannot run the call, in one sentence; None if it can."""
        return None

    def refuse_linear(self, x: Tensor, weight: Tensor) -> str | None:
        """Why this backend cannot run the call, in one sentence; None if it can."""
        return None

    def explain_conv2d(self, x: Tensor, weight: Tensor, geometry: ConvGeometry, batch: int) -> str:
        """How this backend would run the call, or why it would not."""
        reason = self.refuse_conv2d(x, weight, geometry)
        return "can run" if reason is None else f"refused: {reason}"

    def explain_linear(self, x: Tensor, weight: Tensor, batch: int | None = None) -> str:
        """As :meth:`explain_conv2d`."""
        reason = self.refuse_linear(x, weight)
        return "can run" if reason is None else f"refused: {reason}"

    def measured_fastest_conv2d(
        self, x: Tensor, weight: Tensor, geometry: ConvGeometry, batch: int
    ) -> bool:
        """Whether a committed measurement on this device says that this backend is the fastest."""
        return False

    def measured_fastest_linear(self, x: Tensor, weight: Tensor, batch: int) -> bool:
        """As :meth:`measured_fastest_conv2d`."""
        return False

    def saved_batch(self, sources: int, batch: int) -> int:
        """Samples in ``saved``: ``batch`` for the scaled branch, ``sources`` for unscaled ``u``."""
        return batch

    @abstractmethod
    def conv2d(
        self,
        x: Tensor,
        weight: Tensor,
        scale: Tensor,
        shift: Tensor | None,
        source: Tensor | None,
        geometry: ConvGeometry,
        save: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns ``out`` and, if ``save``, the private tensor that ``t1`` is summed from."""

    @abstractmethod
    def conv2d_backward(
        self,
        dout: Tensor,
        saved: Tensor | None,
        weight: Tensor,
        scale: Tensor,
        source: Tensor | None,
        input_shape: tuple[int, ...],
        geometry: ConvGeometry,
        need_dx: bool,
        need_t1: bool,
        need_t0: bool,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Returns ``dx`` (``input_shape``), ``t1`` and ``t0``; None for what is not needed."""

    @abstractmethod
    def linear(
        self,
        x: Tensor,
        weight: Tensor,
        scale: Tensor,
        shift: Tensor | None,
        source: Tensor | None,
        save: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """As :meth:`conv2d`."""

    @abstractmethod
    def linear_backward(
        self,
        dout: Tensor,
        saved: Tensor | None,
        weight: Tensor,
        scale: Tensor,
        source: Tensor | None,
        input_shape: tuple[int, ...],
        need_dx: bool,
        need_t1: bool,
        need_t0: bool,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """As :meth:`conv2d_backward`."""

    def gate_rows(self, alpha: Tensor, forget: Tensor, gate_scale: float) -> Tensor:
        """``[B, O]`` scales from ``alpha`` ``[K, O]`` and labels ``[B, J]``; see wfnet.gates."""
        return gates.gate_rows(alpha, forget, gate_scale)

    def gate_rows_backward(self, t: Tensor, alpha: Tensor, forget: Tensor) -> Tensor:
        """``[K, O]`` gradient from log-derivatives ``t`` ``[B, O]``; see wfnet.gates."""
        return gates.gate_rows_backward(t, alpha, forget)


# Name -> module that defines `backend`, loaded on first use. `reference` has no Backend object: it
# is plain PyTorch in wfnet/reference.py and shares no code with what it is the truth for.
_MODULES = {
    "eager": "wfnet.backends.eager",
    "triton": "wfnet.backends.triton",
    "cuda": "wfnet.backends.cuda",
}
_loaded: dict[str, Backend] = {}

KERNELS = tuple(_MODULES)
NAMES = ("auto", "reference", *KERNELS)


def get(name: str) -> Backend:
    """The backend called ``name``.

    Raises:
        ValueError: if there is none of that name.
    """
    if name not in _loaded:
        if name not in _MODULES:
            raise ValueError(f"unknown backend {name!r}; choose one of {', '.join(NAMES)}")
        _loaded[name] = importlib.import_module(_MODULES[name]).backend
    return _loaded[name]


def requested(name: str) -> str:
    """``name``, or what WFNET_BACKEND says where ``name`` is ``auto``.

    Raises:
        ValueError: if there is no backend of that name.
    """
    if name == "auto":
        name = os.environ.get("WFNET_BACKEND") or "auto"
    if name not in NAMES:
        raise ValueError(f"unknown backend {name!r}; choose one of {', '.join(NAMES)}")
    return name
