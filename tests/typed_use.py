"""The public interface as a typed program uses it; `make lint` runs mypy --strict on this file.

Nothing here is run.
"""

from pathlib import Path
from typing import assert_type

import torch
from torch import Tensor, nn

import wfnet
from wfnet.data import Splits, TensorImages, as_dataset, open_data


def use(base: nn.Module, images: Tensor, labels: Tensor) -> None:
    data = open_data("digits", image_size=16)
    assert_type(data, Splits)
    net = wfnet.WFNet(base, num_classes=10, targets=["conv*"], fuse="compile", gate="durable")
    config = wfnet.UntrainConfig.recipe("durable", steps=5)
    assert_type(config, wfnet.UntrainConfig)
    result = wfnet.untrain(net, data.train, data.validation, config, Path("run"), resume=True)
    assert_type(result, wfnet.UntrainResult)
    assert_type(result.steps, int)
    found = wfnet.evaluate(net, as_dataset(data.test, 10), classes=[1, 2])
    assert_type(found, wfnet.EvaluationResult)
    assert_type(found.table(), str)
    assert_type(net.forward(images, forget=labels, source=labels), Tensor)
    assert_type(net.bake(3), nn.Module)
    assert_type(net.bake([3, 4], images=images), nn.Module)
    assert_type(net.filter_parameters(), list[nn.Parameter])
    assert_type(net.gates(), dict[str, Tensor])
    assert_type(wfnet.WFNet.from_pretrained("run", base), wfnet.WFNet)
    conv = wfnet.WFConv2d.from_conv(nn.Conv2d(1, 8, 3), num_classes=10)
    assert_type(conv, wfnet.WFConv2d)
    linear = wfnet.WFLinear.from_linear(nn.Linear(1, 8), num_classes=10)
    assert_type(linear, wfnet.WFLinear)
    with wfnet.forgetting(labels):
        conv(images)
    for forget in (3, labels, None):
        wfnet.forgetting(forget)
    y = wfnet.functional.wf_conv2d(
        images, conv.weight, conv.bias, torch.zeros(10, 8), torch.zeros(10, 8), labels, padding=1
    )
    assert_type(y, Tensor)
    assert_type(wfnet.explain(images, conv.weight), str)
    assert_type(wfnet.__version__, str)
    TensorImages(images, labels, ["a", "b"], mean=0.5, std=[0.2]).batch(labels).images.mean()
    net.bake("3")  # type: ignore[arg-type]  # unless types are lost on the way
