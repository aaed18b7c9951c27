"""A run of `wfnet untrain` on the digits that takes a second."""

import pytest
import torch

import wfnet
from wfnet import models
from wfnet.cli import main
from wfnet.services.files import write_tensors


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
        error = capsys.readouterr().err.splitlines()[-1]
        for part in parts:
            assert part in error

    return check


@pytest.fixture
def small_pictures(monkeypatch):
    monkeypatch.setattr("wfnet.report.figures.style.DPI", 30)
