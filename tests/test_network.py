"""WFNet on real architectures (small, random weights): coverage, refusals, targets, bake."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from wfnet import WFConv2d, WFNet

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")


CLASSES = 10


def tv(name, **options):
    return torchvision.models.get_model(name, weights=None, num_classes=CLASSES, **options)


def tm(name, **options):
    return timm.create_model(name, num_classes=CLASSES, **options)


def spread(model):
    """Random weights whose logits depend on the input: no statistic is at its trivial start."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_var.uniform_(0.5, 2)
                module.running_mean.normal_(0, 0.1)
                module.weight.uniform_(0.5, 1.5)
        for name, parameter in model.named_parameters():
            if name.endswith("gamma") or "layer_scale" in name:  # ConvNeXt starts at 1e-6
                parameter.uniform_(0.5, 1)
    return model.eval()


def randomize(net):
    for parameter in net.filter_parameters():
        nn.init.normal_(parameter, 2, 1)
    return net


DEIT = "deit_tiny_distilled_patch16_224"
SWIN = {"embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)}
COVERED = {
    # name: (model, image size, masked layers, a bias where it is masked)
    "torchvision resnet18": (lambda: tv("resnet18"), 32, 20, False),
    "torchvision mobilenet_v3": (lambda: tv("mobilenet_v3_small"), 32, 52, True),
    "torchvision squeezenet": (lambda: tv("squeezenet1_1"), 64, 25, True),
    "timm resnet10t": (lambda: tm("resnet10t"), 32, 14, False),
    "timm tf_efficientnet": (lambda: tm("tf_mobilenetv3_small_minimal_100"), 33, None, True),
    "timm convnext": (lambda: tm("convnext_atto", depths=(1, 1, 2, 1)), 32, None, True),
    "timm deit": (lambda: tm(DEIT, img_size=32, depth=2), 32, 8, True),
    "timm swin": (
        lambda: tm("swin_tiny_patch4_window7_224", img_size=56, window_size=7, **SWIN),
        56,
        16,
        True,
    ),
}


@pytest.mark.parametrize("name", COVERED)
def test_coverage(name):
    make, size, count, bias = COVERED[name]
    model = spread(make())
    state = {k: v.clone() for k, v in model.state_dict().items()}
    net = WFNet(model, CLASSES)
    assert count is None or len(net.masked_layers) == count
    x, forget = torch.randn(3, 3, size, size), torch.tensor([1, -1, 2])
    with torch.no_grad():
        original = model(x)
        assert torch.equal(net(x), original)
        fresh = net(x, forget)
        if bias:
            torch.testing.assert_close(fresh, original, rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(fresh, original)

        randomize(net)
        found = net(x, forget)
        for layer in net.masked_layers.values():
            layer.backend = "reference"
        truth = net(x, forget)
        torch.testing.assert_close(found, truth, rtol=1e-3, atol=1e-4)
        assert not torch.allclose(found[0], original[0], rtol=1e-2)

        baked = net.bake(1)
        torch.testing.assert_close(baked(x[:1]), found[:1], rtol=1e-3, atol=1e-4)
        assert type(baked) is type(model)
        assert list(baked.state_dict()) == list(state)
        assert torch.equal(net.bake(None)(x), original)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def small(*layers, channels=4):
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES)
    ).eval()


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))


class Shared(nn.Module):
    """Uses a layer twice, under two names."""

    def __init__(self):
        super().__init__()
        self.a = self.b = nn.Conv2d(3, 3, 3, padding=1)
        self.head = nn.Linear(3, CLASSES)

    def forward(self, x):
        return self.head(self.b(self.a(x).relu()).mean((2, 3)))


def test_a_layer_that_is_used_twice():
    net = randomize(WFNet(Shared().double().eval(), CLASSES))
    assert list(net.masked_layers) == ["a"]
    assert net.model.a is net.model.b
    x, forget = X.double(), torch.tensor([3, 7])
    found = net(x, forget)
    gradients = torch.autograd.grad(found.square().sum(), net.filter_parameters())
    baked = net.bake(3)
    assert not any(isinstance(m, WFConv2d) for m in baked.modules())
    torch.testing.assert_close(baked(x[:1]), found[:1], rtol=0, atol=1e-10)
    net.masked_layers["a"].backend = "reference"
    truth = net(x, forget)
    wanted = torch.autograd.grad(truth.square().sum(), net.filter_parameters())
    for a, b in zip((found, *gradients), (truth, *wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


# -- construction ---------------------------------------------------------------------------------


def test_num_classes_must_fit_the_head():
    with pytest.raises(ValueError, match=r"num_classes=7 does not match.*'fc'.*10 outputs"):
        WFNet(tm("resnet10t"), 7)
    for wrong in (1, 0, True, 10.0, "10", None):
        with pytest.raises(ValueError, match="at least 2"):
            WFNet(tm("resnet10t"), wrong)
    assert type(WFNet(tm("resnet10t"), np.int64(CLASSES)).num_classes) is int


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [("0.weight", torch.nan, "NaN"), ("1.running_var", torch.inf, "infinite")]
    + [("1.running_var", -1.0, "negative")],
)
def test_weights_that_no_training_gives_are_refused(name, value, says):
    model = small(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model.state_dict()[name].view(-1)[0] = value
    with pytest.raises(ValueError, match=f"'{name}' of the model holds 1 values .*{says}"):
        WFNet(model, CLASSES)


def test_wrapping_copies_and_freezes():
    model = small(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    net = WFNet(model, CLASSES)
    assert all(p.requires_grad for p in model.parameters())
    assert model.training
    assert type(model[0]) is nn.Conv2d
    wanted = {f"model.{name}" for name in net.named_filters()}
    assert {n for n, p in net.named_parameters() if p.requires_grad} == wanted
    assert list(net.named_filters()) == ["0.alpha_weight", "0.alpha_bias"]
    assert [p.shape for p in net.filter_parameters()] == [(CLASSES, 4)] * 2
    with pytest.raises(RuntimeError, match="DistributedDataParallel"):
        net._replicate_for_data_parallel()(X, 1)
    with pytest.raises(ValueError, match="is a WFNet already"):
        WFNet(net, CLASSES)
    gates = net.gates()
    assert list(gates) == list(net.named_filters())
    assert all(torch.equal(g, torch.ones(CLASSES, 4)) for g in gates.values())


def test_models_that_already_have_masked_layers():
    model = small(WFConv2d(3, 4, 3, num_classes=CLASSES), nn.Conv2d(4, 4, 1))
    assert list(WFNet(model, CLASSES).masked_layers) == ["0"]
    assert list(WFNet(model, CLASSES, targets="1").masked_layers) == ["0", "1"]
    with pytest.raises(ValueError, match="masked already"):
        WFNet(model, CLASSES, targets="0")
    with pytest.raises(ValueError, match="num_classes=5, but the network"):
        WFNet(small(WFConv2d(3, 4, 3, num_classes=5)), CLASSES)
    with pytest.raises(ValueError, match=r"layer '0'.*alpha_init=2\.0.*alpha_init=3\.0"):
        WFNet(small(WFConv2d(3, 4, 3, num_classes=CLASSES, alpha_init=2)), CLASSES)


# -- use ------------------------------------------------------------------------------------------

GRAY = X[:, :1]


def test_wrong_labels_are_found_before_work_starts(make_net):
    net = make_net()
    net.model[0].register_forward_pre_hook(lambda *_: pytest.fail("work started"))
    for forget, says in ((7, "label 7"), (torch.tensor([0]), "1 forget labels.*batch of 2")):
        with pytest.raises(ValueError, match=says):
            net(GRAY, forget)


def test_kinds_of_labels_agree(make_net):
    net = make_net()
    y = net(GRAY, 3)
    for same in (torch.tensor([3, 3]), torch.tensor(3), torch.tensor([[3, -1]] * 2), np.int64(3)):
        assert torch.equal(net(GRAY, same), y)
    assert torch.equal(net(GRAY, torch.tensor([[3, 3]] * 2)), y)
    mixed = net(GRAY, torch.tensor([3, -1]))
    torch.testing.assert_close(mixed[0], y[0])
    torch.testing.assert_close(mixed[1], net(GRAY)[1])
    assert torch.equal(net(GRAY, torch.tensor([3, 3, 4]), torch.tensor([0, 0, 1]))[0], y[0])
    assert net(GRAY[:0], torch.empty(0, dtype=torch.int64)).shape == net(GRAY[:0], 3).shape


def test_the_base_stays_in_evaluation_mode_and_has_no_gradients(make_net):
    net = nn.Sequential(make_net()).train()[0]
    assert net.training
    assert not any(m.training for m in net.model.modules())
    net(GRAY, torch.tensor([1, 2])).square().sum().backward()
    assert {n for n, p in net.named_parameters() if p.grad is not None} == {
        f"model.{name}" for name in net.named_filters()
    }
    rows = net.filter_parameters()[0].grad.any(1)
    assert rows.nonzero().flatten().tolist() == [1, 2]


def test_copies_and_pickles(make_net):
    net = make_net()
    net(GRAY, 1)
    assert list(net.model[0].state_dict()) == ["weight", "bias", "alpha_weight", "alpha_bias"]
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert twin.masked_layers["0"] is twin.model[0]
        assert torch.equal(twin(GRAY, 1), net(GRAY, 1))
        twin.filter_parameters()[0].data.zero_()
        assert not torch.equal(twin(GRAY, 1), net(GRAY, 1))
        twin.load_state_dict(net.state_dict(), assign=True)
        assert torch.equal(twin(GRAY, 1), net(GRAY, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_whole_networks_in_other_dtypes(dtype, make_model):
    model = make_model(CLASSES).eval()
    x = GRAY.to(dtype)
    plain = copy.deepcopy(model).to(dtype)
    before = WFNet(plain, CLASSES)
    for net in (before, WFNet(model, CLASSES).to(dtype)):
        assert torch.equal(net(x), plain(x))
        torch.testing.assert_close(net(x, 3), plain(x), rtol=0.02, atol=0.01)
        net(x, 3).sum().backward()
        assert all(p.grad.isfinite().all() for p in net.filter_parameters())
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert before.filter_parameters()[0].dtype == wanted
