"""The masked operators on this machine, in pytest-benchmark's format.

    pytest benchmarks --benchmark-only
    pytest benchmarks --benchmark-only --benchmark-compare     (against a saved run)

One group per layer and direction; the members are providers of `bench_ops.py`. Shapes are divided
by four where there is no CUDA device.
"""

import pytest
import torch
from bench_ops import LAYERS, forward_of, make_problem, step_of

CUDA = torch.cuda.is_available()
NAMES = "resnet18.conv1 resnet18.layer1.conv resnet18.layer2.0.conv1 resnet50.layer3.conv3"
NAMES += " vgg16.conv3_2 vit_small.qkv"
PROVIDERS = ["loop", "eager", "unmasked", *(["triton"] if CUDA else [])]


@pytest.mark.parametrize("direction", ["forward", "forward and backward"])
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("name", NAMES.split())
def test_operator(benchmark, name, provider, direction):
    layer = next(layer for layer in LAYERS if layer.name == name)
    how = (256, 1, torch.bfloat16, "cuda", 1000) if CUDA else (8, 4, torch.float32, "cpu", 10)
    problem = make_problem(layer, *how)
    run = forward_of(provider, problem)
    if direction != "forward":
        run = step_of(provider, problem, run)

    def finished() -> None:
        """Runs and waits: a kernel that is only queued has not been measured."""
        run()
        if CUDA:
            torch.cuda.synchronize()

    benchmark.group = f"{name}, {direction}"
    benchmark(finished)
