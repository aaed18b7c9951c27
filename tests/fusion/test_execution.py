"""Running a plan: outputs and gradients of the unfused network, and what is kept meanwhile."""

import pytest
import torch
from torch import nn

from wfnet import fusion, models
from wfnet.services.peak_memory import peak_bytes

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")

CLASSES = 5


def images(count: int = 3, size: int = 32) -> torch.Tensor:
    return torch.randn(count, 3, size, size, dtype=torch.float64)


def timm_model(name: str, **options) -> nn.Module:
    return timm.create_model(name, num_classes=CLASSES, **options)


RESNET = {"channels": (8, 16, 16, 16), "stem_width": 8}
RES2NET = {"layers": (1, 1, 1, 1), "base_width": 8}
NETWORKS = {
    "toy": lambda toy: toy(),
    "toy with biases": lambda toy: toy(bias=True, inplace=False),
    "own resnet": lambda toy: models.create("resnet", CLASSES, width=8, in_channels=3),
    "shufflenet": lambda toy: torchvision.models.shufflenet_v2_x0_5(num_classes=CLASSES),
    "timm resnet26": lambda toy: timm_model("resnet26", **RESNET),
    "timm mobilenetv3": lambda toy: timm_model("mobilenetv3_small_050"),
    "timm densenet": lambda toy: timm_model("densenet121", block_config=(2, 2), growth_rate=8),
    "timm res2net": lambda toy: timm_model("res2net50_26w_4s", **RES2NET),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_equals_the_unfused_network(name, toy, pair_of, check_equal):
    check_equal(*pair_of(NETWORKS[name](toy)), images())


@pytest.mark.parametrize(
    "window",
    [
        {"kernel_size": (2, 3), "stride": (2,), "padding": (1,), "ceil_mode": True},
        {"kernel_size": 2, "stride": 1, "dilation": 2},
    ],
    ids=str,
)
def test_poolings_run_the_epilogue_of_the_layer_below(window, pair_of, check_equal):
    """However the window is written."""
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(**window)),
        *(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(**window)),
        *(nn.Flatten(), nn.LazyLinear(CLASSES)),
    )
    with torch.no_grad():
        model(torch.zeros(1, 3, 20, 20))
    net, fused = pair_of(model)
    check_equal(net, fused, images(size=20))
    steps = fusion.make_plan(net.model).steps
    below = [step.below for step in steps if isinstance(step, fusion.CallStep)]
    assert sum(step is not None for step in below) == 2


@pytest.mark.parametrize("channels_last", [False, True])
def test_rows_while_evaluating_and_the_original_network(channels_last, toy, randomised, pair_of):
    base = randomised(toy(bias=True))
    net, fused = pair_of(base)
    x = images(2, 9)
    source, labels = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([0, 4, 2, -1, 1])
    if channels_last:
        fused = fused.to(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        found = fused(x, labels, source)
        torch.testing.assert_close(found, net(x, labels, source), rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(fused(x, 3), net(x, 3), rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(fused(x, -1), base(x), rtol=1e-11, atol=1e-12)
        assert channels_last or torch.equal(fused(x), base(x))
    assert fused.fused_network(x) is not None
    fused(x, labels, source).sum().backward()  # a plan made while evaluating can be trained
    assert all(p.grad.any() for p in fused.filter_parameters())


@pytest.mark.parametrize("several", [False, True], ids=["at once", "one by one"])
def test_gradients_of_a_run_come_in_the_order_of_the_filters(several, network_of, pair_of):
    """With a layer that does not fold among those that do; into one matrix as a step has it."""

    def body(net, x):
        return net.conv(net.linear(net.conv(x).movedim(1, -1)).movedim(-1, 1))

    model = network_of(body, linear=nn.Linear(8, 8), conv=nn.Conv2d(8, 8, 3))
    net, fused = pair_of(model, targets=[nn.Conv2d, "linear"])
    x, labels = images(size=12), torch.tensor([1, 0, 4])
    net(x, labels).square().sum().backward()
    network = fused.fused_network(x)
    assert all(a is b for a, b in zip(network.filters(), fused.filter_parameters(), strict=True))
    run = network.start(x, labels[:, None], None)
    logits = run.forward()
    into = torch.empty(CLASSES, sum(f.shape[1] for f in network.filters())).double()
    found = run.backward(2 * logits, None if several else into)
    for gradient, parameter in zip(found, net.filter_parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-8, atol=1e-12)
        assert several or gradient.untyped_storage().data_ptr() == into.data_ptr()


# -- what is kept from forward to backward ---------------------------------------------------------


def test_calls_keep_no_more_than_autograd_needs(network_of, pair_of):
    """A branch and what the activation keeps, of 8 channels: no clone of an activation in place."""
    norms = [timm.layers.BatchNormAct2d(8, act_layer=nn.SiLU) for _ in range(6)]
    convs = [nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(6)]
    layers = [layer for pair in zip(convs, norms, strict=True) for layer in pair]
    _, fused = pair_of(network_of(nn.Sequential(*layers)))
    fused, x = fused.float(), images(4).float()
    fused(x, 1)
    peak = peak_bytes(lambda: fused(x, 1), x.device)
    assert peak < 17 * 8 / 3 * x.nbytes
