"""The fused plan against the unfused network: outputs, gradients, and what must not be fused."""

import copy
import logging

import pytest
import torch
from torch import nn

import wfnet
from wfnet import fusion
from wfnet import gate_tables as tables

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")

CLASSES = 5


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Evaluation mode, fp64, and statistics that a missing or swapped fold would show."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(t: torch.Tensor, low: float, high: float) -> None:
        t.data.copy_(low + (high - low) * torch.rand(t.shape, generator=generator))

    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            uniform(module.running_mean, -0.3, 0.3)
            uniform(module.running_var, 0.5, 1.5)
            if module.affine:
                uniform(module.weight, 0.5, 1.5)
                uniform(module.bias, -0.3, 0.3)
        elif isinstance(module, nn.Conv2d) and module.bias is not None:
            uniform(module.bias, -0.3, 0.3)
    return model.double().eval()


def pair_of(model: nn.Module, **options) -> tuple[wfnet.WFNet, wfnet.WFNet]:
    """An unfused and a fused network with the same random filters."""
    net = wfnet.WFNet(randomised(model), CLASSES, **options)
    generator = torch.Generator().manual_seed(1)
    for parameter in net.filter_parameters():
        parameter.data.copy_(3 * torch.randn(parameter.shape, generator=generator))
    fused = copy.deepcopy(net)
    fused.fuse = True
    return net, fused


class Toy(nn.Module):
    """Convolutions with everything that can follow them, in a few thousand multiplications."""

    def __init__(self, bias: bool = False, inplace: bool = True):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=bias)
        self.bn1 = nn.BatchNorm2d(8)
        self.pool = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=bias)
        self.bn2 = nn.BatchNorm2d(8, affine=False)
        self.conv3 = nn.Conv2d(8, 16, (3, 1), stride=(2, 1), padding=(1, 0), bias=bias)
        self.shortcut = nn.Conv2d(8, 16, 1, stride=(2, 1), bias=bias)
        self.act = nn.ReLU(inplace)
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x):
        x = self.pool(self.act(self.bn1(self.conv1(x))))
        x = self.act(self.bn2(self.conv2(x)) + x)  # x is read twice
        x = self.conv3(x) + self.shortcut(x)
        x = self.act(x)
        return self.fc(x.mean((2, 3)))


def plan_of(net: wfnet.WFNet) -> fusion.Plan:
    return fusion.make_plan(net.model)


NETWORKS = {
    "toy": lambda: Toy(),
    "toy with biases": lambda: Toy(bias=True, inplace=False),
    "torchvision resnet18": lambda: torchvision.models.resnet18(num_classes=CLASSES),
    "torchvision vgg11": lambda: small_vgg(torchvision.models.vgg11),
    "torchvision vgg11_bn": lambda: small_vgg(torchvision.models.vgg11_bn),
    "torchvision mobilenet_v2": lambda: torchvision.models.mobilenet_v2(
        num_classes=CLASSES, width_mult=0.25
    ),
    "timm resnet26": lambda: timm.create_model(
        "resnet26", num_classes=CLASSES, channels=(8, 16, 16, 16), stem_width=8
    ),
    "timm mobilenetv3": lambda: timm.create_model("mobilenetv3_small_050", num_classes=CLASSES),
    "timm densenet": lambda: timm.create_model(
        "densenet121", num_classes=CLASSES, block_config=(2, 2), growth_rate=8
    ),
    "timm convnext": lambda: timm.create_model(
        "convnext_atto", num_classes=CLASSES, depths=(1, 1, 1, 1), dims=(8, 8, 16, 16)
    ),
}


def small_vgg(make) -> nn.Module:
    model = make(num_classes=CLASSES, init_weights=False)
    model.avgpool = nn.AdaptiveAvgPool2d(1)
    model.classifier = nn.Sequential(
        nn.Linear(512, 16), nn.ReLU(True), nn.Dropout(), nn.Linear(16, CLASSES)
    )
    return model


@pytest.mark.parametrize("name", NETWORKS)
def test_equals_the_unfused_network(name: str):
    net, fused = pair_of(NETWORKS[name]())
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    source = torch.tensor([0, 2, 2, 1, 0])
    labels = torch.tensor([[0, -1], [4, 1], [-1, -1], [2, 2], [0, 3]])
    weights = torch.randn(5, CLASSES, dtype=torch.float64)
    expected, found = net(images, labels, source), fused(images, labels, source)
    assert fused._fusion.network is not None, "the network runs unfused"
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    for key, parameter in net.named_filters().items():
        torch.testing.assert_close(
            fused.named_filters()[key].grad, parameter.grad, rtol=1e-8, atol=1e-12, msg=key
        )


@pytest.mark.parametrize(
    "window", [{"kernel_size": (2,)}, {"kernel_size": 3, "stride": (2,), "padding": (1,)},
               {"kernel_size": (2, 3), "stride": (1, 2), "ceil_mode": True},
               {"kernel_size": 2, "stride": 1, "dilation": 2}],
)  # fmt: skip
def test_poolings_finish_the_layer_below(window):
    """Outputs and gradients of the unfused network, however the window is written."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(**window), nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(**window), nn.Flatten(), nn.LazyLinear(5),
    )  # fmt: skip
    with torch.no_grad():
        model(torch.zeros(1, 3, 20, 20))
    plain, fused = pair_of(model)
    images, source = torch.randn(2, 3, 20, 20, dtype=torch.float64), torch.tensor([0, 1, 1])
    results = []
    for net in (fused, plain):
        out = net(images, torch.tensor([0, 3, -1]), source)
        results.append([out, *torch.autograd.grad(out.square().sum(), net.filter_parameters())])
    assert fused.fused_network(images) is not None
    finished = [s.finishes for s in plan_of(fused).steps if isinstance(s, fusion.CallStep)]
    assert sum(step is not None for step in finished) == 2
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("labels", [3, torch.tensor([0, -1, 4]), torch.tensor([[1], [1], [2]])])
def test_without_source(labels, channels_last: bool):
    net, fused = pair_of(Toy(bias=True))
    images = torch.randn(3, 3, 9, 8, dtype=torch.float64)
    if channels_last:
        fused = fused.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(fused(images, labels), net(images, labels), rtol=1e-11, atol=1e-12)
    with torch.inference_mode():
        torch.testing.assert_close(
            fused(images, labels), net(images, labels), rtol=1e-11, atol=1e-12
        )


def test_what_is_folded():
    net, _ = pair_of(Toy())
    steps = {step.name: step for step in plan_of(net).convolutions}
    folded = {n: (s.norm is not None, s.residual is not None, s.relu) for n, s in steps.items()}
    assert folded == {
        "conv1": (True, False, True),
        "conv2": (True, True, True),
        "shortcut": (False, False, False),
        "conv3": (False, True, True),  # the sum belongs to the first of its two convolutions
    }


def test_who_finishes_whom():
    """The chain of a bottleneck network: only what a pooling or the head sends down is finished by
    a pass of its own."""
    with torch.device("meta"):
        model = torchvision.models.resnet50(num_classes=CLASSES)
        convs = plan_of(wfnet.WFNet(model, CLASSES)).convolutions
    finished = {step.finishes.name for step in convs if step.finishes is not None}
    shortcuts = {step.shortcut.name for step in convs if step.shortcut is not None}
    assert shortcuts == {f"layer{i}.0.downsample.0" for i in range(1, 5)}
    assert {step.name for step in convs} - finished - shortcuts == {"conv1", "layer4.2.conv3"}
    by_name = {step.name: step for step in convs}
    assert by_name["layer2.0.conv1"].finishes is by_name["layer1.2.conv3"]
    assert by_name["layer2.0.downsample.0"].finishes is None  # its gradient is not the last one
    assert [step.name for step in convs if step.at_source] == ["conv1"]


def made_without_memory(package: str, name: str) -> nn.Module:
    if package == "timm":
        return timm.create_model(name, num_classes=CLASSES)
    return getattr(torchvision.models, name)(num_classes=CLASSES)


def remaining(plan: fusion.Plan) -> set[str]:
    """What kind of operations run outside the fused convolutions."""
    calls = [step.call for step in plan.steps if isinstance(step, fusion.CallStep)]
    return {getattr(call, "__name__", type(call).__name__) for call in calls}


BLOCKS = {"resnet18": 8, "resnet34": 16, "resnet50": 16, "resnet101": 33}


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("package", ["torchvision", "timm"])
def test_resnets_fuse_completely(package: str, name: str):
    with torch.device("meta"):
        plan = plan_of(wfnet.WFNet(made_without_memory(package, name), CLASSES))
    convs = plan.convolutions
    assert all(step.norm is not None for step in convs)
    assert sum(step.residual is not None for step in convs) == BLOCKS[name]
    shortcuts = {step.shortcut for step in convs} - {None}
    assert all(step.relu for step in convs if step not in shortcuts)
    finished = {step.finishes for step in convs} - {None}
    assert len(set(convs) - finished - shortcuts) == 2  # below the pooling, below the head
    assert remaining(plan) <= {
        "MaxPool2d", "AdaptiveAvgPool2d", "SelectAdaptivePool2d", "flatten", "Linear", "Dropout",
        "Identity",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["vgg16", "vgg16_bn"])
@pytest.mark.parametrize("package", ["torchvision", "timm"])
def test_vggs_fuse_completely(package: str, name: str):
    with torch.device("meta"):
        plan = plan_of(wfnet.WFNet(made_without_memory(package, name), CLASSES))
    norm = name == "vgg16_bn"
    assert len(plan.convolutions) == 13
    assert all(step.relu and (step.norm is not None) == norm for step in plan.convolutions)
    assert sum(step.finishes is not None for step in plan.convolutions) == 8  # five pools between
    assert remaining(plan) <= {
        "MaxPool2d", "AdaptiveAvgPool2d", "flatten", "Linear", "ReLU", "Dropout", "ConvMlp",
        "ClassifierHead",
    }  # fmt: skip


def test_evaluation_runs_fused_once_per_source():
    """Mixed rows over shared images under inference mode; -1 is the original network."""
    base = randomised(Toy(bias=True))
    net, fused = pair_of(base)
    images = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    source, labels = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([0, 4, 2, -1, 1])
    with torch.inference_mode():
        found = fused(images, labels, source)
        torch.testing.assert_close(found, net(images, labels, source), rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(found[3:4], base(images[1:]), rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(fused(images, -1), base(images), rtol=1e-11, atol=1e-12)
    assert fused._fusion.network is not None


@pytest.mark.parametrize("make", [Toy, lambda: timm.create_model(
    "vit_tiny_patch16_224", num_classes=CLASSES, img_size=32, embed_dim=12, depth=1
)], ids=["plan", "trunk"])  # fmt: skip
def test_a_network_made_in_inference_mode_runs_fused(make):
    with torch.inference_mode():
        net, fused = pair_of(make())
        images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
        torch.testing.assert_close(fused(images, 1), net(images, 1), rtol=1e-11, atol=1e-12)
    assert fused._fusion.network is not None


def test_prefix_and_stem_run_once_per_source_image():
    seen = []

    class Stem(nn.Module):
        def forward(self, x):
            seen.append(x.shape[0])
            return x * 2

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = Stem()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
            self.fc = nn.Linear(3, CLASSES)

        def forward(self, x):
            x = self.stem(x)
            return self.fc((self.conv(x) + x).mean((2, 3)))

    net, fused = pair_of(Net())
    images = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    source, labels = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([0, 1, 2, 3, 4, -1])
    expected = net(images, labels, source)
    fused(images, labels, source)
    seen.clear()
    torch.testing.assert_close(fused(images, labels, source), expected)
    assert seen == [2]


def test_gradients_repeat_bit_by_bit():
    _, fused = pair_of(Toy(bias=True))
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    labels = torch.tensor([1, 1, 0, 1])
    found = []
    for _ in range(3):
        fused.zero_grad()
        fused(images, labels).square().sum().backward()
        found.append([p.grad.clone() for p in fused.filter_parameters()])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def bfloat16_errors(gate: float, fuse: bool | str) -> tuple[wfnet.WFNet, float, float]:
    """A fused network, and relative errors of its and of the unfused network's bf16 gradients."""
    net, _ = pair_of(Toy())
    alpha = torch.logit(torch.tensor(gate * torch.sigmoid(torch.tensor(3.0)).item())).item()
    for parameter in net.filter_parameters():
        parameter.data.normal_(alpha, 0.1)
    images, labels = torch.randn(64, 3, 16, 16, dtype=torch.float64), torch.arange(64) % CLASSES
    weights = torch.randn(64, CLASSES, dtype=torch.float64)

    def gradients(network: wfnet.WFNet, dtype: torch.dtype) -> torch.Tensor:
        network = network.to(torch.float32 if dtype is torch.bfloat16 else dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            out = network(images.to(network.filter_parameters()[0].dtype), labels)
        (out.double() * weights).sum().backward()
        return torch.cat([p.grad.double().flatten() for p in network.filter_parameters()])

    fused = copy.deepcopy(net)
    fused.fuse = fuse
    exact = gradients(copy.deepcopy(net), torch.float64)
    errors = [
        ((gradients(network, torch.bfloat16) - exact).norm() / exact.norm()).item()
        for network in (fused, copy.deepcopy(net))
    ]
    return fused, *errors


@pytest.mark.parametrize("gate", [1.0, 1e-1, 1e-2, 1e-3])
def test_bfloat16_error_is_at_most_twice_the_unfused_one(gate: float):
    fused, error, unfused = bfloat16_errors(gate, fuse=True)
    assert fused._fusion.network is not None
    assert error <= 2 * unfused


def test_changed_statistics_are_noticed():
    net, fused = pair_of(Toy())
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    before = fused(images, 1)
    for network in (net, fused):
        network.model.bn1.running_mean.add_(1.0)
    after = fused(images, 1)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, net(images, 1))


def test_frees_what_it_kept_and_says_so():
    _, fused = pair_of(Toy())
    out = fused(torch.randn(2, 3, 8, 8, dtype=torch.float64), 1).sum()
    out.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        out.backward()


def test_double_backward_raises():
    _, fused = pair_of(Toy())
    out = fused(torch.randn(2, 3, 8, 8, dtype=torch.float64), 1).sum()
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(out, fused.filter_parameters(), create_graph=True)


def test_filters_changed_before_backward_raise():
    _, fused = pair_of(Toy())
    out = fused(torch.randn(2, 3, 8, 8, dtype=torch.float64), 1).sum()
    with torch.no_grad():
        fused.filter_parameters()[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_images_that_need_a_gradient_run_unfused():
    net, fused = pair_of(Toy())
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    for network in (net, fused):
        (gradient,) = torch.autograd.grad(network(images, 1).sum(), images)
        assert gradient.abs().sum() > 0


def test_forget_none_is_bitwise_the_original():
    base = randomised(Toy())
    net = wfnet.WFNet(base, CLASSES, fuse=True)
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert torch.equal(net(images), base(images))


class Branching(Toy):
    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)


def with_hook() -> nn.Module:
    model = Toy()
    model.register_forward_hook(lambda module, inputs, output: output * 2)
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Branching(), "cannot trace"),
        (with_hook, "has hooks"),
    ],
    ids=["control flow", "hooks"],
)
def test_runs_unfused_with_a_line_in_the_log(make, reason: str, caplog):
    net, fused = pair_of(make())
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with caplog.at_level(logging.WARNING, logger="wfnet"):
        torch.testing.assert_close(fused(images, 1), net(images, 1))
    assert reason in caplog.text


def test_a_wrong_plan_is_never_used(monkeypatch, caplog):
    net, fused = pair_of(Toy())
    fold = tables.GatedLayer.folded

    def wrong(layer):
        gamma, beta = fold(layer)
        return gamma * 1.01, beta

    monkeypatch.setattr(tables.GatedLayer, "folded", wrong)
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with caplog.at_level(logging.WARNING, logger="wfnet"):
        torch.testing.assert_close(fused(images, 1), net(images, 1))
    assert "differ" in caplog.text


def test_another_way_to_fuse_is_refused():
    with pytest.raises(ValueError, match="fuse='compiled' is none of True, False and 'compile'"):
        wfnet.WFNet(Toy(), CLASSES, fuse="compiled")
    _, fused = pair_of(Toy())
    fused.fuse = "compiled"
    with pytest.raises(ValueError, match="none of True, False"):
        fused(torch.randn(2, 3, 8, 8, dtype=torch.float64), 1)


def test_out_of_range_labels_are_refused_before_work():
    _, fused = pair_of(Toy())
    with pytest.raises(ValueError, match="forget label 5 is out of range"):
        fused(torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 5]))


def test_module_tree_and_state_dict_stay():
    net, fused = pair_of(Toy())
    fused(torch.randn(2, 3, 8, 8, dtype=torch.float64), 1)
    assert list(net.state_dict()) == list(fused.state_dict())
    assert [n for n, _ in net.named_modules()] == [n for n, _ in fused.named_modules()]
    copy.deepcopy(fused)
