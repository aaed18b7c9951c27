"""PyTorch's operations with the branches of kernels compute what the backend ``eager`` computes."""

import pytest
import torch
from captured_steps import CLASSES, Residual, network

from wfnet.backends import mixed
from wfnet.labels import select


@pytest.mark.parametrize("sources", [True, False])
def test_a_network_whose_branches_are_scaled(sources):
    net = network(Residual, "cpu").double()
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    source = torch.tensor([0, 2, 1, 2]) if sources else None
    rows = select(torch.tensor([[0, 3], [5, -1], [2, 2], [-1, 4]])[: 4 if sources else 3])
    weights = torch.randn(4 if sources else 3, CLASSES, dtype=torch.float64)
    results = []
    for backend in (None, mixed.MixedEager()):
        fused = net.fused_network(images)
        fused.backend = backend or fused.backend
        run = fused.start(images, rows.rows, source)
        results.append([run.forward(), *run.backward(weights)])
        assert fused.backend.name == "eager"
    for mine, truth in zip(*results, strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-9, atol=1e-12)
    with torch.no_grad():
        mine = fused.start(images, rows.rows, source, save=False).forward()
    torch.testing.assert_close(mine, results[0][0], rtol=1e-9, atol=1e-12)
