"""Every convolution of a fused plan, forward and input gradient, timed inside of a real step.

:class:`TimedConvolutions` runs a plan in place of a backend: at every operation it has all
candidates compute the same thing from the same tensors, one after the other, compares what they
give and keeps their times. Operations of one shape and epilogue are measured once.
"""

from __future__ import annotations

import functools
import logging
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from wfnet import backends, fusion
from wfnet.backends import (
    Backend,
    Below,
    ConvGeometry,
    Finished,
    FusedConvolutions,
    PoolGeometry,
    winners,
)
from wfnet.backends.measured import DGRAD, FORWARD, shared_dgrad, shared_forward
from wfnet.benchmarking.floors import Rates
from wfnet.benchmarking.layer_calls import Work
from wfnet.benchmarking.steps import Problem
from wfnet.gate_tables import GatedLayer, GateTables

logger = logging.getLogger("wfnet")

Clock = Callable[[Callable[[], object]], float]  # milliseconds of one call

# Candidates agree within rounding of 16-bit operands, or one of them is wrong.
_MOST_DIFFERENCE = {torch.bfloat16: 3e-2, torch.float16: 5e-3, torch.float32: 5e-3}


@dataclass
class Operation:
    """Forward or input gradient of all layers of one shape and epilogue.

    Attributes:
        op: ``fused_conv2d`` or ``conv2d_dgrad``.
        epilogue: what else it does, in words; layers of one shape may differ in that.
        shape: key of the shape, as in the table of winners; None with groups, which has no key.
        layers: names of the layers; the first one was measured.
        flops: multiplications and additions, twice the products.
        bytes: read and written at least.
        milliseconds: of each candidate, every repeat.
        alone: the same of those that keep another branch than kernels, in a plan of their own.
        failed: why a candidate has no time.
    """

    op: str
    epilogue: str
    shape: str | None
    layers: list[str] = field(default_factory=list)
    flops: float = 0.0
    bytes: float = 0.0
    milliseconds: dict[str, list[float]] = field(default_factory=dict)
    alone: dict[str, list[float]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def medians(self) -> dict[str, float]:
        """Milliseconds of every candidate that has computed it rightly."""
        return {name: statistics.median(ms) for name, ms in self.milliseconds.items() if ms}

    def alone_medians(self) -> dict[str, float]:
        """Milliseconds of :attr:`alone`."""
        return {name: statistics.median(ms) for name, ms in self.alone.items() if ms}

    def floor_ms(self, rates: Rates) -> float:
        """The longer of products and bytes at a device's rates."""
        return rates.seconds(self.flops, self.bytes) * 1e3


class _Call(NamedTuple):
    """One candidate's way to compute an operation."""

    run: Callable[[], object]
    results: Callable[[object], list[Tensor]]
    alone: Callable[[], object] | None = None  # in a plan of its own, for its time only


class TimedConvolutions(FusedConvolutions):
    """Runs a plan and times every candidate at every operation.

    Args:
        candidates: names of backends; the first one that takes an operation computes what the step
            goes on with, and is what the others are compared with.
        name_of: layer names by the address of the filter that a run uses.
        clock: times one call.
        repeats: timed calls of each candidate, after two to warm up.
        progress: told of each operation when it has been measured.

    Attributes:
        operations: what was measured, by operation, shape and geometry.
    """

    fuses = True

    def __init__(
        self,
        candidates: Sequence[str],
        name_of: dict[int, str],
        clock: Clock,
        repeats: int,
        progress: Callable[[Operation], None] = lambda operation: None,
    ):
        self.candidates: list[Backend] = [backends.get(name) for name in candidates]
        sharing = [backend for backend in self.candidates if backend.shares_branch]
        # Without kernels eager keeps its own kind of branch, as it does in a plan of its own.
        self.kernels = sharing[0] if sharing else self.candidates[0]
        self.shared = bool(sharing)
        self.shares_branch = self.shared
        self.finishes_pooled = self.kernels.finishes_pooled
        self.name = f"timed ({', '.join(candidates)})"
        self.name_of, self.clock, self.repeats = name_of, clock, repeats
        self.progress = progress
        self.operations: dict[tuple, Operation] = {}

    def gate_tables(self, layers: Sequence[GatedLayer]) -> GateTables:
        return self.kernels.gate_tables(layers)

    def finish(
        self, dout: Tensor, below: Below, skip: Tensor | None = None, may_overwrite: bool = False
    ) -> Finished:
        return self.kernels.finish(dout, below, skip, may_overwrite)

    def max_pool2d(
        self, x: Tensor, window: PoolGeometry, save: bool
    ) -> tuple[Tensor, Tensor | None]:
        return self.kernels.max_pool2d(x, window, save)

    def max_pool2d_backward(self, *arguments: object) -> Finished:
        return self.kernels.max_pool2d_backward(*arguments)

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
        arguments = (x, weight, scale, shift, residual, relu, source, geometry, save)
        samples = scale.shape[0]

        def call(backend: Backend) -> _Call:
            def alone() -> object:
                return backend.fused_conv2d(*arguments)

            def results(found: tuple) -> list[Tensor]:
                return [found[0]]

            if not self.shared:
                return _Call(alone, results)
            own = None if backend.shares_branch else alone
            return _Call(lambda: shared_forward(backend, *arguments), results, own)

        parts = {
            "residual": residual is not None,
            "ReLU": relu,
            "expansion": source is not None,
        }
        key = (FORWARD, _words(parts), tuple(x.shape), tuple(weight.shape), geometry, samples)
        counted = {"x": x, "weight": weight, "residual": residual}
        return self._operate(key, x, weight, geometry, samples, call, counted)

    def conv2d_dgrad(
        self,
        scaled_grad: Tensor,
        weight: Tensor,
        input_shape: tuple[int, ...],
        geometry: ConvGeometry,
        skip: Tensor | None = None,
        below: Below | None = None,
    ) -> Finished:
        rest = (weight, input_shape, geometry, skip, below)

        def call(backend: Backend) -> _Call:
            # It may be overwritten: the others need it as it was.
            own = scaled_grad.clone(memory_format=torch.preserve_format)
            results = _gradients_of(below)
            if not self.shared:
                return _Call(lambda: backend.conv2d_dgrad(own, *rest), results)
            alone = None
            if not backend.shares_branch:
                given = (weight, input_shape, geometry, skip, _as_its_own(below))
                alone = functools.partial(backend.conv2d_dgrad, own, *given)
            shared = functools.partial(shared_dgrad, backend, self.kernels, own, *rest)
            return _Call(shared, results, alone)

        parts = {"skip": skip is not None}
        if below is not None:
            parts |= {
                "ReLU": below.relu,
                "sums": True,
                "A * g": below.need_scaled_grad,
                "g": below.need_grad,
                "shortcut": below.shortcut is not None,
            }
        words = _words(parts)
        key = (DGRAD, words, tuple(input_shape), tuple(weight.shape), geometry, input_shape[0])
        x = scaled_grad.new_empty(1).expand(input_shape)
        counted = {"scaled_grad": scaled_grad, "weight": weight, "input_shape": input_shape,
                   "skip": skip, "below": below}  # fmt: skip
        return self._operate(key, x, weight, geometry, input_shape[0], call, counted)

    def _operate(
        self,
        key: tuple,
        x: Tensor,
        weight: Tensor,
        geometry: ConvGeometry,
        samples: int,
        call: Callable[[Backend], _Call],
        counted: dict[str, object],
    ) -> object:
        """What the first candidate computes; measured if there was no such operation yet."""
        name = self.name_of.get(weight.data_ptr(), "unknown")
        reasons = {b.name: b.refuse_conv2d(x, weight, geometry) for b in self.candidates}
        taking = [b for b in self.candidates if reasons[b.name] is None]
        if not taking:
            said = "; ".join(f"{who}: {reason}" for who, reason in reasons.items())
            raise RuntimeError(f"no candidate takes {name!r} ({said}); add eager, which takes all")
        if key in self.operations:
            self.operations[key].layers.append(name)
            return call(taking[0]).run()
        shape = None
        if geometry.groups == 1:
            shape = winners.conv_key(tuple(x.shape), weight, geometry, samples)
        operation = self.operations[key] = Operation(*key[:2], shape, [name])
        expected = self._check(operation, taking, call, x.dtype)
        work = Work.of(key[0], counted, expected)
        operation.flops, operation.bytes = work.flops, work.size
        del expected
        for repeat in range(-2, self.repeats):
            for backend in taking:
                if backend.name in operation.failed:
                    continue
                one = call(backend)
                ms = self.clock(one.run)
                alone = None if one.alone is None else self.clock(call(backend).alone)
                if repeat >= 0:
                    operation.milliseconds.setdefault(backend.name, []).append(ms)
                    if alone is not None:
                        operation.alone.setdefault(backend.name, []).append(alone)
        self.progress(operation)
        return call(taking[0]).run()

    def _check(
        self,
        operation: Operation,
        taking: Sequence[Backend],
        call: Callable[[Backend], _Call],
        dtype: torch.dtype,
    ) -> object:
        """What the first candidate gives; those that fail or give something else are noted.

        Raises:
            RuntimeError: if the first one fails: the step cannot go on.
        """
        first, expected = None, []
        for backend in taking:
            try:
                one = call(backend)
                found = one.run()
                # Sums are written in place: the next candidate writes them again.
                results = [t.clone() for t in one.results(found)]
            except Exception as error:
                if first is None:
                    raise
                logger.info("%s failed at %s", backend.name, operation.shape, exc_info=True)
                reason = next(iter(str(error).strip().splitlines()), "")
                operation.failed[backend.name] = f"{type(error).__name__}: {reason}"
                continue
            if first is None:
                first, expected = found, results
                continue
            error = max(map(_difference, results, expected), default=0.0)
            if not error <= _MOST_DIFFERENCE.get(dtype, 1e-6):
                operation.failed[backend.name] = (
                    f"computes something else: it differs from {taking[0].name} by {error:.1e}"
                )
        return first


def _words(parts: dict[str, bool]) -> str:
    return ", ".join(word for word, there in parts.items() if there) or "nothing"


def _as_its_own(below: Below | None) -> Below | None:
    """A layer with tensors of the kinds that ``eager`` keeps; for its time, not for its results."""
    if below is None:
        return None
    mask = None if below.mask is None else below.mask > 0
    return replace(below, mask=mask, source=None, shortcut=_as_its_own(below.shortcut))


def _gradients_of(below: Below | None) -> Callable[[Finished], list[Tensor]]:
    """All that an input gradient writes: tensors, and sums in place."""

    def results(found: Finished) -> list[Tensor]:
        written = list(found)
        if below is not None:
            written += [below.t1, below.t0]
            if below.shortcut is not None:
                written += [below.shortcut.t1, below.shortcut.t0]
        return [t for t in written if t is not None]

    return results


def _difference(found: Tensor, expected: Tensor) -> float:
    """Relative to the norm; NaN is no agreement."""
    norm = expected.float().norm().clamp_min(1e-30)
    return ((found.float() - expected.float()).norm() / norm).item()


def time_plan(
    problem: Problem,
    candidates: Sequence[str],
    clock: Clock,
    repeats: int,
    progress: Callable[[Operation], None] = lambda operation: None,
) -> list[Operation]:
    """One step of a convolutional network with every candidate at every operation.

    Args:
        candidates: names of backends, see :class:`TimedConvolutions`.

    Raises:
        NotFusable: if the network has no plan.
        RuntimeError: if the first candidate fails.
    """
    net, images, batch = problem.net, problem.images, problem.batch
    plan = fusion.make_plan(net.model, images[:2])
    rows = batch.forget if batch.forget.dim() == 2 else batch.forget.unsqueeze(1)
    name_of: dict[int, str] = {}
    timed = TimedConvolutions(candidates, name_of, clock, repeats, progress)
    network = fusion.PlanNetwork(plan, timed)
    with problem.autocast(), torch.no_grad():
        run = network.start(images, rows, batch.source)
        for step in plan.convolutions:
            name_of[network.weight(step.layer, run.dtype).data_ptr()] = step.name
        logits = run.forward()
        run.backward(torch.randn_like(logits) / logits.shape[0])
    return list(timed.operations.values())
