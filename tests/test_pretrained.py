"""Filter checkpoints: what is written, what is refused, what survives an accident."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import wfnet
from wfnet import pretrained
from wfnet.pretrained import CONFIG_NAME, FILTERS_NAME
from wfnet.services import files


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
        {"alpha_init": 1.5},
        {"filter_dtype": torch.float64},
        {"targets": "block.conv"},
        {"targets": nn.Conv2d},
    ],
    ids=str,
)
def test_round_trip(tmp_path, options):
    net = trained(**options)
    net.save_pretrained(tmp_path)
    again = wfnet.WFNet.from_pretrained(tmp_path, Net())
    assert list(again.masked_layers) == list(net.masked_layers)
    for forget in (None, 3, torch.tensor([1, -1])):
        assert torch.equal(net(X, forget), again(X, forget))


def test_names_in_a_checkpoint_are_full_names(tmp_path):
    model = Net()
    model.conv = wfnet.WFConv2d.from_conv(model.conv, 10)
    net = wfnet.WFNet(model, 10)  # masks `conv`, not `block.conv`
    assert list(net.masked_layers) == ["conv"]
    nn.init.normal_(net.filter_parameters()[0])
    net.save_pretrained(tmp_path)
    again = wfnet.WFNet.from_pretrained(tmp_path, Net())
    assert list(again.masked_layers) == ["conv"]
    assert torch.equal(net(X, 3), again(X, 3))
    assert torch.equal(net(X, 3), wfnet.WFNet.from_pretrained(tmp_path, model)(X, 3))


def test_only_filters_are_written(tmp_path):
    net = trained()
    net.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [CONFIG_NAME, FILTERS_NAME]
    assert set(load_file(tmp_path / FILTERS_NAME)) == set(net.named_filters())
    assert all(".alpha_" in name for name in net.named_filters())
    config = json.loads((tmp_path / CONFIG_NAME).read_text())
    assert config["targets"] == ["conv", "block.conv"]
    assert config["num_classes"] == 10


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


def test_a_module_with_extra_state_has_a_fingerprint():
    class Extra(Net):
        def get_extra_state(self):
            return {"step": 1}

    assert pretrained.fingerprint(Extra()) == pretrained.fingerprint(Net())


def test_another_base_is_refused(tmp_path):
    trained().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not the one these filters were trained on"):
        wfnet.WFNet.from_pretrained(tmp_path, Net(seed=1))
    with pytest.raises(ValueError, match="original dtype"):
        wfnet.WFNet.from_pretrained(tmp_path, Net().bfloat16())


@pytest.mark.parametrize("missing", [CONFIG_NAME, FILTERS_NAME])
def test_missing_files_are_named(tmp_path, missing):
    trained().save_pretrained(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(FileNotFoundError, match=missing):
        wfnet.WFNet.from_pretrained(tmp_path, Net())


@pytest.mark.parametrize("kept", [0, 4, 100, -1, -100])
def test_truncated_filters_are_refused(tmp_path, kept):
    trained().save_pretrained(tmp_path)
    path = tmp_path / FILTERS_NAME
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match="truncated or not a safetensors file"):
        wfnet.WFNet.from_pretrained(tmp_path, Net())


def test_foreign_filters_are_refused(tmp_path):
    trained().save_pretrained(tmp_path)
    save_file({"fc.weight": torch.zeros(2)}, tmp_path / FILTERS_NAME)
    with pytest.raises(ValueError, match=r"does not fit this network.*is only in one of them"):
        wfnet.WFNet.from_pretrained(tmp_path, Net())
    (tmp_path / FILTERS_NAME).write_bytes(b"PK\x03\x04 a zip file")
    with pytest.raises(ValueError, match="not a safetensors file"):
        wfnet.WFNet.from_pretrained(tmp_path, Net())


def test_filters_of_another_shape_are_refused(tmp_path):
    net = trained()
    net.save_pretrained(tmp_path)
    filters = {name: p.detach()[:, :-1].clone() for name, p in net.named_filters().items()}
    save_file(filters, tmp_path / FILTERS_NAME)
    with pytest.raises(ValueError, match=r"is \[10, 3\], expected \[10, 4\]"):
        wfnet.WFNet.from_pretrained(tmp_path, Net())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": 2}, "has format 2, this version of wfnet reads 1"),
        ({"targets": 5}, "targets must be a list of names; got 5"),
        ({"filter_dtype": "int8"}, "filter_dtype is 'int8'"),
        ({"num_classes": "ten"}, "not written together|num_classes"),
        ({"targets": ["conv"]}, "not written together"),
        ({"normalize_gate": False}, "not written together"),
    ],
)
def test_a_changed_configuration_is_refused(tmp_path, change, says):
    trained().save_pretrained(tmp_path)
    path = tmp_path / CONFIG_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=says):
        wfnet.WFNet.from_pretrained(tmp_path, Net())


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", '{"a": 1}', "\x00"])
def test_a_foreign_configuration_is_refused(tmp_path, text):
    trained().save_pretrained(tmp_path)
    (tmp_path / CONFIG_NAME).write_text(text)
    with pytest.raises(ValueError, match=r"wf_config\.json is (damaged|not a wfnet configuration)"):
        wfnet.WFNet.from_pretrained(tmp_path, Net())


def test_filters_without_the_copy_of_the_configuration_still_load(tmp_path):
    net = trained()
    net.save_pretrained(tmp_path)
    save_file({n: p.detach() for n, p in net.named_filters().items()}, tmp_path / FILTERS_NAME)
    assert torch.equal(wfnet.WFNet.from_pretrained(tmp_path, Net())(X, 1), net(X, 1))


# -- accidents ------------------------------------------------------------------------------------


def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(Path(folder).iterdir())}


def no_space(*_, **__):
    raise OSError(28, "No space left on device")


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def write(temporary):
        temporary.write_text("half of the n")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write_atomically(path, write)
    assert contents(tmp_path) == {"file": b"old"}


@pytest.mark.parametrize(
    ("owner", "where"),
    [(Path, "write_bytes"), (Path, "replace"), (files, "write_text")],
    ids=["filters", "their move", "configuration"],
)
def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch, owner, where):
    trained().save_pretrained(tmp_path)
    before, net = contents(tmp_path), trained()
    with monkeypatch.context() as patch:
        patch.setattr(owner, where, no_space)
        with pytest.raises(OSError, match="No space left"):
            net.save_pretrained(tmp_path)
    after = contents(tmp_path)
    assert set(after) == set(before)
    if where != "write_text":
        assert after == before
    wfnet.WFNet.from_pretrained(tmp_path, Net())


def test_a_full_disk_at_fsync(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        files.write_json(path, {})
    assert contents(tmp_path) == {"file": b"old"}


def test_a_save_that_stops_between_its_files_is_noticed(tmp_path, monkeypatch):
    trained().save_pretrained(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(pretrained, "write_json", no_space)
        with pytest.raises(OSError, match="No space left"):
            trained(normalize_gate=False).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"not written together.*metadata"):
        wfnet.WFNet.from_pretrained(tmp_path, Net())
    with safe_open(tmp_path / FILTERS_NAME, "pt") as file:
        (tmp_path / CONFIG_NAME).write_text(file.metadata()["wf_config"])
    assert not wfnet.WFNet.from_pretrained(tmp_path, Net()).normalize_gate


def test_written_files_have_ordinary_permissions(tmp_path):
    trained().save_pretrained(tmp_path / "new" / "folder")
    umask = os.umask(0)
    os.umask(umask)
    for path in (tmp_path / "new" / "folder").iterdir():
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize("bit", range(0, 8 * 700, 97))
def test_a_flipped_bit_never_changes_the_filters(tmp_path, bit):
    net = trained()
    net.save_pretrained(tmp_path)
    path = tmp_path / FILTERS_NAME
    data = bytearray(path.read_bytes())
    at = len(data) * 8 * bit // (8 * 700)
    data[at // 8] ^= 1 << at % 8
    path.write_bytes(data)
    try:
        again = wfnet.WFNet.from_pretrained(tmp_path, Net())
    except ValueError as error:
        assert FILTERS_NAME in str(error)  # noqa: PT017
    else:  # a flip in the name of an entry of the metadata
        assert all(map(torch.equal, again.filter_parameters(), net.filter_parameters()))


def test_filters_of_another_run_on_the_same_base_are_refused(tmp_path):
    for name, net in (("a", trained()), ("b", wfnet.WFNet(Net(), 10))):
        net.save_pretrained(tmp_path / name)
    (tmp_path / "a" / FILTERS_NAME).write_bytes((tmp_path / "b" / FILTERS_NAME).read_bytes())
    with pytest.raises(ValueError, match="not written together"):
        wfnet.WFNet.from_pretrained(tmp_path / "a", Net())


def test_filters_that_are_nan_are_refused(tmp_path):
    net = trained()
    with torch.no_grad():
        net.filter_parameters()[1][3] = torch.nan
    net.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has NaN in 'conv\.alpha|has NaN in 'block"):
        wfnet.WFNet.from_pretrained(tmp_path, Net())


@pytest.mark.parametrize(
    ("table", "value", "says"),
    [
        ("row_mean", torch.nan, "has NaN in"),
        ("row_mean", torch.inf, "has infinite values in"),
        ("row_var", torch.inf, "has infinite values in"),
        ("row_var", -0.5, "has negative variances in"),
    ],
)
def test_statistics_that_cannot_be_measured_are_refused(tmp_path, table, value, says):
    net = wfnet.WFNet(Net(), 10, gate="durable")
    name = next(name for name in net.named_statistics() if name.endswith(table))
    net.named_statistics()[name][1, 0] = value
    net.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{says} '{name}'"):
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
