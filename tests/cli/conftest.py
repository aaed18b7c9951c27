"""Runs of `wfnet untrain` that take a second, on the digits and on a folder of images."""

import shutil
from pathlib import Path

import pytest
import torch
from image_files import write_class_folders

import wfnet
from wfnet import models
from wfnet.cli import main
from wfnet.services.files import write_tensors

NETWORK = ["--model", "small/resnet", "--model-kwargs", "width=8", "--img-size", "32"]
QUICK = ["-b", "4", "-M", "2", "--workers", "0", "--seed", "3", "--device", "cpu"]


@pytest.fixture(scope="session")
def network_options():
    return NETWORK


@pytest.fixture(scope="session")
def quick_options():
    """Of untraining, beside its length."""
    return QUICK


@pytest.fixture(scope="session")
def small_network():
    """The classifier of ``digits_run``."""
    return lambda seed=1: models.create("resnet", 10, seed=seed, width=8)


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory, small_network):
    """A run on digits whose filters are random: what is measured does not matter."""
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("digits") / "run"
    base = folder / "base.safetensors"
    folder.mkdir()
    write_tensors(base, small_network().state_dict())
    call = "untrain --data digits --model small/resnet --model-kwargs width=8 --steps 1 --quiet"
    arguments = ["--checkpoint", str(base), "--output", str(folder), "--workers", "0"]
    assert main([*call.split(), *arguments, "--seed", "3"]) == 0
    net = wfnet.WFNet.from_pretrained(folder, small_network())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for alpha in net.filter_parameters():
            alpha.copy_(3 * torch.randn(alpha.shape, generator=generator))
    net.save_pretrained(folder)
    return folder


@pytest.fixture
def fails(capsys):
    """Runs a command that must fail, and looks for parts of its last line."""

    def check(arguments, *parts):
        assert main([str(argument) for argument in arguments]) == 2
        error = capsys.readouterr().err
        assert "Traceback" not in error
        assert [line for line in error.splitlines() if "error:" in line] == [error.splitlines()[-1]]
        for part in parts:
            assert part in error.splitlines()[-1]

    return check


@pytest.fixture
def call():
    """Runs a command that must succeed; words are separated by spaces or given one by one."""

    def run(words, *more):
        assert main([*words.split(), *map(str, more)]) == 0

    return run


@pytest.fixture
def small_pictures(monkeypatch):
    monkeypatch.setattr("wfnet.report.figures.style.DPI", 30)


@pytest.fixture
def base(tmp_path):
    """Weights of a small network for three classes."""
    path = tmp_path / "base.safetensors"
    write_tensors(path, models.create("resnet", 3, 3, seed=1, width=8).state_dict())
    return path


@pytest.fixture
def arguments(image_folder, base, small_pictures):
    """Options of an untraining run without its length and output."""
    return ["--data-dir", str(image_folder), "--checkpoint", str(base), *NETWORK, *QUICK]


@pytest.fixture(scope="module")
def finished_once(tmp_path_factory):
    """A folder with `images`, `base.safetensors` and a finished `run`; not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    write_class_folders(folder / "images")
    base = folder / "base.safetensors"
    write_tensors(base, models.create("resnet", 3, 3, seed=1, width=8).state_dict())
    places = ["--data-dir", folder / "images", "--checkpoint", base, "--output", folder / "run"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("wfnet.report.figures.style.DPI", 30)
        words = ["untrain", *map(str, places), *NETWORK, *QUICK, "--steps", "3", "--quiet"]
        assert main(words) == 0
    return folder


@pytest.fixture
def finished(finished_once: Path, tmp_path: Path, small_pictures: None) -> Path:
    """A copy of that run."""
    return shutil.copytree(finished_once / "run", tmp_path / "run")
