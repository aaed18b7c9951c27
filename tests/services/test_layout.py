import torch
from torch import nn

from wfnet.services.layout import safe_layout


def test_a_narrow_strided_convolution_is_trained_in_contiguous_layout():
    net = nn.Sequential(nn.Conv2d(8, 16, 1, stride=2), nn.Conv2d(16, 16, 1, stride=2))
    net.to(memory_format=torch.channels_last)
    images = torch.randn(9, 8, 64, 64).to(memory_format=torch.channels_last)
    seen = []
    net[0].register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].stride()))
    with safe_layout(net):
        net(images).sum().backward()  # without it, this can end the process
    expected = torch.autograd.grad(net.double()(images.double()).sum(), net[0].weight)[0]
    torch.testing.assert_close(net[0].weight.grad.double(), expected, atol=1e-3, rtol=1e-4)
    assert seen == [(8 * 64 * 64, 64 * 64, 64, 1), images.stride()]
