"""Every masked layer's calls of its backend, timed inside of a real step.

A fused network runs forward and backward over an expanded minibatch, as in an untraining step,
while the methods of its backend that multiply are watched. Nothing is rebuilt: operands, sizes and
what each call finishes for others are those of the step. Backends take turns, step by step.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass

import torch
from torch import Tensor

from wfnet import backends, fusion
from wfnet.backends.contract import Backend
from wfnet.benchmarking import roofline
from wfnet.benchmarking.steps import Problem, on_backend
from wfnet.benchmarking.timing import reason_of

# What multiplies: method of a backend, direction.
METHODS = {
    "conv2d": "forward",
    "conv2d_dgrad": "backward",
    "linear": "forward",
    "linear_backward": "backward",
}
# Cycles that a device spins before a timed step, so that the host is ahead of it ever after: about
# 0.1 s, longer than the host takes to queue a step.
_HEAD_START = 200_000_000
# Filter gradients of two backends agree within rounding of 16-bit operands, or one is wrong.
_MOST_DIFFERENCE = {torch.bfloat16: 5e-2, torch.float16: 1e-2}

Key = tuple[str, str]  # layer and direction of a call
Around = Callable[[str, tuple, Callable[[], object]], object]


@contextmanager
def watched(backend: Backend, around: Around) -> Iterator[None]:
    """Inside, ``around(method, arguments, call)`` stands in for a backend's methods.

    It calls ``call`` and returns what that returns. Calls that a method makes of another one are
    part of it.
    """
    inside = False

    def watch(method: str) -> Callable:
        plain = getattr(backend, method)

        @functools.wraps(plain)
        def call(*args: object, **kwargs: object) -> object:
            nonlocal inside
            if inside:
                return plain(*args, **kwargs)
            inside = True
            try:
                given = (*args, *kwargs.values())
                return around(method, given, lambda: plain(*args, **kwargs))
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


class BackendRun:
    """A problem's network, fused, on one backend.

    Args:
        problem: from :func:`wfnet.benchmarking.steps.make_problem`.

    Raises:
        ValueError, RuntimeError: with the reason if the network does not run fused on it.
    """

    def __init__(self, problem: Problem, backend: str):
        self.problem = problem
        self.backend = backends.get(backend)
        self.net = on_backend(problem, backend, fuse=True)
        with problem.autocast():
            network = self.net.fused_network(problem.images)
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
        size = problem.settings.image_size
        self.elements_per_image = roofline.elements_per_image(self.net.model, size)

    def step(self) -> Tensor:
        """Computes forward and backward; returns the gradients of all filters in one vector."""
        batch = self.problem.batch
        with self.problem.autocast():
            run = self.network.start(self.problem.images, batch.forget[:, None], batch.source)
            with torch.no_grad():
                logits = run.forward()
        gradients = run.backward(self.dout.to(logits.dtype))
        return torch.cat([gradient.double().flatten() for gradient in gradients])

    def timed_step(self, calls: dict[Key, dict]) -> tuple[Tensor, list[tuple[Key, float]]]:
        """Runs one step; notes shapes and work of calls that are not yet in ``calls``.

        Returns:
            The gradients of :meth:`step`, and the milliseconds of every call.
        """
        cuda = self.problem.device.type == "cuda"
        found: list[tuple[Key, object, object]] = []

        def now() -> object:
            if not cuda:
                return time.perf_counter()
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event

        def clocked(method: str, arguments: tuple, compute: Callable) -> object:
            key = self._layer_of(arguments), METHODS[method]
            start = now()
            result = compute()
            found.append((key, start, now()))
            if key not in calls:
                calls[key] = self._described(key, arguments, result)
            return result

        if cuda:
            torch.cuda.synchronize()
            torch.cuda._sleep(_HEAD_START)
        with watched(self.backend, clocked):
            gradients = self.step()
        if cuda:
            torch.cuda.synchronize()
            return gradients, [(key, start.elapsed_time(end)) for key, start, end in found]
        return gradients, [(key, (end - start) * 1e3) for key, start, end in found]

    def _described(self, key: Key, arguments: tuple, result: object) -> dict:
        """Returns shapes and work of a call."""
        layer, direction = key
        module = self.net.masked_layers[layer]
        first = next(tensors_of(arguments))
        moved = {
            (t.data_ptr(), t.dtype, held): held * t.element_size()
            for t in tensors_of([arguments, result])
            if (held := _elements(t))
        }
        outputs = self.elements_per_image[module][1]
        return {
            "layer": layer,
            "direction": direction,
            "shapes": (tuple(first.shape), tuple(module.weight.shape)),
            "ms": {},
            "flops": 2.0 * outputs * module.weight[0].numel() * first.shape[0],
            "bytes": float(sum(moved.values())),
        }

    def _layer_of(self, arguments: tuple) -> str:
        """Returns the layer whose filter is among the arguments."""
        dtype = next(tensors_of(arguments)).dtype
        given = {t.data_ptr() for t in tensors_of(arguments)}
        for name, layer in self.net.masked_layers.items():
            if self.network.weight(layer, dtype).data_ptr() in given:
                return name
        raise ValueError("a call has no masked layer's filter among its arguments")


def time_layers(
    problem: Problem, names: Sequence[str], repeats: int, rates: roofline.Rates
) -> tuple[list[dict], dict[str, str]]:
    """Times every call of a fused step on every backend.

    Args:
        names: backends. The first that runs is what the others' gradients are compared with.

    Returns:
        JSON of the calls in the order of the step: layer, direction, shapes of the first operand
        and of the filter, median milliseconds by backend, those of the roofline, flops (of samples
        that share an image once) and bytes moved at least. And by name why a backend has no times:
        it fails, or computes something else.
    """
    calls: dict[Key, dict] = {}
    runs: dict[str, BackendRun] = {}
    failed: dict[str, str] = {}
    expected = None
    limit = _MOST_DIFFERENCE.get(problem.settings.dtype, 1e-3)
    for name in names:
        try:
            run = BackendRun(problem, name)
            found, times = run.timed_step(calls)
            if not times:
                raise ValueError("it multiplies nothing in this network: all is PyTorch's own")
        except Exception as error:  # of compilers, drivers and our own code
            failed[name] = reason_of(error)
            continue
        expected = found if expected is None else expected
        error = ((found - expected).norm() / expected.norm().clamp_min(1e-30)).item()
        if error <= limit:
            runs[name] = run
        else:
            failed[name] = f"computes something else: gradients differ by {error:.1e}"
    for _ in range(repeats):
        for name, run in runs.items():
            for key, milliseconds in run.timed_step(calls)[1]:
                calls[key]["ms"].setdefault(name, []).append(milliseconds)
    for call in calls.values():
        call["ms"] = {name: statistics.median(ms) for name, ms in call["ms"].items()}
        call["floor_ms"] = rates.seconds(call["flops"], call["bytes"]) * 1e3
    return list(calls.values()), failed


def tensors_of(value: object) -> Iterator[Tensor]:
    """Yields all tensors in containers and dataclasses, such as those of a backend."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_of(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_of(item)
    elif is_dataclass(value):
        yield from tensors_of([getattr(value, one.name) for one in fields(value)])


def _elements(t: Tensor) -> int:
    """Returns the elements in memory: those of an expanded view count once."""
    count = 1
    for size, stride in zip(t.shape, t.stride(), strict=True):
        count *= 1 if stride == 0 and size else size
    return count
