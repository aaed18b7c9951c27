"""Images on which every measure is tested."""

import pytest
import torch

from wfnet.data import MultiLabelTensors, TensorImages


@pytest.fixture
def dataset(uneven_dataset) -> TensorImages:
    return uneven_dataset


@pytest.fixture
def multi_label_dataset() -> MultiLabelTensors:
    """24 images with about a third of 7 labels each."""
    generator = torch.Generator().manual_seed(0)
    multi_hot = torch.rand(24, 7, generator=generator) < 0.35
    multi_hot[:, 0] |= ~multi_hot.any(1)
    multi_hot[multi_hot.all(1), 1] = False
    images = torch.rand(24, 1, 8, 8, generator=generator)
    return MultiLabelTensors(images, multi_hot, [f"name{i}" for i in range(7)], mean=0.5, std=0.2)
