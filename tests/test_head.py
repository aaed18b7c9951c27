"""Which layer is taken as the classifier's head, and what cutting a class from it does."""

import pytest
import timm
import torch
from torch import nn

from wfnet import WFNet
from wfnet.head import CUT_LOGIT, find_head

CLASSES = 10
FEW = 4


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        ([nn.Flatten(), nn.Linear(192, 1)], "one logit for two classes needs two"),
        ([nn.Flatten()], "num_classes=10 does not match Sequential.*only computes features"),
        ([nn.Flatten(), nn.Linear(144, 7)], "'2' has 7 outputs: pass num_classes=7"),
    ],
)
def test_networks_without_a_fitting_head(layers, says):
    with pytest.raises(ValueError, match=says):
        WFNet(nn.Sequential(nn.Conv2d(3, 4, 3), *layers), CLASSES)
    with pytest.raises(ValueError, match="has no classifier, it only computes features"):
        WFNet(timm.create_model("resnet10t", num_classes=0), 512)


def test_outputs_that_are_not_logits_are_refused(images):
    net = WFNet(Auxiliary(lambda features, main, auxiliary: (features, main)), FEW)
    with pytest.raises(ValueError, match=r"returns a tensor \[5, 6\] where 4 logits"):
        net(images, forget=1)
    named = WFNet(Auxiliary(lambda features, main, _: {"x": features, "logits": main}), FEW)
    assert named(images, forget=1).shape == (5, FEW)


def test_a_projection_behind_the_head_is_not_the_head():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.ReLU(), nn.Linear(4, CLASSES))
    model.projection = nn.Linear(4, 128)
    assert find_head(model, CLASSES)[0] == "3"


# -- the class cut from the head ------------------------------------------------------------------


def make_net(*head, targets=None, **options):
    torch.manual_seed(0)
    head = head or (nn.Linear(6, FEW),)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        *head,
    )
    net = WFNet(model, FEW, targets, **options)
    with torch.no_grad():
        for alpha in net.filter_parameters():
            alpha.copy_(2 * torch.randn(alpha.shape))
    return net


@pytest.fixture
def images():
    return torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("targets", [None, ["0", "6"]], ids=["", "masked head"])
@pytest.mark.parametrize(("cut", "prune_below"), [([1], 0.3), ([2, 1], 0.0)])
@torch.no_grad()
def test_other_logits_stay_and_the_class_is_a_constant(images, cut, prune_below, targets):
    net = make_net(targets=targets)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    others = [c for c in range(FEW) if c not in cut]
    found = net.bake(cut, prune_below, cut_output=True)(images)
    assert torch.equal(found[:, others], net.bake(cut, prune_below)(images)[:, others])
    assert found[:, cut].eq(CUT_LOGIT).all()
    assert not set(found.argmax(1).tolist()) & set(cut)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    with pytest.raises(ValueError, match="has no class to cut from the head: name one in forget="):
        net.bake(None, cut_output=True)


class Auxiliary(nn.Module):
    """The auxiliary head is registered last; ``join`` makes the outputs."""

    def __init__(self, join=lambda features, main, auxiliary: main):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.fc = nn.Linear(6, FEW)
        self.aux = nn.Linear(6, FEW)
        self.join = join

    def forward(self, x):
        x = self.conv(x).mean((2, 3))
        return self.join(x, self.fc(x), self.aux(x))


@pytest.mark.parametrize(
    ("make", "tried"),
    [
        (lambda: make_net(nn.Linear(6, FEW, bias=False)), "none"),
        (lambda: make_net(nn.Unflatten(1, (6, 1, 1)), nn.Conv2d(6, FEW, 1), nn.Flatten()), "none"),
        (
            lambda: make_net(
                nn.utils.parametrizations.weight_norm(nn.Linear(6, FEW)), targets=nn.Conv2d
            ),
            "none",
        ),
        (lambda: WFNet(Auxiliary(lambda _, main, more: (main + more) / 2), FEW), "'aux', 'fc'"),
        (lambda: make_net(nn.Linear(6, FEW), nn.ReLU()), "'6'"),
        (lambda: WFNet(Auxiliary(), FEW, head="aux"), "'aux'"),
    ],
)
@torch.no_grad()
def test_a_head_that_cannot_be_cut_is_refused(make, tried):
    net = make()
    net.bake(1)
    with pytest.raises(ValueError, match=rf"needs one linear head with a bias.*tried {tried}\)"):
        net.bake(1, cut_output=True)


@torch.no_grad()
def test_the_head_is_the_layer_that_gives_the_logits(images):
    net = WFNet(Auxiliary(), FEW)
    plain = net.bake(1, cut_output=True)
    assert plain(images)[:, 1].eq(CUT_LOGIT).all()
    assert plain.aux.weight[1].any()
    with pytest.raises(ValueError, match="head='fd' is no linear map"):
        WFNet(Auxiliary(), FEW, head="fd")
