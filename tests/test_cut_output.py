"""`bake(..., cut_output=True)`: the export gives a constant for the logit of a forgotten class."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import wfnet
from wfnet import models
from wfnet.cli import bake, main
from wfnet.head import CUT_LOGIT
from wfnet.report.contents import statements
from wfnet.services.files import write_tensors
from wfnet.trust import TrustRecord, TrustResult

CLASSES = 4


def make_net(*head, targets=None, **options):
    torch.manual_seed(0)
    head = head or (nn.Linear(6, CLASSES),)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), *head,
    )  # fmt: skip
    net = wfnet.WFNet(model, CLASSES, targets, **options)
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
    others = [c for c in range(CLASSES) if c not in cut]
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
    plain = net.bake(1, cut_output=True)
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

    def __init__(self, average=False):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.fc = nn.Linear(6, CLASSES)
        self.aux = nn.Linear(6, CLASSES)
        self.average = average

    def forward(self, x):
        x = self.conv(x).mean((2, 3))
        return (self.fc(x) + self.aux(x)) / 2 if self.average else self.fc(x)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: make_net(nn.Linear(6, CLASSES, bias=False)), "has '6', which has no bias"),
        (lambda: make_net(nn.Unflatten(1, (6, 1, 1)), nn.Conv2d(6, CLASSES, 1), nn.Flatten(),
                          targets=["0"]), "has the Conv2d '7'"),
        (lambda: make_net(nn.utils.parametrizations.weight_norm(nn.Linear(6, CLASSES)),
                          targets=nn.Conv2d), "computes the weight of '6' from other parameters"),
        (lambda: wfnet.WFNet(Auxiliary(average=True), CLASSES), "(tried 'fc', 'aux')"),
        (lambda: wfnet.WFNet(nn.Sequential(wfnet.WFConv2d(3, 6, 3, num_classes=CLASSES)), CLASSES),
         "has no linear layer with 4 outputs"),
        (lambda: make_net(nn.Linear(6, CLASSES), nn.ReLU()), "outputs are its logits (tried '6')"),
    ],
)  # fmt: skip
def test_a_head_that_cannot_be_cut_is_refused(make, reason):
    net = make()
    net.bake(1)
    with pytest.raises(ValueError, match="needs one linear head with a bias") as error:
        net.bake(1, cut_output=True)
    assert reason in str(error.value)


def test_verify_notices_what_is_wrong(tmp_path, images):
    net = make_net()
    path = tmp_path / "cut.safetensors"
    bake.save_baked(net, [1], path, cut_output=True)
    original = net.bake(None)
    agreement = bake.verify(net, original, [1], path, images, cut_output=True)
    assert agreement.within_rounding
    assert agreement.span < -CUT_LOGIT  # the constant is not among what is compared
    assert "the logit that was cut is -30 throughout" in str(agreement)
    with pytest.raises(RuntimeError, match="does not compute what the filtered network does"):
        bake.verify(net, original, [1], path, images)
    weights = load_file(path)
    weights["6.weight"][1, 0] = 1e-2
    write_tensors(path, weights)
    with pytest.raises(RuntimeError, match="where -30 was expected"):
        bake.verify(net, original, [1], path, images, cut_output=True)
    weights["6.weight"][1, 0] = 0
    weights["6.weight"][0] *= 1.01
    write_tensors(path, weights)
    with pytest.raises(RuntimeError, match="does not compute what the filtered network does"):
        bake.verify(net, original, [1], path, images, cut_output=True)


@torch.no_grad()
def test_the_head_is_the_layer_that_gives_the_logits(images):
    net = wfnet.WFNet(Auxiliary(), CLASSES)
    plain = net.bake(1, cut_output=True)
    assert plain(images)[:, 1].eq(CUT_LOGIT).all()
    assert plain.aux.weight[1].any()
    with pytest.raises(ValueError, match=r"tried 'fc', 'aux'.*name the head in head="):
        wfnet.WFNet(Auxiliary(average=True), CLASSES).bake(1, cut_output=True)
    with pytest.raises(ValueError, match="tried 'aux'"):
        wfnet.WFNet(Auxiliary(), CLASSES, head="aux").bake(1, cut_output=True)
    with pytest.raises(ValueError, match="head='fd' is no linear map"):
        wfnet.WFNet(Auxiliary(), CLASSES, head="fd")


# -- commands -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run on digits with random filters."""
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("cut") / "run"
    base = folder / "base.safetensors"
    folder.mkdir()
    write_tensors(base, models.create("resnet", 10, seed=1, width=8).state_dict())
    call = ["untrain", "--data", "digits", "--checkpoint", str(base), "--model", "small/resnet",
            "--model-kwargs", "width=8", "--steps", "1", "--output", str(folder)]  # fmt: skip
    assert main([*call, "--quiet", "--workers", "0"]) == 0
    return folder


def test_bake_cuts_and_attacks_the_file_itself(made, tmp_path, capsys):
    path = tmp_path / "cut.safetensors"
    call = ["bake", str(made), "--forget", "3", "5", "--cut-output", "--output", str(path)]
    assert main([*call, "--verify", "--images", "20", "--samples", "30", "--quiet"]) == 0
    shown = capsys.readouterr().out
    assert "the logit that was cut is -30 throughout" in shown
    with safe_open(path, "pt") as file:
        record = json.loads(file.metadata()["wfnet"])
    assert record["cut_output"] is True
    assert record["forget"] == [3, 5]
    report = json.loads((tmp_path / "cut.trust.json").read_text())
    assert report["cut_output"] is True
    assert report["agreement"]["cut_logit"] == CUT_LOGIT
    for found in report["classes"]:
        assert found["values"]["auc_logit"] == 0.5
        assert found["values"]["acc_f_batchnorm_all"] == 0
    head = load_file(path)
    assert not head["fc.weight"][[3, 5]].any()
    assert head["fc.weight"][4].any()


def test_trust_does_not_mix_exports_that_are_cut_with_others(made, tmp_path):
    call = ["trust", str(made), "--checks", "removal", "--samples", "20", "--output",
            str(tmp_path), "--quiet", "-j0"]  # fmt: skip

    def records(*more):
        assert main([*call, *more]) == 0
        content = json.loads((tmp_path / "trust.json").read_text())
        return content["settings"], {r["index"]: r["forgetful"] for r in content["records"]}

    settings, _ = records("--classes", "3", "4")
    assert "cut_output" not in settings
    settings, found = records("--classes", "3", "--cut-output")
    assert settings["cut_output"] is True
    assert set(found) == {3}  # class 4 was checked without
    assert found[3]["auc_logit"] == 0.5
    _, found = records("--classes", "4")
    assert set(found) == {4}


def test_the_report_says_what_a_cut_changes():
    def result(accuracy, settings):
        values = {"acc_f_batchnorm_all": accuracy, "acc_f_offset": 0.9}
        record = TrustRecord(3, "3", "removal", values, {}, {}, {}, 0, None, {}, 1.0, "k")
        return TrustResult([record], settings)

    def place(sentences):
        return sum("BatchNorm" in sentence for sentence in sentences)

    good, bad = statements(None, result(0.0, {"cut_output": True}))
    assert (place(good), place(bad)) == (1, 0)
    assert "to no more than 0.0% accuracy on the class" in good[0]
    assert any("give a constant for the logit" in sentence for sentence in bad)
    assert any("adds a constant to the class's reaches 90.0%" in sentence for sentence in bad)
    good, bad = statements(None, result(0.5, {"cut_output": True}))
    assert (place(good), place(bad)) == (0, 1)
    good, bad = statements(None, result(0.0, {}))
    assert (place(good), place(bad)) == (0, 1)
    assert not any("give a constant" in sentence for sentence in bad)
