"""Every branch that only a CUDA device takes, on a pretended one (pretended_cuda.py).

What no test without a device can say is whether kernels compute the right numbers there; that no
tensor is left on the host, that nothing waits for the device in secret, and that a step can be
captured, is said here.
"""

import pytest
import torch
from captured_steps import CLASSES, Residual, minibatch, network, step_of, untrained
from torch import nn

from wfnet import models
from wfnet.cli import main
from wfnet.evaluation import evaluate
from wfnet.evaluation.attribution import attribution
from wfnet.evaluation.pair_engine import RunOptions
from wfnet.gate_tables import flatten_filters
from wfnet.untraining.objectives import PaperObjective


def transformer() -> nn.Module:
    return models.create("vit", CLASSES, 3, seed=1, width=32, depth=2)


def relative_error(found: torch.Tensor, truth: torch.Tensor) -> float:
    return ((found.double() - truth.double()).norm() / truth.double().norm()).item()


def test_labels_on_the_device_are_checked_without_waiting(pretended_device):
    net = network(Residual, "cuda", fuse=False)
    images = torch.randn(2, 3, 32, 32, device="cuda")
    good, bad = torch.tensor([0, 5]).cuda(), torch.tensor([0, CLASSES]).cuda()
    net(images, good)  # the first pass looks at the network
    pretended_device.waits.clear()
    net(images, good)
    assert net(images, bad)[1].isnan().all().item()
    ((_, place),) = pretended_device.waits
    assert place.startswith("test_pretended_cuda.py:"), "the question above"
    with pytest.raises(ValueError, match=f"{CLASSES} is out of range"):
        net.check_labels()


# -- the step --------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Residual, transformer])
def test_captured_steps_equal_ordinary_ones(pretended_device, make):
    """And both those of the host; a minibatch of another shape runs as it is in between."""
    sizes = [4] * 4 + [6] + [4]
    expected = untrained(network(make, "cpu"), sizes)
    net = network(make, "cuda")
    ordinary = untrained(net, sizes)
    assert net.fused_network(torch.zeros(2, 3, 32, 32).cuda()) is not None
    assert relative_error(ordinary[0], expected[0]) < 5e-2
    captured = untrained(network(make, "cuda"), sizes, capture=True)
    for one, other in zip(captured, ordinary, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("fuse", [True, False])
def test_accumulated_and_unfused_steps_are_captured(pretended_device, fuse):
    sizes, objective = [4] * 8 + [3] + [4] * 3, PaperObjective()
    results = [
        untrained(network(Residual, "cuda", fuse=fuse), sizes, capture, 2, objective)
        for capture in (False, True)
    ]
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("capture", [False, True])
def test_a_step_waits_for_nothing(pretended_device, capture):
    net = network(Residual, "cuda")
    with flatten_filters(net.filter_parameters()):
        step = step_of(net, capture)
        parts = [(images.cuda(), batch.to("cuda")) for images, batch in map(minibatch, range(6))]
        for number, part in enumerate(parts):
            if number == 2:  # the plan is checked, tables are made
                pretended_device.waits.clear()
            step([part], lr=0.1)
    assert pretended_device.waits == []


def test_checkpointed_activations_are_not_captured(pretended_device):
    net = network(Residual, "cuda")
    net.model.first.grad_checkpointing = True
    with (
        flatten_filters(net.filter_parameters()),
        pytest.raises(ValueError, match="checkpoints its activations"),
    ):
        step_of(net, capture=True)


# -- evaluation and the command line ---------------------------------------------------------------


def test_all_class_evaluation_waits_for_no_pair(pretended_device, make_net, uneven_dataset):
    """The host waits per batch and chunk: for labels, broken logits, divergences."""
    expected = evaluate(make_net(), uneven_dataset, batch_size=8, progress=False)
    net = make_net().cuda()
    pretended_device.waits.clear()
    found = evaluate(net, uneven_dataset, batch_size=8, progress=False)
    assert len(pretended_device.waits) < len(uneven_dataset) * 7 / 3, pretended_device.waits
    for mine, theirs in zip(found.records, expected.records, strict=True):
        assert (mine.acc_f, mine.acc_r) == (theirs.acc_f, theirs.acc_r)


def test_attribution(pretended_device, make_net, uneven_dataset):
    options = {"steps": 2, "options": RunOptions(progress=False), "classes": [0, 2]}
    expected = attribution(make_net(), uneven_dataset, **options)
    found = attribution(make_net().cuda(), uneven_dataset, **options)
    assert found.mean == pytest.approx(expected.mean, abs=1e-5)


def test_commands_run_on_the_device(pretended_device, image_folder, tmp_path, capfd):
    run = str(tmp_path / "run")
    call = ["untrain", "--data-dir", str(image_folder), "--model", "small/resnet", "--output", run]
    call += ["--model-kwargs", "width=8", "--img-size", "32", "-b", "4", "-M", "2"]
    call += ["--workers", "0", "--steps", "6", "--grad-accum-steps", "2", "--cache", "device"]
    call += ["--device", "cuda", "--backend", "eager", "--amp"]
    assert main(call) == 0, capfd.readouterr().err
    assert "runs unfused" not in capfd.readouterr().err
    call = ["-j", "0", "--no-figures", "--device", "cuda", "--amp", "--backend", "eager"]
    assert main(["evaluate", run, *call]) == 0


# -- what the pretended device finds ---------------------------------------------------------------


def test_hidden_waits_are_found(pretended_device):
    x = torch.randn(3, device="cuda")
    assert not pretended_device.waits
    for wait in (
        lambda: x[0].item(),
        lambda: bool((x > 5).any()),
        lambda: x[x > 0],
        lambda: x.nonzero(),
        lambda: x.cpu(),
        lambda: torch.ones(3).cuda(),
    ):
        pretended_device.waits.clear()
        wait()
        assert len(pretended_device.waits) == 1
    with (
        pytest.raises(RuntimeError, match="while a graph is captured"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        x.sum().item()
