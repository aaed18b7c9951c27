"""Every call of a backend within a real step: which masked layer, how long, how much work.

A fused network is run forward and backward over an expanded minibatch, as in an untraining step,
while the methods of its backend that multiply are watched. Nothing is rebuilt: operands, sizes and
what each call finishes for others are those of the step.

    run = LayerRun(problem, "triton")
    for group in run.measure(repeats=10):
        print(group.layers, group.milliseconds)

Layers whose calls have the same shapes and options form one :class:`Group`. The work of a call is
counted from its arguments: products once per source image where samples share images, every operand
read once and every result written once.
"""

from __future__ import annotations

import functools
import inspect
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass

import torch
from torch import Tensor

from wfnet import backends, fusion
from wfnet.benchmarking.steps import Problem, on_backend

# What multiplies: method of a backend, direction.
METHODS = {
    "fused_conv2d": "forward",
    "conv2d_dgrad": "backward",
    "linear": "forward",
    "linear_backward": "backward",
}
DIRECTIONS = ("forward", "backward")
# Cycles that a device spins before a timed step, so that the host is ahead of it ever after: about
# 0.1 s, longer than the host takes to queue a step.
_HEAD_START = 200_000_000


@dataclass(frozen=True)
class Call:
    """One call: ``layer`` by its name in the network, ``direction`` of :data:`DIRECTIONS`."""

    layer: str
    direction: str


@dataclass(frozen=True)
class Work:
    """What a call must do at least."""

    flops: float
    size: float  # bytes read and written

    @classmethod
    def of(cls, method: str, arguments: dict[str, object], result: object) -> Work:
        """Counted from the arguments of a backend's method, by name, and from its result."""
        weight = arguments["weight"]
        if METHODS[method] == "forward":
            images, columns = arguments["x"].shape[0], result[0]
        else:
            images = arguments["input_shape"][0]
            columns = arguments["scaled_grad" if method == "conv2d_dgrad" else "dout"]
        products = images * columns[0].numel() * weight[0].numel()
        if not arguments.get("need_dx", True):
            products = 0
        moved = {(t.data_ptr(), t.dtype, held): held * t.element_size()
                 for t in tensors_of([arguments, result]) if (held := _elements(t))}  # fmt: skip
        return cls(2.0 * products, float(sum(moved.values())))


def tensors_of(value: object) -> Iterator[Tensor]:
    """All tensors in containers and dataclasses, such as :class:`wfnet.backends.Below`."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_of(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_of(item)
    elif is_dataclass(value):
        yield from tensors_of([getattr(value, field.name) for field in fields(value)])


def _elements(t: Tensor) -> int:
    """Elements in memory: those of an expanded view count once."""
    count = 1
    for size, stride in zip(t.shape, t.stride(), strict=True):
        count *= 1 if stride == 0 and size else size
    return count


def _likeness(value: object) -> object:
    """What two calls of one kind have in common: shapes, types and options, not values."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, dict):
        return tuple((name, _likeness(item)) for name, item in value.items())
    if isinstance(value, list | tuple):
        return tuple(_likeness(item) for item in value)
    if is_dataclass(value):
        return tuple(_likeness(getattr(value, field.name)) for field in fields(value))
    return value


@dataclass
class Measured:
    """One direction of a group of layers: work of a call, and its time, layer after layer."""

    work: Work
    milliseconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.milliseconds)


@dataclass
class Group:
    """Layers that are computed alike.

    Attributes:
        layers: their names, in the order in which they run.
        forward, backward: None where there is no such call: nothing below the layer is masked, or
            autograd computes it.
    """

    layers: list[str]
    forward: Measured | None = None
    backward: Measured | None = None

    @property
    def milliseconds(self) -> float:
        """Of all its layers in one step."""
        found = [m for m in (self.forward, self.backward) if m is not None]
        return len(self.layers) * sum(m.median for m in found)


Around = Callable[[str, dict[str, object], Callable[[], object]], object]


@contextmanager
def watched(backend: backends.Backend, around: Around) -> Iterator[None]:
    """Inside, ``around(method, arguments, call)`` is called in place of a backend's method.

    It calls ``call`` and returns what that returns. Calls that a method makes of another one are
    part of it.
    """
    inside = False

    def watch(method: str) -> Callable:
        plain = getattr(backend, method)
        signature = inspect.signature(plain)

        @functools.wraps(plain)
        def call(*args: object, **kwargs: object) -> object:
            nonlocal inside
            if inside:
                return plain(*args, **kwargs)
            inside = True
            try:
                bound = signature.bind(*args, **kwargs)
                return around(method, dict(bound.arguments), lambda: plain(*args, **kwargs))
            finally:
                inside = False

        return call

    for method in METHODS:
        setattr(backend, method, watch(method))
    try:
        yield
    finally:
        for method in METHODS:
            delattr(backend, method)


class LayerRun:
    """A problem's network, fused, on one backend.

    Args:
        problem: from :func:`wfnet.benchmarking.steps.make_problem`.

    Raises:
        ValueError, RuntimeError: with the reason if the network does not run fused on it.
    """

    def __init__(self, problem: Problem, backend: str):
        self.problem = problem
        self.backend = backends.get(backend)
        self.net = on_backend(problem, backend, fuse=False)
        self.net.fuse = True
        with problem.autocast():
            network = self.net.fused_network(problem.images)
        if network is None:
            raise ValueError("the network runs unfused; the log says why")
        if isinstance(network, fusion.TrunkNetwork):
            # What lies between masked layers is compiled on a device, which takes a minute and
            # leaves their calls as they are.
            network = fusion.TrunkNetwork(
                network.prefix, network.rest, network.layers, compiled=False
            )
        self.network = network
        classes = problem.settings.classes
        generator = torch.Generator().manual_seed(problem.settings.seed)
        dout = torch.randn(len(problem.batch), classes, generator=generator) / classes
        self.dout = dout.to(problem.device)

    def step(self) -> None:
        """Forward and backward, down to the gradients of all filters."""
        batch = self.problem.batch
        with self.problem.autocast():
            run = self.network.start(self.problem.images, batch.forget[:, None], batch.source)
            with torch.no_grad():
                logits = run.forward()
        run.backward(self.dout.to(logits.dtype))

    def watch(self, around: Callable[[Call, str, dict, Callable], object]) -> None:
        """One step in which ``around(call, method, arguments, compute)`` stands for every call.

        Raises:
            ValueError: if a call is of no layer, or none of the backend's methods is called.
        """
        called: set[Call] = set()

        def named(method: str, arguments: dict[str, object], compute: Callable) -> object:
            layer = self._layer_of(arguments["weight"])
            call = Call(layer, METHODS[method])
            called.add(call)
            return around(call, method, arguments, compute)

        with watched(self.backend, named):
            self.step()
        if not called:
            raise ValueError(
                f"backend {self.backend.name!r} multiplies nothing in this network: all is "
                "PyTorch's own"
            )

    def _layer_of(self, weight: Tensor) -> str:
        for name, layer in self.net.masked_layers.items():
            if self.network.weight(layer, weight.dtype).data_ptr() == weight.data_ptr():
                return name
        raise ValueError(f"a weight of shape {list(weight.shape)} is of no masked layer")

    def measure(self, repeats: int) -> list[Group]:
        """All groups, those that take longest in a step first."""
        kinds: dict[str, dict[str, object]] = {}
        work: dict[Call, Work] = {}

        def count(call: Call, method: str, arguments: dict, compute: Callable) -> object:
            result = compute()
            kinds.setdefault(call.layer, {})[call.direction] = method, _likeness(arguments)
            work[call] = Work.of(method, arguments, result)
            return result

        self.watch(count)
        times: dict[Call, list[float]] = {call: [] for call in work}
        for _ in range(repeats):
            for call, milliseconds in self._timed_step():
                times[call].append(milliseconds)
        groups: dict[object, Group] = {}
        for layer, kind in kinds.items():
            key = tuple(kind.get(direction) for direction in DIRECTIONS)
            group = groups.setdefault(key, Group([]))
            group.layers.append(layer)
            for direction in kind:
                call = Call(layer, direction)
                measured = getattr(group, direction)
                if measured is None:
                    measured = Measured(work[call], [])
                    setattr(group, direction, measured)
                measured.milliseconds += times[call]
        return sorted(groups.values(), key=lambda group: -group.milliseconds)

    def _timed_step(self) -> list[tuple[Call, float]]:
        """Milliseconds of every call of one step: CUDA events, or the wall clock."""
        found: list[tuple[Call, Callable[[], float]]] = []
        cuda = self.problem.device.type == "cuda"

        def clocked(call: Call, method: str, arguments: dict, compute: Callable) -> object:
            if cuda:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                result = compute()
                end.record()
                found.append((call, functools.partial(start.elapsed_time, end)))
                return result
            start = time.perf_counter()
            result = compute()
            milliseconds = (time.perf_counter() - start) * 1e3
            found.append((call, lambda: milliseconds))
            return result

        if cuda:
            torch.cuda.synchronize()
            torch.cuda._sleep(_HEAD_START)
        self.watch(clocked)
        if cuda:
            torch.cuda.synchronize()
        return [(call, elapsed()) for call, elapsed in found]
