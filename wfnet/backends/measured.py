"""``auto`` in a fused plan: every convolution by the backend that measured fastest at it.

Kernels that keep the same branch (:attr:`FusedConvolutions.shares_branch`) finish each other's
layers, so that forward and input gradient of every layer are chosen one by one. Where a backend of
another kind is the fastest at one (``eager``: cuDNN's convolution and passes of PyTorch), its
branch is brought into that form; what the table says of it was measured with these passes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wfnet import backends
from wfnet.backends import (
    Below,
    ConvGeometry,
    Finished,
    FusedConvolutions,
    PoolGeometry,
    winners,
)
from wfnet.gate_tables import GatedLayer, GateTables
from wfnet.gates import gather_samples

FORWARD, DGRAD = "fused_conv2d", "conv2d_dgrad"

# Forward or input gradient, input [N, C, H, W], filter, geometry, samples: to a backend's name.
Choose = Callable[[str, tuple[int, ...], Tensor, ConvGeometry, int], str]


class MeasuredConvolutions(FusedConvolutions):
    """Asks ``choose`` who runs a convolution.

    Args:
        choose: the name of a backend that runs it.
        kernels: the backend that makes the tables and runs the elementwise passes that belong to no
            convolution; its branch is the shared one.
    """

    fuses = True
    shares_branch = True

    def __init__(self, choose: Choose, kernels: FusedConvolutions):
        self.name = f"auto ({kernels.name} first)"
        self.choose = choose
        self.kernels = kernels
        self.finishes_pooled = kernels.finishes_pooled

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
        name = self.choose(FORWARD, tuple(x.shape), weight, geometry, scale.shape[0])
        arguments = (x, weight, scale, shift, residual, relu, source, geometry, save)
        return shared_forward(backends.get(name), *arguments)

    def finish(
        self, dout: Tensor, below: Below, skip: Tensor | None = None, may_overwrite: bool = False
    ) -> Finished:
        return self.kernels.finish(dout, below, skip, may_overwrite)

    def conv2d_dgrad(
        self,
        scaled_grad: Tensor,
        weight: Tensor,
        input_shape: tuple[int, ...],
        geometry: ConvGeometry,
        skip: Tensor | None = None,
        below: Below | None = None,
    ) -> Finished:
        name = self.choose(DGRAD, input_shape, weight, geometry, input_shape[0])
        arguments = (scaled_grad, weight, input_shape, geometry, skip, below)
        return shared_dgrad(backends.get(name), self.kernels, *arguments)

    def max_pool2d(
        self, x: Tensor, window: PoolGeometry, save: bool
    ) -> tuple[Tensor, Tensor | None]:
        return self.kernels.max_pool2d(x, window, save)

    def max_pool2d_backward(
        self,
        dout: Tensor,
        positions: Tensor,
        like: Tensor,
        window: PoolGeometry,
        skip: Tensor | None = None,
        below: Below | None = None,
    ) -> Finished:
        return self.kernels.max_pool2d_backward(dout, positions, like, window, skip, below)

    def gate_tables(self, layers: Sequence[GatedLayer]) -> GateTables:
        return self.kernels.gate_tables(layers)


def shared_forward(
    backend: FusedConvolutions,
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
    """:meth:`FusedConvolutions.fused_conv2d` with the shared branch, by any backend.

    One that keeps ``u`` takes one more pass: ``v = scale * u``.
    """
    out, branch, mask = backend.fused_conv2d(
        x, weight, scale, shift, residual, relu, source, geometry, save
    )
    if save and not backend.shares_branch:
        u = gather_samples(branch, source)
        branch = torch.mul(u, scale[:, :, None, None], out=torch.empty_like(u))
        mask = out if relu and residual is not None else None
    return out, branch, mask


def shared_dgrad(
    backend: FusedConvolutions,
    kernels: FusedConvolutions,
    scaled_grad: Tensor,
    weight: Tensor,
    input_shape: tuple[int, ...],
    geometry: ConvGeometry,
    skip: Tensor | None,
    below: Below | None,
) -> Finished:
    """:meth:`FusedConvolutions.conv2d_dgrad` above a layer with the shared branch, by any backend.

    After one that cannot read it, ``kernels`` run the elementwise pass.
    """
    if backend.shares_branch or below is None:
        return backend.conv2d_dgrad(scaled_grad, weight, input_shape, geometry, skip, below)
    dx = backend.conv2d_dgrad(scaled_grad, weight, input_shape, geometry).grad
    return kernels.finish(dx, below, skip, may_overwrite=True)


# -- what was measured of a plan -------------------------------------------------------------------


@dataclass(frozen=True)
class Convolution:
    """One convolution of a plan: ``[O, C / groups, R, S]`` filter, and what it is applied to."""

    weight: Tensor
    geometry: ConvGeometry
    input_size: tuple[int, int] | None  # height and width, as far as known
    learns: bool  # whether an input gradient is taken


@dataclass(frozen=True)
class _Times:
    """Milliseconds of one operation by each backend, and by ``eager`` in a plan of its own."""

    ms: dict[str, float]
    eager_alone: float

    @property
    def fastest(self) -> list[str]:
        """All backends, the fastest first."""
        return sorted(self.ms, key=self.ms.__getitem__)


def _usable(channels: Iterable[int], dtype: torch.dtype, device: torch.device) -> set[str]:
    """Backends that run here, and finish layers of so many channels."""
    x = torch.empty((8, 8, 8, 8), dtype=dtype, device=device)
    found = set()
    for name in backends.KERNELS:
        backend = backends.get(name)
        runs = backend.refuse_conv2d(x, x[:, :, :1, :1], ConvGeometry()) is None
        if runs and all(backend.refuse_finish(number) is None for number in channels):
            found.add(name)
    return found


class PlanWinners:
    """The table's word on the convolutions of one plan.

    Args:
        convolutions: of the plan.
        batch: samples of a run.
        dtype, device: of the run.
    """

    def __init__(
        self,
        convolutions: Sequence[Convolution],
        batch: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.dtype_name = winners.dtype_name(dtype)
        self.device_name = winners.device_name(device)
        self.usable = _usable([conv.weight.shape[0] for conv in convolutions], dtype, device)
        self.asked = sum(1 + conv.learns for conv in convolutions)
        self.times = [
            times
            for conv in convolutions
            if conv.input_size is not None
            for op in (FORWARD, DGRAD)[: 1 + conv.learns]
            if (times := self._times(op, conv.input_size, conv.weight, conv.geometry, batch))
        ]
        self.won: dict[str, float] = {}  # milliseconds of the operations a backend is fastest at
        for times in self.times:
            name = times.fastest[0]
            self.won[name] = self.won.get(name, 0.0) + times.ms[name]
        kernels = [name for name in self.won if backends.get(name).shares_branch]
        self.kernels = sorted(kernels, key=self.won.__getitem__, reverse=True)
        self._chosen: dict[tuple, str] = {}

    def _times(
        self,
        op: str,
        size: tuple[int, int],
        weight: Tensor,
        geometry: ConvGeometry,
        batch: int,
    ) -> _Times | None:
        """What was measured of an operation, of backends that can run here."""
        if geometry.groups != 1:
            return None
        shape = (batch, weight.shape[1], *size)
        key = winners.conv_key(shape, weight, geometry, batch)
        entry = winners.measured(op, key, self.dtype_name, self.device_name)
        if entry is None:
            return None
        ms = {name: time for name, time in entry["ms"].items() if name in self.usable}
        alone = entry.get("alone_ms", {}).get("eager", entry["ms"].get("eager", math.inf))
        return _Times(ms, alone) if ms else None

    def convolutions(self) -> FusedConvolutions:
        """``eager``, unless kernels won: measured at half of the operations, and faster in sum."""
        eager = sum(times.eager_alone for times in self.times)
        known = 2 * len(self.times) >= self.asked
        if not self.kernels or not known or sum(self.won.values()) >= eager:
            return backends.get("eager")
        return MeasuredConvolutions(self.choose, backends.get(self.kernels[0]))

    def choose(
        self, op: str, shape: tuple[int, ...], weight: Tensor, geometry: ConvGeometry, batch: int
    ) -> str:
        """The fastest backend that takes the operation (:data:`Choose`).

        Where it was not measured, the kernels that won most of the plan's time.
        """
        key = (op, shape, tuple(weight.shape), geometry, batch)
        if key not in self._chosen:
            times = self._times(op, shape[2:], weight, geometry, batch)
            names = self.kernels if times is None else times.fastest
            x = weight.new_empty(1).expand(shape)  # shape, dtype and device are all that is read
            self._chosen[key] = next(
                name
                for name in (*names, "eager")
                if backends.get(name).refuse_conv2d(x, weight, geometry) is None
            )
        return self._chosen[key]

    def describe(self) -> str:
        """One line for the log: what was measured, and who is the fastest."""
        count = Counter(times.fastest[0] for times in self.times)
        best = ", ".join(f"{name} is the fastest at {number}" for name, number in count.items())
        return (
            f"{len(self.times)} of {self.asked} operations were measured in {self.dtype_name} on "
            f"{self.device_name}" + (f": {best}" if best else "")
        )
