"""The command line on shards and with caches: the same run as on the folder they came from."""

import pytest
import torch
from image_files import pack_folder
from safetensors.torch import load_file

from wfnet import models
from wfnet.cli import main
from wfnet.services.files import write_tensors


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setattr("wfnet.report.figures.style.DPI", 30)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def untrain(tmp_path):
    """Untrains three steps and returns the filters."""
    base = tmp_path / "base.safetensors"
    write_tensors(base, models.create("resnet", 3, 3, seed=1, width=8).state_dict())

    def run(data, name, *options):
        call = "--model small/resnet --model-kwargs width=8 --img-size 32 -b 4 -M 2 --steps 3"
        arguments = [*call.split(), "--quiet", "--output", str(tmp_path / name)]
        arguments += ["--data-dir", str(data), "--checkpoint", str(base), *options]
        assert main(["untrain", *arguments]) == 0
        return load_file(tmp_path / name / "wf_model.safetensors")

    return run


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "options",
    [
        ("--cache", "host", "--workers", "0"),
        ("--cache", "device", "--workers", "1"),
        ("--cache", "disk", "--workers", "0"),
    ],
)
def test_caches_change_nothing(untrain, image_folder, options):
    plain = untrain(image_folder, "plain", "--workers", "0")
    assert same(plain, untrain(image_folder, "cached", *options))


def test_shards_change_nothing(untrain, image_folder, tmp_path, capsys):
    plain = untrain(image_folder, "plain", "--workers", "0")
    packed = pack_folder(image_folder, tmp_path / "packed")
    assert same(plain, untrain(packed, "shards", "--workers", "0", "--cache", "disk"))
    assert main(["evaluate", str(tmp_path / "shards"), "--no-figures", "--workers", "0"]) == 0
    assert "bee" in capsys.readouterr().out
