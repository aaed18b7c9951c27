"""The masked operators on this machine, in pytest-benchmark's format.

    pytest benchmarks --benchmark-only
    pytest benchmarks --benchmark-only --benchmark-compare     (against a saved run)

One group per layer and direction; the members are the providers of `bench_ops.py`. Shapes are
divided by four where there is no CUDA device.
"""

import functools

import pytest
import torch
from bench_ops import LAYERS, make_problem, step_of

CUDA = torch.cuda.is_available()
NAMES = ("resnet18.conv1", "resnet18.layer1.conv", "resnet18.layer2.0.conv1",
         "resnet50.layer3.conv3", "vgg16.conv3_2", "vit_small.qkv")  # fmt: skip
PROVIDERS = ("loop", "eager", "unmasked", *(("triton",) if CUDA else ()))


@functools.cache
def problem(name: str):
    layer = next(layer for layer in LAYERS if layer.name == name)
    if CUDA:
        return make_problem(layer, 256, 1, torch.bfloat16, "cuda", 1000)
    return make_problem(layer, 8, 4, torch.float32, "cpu", 10)


def finished(function, *arguments):
    """Calls and waits: a kernel that is only queued has not been measured."""
    result = function(*arguments)
    if CUDA:
        torch.cuda.synchronize()
    return result


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("name", NAMES)
def test_forward(benchmark, name, provider):
    benchmark.group = f"{name}, forward"
    forward, _ = step_of(provider, problem(name))
    y = benchmark(finished, forward)
    assert y.shape == problem(name).dout.shape


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("name", NAMES)
def test_step(benchmark, name, provider):
    benchmark.group = f"{name}, forward and backward"
    forward, backward = step_of(provider, problem(name))
    benchmark(finished, lambda: backward(forward()))
