"""Which layer is taken as the classifier's head, and what cutting a class from it does."""

import pytest
import timm
import torch
from torch import nn

from wfnet import WFConv2d, WFNet
from wfnet.head import CUT_LOGIT, find_head

CLASSES = 10
FEW = 4


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        ([nn.Flatten(), nn.Linear(192, 1)], "one logit for two classes needs two"),
        ([nn.Flatten()], r"none of its layers has 10 outputs.*if it only computes features"),
        ([nn.Flatten(), nn.Linear(144, 7)], r"'2' with 7: pass num_classes=7 if"),
    ],
)
def test_networks_without_a_fitting_head(layers, says):
    with pytest.raises(ValueError, match=says):
        WFNet(nn.Sequential(nn.Conv2d(3, 4, 3), *layers), CLASSES)


@pytest.mark.parametrize("num_classes", [CLASSES, 512])
def test_a_network_without_its_classifier_is_refused(num_classes):
    features = timm.create_model("resnet10t", num_classes=0)
    with pytest.raises(ValueError, match="has no classifier, it only computes features"):
        WFNet(features, num_classes)


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


@pytest.mark.parametrize("forget", [1, [0, 2], [3, -1], torch.tensor([2, 1])])
@pytest.mark.parametrize("prune_below", [0.0, 0.3])
@torch.no_grad()
def test_other_logits_stay_and_the_class_is_a_constant(images, forget, prune_below):
    net = make_net()
    cut = [c for c in torch.as_tensor(forget).reshape(-1).tolist() if c != -1]
    others = [c for c in range(FEW) if c not in cut]
    found = net.bake(forget, prune_below, cut_output=True)(images)
    assert torch.equal(found[:, others], net.bake(forget, prune_below)(images)[:, others])
    assert found[:, cut].eq(CUT_LOGIT).all()
    if not prune_below:
        labels = torch.tensor(cut).expand(len(images), -1)
        torch.testing.assert_close(found[:, others], net(images, forget=labels)[:, others])
    assert not set(found.argmax(1).tolist()) & set(cut)


@torch.no_grad()
def test_no_features_reach_the_logit(images):
    plain = make_net().bake(1, cut_output=True)
    assert not plain[6].weight[1].any()
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
    plain[3].weight.mul_(1000)
    assert plain(images)[:, 1].eq(CUT_LOGIT).all()


def test_only_the_export_is_cut_and_it_can_be_trained():
    net = make_net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    plain = net.bake(1, prune_below=0.5, cut_output=True)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(p.requires_grad and p.is_leaf for p in plain.parameters())
    assert net.bake(1)[6].weight[1].any()


@torch.no_grad()
def test_a_masked_head_is_cut_as_well(images):
    net = make_net(targets=["0", "6"])
    assert "6" in net.masked_layers
    found = net.bake(2, cut_output=True)(images)
    assert found[:, 2].eq(CUT_LOGIT).all()
    torch.testing.assert_close(found[:, :2], net(images, forget=2)[:, :2])


def test_without_a_class_there_is_nothing_to_cut():
    with pytest.raises(ValueError, match="has no class to cut from the head: name one in forget="):
        make_net().bake(None, cut_output=True)


class Auxiliary(nn.Module):
    """The auxiliary head is registered last and serves training only."""

    def __init__(self, join=lambda features, main, auxiliary: main):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.fc = nn.Linear(6, FEW)
        self.aux = nn.Linear(6, FEW)
        self.join = join

    def forward(self, x):
        x = self.conv(x).mean((2, 3))
        return self.join(x, self.fc(x), self.aux(x))


def averaged():
    return WFNet(Auxiliary(lambda features, main, auxiliary: (main + auxiliary) / 2), FEW)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: make_net(nn.Linear(6, FEW, bias=False)), "has '6', which has no bias"),
        (
            lambda: make_net(
                nn.Unflatten(1, (6, 1, 1)), nn.Conv2d(6, FEW, 1), nn.Flatten(), targets=["0"]
            ),
            "has the Conv2d '7'",
        ),
        (
            lambda: make_net(
                nn.utils.parametrizations.weight_norm(nn.Linear(6, FEW)), targets=nn.Conv2d
            ),
            "computes the weight of '6' from other parameters",
        ),
        (averaged, "(tried 'fc', 'aux')"),
        (
            lambda: WFNet(Auxiliary(lambda features, main, auxiliary: main + auxiliary), FEW),
            "computes with the outputs of 'aux': once that is cut, the logits are",
        ),
        (
            lambda: WFNet(Auxiliary(lambda features, main, auxiliary: main.clamp(-9, 9)), FEW),
            "the logits are -9 to -9 instead of -30",
        ),
        (
            lambda: WFNet(nn.Sequential(WFConv2d(3, 6, 3, num_classes=FEW)), FEW),
            "has no linear layer with 4 outputs",
        ),
        (lambda: make_net(nn.Linear(6, FEW), nn.ReLU()), "outputs are its logits (tried '6')"),
    ],
)
def test_a_head_that_cannot_be_cut_is_refused(make, reason):
    net = make()
    net.bake(1)
    with pytest.raises(ValueError, match="needs one linear head with a bias") as error:
        net.bake(1, cut_output=True)
    assert reason in str(error.value)


@torch.no_grad()
def test_the_head_is_the_layer_that_gives_the_logits(images):
    net = WFNet(Auxiliary(), FEW)
    plain = net.bake(1, cut_output=True)
    assert plain(images)[:, 1].eq(CUT_LOGIT).all()
    assert plain.aux.weight[1].any()
    with pytest.raises(ValueError, match=r"tried 'fc', 'aux'.*name the head in head="):
        averaged().bake(1, cut_output=True)
    with pytest.raises(ValueError, match="tried 'aux'"):
        WFNet(Auxiliary(), FEW, head="aux").bake(1, cut_output=True)
    with pytest.raises(ValueError, match="head='fd' is no linear map"):
        WFNet(Auxiliary(), FEW, head="fd")
