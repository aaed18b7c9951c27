"""Every masked layer's calls of its backend, timed on the operands of a real step.

A fused network runs forward and backward over an expanded minibatch, as in an untraining step, by
:class:`wfnet.backends.autotune.TunedBackend`: every candidate makes every call, is compared with
PyTorch and timed. Nothing is rebuilt: operands, sizes and what each call finishes for others are
those of the step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass

import torch
from torch import Tensor

from wfnet import fusion
from wfnet.backends.autotune import TunedBackend, default_candidates
from wfnet.benchmarking import roofline
from wfnet.benchmarking.steps import Problem, on_backend
from wfnet.network import WFNet

# What multiplies: method of a backend, direction.
METHODS = {"conv2d": "forward", "conv2d_dgrad": "backward"}
_STANDS_FOR = {"cuda": "triton", "eager+triton": "eager"}


def time_layers(
    problem: Problem, names: Sequence[str], repeats: int, rates: roofline.Rates
) -> tuple[list[dict], dict[str, str]]:
    """Times every call of a fused step by every candidate.

    Args:
        names: of candidates (:func:`wfnet.backends.autotune.default_candidates`); ``eager``, which
            the others are compared with, is always one.

    Returns:
        JSON of the calls in the order of the step: layer, direction, shapes of the first operand
        and of the filter, milliseconds by candidate, those of the roofline, flops (of samples that
        share an image once) and bytes moved at least. And by name why a candidate lacks times: it
        cannot run here, fails, or computes something else.

    Raises:
        ValueError: if the network does not run fused.
    """
    net = on_backend(problem, "eager", fuse=True)
    with problem.autocast():
        network = net.fused_network(problem.images)
    known = default_candidates()
    candidates = {name: known[name] for name in dict.fromkeys(("eager", *names))}
    backend = TunedBackend(problem.device, math.inf, candidates, repeats=repeats)
    if isinstance(network, fusion.TrunkNetwork):
        # What lies between masked layers is compiled on a device, which takes a minute and leaves
        # their calls as they are.
        network = fusion.TrunkNetwork(network.prefix, network.rest, network.layers, compiled=False)
        network.products = backend
    else:
        network.backend = backend
    pixels = roofline.elements_per_image(net.model, problem.settings.image_size)
    calls: list[dict] = []
    failed: dict[str, str] = {}

    def note(method: str, kind: str, arguments: dict, result: object) -> None:
        if method not in METHODS:
            return
        layer = _layer_of(network, net, arguments["weight"])
        (entry,) = backend.choices[kind].values()
        x, ms = next(iter(arguments.values())), dict(entry["ms"])
        for name in names:
            reason = candidates[name].refuse_conv2d(x, arguments["weight"], arguments["geometry"])
            reason = entry["excluded"].get(name, reason)
            if reason is not None:
                failed.setdefault(name, f"{layer} {METHODS[method]}: {reason}")
            elif _STANDS_FOR.get(name) in ms:  # where it has no kernel of its own
                ms.setdefault(name, ms[_STANDS_FOR[name]])
        module = net.masked_layers[layer]
        moved = {
            (t.data_ptr(), t.dtype, held): held * t.element_size()
            for t in tensors_of([arguments, result])
            if (held := _elements(t))
        }
        flops = 2.0 * pixels[module][1] * module.weight[0].numel() * x.shape[0]
        size = float(sum(moved.values()))
        calls.append(
            {
                "layer": layer,
                "direction": METHODS[method],
                "shapes": (tuple(x.shape), tuple(module.weight.shape)),
                "ms": ms,
                "flops": flops,
                "bytes": size,
                "floor_ms": rates.seconds(flops, size) * 1e3,
            }
        )

    backend.listener = note
    settings, batch = problem.settings, problem.batch
    generator = torch.Generator().manual_seed(settings.seed)
    dout = torch.randn(len(batch), settings.classes, generator=generator) / settings.classes
    with problem.autocast(), torch.no_grad():
        run = network.start(problem.images, batch.forget[:, None], batch.source)
        logits = run.forward()
    run.backward(dout.to(logits))
    return calls, failed


def _layer_of(network: fusion.FusedNetwork, net: WFNet, weight: Tensor) -> str:
    """Returns the masked layer whose filter ``weight`` is."""
    for name, layer in net.masked_layers.items():
        if network.weight(layer, weight.dtype).data_ptr() == weight.data_ptr():
            return name
    raise ValueError("a call has no masked layer's filter among its arguments")


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
