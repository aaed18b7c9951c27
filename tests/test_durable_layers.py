"""Durable layers: fresh rows, statistics per row, mixed rows, exact zeros, gradients, bake."""

import copy
import json

import pytest
import torch
from torch import nn

import wfnet
from wfnet import durable_layers, models
from wfnet.durable_layers import hard_gate, soft_gate

CLASSES = 5


def make_net(kind="resnet", seed=0, moved=True, **options):
    torch.manual_seed(seed)
    model = models.create(kind, CLASSES, seed=seed, **({} if kind == "vit" else {"width": 8}))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    net = wfnet.WFNet(model.double().eval(), CLASSES, gate="durable", **options)
    if moved:
        for name, table in {**net.named_filters(), **net.named_statistics()}.items():
            with torch.no_grad():
                table.add_(2 * torch.randn_like(table))
                if "var" in name:
                    table.abs_()
    return net


def images(count=4):
    return torch.randn(count, 1, 32, 32, generator=torch.Generator().manual_seed(5)).double()


@pytest.mark.parametrize("kind", ["resnet", "vit"])
@torch.no_grad()
def test_a_fresh_row_is_the_original_network_bit_by_bit(kind):
    net = make_net(kind, moved=False)
    forget = torch.tensor([0, -1, 4, 2])
    assert torch.equal(net(images(), forget), net(images(), None))
    assert torch.equal(net.bake(None)(images()), net(images(), None))


def test_options_of_other_gates_are_refused():
    model = models.create("vgg", CLASSES, width=8)
    with pytest.raises(ValueError, match="gate='hard' is none of sigmoid, durable"):
        wfnet.WFNet(model, CLASSES, gate="hard")
    with pytest.raises(ValueError, match="soft_init is the start of durable gates"):
        wfnet.WFNet(model, CLASSES, soft_init=1.0)


@pytest.mark.parametrize("kind", ["resnet", "vgg", "vit"])
@torch.no_grad()
def test_mixed_rows_equal_baked_networks(kind):
    net = make_net(kind)
    x = images(2)
    forget = torch.tensor([[3, -1], [-1, -1], [0, 3], [2, 2]])
    source = torch.tensor([0, 1, 1, 0])
    found = net(x, forget, source)
    for sample, (labels, image) in enumerate(zip([[3], None, [0, 3], [2]], source, strict=True)):
        truth = net.bake(labels)(x[image : image + 1])
        torch.testing.assert_close(found[sample : sample + 1], truth, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_rows_out_of_range_give_nan_and_never_a_wrong_row():
    for table in make_net().masked_layers["bn1"].tables(torch.tensor([[CLASSES], [-2], [1]])):
        assert table[:2].isnan().all()
        assert table[2].isfinite().all()


def naive(norm, x, rows, gates, shift, factor):
    """The formula of design section 7, row by row; of other images than the base's, corrected."""
    y = torch.empty_like(x)
    for group, row in enumerate(rows.unique().tolist()):
        own = x[rows == row]
        mean = own.mean((0, 2, 3), keepdim=True)
        var = own.var((0, 2, 3), unbiased=False, keepdim=True)
        shape = (1, -1, 1, 1)
        mean = mean + shift.reshape(shape)
        var = (var + norm.eps) * factor.reshape(shape) - norm.eps
        normal = (own - mean) / (var + norm.eps).sqrt()
        plain = norm.weight.reshape(shape) * normal + norm.bias.reshape(shape)
        y[rows == row] = gates[group].reshape(shape) * plain
    return y


@pytest.mark.parametrize("corrected", [False, True])
def test_moments_of_groups_and_gradients_equal_the_formula(corrected):
    net = make_net()
    norm = net.masked_layers["bn1"]
    rows = torch.tensor([3, 0, 3, 3, 0])
    x = torch.randn(5, 8, 4, 3, dtype=torch.double, requires_grad=True)
    noise = {"bn1": torch.rand(2, 8, dtype=torch.double)}
    correction = torch.zeros(8).double(), torch.ones(8).double()
    if corrected:
        correction = torch.randn(8).double(), 0.5 + torch.rand(8).double()
        net.gate_mode.from_base["bn1"] = correction
    with net.gate_mode.grouped(rows, noise) as labels, wfnet.forgetting(rows):
        found = norm(x)
    assert labels.tolist() == [0, 3]
    gates = hard_gate(norm.alpha_hard[labels], noise["bn1"]) * soft_gate(norm.alpha_soft[labels])
    truth = naive(norm, x, rows, gates, *correction)
    torch.testing.assert_close(found, truth)
    leaves = (x, norm.alpha_hard, norm.alpha_soft)
    weight = torch.randn_like(truth)
    for a, b in zip(
        torch.autograd.grad((found * weight).sum(), leaves),
        torch.autograd.grad((truth * weight).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    assert net.gate_mode.groups is None


def test_hard_gates_are_exact_zeros_and_ones_without_noise():
    alpha = torch.tensor([-1.0, -1e-6, 1e-6, 4.0], requires_grad=True)
    assert hard_gate(alpha).tolist() == [0, 0, 1, 1]
    noisy = hard_gate(alpha, torch.tensor([0.5, 0.5, 0.5, 1 - 1e-6]))
    assert noisy[3] == 1
    assert 0 < noisy[0] < noisy[2] < 1
    for start in (3.0, -1.0):
        assert soft_gate(torch.full((17,), start), start).tolist() == [1] * 17


@torch.no_grad()
def test_soft_gates_start_where_they_are_told_and_are_saved_with_it(tmp_path):
    for start in (3.0, -1.0):
        vit = make_net("vit", moved=False, **({} if start == 3 else {"soft_init": start}))
        layer = next(iter(vit.masked_layers.values()))
        assert layer.filter_starts() == {"alpha_hard": layer.alpha_init, "alpha_soft": start}
        assert layer.alpha_soft.unique().tolist() == [start]
    # An earlier version wrote null for its defaults, among which linear maps had -1.
    vit.save_pretrained(tmp_path)
    path = tmp_path / "wf_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"soft_init": None}))
    assert wfnet.WFNet.from_pretrained(tmp_path, vit.bake(None)).soft_init == -1
    net = make_net("vit", moved=False, soft_init=0.5)
    assert torch.equal(net(images(), 1), net(images(), None))
    for saved in (make_net("vit", soft_init=0.5), make_net("resnet")):
        saved.save_pretrained(tmp_path)
        again = wfnet.WFNet.from_pretrained(tmp_path, saved.bake(None))
        assert again.gate == "durable"
        assert torch.equal(again(images(), 1), saved(images(), 1))
    assert "soft_init" not in vars(net.bake(1).get_submodule("blocks.0.mlp.fc1"))


@torch.no_grad()
def test_closed_channels_leave_nothing_in_the_export():
    net = make_net("resnet")
    before = copy.deepcopy(net.state_dict())
    layer = net.masked_layers["layer2.0.bn1"]
    layer.alpha_hard[2, :3] = -1
    layer.alpha_hard[2, 3:] = 1
    plain = net.bake(2)
    norm, conv = plain.layer2[0].bn1, plain.layer2[0].conv1
    assert conv.weight.flatten(1).abs().sum(1).eq(0).tolist() == [True] * 3 + [False] * 13
    assert not norm.weight[:3].any()
    assert not norm.bias[:3].any()
    assert norm.running_var[:3].eq(1).all()
    torch.testing.assert_close(plain(images()), net(images(), 2), rtol=1e-9, atol=1e-9)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items() if "bn1.al" not in k)


@torch.no_grad()
def test_a_convolution_that_also_feeds_a_skip_keeps_its_weights():
    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
            self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
            self.head = nn.Linear(4, CLASSES)

        def forward(self, x):
            x = self.conv(x)
            x = x + self.bn2(self.conv2(self.bn(x).relu()))
            return self.head(x.mean((2, 3)))

    net = wfnet.WFNet(Skips(), CLASSES, gate="durable")
    for layer in net.masked_layers.values():
        layer.alpha_hard[1, :2] = -1
    plain = net.bake(1)
    assert plain.conv.weight.flatten(1).any(1).all()
    assert not plain.conv2.weight[:2].any()
    torch.testing.assert_close(plain(images(2).float()), net(images(2).float(), 1))


def test_timm_batch_norm_with_activation():
    timm = pytest.importorskip("timm")
    model = timm.create_model("tf_efficientnet_lite0", num_classes=CLASSES).eval()
    net = wfnet.WFNet(model, CLASSES, gate="durable")
    kinds = {type(layer) for layer in net.masked_layers.values()}
    assert kinds == {durable_layers.DurableBatchNormAct2d}
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        for layer in net.masked_layers.values():
            layer.alpha_hard[1, ::3] = -1
            layer.alpha_soft[1] += torch.randn(layer.alpha_soft.shape[1])
        torch.testing.assert_close(net.bake(1)(x), net(x, 1), rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_shifts_of_means_add_up_to_less_under_several_rows():
    layer = make_net().masked_layers["bn1"]
    layer.row_mean += torch.randn_like(layer.row_mean)
    shift = layer.row_mean - layer.running_mean
    for rows, wanted in (
        ([1, -1], shift[1]),
        ([1, 1], shift[1]),
        ([1, 2], 0.8 * shift[1:3].sum(0)),
    ):
        mean, _ = layer.row_statistics(torch.tensor([rows]))
        torch.testing.assert_close(mean[0] - layer.running_mean, wanted)


@torch.no_grad()
def test_means_under_pairs_are_read_from_their_table(tmp_path):
    net = make_net()
    layer = net.masked_layers["bn1"]
    alone = net(images(), torch.tensor([0, 1, 2, -1]))
    for other in net.masked_layers.values():
        other.start_pairs()
    every = torch.combinations(torch.arange(CLASSES))
    assert torch.equal(layer.pair_index(every.flip(1)), torch.arange(len(every)))
    both = torch.tensor([[1, 2]]).expand(4, 2)
    torch.testing.assert_close(net(images(), both), make_net()(images(), both))

    layer.row_pair_mean += torch.randn_like(layer.row_pair_mean)
    shift, base = layer.row_mean - layer.running_mean, layer.running_mean
    of_pair = {frozenset(p): layer.row_pair_mean[i] - base for i, p in enumerate(every.tolist())}
    three = of_pair[frozenset((1, 2))] + of_pair[frozenset((1, 4))] + of_pair[frozenset((2, 4))]
    for rows, wanted in (
        ([1, -1, -1], shift[1]),
        ([2, 1, 2], of_pair[frozenset((1, 2))]),
        ([4, -1, 2], of_pair[frozenset((2, 4))]),
        ([1, 2, 4], three - shift[[1, 2, 4]].sum(0)),
    ):
        mean, _ = layer.row_statistics(torch.tensor([rows]))
        torch.testing.assert_close(mean[0] - base, wanted)
    assert layer.row_statistics(torch.tensor([[1, CLASSES]]))[0].isnan().all()
    assert torch.equal(net(images(), torch.tensor([0, 1, 2, -1])), alone)

    pairs = torch.tensor([[1, 2], [0, -1], [3, 4], [2, 0]])
    net.save_pretrained(tmp_path)
    loaded = wfnet.WFNet.from_pretrained(tmp_path, net.bake(None))
    other = make_net(moved=False)
    other.load_state_dict(net.state_dict())
    for same in (loaded, other):
        assert torch.equal(same(images(), pairs), net(images(), pairs))
    torch.testing.assert_close(net.bake([1, 2])(images()), net(images(), both))


@torch.no_grad()
def test_pairs_of_some_rows_take_the_space_of_these_alone(tmp_path):
    """With rows that were not untrained a row is as it is alone."""
    net, fresh = make_net(), make_net(moved=False)
    untouched = fresh.named_filters() | fresh.named_statistics()
    for name, table in {**net.named_filters(), **net.named_statistics()}.items():
        table[[1, 4]] = untouched[name][[1, 4]]
    for layer in net.masked_layers.values():
        layer.start_pairs(torch.tensor([0, -1, 1, 2, -1]))
        layer.row_pair_mean += torch.randn_like(layer.row_pair_mean)
    assert layer.row_pair_mean.shape[0] == 3
    assert torch.equal(layer.pair_index(torch.tensor([[3, 2], [0, 1]])), torch.tensor([2, -1]))
    net.save_pretrained(tmp_path)
    loaded = wfnet.WFNet.from_pretrained(tmp_path, net.bake(None))
    other = make_net(moved=False)
    other.load_state_dict(net.state_dict())
    for pair, same in (([2, 1], [2, -1]), ([4, 3], [-1, 3]), ([1, 4], [-1, -1])):
        expected = net(images(), torch.tensor([same] * 4))
        for one in (net, loaded, other):
            torch.testing.assert_close(one(images(), torch.tensor([pair] * 4)), expected)
    both = torch.tensor([[2, 3]] * 4)
    assert torch.equal(loaded(images(), both), net(images(), both))
    torch.testing.assert_close(net.bake([3, 2])(images()), net(images(), both))
