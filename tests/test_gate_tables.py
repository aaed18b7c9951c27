"""Tables of all layers at once against the equations, layer by layer, in fp64."""

import torch

from wfnet import gates
from wfnet.gate_tables import GatedLayer, GateTables

FORGET = torch.tensor([[0, 1, -1], [1, 1, 1], [-1, -1, -1], [-1, 3, 3], [4, 2, 0], [2, 0, 2]])


def random_layers() -> list[GatedLayer]:
    """Without a norm; with everything; with a norm that has neither weight nor bias."""
    return [
        GatedLayer(torch.randn(5, 20), gate_scale=1.3),
        GatedLayer(
            torch.randn(5, 14),
            torch.randn(5, 14),
            bias=torch.randn(14),
            gamma=torch.randn(14),
            beta=torch.randn(14),
            mean=torch.randn(14),
            var=torch.rand(14) + 0.5,
            eps=1e-3,
            gate_scale=1.3,
        ),
        GatedLayer(torch.randn(5, 8), mean=torch.randn(8), var=torch.rand(8) + 0.5, gate_scale=1.3),
    ]


def close(found, truth):
    torch.testing.assert_close(found.double(), truth, rtol=2e-6, atol=2e-6)


def test_tables_and_gradients_of_a_network():
    layers = random_layers()
    step = GateTables(layers)(FORGET, save=True)
    step.sums.normal_()
    t1 = [sums.double() for sums in step.t1]
    t0 = [None if sums is None else sums.double() for sums in step.t0]
    gradients = iter(step.gradients())
    for i, layer in enumerate(layers):
        gamma = torch.ones(layer.alpha_weight.shape[1], dtype=torch.float64)
        beta = torch.zeros_like(gamma)
        if layer.var is not None:
            weight = 1 if layer.gamma is None else layer.gamma.double()
            gamma = weight / (layer.var.double() + layer.eps).sqrt()
            beta = (0 if layer.beta is None else layer.beta.double()) - layer.mean * gamma
        rows = gates.gate_rows(layer.alpha_weight.double(), FORGET, layer.gate_scale)
        close(step.scales[i], gamma * rows)
        alpha = layer.alpha_weight.double()
        close(next(gradients), gates.gate_rows_backward(t1[i], alpha, FORGET))
        if layer.alpha_bias is None:
            close(step.shifts[i], beta.expand(6, -1))
            continue
        alpha = layer.alpha_bias.double()
        rows = gates.gate_rows(alpha, FORGET, layer.gate_scale)
        shift = gamma * layer.bias.double() * rows
        close(step.shifts[i], shift + beta)
        close(next(gradients), gates.gate_rows_backward(t0[i] * shift, alpha, FORGET))


def test_both_tables_have_rows_of_one_stride():
    """Kernels take one stride for scale and shift."""
    step = GateTables(random_layers())(FORGET)
    for scale, shift in zip(step.scales, step.shifts, strict=True):
        assert scale.stride() == shift.stride()
