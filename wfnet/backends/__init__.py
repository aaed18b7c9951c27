"""Backends: who computes a masked convolution or linear map.

Every backend implements :class:`Backend` in one file and registers itself by name. A backend that
is asked for by name runs or raises; ``auto`` asks :func:`choose`.
"""

from __future__ import annotations

import importlib
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

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


class Backend(ABC):
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

    name: str

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

    # Whether the two methods below exist: convolutions of a frozen network with all that follows.
    fuses = False

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
            ``out``; if ``save``, the branch that ``t1`` is summed from, and what else backward
            needs for the ReLU mask (None where branch, scale and shift suffice).
        """
        raise NotImplementedError(f"backend {self.name!r} has no fused convolutions")

    def fused_conv2d_backward(
        self,
        dout: Tensor,
        branch: Tensor,
        kept: Tensor | None,
        weight: Tensor,
        scale: Tensor,
        shift: Tensor,
        source: Tensor | None,
        input_shape: tuple[int, ...],
        relu: bool,
        geometry: ConvGeometry,
        need_dx: bool,
        need_t0: bool,
        may_overwrite: bool,
    ) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
        """Returns ``dx``, ``g = dout * act'(out)`` (the residual's gradient), ``t1`` and ``t0``.

        ``may_overwrite``: ``dout`` is not needed afterwards and may become ``g``. ``source`` is
        given only for the first masked layer, which needs no ``dx``.
        """
        raise NotImplementedError(f"backend {self.name!r} has no fused convolutions")

    def gate_rows(self, alpha: Tensor, forget: Tensor, gate_scale: float) -> Tensor:
        """``[B, O]`` scales from ``alpha`` ``[K, O]`` and labels ``[B, J]``; see wfnet.gates."""
        return gates.gate_rows(alpha, forget, gate_scale)

    def gate_rows_backward(self, t: Tensor, alpha: Tensor, forget: Tensor) -> Tensor:
        """``[K, O]`` gradient from log-derivatives ``t`` ``[B, O]``; see wfnet.gates."""
        return gates.gate_rows_backward(t, alpha, forget)


# Name -> module that defines `backend`, loaded on first use. `reference` has no Backend object: it
# is plain PyTorch in wfnet/reference.py and shares no code with what it is the truth for.
_MODULES = {"eager": "wfnet.backends.eager", "triton": "wfnet.backends.triton"}
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
