"""The fused form of a network follows the network, or is refused."""

import copy
import functools
import io
import logging
import pickle

import pytest
import torch
from torch import nn
from torch.nn.modules import module as hooks

import wfnet
from wfnet import fusion
from wfnet import gate_tables as tables

CLASSES = 5
IMAGES = torch.randn(3, 3, 32, 32, dtype=torch.float64)


def masked(model: nn.Module) -> nn.Module:
    return [m for m in model.modules() if isinstance(m, wfnet.layers.MaskedLayer)][-1]


def replaced_head(model: nn.Module) -> None:
    name = "fc" if hasattr(model, "fc") else "head"
    setattr(model, name, nn.Linear(getattr(model, name).in_features, CLASSES).double())


def replaced_weight(model: nn.Module) -> None:
    masked(model).weight = nn.Parameter(masked(model).weight.detach() * 2, requires_grad=False)


def hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, inputs, output: 2 * output)


def replaced_forward(model: nn.Module) -> None:
    forward = model.forward
    model.forward = lambda x: 2 * forward(x)


CHANGES = {
    "head": replaced_head,
    "weight": replaced_weight,
    "weight in place": lambda model: masked(model).weight.mul_(2),
    "hook of a layer": lambda model: hook(list(model.modules())[-2]),
    "hook of a masked layer": lambda model: hook(masked(model)),
    "forward": replaced_forward,
    "child": lambda m: setattr(m, "act" if hasattr(m, "act") else "norm", nn.Softplus()),
    "stride": lambda model: setattr(model.conv1, "stride", (2, 2)),
    "hook of a norm": lambda model: hook(model.bn1),
    "hook of a container": lambda model: hook(model.stem),
    "statistics": lambda model: model.bn1.running_mean.add_(1.0),
    "statistics of the batch": lambda model: model.bn1.train(),
}


@pytest.mark.parametrize(
    ("kind", "name"),
    [("plan", name) for name in CHANGES] + [("trunk", name) for name in list(CHANGES)[:7]],
)
@torch.no_grad()
def test_a_changed_network_answers_anew(kind, name, toy, small_vit, pair_of):
    net, fused = pair_of(toy() if kind == "plan" else small_vit())
    before = fused(IMAGES, 1)
    for network in (net, fused):
        torch.manual_seed(0)
        CHANGES[name](network.model)
    after = fused(IMAGES, 1)
    assert not torch.allclose(before, after)
    if name == "statistics of the batch":  # they move with every call
        fused.model.bn1.load_state_dict(net.model.bn1.state_dict())
        after = fused(IMAGES, 1)
    torch.testing.assert_close(after, net(IMAGES, 1), rtol=1e-10, atol=1e-11)


def test_hooks_for_every_module_are_called(toy, pair_of):
    net, fused = pair_of(toy())
    fused(IMAGES, 1)
    handle = hooks.register_module_forward_hook(lambda module, inputs, output: 0.9 * output)
    try:
        torch.testing.assert_close(fused(IMAGES, 1), net(IMAGES, 1), rtol=1e-10, atol=1e-11)
        assert fused.fused_network(IMAGES) is None
    finally:
        handle.remove()
    assert fused.fused_network(IMAGES) is not None


def test_an_unchanged_network_is_planned_once(toy, pair_of):
    class Counting(nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return x

    model = toy()
    model.pool = nn.Sequential(model.pool, Counting())
    net, fused = pair_of(model)
    network = fused.fused_network(IMAGES)
    for labels in (0, torch.tensor([1, -1, 2])):
        fused.filter_parameters()[0].data.add_(1)
        fused(IMAGES, labels)
        fused.train()
        fused.model.act.note = object()  # says nothing of what is computed
    assert fused.fused_network(IMAGES) is network
    assert list(net.state_dict()) == list(fused.state_dict())
    assert [n for n, _ in net.named_modules()] == [n for n, _ in fused.named_modules()]


@pytest.fixture
def without_generated_code(monkeypatch):
    compile_ = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", compile_)


def test_copies_and_saved_networks_start_without_plans(pair_of, without_generated_code):
    model = nn.Sequential(nn.Conv2d(3, 4, 32), nn.Flatten(), nn.Linear(4, 5))
    _, fused = pair_of(model, "compile")
    with torch.no_grad():
        expected = fused(IMAGES, 1)
        file = io.BytesIO()
        torch.save(fused, file)
        file.seek(0)
        saved = torch.load(file, weights_only=False)
        for twin in (saved, pickle.loads(pickle.dumps(fused)), copy.deepcopy(fused)):
            assert twin.fuse == "compile"
            twin.fuse = True  # its own, without compiling once more
            torch.testing.assert_close(twin(IMAGES, 1), expected, rtol=1e-10, atol=1e-11)


class NoBackward(nn.Module):
    def forward(self, x):
        def fails(gradient):
            raise ValueError("no backward")

        x = x * 2
        if x.requires_grad:
            x.register_hook(fails)
        return x


@pytest.mark.parametrize(
    ("error", "layer", "reason"),
    [(1.01, nn.Identity(), "differ"), (1, NoBackward(), "running the plan failed (no backward)")],
)
def test_a_wrong_plan_is_never_used(error, layer, reason, monkeypatch, caplog, toy, pair_of):
    fold = tables.GatedLayer.folded
    wrong = lambda layer: (fold(layer)[0] * error, fold(layer)[1])  # noqa: E731
    monkeypatch.setattr(tables.GatedLayer, "folded", wrong)
    model = toy()
    model.pool = nn.Sequential(model.pool, layer)
    net, fused = pair_of(model)
    with caplog.at_level(logging.WARNING, logger="wfnet"):
        torch.testing.assert_close(fused(IMAGES, 1), net(IMAGES, 1))
    assert reason in caplog.text


def test_another_way_to_fuse_is_refused(toy):
    with pytest.raises(ValueError, match="fuse='compiled' is none of True, False and 'compile'"):
        wfnet.WFNet(toy(), CLASSES, fuse="compiled")


def test_which_backend_layers_ask_for():
    layer = wfnet.WFConv2d(2, 3, 1, num_classes=2)
    other = wfnet.WFConv2d(2, 3, 1, num_classes=2, backend="eager")
    assert fusion.backend_for([layer]).name == fusion.backend_for([other]).name == "eager"
    with pytest.raises(fusion.NotFusable, match="different backends"):
        fusion.backend_for([layer, other])
    other.backend = "reference"
    with pytest.raises(fusion.NotFusable, match="never fused"):
        fusion.backend_for([other])


@pytest.mark.parametrize(
    ("kind", "mode", "gate"),
    [("plan", True, gate) for gate in (1.0, 1e-2, 1e-3)]
    + [("plan", "compile", 1.0), ("plan", "compile", 1e-3), ("trunk", True, 0.5)],
)
def test_bfloat16_error_is_at_most_twice_the_unfused_one(
    kind, mode, gate, toy, small_vit, pair_of, without_generated_code
):
    torch.manual_seed(0)  # at the smallest gates the ratio of two draws is between 0.3 and 4
    net, fused = pair_of(small_vit() if kind == "trunk" else toy(), mode)
    alpha = torch.logit(torch.tensor(gate * torch.sigmoid(torch.tensor(3.0)).item())).item()
    for parameter in net.filter_parameters():
        parameter.data.normal_(alpha, 0.1)
    fused.load_state_dict(net.state_dict())
    images = torch.randn(64, 3, 32, 32, dtype=torch.float64)
    labels, weights = torch.arange(64) % CLASSES, torch.randn(64, CLASSES).double()

    def gradients(network: wfnet.WFNet, half: bool) -> torch.Tensor:
        network = network.to(torch.float32 if half else torch.float64)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            out = network(images.to(network.filter_parameters()[0].dtype), labels)
        (out.double() * weights).sum().backward()
        return torch.cat([p.grad.double().flatten() for p in network.filter_parameters()])

    exact = gradients(copy.deepcopy(net), False)
    error, unfused = ((gradients(network, True) - exact).norm() for network in (fused, net))
    assert fused.fused_network(images.float()) is not None
    assert error <= 2 * unfused
