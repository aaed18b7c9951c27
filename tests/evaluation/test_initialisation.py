import copy

import pytest
import torch
from torch import nn

import wfnet
from wfnet.evaluation import reinitialise

K = 7


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_independent_of_weights(model, seed=0):
    """Two models of one architecture with other weights become the same, and finite."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in other.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)
    a, b = state(reinitialise(model, seed)), state(reinitialise(other, seed))
    assert a.keys() == b.keys() == model.state_dict().keys()
    for name in a:
        assert a[name].isfinite().all(), name
        assert torch.equal(a[name], b[name]), name


def test_reinitialise_a_convolutional_network(make_model):
    model = make_model()
    before = state(model)
    torch.manual_seed(7)
    random_state = torch.get_rng_state()
    new = reinitialise(model, seed=3)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert not any(module.training for module in new.modules())
    assert not torch.equal(new[0].weight, model[0].weight)
    assert torch.equal(new[1].running_mean, torch.zeros(6))
    assert torch.equal(new[1].running_var, torch.ones(6))
    assert torch.equal(new[1].weight, torch.ones(6))
    assert not torch.equal(new[0].weight, reinitialise(model, seed=4)[0].weight)
    assert_independent_of_weights(model)


def test_reinitialise_is_what_a_new_network_would_be():
    layer = nn.Linear(5, 3)
    torch.manual_seed(11)
    fresh = nn.Linear(5, 3)
    new = reinitialise(layer, seed=11)
    assert torch.equal(new.weight, fresh.weight)
    assert torch.equal(new.bias, fresh.bias)


def test_reinitialise_removes_filters(make_net):
    net = make_net()
    new = reinitialise(net)
    assert not any("alpha" in name for name in new.state_dict())
    assert not any(isinstance(m, wfnet.layers.MaskedLayer) for m in new.modules())
    assert all(
        torch.equal(t, state(reinitialise(net.bake(None)))[n]) for n, t in state(new).items()
    )
    with torch.no_grad():
        logits = new(torch.rand(2, 1, 8, 8))
    assert logits.shape == (2, K)


class Raw(nn.Module):
    """Parameters that no module resets."""

    def __init__(self):
        super().__init__()
        self.cls_token = nn.Parameter(torch.full((1, 1, 64), 9.0))
        self.layer_scale = nn.Parameter(torch.full((64, 1, 1), 9.0))
        self.temperature = nn.Parameter(torch.arange(1.0, 65.0))
        self.head = nn.Linear(64, 3)

    def forward(self, x):
        return self.head(x)


def test_reinitialise_raw_parameters(caplog):
    model = Raw()
    new = reinitialise(model)
    assert new.cls_token.std().item() == pytest.approx(0.02, rel=0.3)
    assert torch.equal(new.layer_scale, torch.full((64, 1, 1), 1e-6))
    assert not torch.equal(new.temperature, model.temperature)
    assert torch.equal(new.temperature.sort().values, model.temperature)
    assert "temperature" in caplog.text


def test_reinitialise_uses_the_model_s_own_initialisation():
    class Own(Raw):
        def init_weights(self, mode=""):
            nn.init.constant_(self.temperature, 2)
            nn.init.zeros_(self.head.bias)

    new = reinitialise(Own())
    assert torch.equal(new.temperature, torch.full((64,), 2.0))
    assert torch.equal(new.head.bias, torch.zeros(3))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet10t", {}),
        ("vit_tiny_patch16_224", {"img_size": 32, "depth": 2, "init_values": 1e-4}),
        ("swin_tiny_patch4_window7_224", {"depths": (1, 1), "num_heads": (2, 4), "embed_dim": 16,
                                          "img_size": 56}),
        ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}),
    ],
)  # fmt: skip
def test_reinitialise_timm_networks(name, options, caplog):
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, num_classes=5, **options)
    assert_independent_of_weights(model)
    assert caplog.text == ""


@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "mobilenet_v3_small"])
def test_reinitialise_torchvision_networks(name, caplog):
    models = pytest.importorskip("torchvision.models")
    assert_independent_of_weights(models.get_model(name, weights=None, num_classes=5))
    assert caplog.text == ""
