"""A fused network as an autograd node: gradients that repeat, and what is refused."""

import pytest
import torch

IMAGES = torch.randn(3, 3, 32, 32, dtype=torch.float64)


@pytest.fixture(params=["plan", "trunk"])
def pair(request, toy, small_vit, pair_of):
    return pair_of(toy(bias=True) if request.param == "plan" else small_vit())


def test_gradients_repeat_bit_by_bit_and_accumulate(pair):
    net, fused = pair
    labels, found = torch.tensor([1, 1, 0]), []
    for _ in range(2):
        fused.zero_grad()
        fused(IMAGES, labels).square().sum().backward()
        found.append([p.grad.clone() for p in fused.filter_parameters()])
    assert all(map(torch.equal, *found))
    for network in (net, fused):
        network.zero_grad()
        for _ in range(2):
            network(IMAGES, labels).square().sum().backward()
    for mine, other in zip(fused.filter_parameters(), net.filter_parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-8, atol=1e-12)


def test_what_backward_refuses(pair):
    _, fused = pair
    out = fused(IMAGES, 1).sum()
    out.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        out.backward()
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(fused(IMAGES, 1).sum(), fused.filter_parameters(), create_graph=True)
    out = fused(IMAGES, 1).sum()
    with torch.no_grad():
        fused.filter_parameters()[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_images_that_need_a_gradient_and_no_labels_run_unfused(pair):
    net, fused = pair
    images = IMAGES.clone().requires_grad_()
    (expected,) = torch.autograd.grad(net(images, 1).sum(), images)
    (found,) = torch.autograd.grad(fused(images, 1).sum(), images)
    assert torch.equal(found, expected)
    with torch.no_grad():
        assert torch.equal(fused(IMAGES), net.bake(None)(IMAGES))


def test_a_network_made_in_inference_mode_runs_fused(toy, small_vit, pair_of):
    for make in (toy, small_vit):
        with torch.inference_mode():
            net, fused = pair_of(make())
            torch.testing.assert_close(fused(IMAGES, 1), net(IMAGES, 1), rtol=1e-11, atol=1e-12)
        assert fused.fused_network(IMAGES) is not None
