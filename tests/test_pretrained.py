"""Filter checkpoints: what is written, what is refused, what survives an accident."""

import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import wfnet
from wfnet import pretrained
from wfnet.layers import LayerNames
from wfnet.pretrained import CONFIG_NAME, FILTERS_NAME


class Net(nn.Module):
    """Two names where one is the suffix of the other."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.block = nn.Sequential()
        self.block.conv = nn.Conv2d(4, 5, 3)
        self.head = nn.Linear(5, 10)

    def forward(self, x):
        return self.head(self.block(self.bn(self.conv(x)).relu()).mean((2, 3)))


X = torch.randn(2, 3, 8, 8)


def trained(**options):
    net = wfnet.WFNet(Net(), 10, **options)
    for parameter in net.filter_parameters():
        nn.init.normal_(parameter, 2, 1)
    return net


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"normalize_gate": False},
        {"alpha_init": 1.5, "filter_dtype": torch.float64},
        {"targets": "block.conv"},
        {"targets": LayerNames(["conv"])},  # a full name, no suffix
    ],
    ids=str,
)
def test_round_trip(tmp_path, options):
    net = trained(**options)
    net.save_pretrained(tmp_path)
    again = wfnet.WFNet.from_pretrained(tmp_path, Net())
    assert list(again.masked_layers) == list(net.masked_layers)
    assert sorted(os.listdir(tmp_path)) == [CONFIG_NAME, FILTERS_NAME]
    assert set(load_file(tmp_path / FILTERS_NAME)) == set(net.named_filters())
    for forget in (None, 3, torch.tensor([1, -1])):
        assert torch.equal(net(X, forget), again(X, forget))


def test_the_fingerprint_sees_weights_and_statistics_and_nothing_else(tmp_path):
    base = pretrained.fingerprint(Net())
    assert base == pretrained.fingerprint(wfnet.WFNet(Net(), 10).model)
    assert base == pretrained.fingerprint(Net().to(memory_format=torch.channels_last).eval())
    for change in (
        lambda m: m.head.bias.data.add_(1),
        lambda m: m.bn.running_mean.add_(1),
        lambda m: m.double(),
    ):
        model = Net()
        change(model)
        assert pretrained.fingerprint(model) != base
    model = Net()
    model.bn.num_batches_tracked += 1
    assert pretrained.fingerprint(model) == base


def test_another_base_is_refused(tmp_path):
    trained().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not the one these filters were trained on"):
        wfnet.WFNet.from_pretrained(tmp_path, Net(seed=1))
    with pytest.raises(ValueError, match="original dtype"):
        wfnet.WFNet.from_pretrained(tmp_path, Net().bfloat16())


def test_missing_files_are_named(tmp_path):
    trained().save_pretrained(tmp_path)
    for missing in (FILTERS_NAME, CONFIG_NAME):
        (tmp_path / missing).unlink()
        with pytest.raises(FileNotFoundError, match=missing):
            wfnet.WFNet.from_pretrained(tmp_path, Net())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda config: config | {"format": 2}, "has format 2, this version of wfnet reads 1"),
        (lambda config: config | {"targets": 5}, "targets must be a list of names; got 5"),
        (lambda config: config | {"filter_dtype": "int8"}, "filter_dtype is 'int8'"),
        (lambda config: [1], "is not a wfnet configuration"),
    ],
)
def test_a_changed_configuration_is_refused(tmp_path, change, says):
    trained().save_pretrained(tmp_path)
    path = tmp_path / CONFIG_NAME
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=says):
        wfnet.WFNet.from_pretrained(tmp_path, Net())
    path.write_text("")
    with pytest.raises(ValueError, match=r"wf_config\.json is damaged"):
        wfnet.WFNet.from_pretrained(tmp_path, Net())


# -- accidents ------------------------------------------------------------------------------------


def no_space(*_, **__):
    raise OSError(28, "No space left on device")


def test_a_save_that_stops_between_its_files_is_noticed(tmp_path, monkeypatch):
    wfnet.WFNet(Net(), 10).save_pretrained(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(pretrained, "write_json", no_space)
        with pytest.raises(OSError, match="No space left"):
            trained(normalize_gate=False).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"not written together.*metadata"):
        wfnet.WFNet.from_pretrained(tmp_path, Net())
    with safe_open(tmp_path / FILTERS_NAME, "pt") as file:
        (tmp_path / CONFIG_NAME).write_text(file.metadata()["wf_config"])
    assert not wfnet.WFNet.from_pretrained(tmp_path, Net()).normalize_gate


def test_a_flipped_bit_never_changes_the_filters(tmp_path):
    net = trained()
    net.save_pretrained(tmp_path)
    path = tmp_path / FILTERS_NAME
    content = path.read_bytes()
    bits = 8 * len(content)
    for at in range(0, bits, bits // 15):
        damaged = bytearray(content)
        damaged[at // 8] ^= 1 << at % 8
        path.write_bytes(damaged)
        try:
            again = wfnet.WFNet.from_pretrained(tmp_path, Net())
        except ValueError as error:
            assert FILTERS_NAME in str(error)  # noqa: PT017
        else:  # a flip in the name of an entry of the metadata
            assert all(map(torch.equal, again.filter_parameters(), net.filter_parameters()))
    path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match="truncated or not a safetensors file"):
        wfnet.WFNet.from_pretrained(tmp_path, Net())


def test_a_file_without_a_digest_loads(tmp_path):
    """As earlier versions wrote them."""
    net = trained()
    net.save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG_NAME).read_text())
    del config["filters_digest"]
    (tmp_path / CONFIG_NAME).write_text(json.dumps(config))
    save_file(load_file(tmp_path / FILTERS_NAME), tmp_path / FILTERS_NAME)
    assert torch.equal(wfnet.WFNet.from_pretrained(tmp_path, Net())(X, 3), net(X, 3))


def test_filters_of_another_network_are_refused(tmp_path):
    net = trained()
    net.save_pretrained(tmp_path)
    shapes = {name: p.detach()[:, :-1].clone() for name, p in net.named_filters().items()}
    for content, says in (
        ({"fc.weight": torch.zeros(2)}, r"does not fit.*is only in one"),
        (shapes, r"\[10, 3\], expected \[10, 4\]"),
    ):
        save_file(content, tmp_path / FILTERS_NAME)
        with pytest.raises(ValueError, match=says):
            wfnet.WFNet.from_pretrained(tmp_path, Net())


@pytest.mark.parametrize(
    ("table", "value", "says"),
    [
        ("alpha_soft", torch.nan, "has NaN in"),
        ("row_mean", torch.inf, "has infinite values in"),
        ("row_var", -0.5, "has negative variances in"),
    ],
)
def test_values_that_no_untraining_gives_are_refused(tmp_path, table, value, says):
    net = wfnet.WFNet(Net(), 10, gate="durable")
    tables = net.named_filters() | net.named_statistics()
    name = next(name for name in tables if name.endswith(table))
    tables[name].data[1, 0] = value
    net.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{says} '{name}'"):
        wfnet.WFNet.from_pretrained(tmp_path, Net())
