import copy

import pytest
import torch
from torch import nn

from wfnet.evaluation import reinitialise


def assert_independent_of_weights(model):
    """Two models of one architecture with other weights become the same, and finite."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in other.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)
    a, b = reinitialise(model).state_dict(), reinitialise(other).state_dict()
    assert a.keys() == model.state_dict().keys()
    for name, tensor in a.items():
        assert tensor.isfinite().all(), name
        assert torch.equal(tensor, b[name]), name


def test_a_filtered_network_without_its_filters(make_net, make_model):
    net, model = make_net(), make_model()
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    new, plain = reinitialise(net).state_dict(), reinitialise(model).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert new.keys() == plain.keys()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in new.items())
    assert torch.equal(new["1.running_var"], torch.ones(6))
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert_independent_of_weights(model)
    torch.manual_seed(11)
    assert torch.equal(nn.Linear(5, 3).weight, reinitialise(nn.Linear(5, 3), seed=11).weight)


class Raw(nn.Module):
    """Parameters that no module resets."""

    def __init__(self):
        super().__init__()
        self.cls_token = nn.Parameter(torch.full((1, 1, 64), 9.0))
        self.layer_scale = nn.Parameter(torch.full((64, 1, 1), 9.0))
        self.temperature = nn.Parameter(torch.arange(1.0, 65.0))
        self.head = nn.Linear(64, 3)


def test_raw_parameters_and_the_model_s_own_initialisation_last(caplog):
    model = Raw()
    new = reinitialise(model)
    assert new.cls_token.std().item() == pytest.approx(0.02, rel=0.3)
    assert torch.equal(new.layer_scale, torch.full((64, 1, 1), 1e-6))
    assert not torch.equal(new.temperature, model.temperature)
    assert torch.equal(new.temperature.sort().values, model.temperature)
    assert "temperature" in caplog.text

    class Own(Raw):
        def init_weights(self, mode=""):
            nn.init.constant_(self.temperature, 2)

    assert torch.equal(reinitialise(Own()).temperature, torch.full((64,), 2.0))


def test_timm_networks(caplog):
    timm = pytest.importorskip("timm")
    options = {"img_size": 32, "depth": 2, "init_values": 1e-4, "num_classes": 5}
    assert_independent_of_weights(timm.create_model("vit_tiny_patch16_224", **options))
    assert caplog.text == ""
