import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import wfnet
from wfnet import models
from wfnet.cli import bake, main
from wfnet.data import open_data
from wfnet.head import CUT_LOGIT
from wfnet.pretrained import filters_digest
from wfnet.services.files import write_tensors

NETWORK = ("--model", "small/resnet", "--model-kwargs", "width=8")


def test_bake_prunes_and_attacks_the_file_itself(digits_run, small_network, tmp_path, capsys):
    path = tmp_path / "pruned.safetensors"
    call = ["bake", str(digits_run), "--forget", "3", "--prune-below", "0.2", "--output", str(path)]
    assert main([*call, "--verify", "--samples", "30", "--quiet"]) == 0
    shown = capsys.readouterr().out
    assert "gates below 0.2 at 0, within rounding" in shown
    assert "brought back by who holds the file and no label" in shown
    report = json.loads((tmp_path / "pruned.trust.json").read_text())
    assert report["forget"] == [3]
    assert report["prune_below"] == 0.2
    (found,) = report["classes"]
    net = wfnet.WFNet.from_pretrained(digits_run, small_network())
    gates = torch.cat([layer.gates()[3] for layer in net.masked_layers.values()])
    assert report["filters_digest"] == filters_digest(net)
    assert found["details"]["rows"]["zero_rows"] == int((gates < 0.2).sum())
    plain = small_network()
    plain.load_state_dict(load_file(path))
    images = open_data("digits", seed=3).test
    own = images.labels == 3
    batch = images.batch(own.nonzero().squeeze(1)[:30]).images
    accuracy = (plain.eval()(batch).argmax(1) == 3).double().mean().item()
    assert found["images"]["forget"] == 30
    assert found["values"]["acc_f"] == pytest.approx(accuracy, abs=0.2)  # other 30 of the images
    assert "acc_f_batchnorm_all" in found["values"]


def test_verify_without_data_says_so(digits_run, tmp_path, capsys):
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("wf_config.json", "wf_model.safetensors"):
        (alone / name).write_bytes((digits_run / name).read_bytes())
    call = [
        "bake",
        str(alone),
        "--forget",
        "1",
        "--checkpoint",
        str(digits_run / "base.safetensors"),
    ]
    assert main([*call, *NETWORK, "--in-chans", "1", "--img-size", "32", "--verify"]) == 0
    shown = capsys.readouterr().out
    assert "attacks need images" in shown
    assert json.loads((alone / "forget_1.trust.json").read_text())["classes"] == []


def test_bake_with_a_threshold_that_makes_no_sense(digits_run, capsys):
    with pytest.raises(SystemExit):
        main(["bake", str(digits_run), "--forget", "1", "--prune-below", "-1"])
    assert "is not a number of at least 0" in capsys.readouterr().err


def test_bake_cuts_and_attacks_the_file_itself(digits_run, tmp_path, capsys):
    path = tmp_path / "cut.safetensors"
    call = ["bake", str(digits_run), "--forget", "3", "5", "--cut-output", "--output", str(path)]
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


def test_verify_notices_what_is_wrong(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    )
    net, images = wfnet.WFNet(model, 4), torch.randn(5, 3, 8, 8)
    with torch.no_grad():
        for alpha in net.filter_parameters():
            alpha.copy_(2 * torch.randn(alpha.shape))
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
    weights["4.weight"][1, 0] = 1e-2
    write_tensors(path, weights)
    with pytest.raises(RuntimeError, match="where -30 was expected"):
        bake.verify(net, original, [1], path, images, cut_output=True)
    weights["4.weight"][1, 0] = 0
    weights["4.weight"][0] *= 1.01
    write_tensors(path, weights)
    with pytest.raises(RuntimeError, match="does not compute what the filtered network does"):
        bake.verify(net, original, [1], path, images, cut_output=True)


def test_a_durable_run_is_baked_compact(arguments, tmp_path, capsys):
    """From the command line to a program that loads without this package."""
    pytest.importorskip("torch_pruning")
    run = tmp_path / "run"
    durable = [*arguments, "-b", "40", "--recipe", "durable", "--steps", "2", "--output", str(run)]
    assert main(["untrain", *durable, "--quiet"]) == 0
    base = models.create("resnet", 3, 3, seed=1, width=8)
    net = wfnet.WFNet.from_pretrained(run, base)
    with torch.no_grad():
        for alpha in (layer.alpha_hard for layer in net.masked_layers.values()):
            alpha[1, ::3] = -1
    net.save_pretrained(run)
    call = ["bake", str(run), "--forget", "1", "--compact", "--verify", "--samples", "4"]
    assert main([*call, "--prune-below", "0.01", "--threads", "1", "--debug"]) == 0
    shown = capsys.readouterr().out
    assert "without closed channels" in shown
    assert "within rounding" in shown
    images = torch.randn(3, 3, 32, 32)
    program = torch.export.load(run / "forget_1.pt2").module()
    plain = models.create("resnet", 3, 3, width=8)
    plain.load_state_dict(load_file(run / "forget_1.safetensors"))
    torch.testing.assert_close(program(images), plain.eval()(images), rtol=1e-4, atol=1e-4)
    size = sum(p.numel() for p in program.parameters())
    assert size < 0.9 * sum(p.numel() for p in plain.parameters())
