"""What a backend computes, and the objects that its arguments and results travel in.

A masked layer is one product ``u = conv(x, weight)`` (or a linear map) with everything that follows
it in a frozen network folded into an epilogue (design: section 2)::

    v = scale * u                          the branch, [B, O, P, Q]
    out = act(v + shift + residual)        :class:`Epilogue` in, :class:`Activation` out

Its backward needs no layer input. For a gradient ``dout`` that reaches ``out``::

    g = (dout + skip) * act'(out)          :class:`LayerBelow` in, :class:`LayerGradient` out
    t1 = sum_p g * v,  t0 = sum_p g        into the layer's own tables
    scaled_grad = scale * g                what the layer's input gradient is computed from

``act`` is ReLU or identity. An unfused layer is the same without residual and activation.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from wfnet import gates


@dataclass(frozen=True)
class ConvGeometry:
    """Stride, zero padding, dilation and groups of a convolution, each as (height, width).

    ``linear``: it is a linear map of tokens as pixels, for which other settings of TF32 hold.
    """

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    linear: bool = False

    def output_size(self, height: int, width: int, kernel: tuple[int, int]) -> tuple[int, int]:
        """Returns height and width of the output for an input of ``height`` x ``width``."""
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
        """Returns height and width of the result for ``height`` x ``width``, by PyTorch's rule."""
        sizes = zip((height, width), *self[:4], strict=True)
        return tuple(self._output_size(*numbers) for numbers in sizes)

    def _output_size(self, size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
        rest = size + 2 * padding - dilation * (kernel - 1) - 1
        count = (rest + (stride - 1 if self.ceil_mode else 0)) // stride + 1
        # With ceil_mode the last window must begin inside of the image or its left padding.
        return count - int(self.ceil_mode and (count - 1) * stride >= size + padding)


@dataclass(frozen=True, slots=True)
class Epilogue:
    """What follows the product of a masked layer: ``out = act(scale * u + shift + residual)``.

    Attributes:
        scale, shift: tables ``[B, O]``, fp32 (fp64 for fp64 activations), columns contiguous;
            ``shift`` may be None.
        residual: ``[B, O, P, Q]`` in the dtype of the output, or None.
        relu: whether the activation is a ReLU (else identity).
        source: ``[B]`` int64: sample ``b`` reads image ``source[b]`` of the input; None: as many
            samples as images.
        save: whether a backward pass will want :attr:`Activation.branch` and its mask.
    """

    scale: Tensor
    shift: Tensor | None = None
    residual: Tensor | None = None
    relu: bool = False
    source: Tensor | None = None
    save: bool = False


class Activation(NamedTuple):
    """The result of a masked layer; branch and mask are what its backward reads, if it was saved.

    Attributes:
        out: ``[B, O, P, Q]``, dtype of ``x``, fresh memory, no alias of ``x`` or ``branch``.
        branch: what ``t1`` is summed from (:attr:`Backend.keeps_scaled_branch`), or None.
        mask: where the ReLU is open; None where branch, scale and shift tell it.
    """

    out: Tensor
    branch: Tensor | None = None
    mask: Tensor | None = None


@dataclass(frozen=True, slots=True)
class LayerBelow:
    """A layer whose output a gradient reaches: what its elementwise backward reads and writes.

    The four tables are ``[B, O]``, fp32 (fp64 for fp64 activations), columns contiguous.

    Attributes:
        scale, shift: the layer's tables; ``shift`` is read for the ReLU alone.
        branch, mask: as its forward pass returned them in :class:`Activation`; ``branch`` may be
            None where neither ``t1`` nor a ReLU asks for it.
        relu: whether its activation is a ReLU (else identity).
        skip: ``[B, O, P, Q]``, gradient that reaches the same output another way, or None.
        t1: written: ``sum_p g * v`` with ``v = scale * u``; None: not wanted.
        t0: written: ``sum_p g``; None where the layer has no bias, or it is not wanted.
        source: ``[B]``, the sources of the forward pass.
        images: with ``source`` and ``need_scaled_grad``: images of the input. The samples of each
            are summed in ``scaled_grad``, which has one row per image: the product is linear.
        need_grad: whether ``g`` itself is wanted (its residual reads it).
        need_scaled_grad: whether ``scale * g`` is wanted (something below the layer learns).
        unscaled: the branch is ``u``, whatever the backend keeps; likewise that of the shortcut.
        shortcut: the layer whose output is this one's residual and read by nobody else (a
            projection shortcut: identity activation, no residual); it receives the same ``g``.
    """

    scale: Tensor
    shift: Tensor | None = None
    branch: Tensor | None = None
    mask: Tensor | None = None
    relu: bool = False
    skip: Tensor | None = None
    t1: Tensor | None = None
    t0: Tensor | None = None
    source: Tensor | None = None
    images: int = 0
    need_grad: bool = False
    need_scaled_grad: bool = True
    unscaled: bool = False
    shortcut: "LayerBelow | None" = None


# What no layer made: the gradient by it is all that is wanted, with its ``skip``, if any.
NO_LAYER = LayerBelow(scale=None, need_grad=True, need_scaled_grad=False)


class LayerGradient(NamedTuple):
    """Results of an elementwise backward, ``[B, O, P, Q]``; None for what is not wanted.

    The column sums are in :attr:`LayerBelow.t1` and ``t0`` (and in those of the shortcut).
    """

    grad: Tensor | None = None  # g
    scaled_grad: Tensor | None = None  # scale * g
    shortcut: Tensor | None = None  # scale * g with the scale of LayerBelow.shortcut


LINEAR = ConvGeometry(linear=True)


def as_pixels(tokens: Tensor | None) -> Tensor | None:
    """Returns ``[B, T, C]`` as ``[B, C, T, 1]``, channels-last in memory."""
    return None if tokens is None else tokens.unsqueeze(2).permute(0, 3, 1, 2)


def as_tokens(pixels: Tensor | None) -> Tensor | None:
    """Returns ``[B, C, T, 1]`` as ``[B, T, C]``."""
    return None if pixels is None else pixels.squeeze(3).transpose(1, 2)


def as_filter(weight: Tensor) -> Tensor:
    """Returns ``[O, C]`` as ``[O, C, 1, 1]``."""
    return weight[:, :, None, None]


class Backend(ABC):
    """One implementation of masked convolutions and linear maps, forward and backward.

    The weight is frozen: no weight gradient exists. Types of arguments stand here alone, not again
    in every backend. Shapes (of a linear map, pixels are tokens: ``x`` ``[N, T, C]``, ``weight``
    ``[O, C]``, ``out`` ``[B, T, O]``):

        x: ``[N, C, H, W]``, contiguous or channels-last.
        weight: ``[O, C / groups, R, S]``.
        out, dout: ``[B, O, P, Q]``.

    Attributes:
        keeps_scaled_branch: whether the branch is ``v = scale * u`` of every sample and the mask is
            ``out`` itself; else the branch is ``u``, one row per image of ``x``.
        pools_with_epilogue: whether :meth:`max_pool2d_backward` runs the elementwise backward of
            the layer below in its own pass. Elsewhere that comes after it, when positions and
            gradient of the pooling are gone.
    """

    name: str
    keeps_scaled_branch = True
    pools_with_epilogue = False

    def refuse_conv2d(self, x: Tensor, weight: Tensor, geometry: ConvGeometry) -> str | None:
        """Returns why this backend cannot run the call, in one sentence; None if it can."""
        return None

    def refuse_linear(self, x: Tensor, weight: Tensor) -> str | None:
        """As :meth:`refuse_conv2d`."""
        return self.refuse_conv2d(as_pixels(x), as_filter(weight), LINEAR)

    def explain_conv2d(
        self, x: Tensor, weight: Tensor, geometry: ConvGeometry, batch: int | None = None
    ) -> str:
        """Says how this backend would run the call, or why it would not.

        Args:
            batch: samples that ``source`` expands ``x`` to; None without ``source``.
        """
        reason = self.refuse_conv2d(x, weight, geometry)
        if reason is not None:
            return f"refused: {reason}"
        return self.describe(x, weight, geometry, batch)

    def describe(self, x: Tensor, weight: Tensor, geometry: ConvGeometry, batch: int | None) -> str:
        """Says what runs a call that is not refused."""
        return "can run"

    @abstractmethod
    def conv2d(
        self, x: Tensor, weight: Tensor, geometry: ConvGeometry, epilogue: Epilogue
    ) -> Activation:
        """Computes ``act(scale * u + shift + residual)`` with ``u = conv(x[source], weight)``."""

    def linear(self, x: Tensor, weight: Tensor, epilogue: Epilogue) -> Activation:
        """Computes ``scale * u + shift`` with ``u = x[source] @ weight.T``, ``[B, T, O]``.

        ``epilogue`` has neither a residual nor a ReLU.
        """
        found = self.conv2d(as_pixels(x), as_filter(weight), LINEAR, epilogue)
        return Activation(as_tokens(found.out), as_tokens(found.branch))

    @abstractmethod
    def epilogue_backward(
        self, dout: Tensor, below: LayerBelow, may_overwrite: bool = False
    ) -> LayerGradient:
        """Runs the elementwise backward of one layer where no input gradient ends in it.

        Args:
            dout: ``[B, O, P, Q]``, any strides (a pooling's gradient may be an expanded view).
            below: the layer that ``dout`` reaches, and what is wanted of it.
            may_overwrite: ``dout`` is not needed afterwards and may become a result.
        """

    @abstractmethod
    def conv2d_dgrad(
        self,
        scaled_grad: Tensor,
        weight: Tensor,
        input_shape: tuple[int, ...],
        geometry: ConvGeometry,
        below: LayerBelow = NO_LAYER,
    ) -> LayerGradient:
        """Computes a layer's input gradient and the elementwise backward of the layer below it.

        Equal to ``epilogue_backward(dx, below)`` with
        ``dx = conv_transpose(scaled_grad, weight)``.

        Args:
            scaled_grad: ``[B, O, P, Q]`` of this layer, as :meth:`epilogue_backward` or the
                input gradient above returned it; it is not needed afterwards.
            input_shape: ``(B, C, H, W)`` of ``dx``.
            below: the layer whose output is this layer's input and whose gradients have all
                arrived with this one; :data:`NO_LAYER` where something else comes before: the
                result then is ``grad = dx + skip`` alone.
        """

    def conv2d_backward(
        self,
        dout: Tensor,
        layer: LayerBelow,
        weight: Tensor,
        input_shape: tuple[int, ...],
        geometry: ConvGeometry,
    ) -> Tensor | None:
        """Runs the whole backward of one convolution by itself.

        Args:
            layer: the convolution; its ``t1`` and ``t0`` are written.

        Returns:
            The gradient of its input ``[N, C, H, W]``; None without ``layer.need_scaled_grad``.
        """
        scaled_grad = self.epilogue_backward(dout, layer).scaled_grad
        if scaled_grad is None:
            return None
        return self.conv2d_dgrad(scaled_grad, weight, input_shape, geometry).grad

    def linear_backward(
        self, dout: Tensor, layer: LayerBelow, weight: Tensor, input_shape: tuple[int, ...]
    ) -> Tensor | None:
        """As :meth:`conv2d_backward`; ``dout`` and ``layer.branch`` are ``[B, T, O]``."""
        layer = replace(layer, branch=as_pixels(layer.branch))
        shape = (input_shape[0], input_shape[2], input_shape[1], 1)
        dx = self.conv2d_backward(as_pixels(dout), layer, as_filter(weight), shape, LINEAR)
        return as_tokens(dx)

    # In untraining with durable gates a scale depends on moments of the product (`wfnet.fusion.
    # durable_run`): product and epilogue come apart, and branches are `u`.

    def product(self, x: Tensor, weight: Tensor, geometry: ConvGeometry) -> Tensor:
        """Computes ``u = conv(x, weight)`` alone, one row per image."""
        ones = torch.ones((x.shape[0], weight.shape[0]), device=x.device)
        return self.conv2d(x, weight, geometry, Epilogue(ones)).out

    @abstractmethod
    def product_moments(
        self, x: Tensor, weight: Tensor, geometry: ConvGeometry
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Computes ``u``, and mean and variance (biased) ``[N, O]`` over the pixels of an image."""

    @abstractmethod
    def epilogue(self, u: Tensor, epilogue: Epilogue) -> Activation:
        """Computes ``act(scale * u[source] + shift + residual)``; without ``save``, over ``u``."""

    @abstractmethod
    def moments_backward(
        self,
        g: Tensor,
        scale: Tensor,
        u: Tensor,
        on_u: Tensor | None,
        constant: Tensor | None,
        may_overwrite: bool,
    ) -> Tensor:
        """Computes ``scale * g + on_u * u + constant``, where a scale depends on moments of ``u``.

        Args:
            g, u: ``[B, O, P, Q]``.
            scale, on_u, constant: ``[B, O]``; the last two are None where it does not.
            may_overwrite: ``g`` may become the result.
        """

    def max_pool2d(
        self, x: Tensor, window: PoolGeometry, save: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Computes the largest value of every window, and where it was.

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
        below: LayerBelow = NO_LAYER,
    ) -> LayerGradient:
        """Computes the gradient by a pooling's input and the layer below's elementwise backward.

        Equal to ``epilogue_backward(dx, below)`` with ``dx`` the pooling's input gradient.

        Args:
            dout: ``[B, C, P, Q]``, any strides.
            positions: from :meth:`max_pool2d`.
            like: shape, strides, dtype and device of the input ``[B, C, H, W]``; on ``meta``.
            below: as in :meth:`conv2d_dgrad`.
        """
        # Only shape and layout of the input are read; its pages are never touched.
        x = dout.new_empty_strided(like.shape, like.stride())
        dx = torch.ops.aten.max_pool2d_with_indices_backward(dout, x, *window, positions)
        return self.epilogue_backward(dx, below, may_overwrite=True)

    def gate_rows(self, alpha: Tensor, forget: Tensor, gate_scale: float) -> Tensor:
        """``[B, O]`` scales from ``alpha`` ``[K, O]`` and labels ``[B, J]``; see wfnet.gates."""
        return gates.gate_rows(alpha, forget, gate_scale)

    def gate_rows_backward(self, t: Tensor, alpha: Tensor, forget: Tensor) -> Tensor:
        """``[K, O]`` gradient from log-derivatives ``t`` ``[B, O]``; see wfnet.gates."""
        return gates.gate_rows_backward(t, alpha, forget)
