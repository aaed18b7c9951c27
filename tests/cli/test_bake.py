import json
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import wfnet
from wfnet import models
from wfnet.cli.bake import Export
from wfnet.cli.classifier import create_classifier
from wfnet.data import open_data
from wfnet.deployment import onnx_logits
from wfnet.head import CUT_LOGIT
from wfnet.pretrained import filters_digest
from wfnet.services.files import write_tensors


def test_bake_prunes_cuts_and_attacks_the_file_itself(
    digits_run, small_network, tmp_path, call, capsys
):
    path = tmp_path / "cut.safetensors"
    words = ["--forget", "3", "5", "--prune-below", "0.2", "--cut-output", "--output", path]
    call("bake --verify --images 20 --samples 30 --quiet", digits_run, *words)
    assert "brought back by who holds the file and no label" in capsys.readouterr().out
    report = json.loads((tmp_path / "cut.trust.json").read_text())
    with safe_open(path, "pt") as file:
        for record in (json.loads(file.metadata()["wfnet"]), report):
            assert (record["forget"], record["prune_below"]) == ([3, 5], 0.2)
            assert record["cut_output"] is True
    net = wfnet.WFNet.from_pretrained(digits_run, small_network())
    gates = torch.cat([layer.gates()[[3, 5]].prod(0) for layer in net.masked_layers.values()])
    assert report["filters_digest"] == filters_digest(net)
    assert report["agreement"]["cut_logit"] == CUT_LOGIT
    for found in report["classes"]:
        assert found["images"]["forget"] == 30
        assert found["values"]["auc_logit"] == 0.5
        assert found["values"]["acc_f_batchnorm_all"] == 0
    head = load_file(path)
    rows = torch.cat([head[f"{name}.weight"].flatten(1).any(1) for name in net.masked_layers])
    assert torch.equal(rows, gates >= 0.2)
    assert not head["fc.weight"][[3, 5]].any()
    assert head["fc.weight"][4].any()


def test_filters_saved_from_python_need_the_options_once(
    base, tmp_path, network_options, call, capsys, fails
):
    options = {"width": 8}
    original = create_classifier("small/resnet", 3, checkpoint=base, in_channels=3, options=options)
    folder = tmp_path / "filters"
    wfnet.WFNet(original, 3).save_pretrained(folder)
    fails(["bake", folder, "--forget", "0"], "does not say which network")
    words = ["--forget", "0", "2", "--verify", "--images", "3", "--in-chans", "3"]
    call("bake", folder, *words, *network_options, "--checkpoint", base)
    shown = capsys.readouterr().out
    assert "verified on 3 random images" in shown
    assert "attacks need images" in shown
    assert json.loads((folder / "forget_0_2.trust.json").read_text())["classes"] == []


def test_verify_notices_what_is_wrong(tmp_path):
    layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    net = wfnet.WFNet(nn.Sequential(*layers, nn.Linear(6, 4)), 4)
    images = torch.randn(5, 3, 8, 8)
    with torch.no_grad():
        for alpha in net.filter_parameters():
            alpha.copy_(2 * torch.randn(alpha.shape))
    path = tmp_path / "cut.safetensors"
    export = Export(path, (1,), cut_output=True)
    export.save(net)
    original = net.bake(None)
    # The constant is not among what is compared.
    assert export.verify(net, original, images)["span"] < -CUT_LOGIT
    with pytest.raises(RuntimeError, match="does not compute what the network does"):
        Export(path, (1,)).verify(net, original, images)
    weights = load_file(path)
    changes = [
        (1, 1e-2, "is not -30"),
        (0, weights["4.weight"][0, 0] * 1.01, "does not compute what the network does"),
        (0, torch.nan, "do not use it"),
    ]
    for row, value, message in changes:
        changed = {name: tensor.clone() for name, tensor in weights.items()}
        changed["4.weight"][row, 0] = value
        write_tensors(path, changed)
        with pytest.raises(RuntimeError, match=message):
            export.verify(net, original, images)


def test_a_missing_package_is_said_before_work_starts(finished, tmp_path, monkeypatch, fails):
    path = tmp_path / "model.onnx"
    words = [finished, "--forget", "1", "--onnx", path]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxscript", None)
        fails(["bake", *words], "pip install wfnet[onnx]")
    assert not (finished / "forget_1.safetensors").exists()


def test_one_file_for_all_classes(digits_run, small_network, tmp_path, call, capsys, fails):
    path = tmp_path / "filtered.pt2"
    call("bake", digits_run, "--per-request", "--program", path)
    assert "images [batch, 1, 32, 32] and forget, int64 [batch]" in capsys.readouterr().out
    net = wfnet.WFNet.from_pretrained(digits_run, small_network())
    images, forget = torch.randn(6, 1, 32, 32), torch.tensor([3, -1, 9, 0, 0, 1])
    found = torch.export.load(path).module()(images, forget)
    torch.testing.assert_close(found, net(images, forget), rtol=1e-4, atol=1e-4)
    start = ["bake", digits_run]
    fails(start, "--forget CLASS, or give --per-request")
    fails([*start, "--per-request"], "needs a file")
    both = ["--per-request", "--program", path]
    fails([*start, *both, "--forget", "1"], "--forget belongs to the export of one")
    fails([*start, *both, "--int8", "a.onnx"], "--int8 belongs to the export of one")
    fails([*start, *both, "--images", "9"], "--images belongs to the export of one")
    call("bake", *start[1:], "--forget", "1", "--output", tmp_path / "a.safetensors", "--compact")
    assert "no channel is closed wherever it runs" in capsys.readouterr().out
    fails([*start, "--forget", "1", "--program", "a.onnx"], "must end in .pt2")
    fails([*start, "--forget", "1", "--program", path, "--package", path], "name the same file")


def test_files_of_one_class(digits_run, small_network, tmp_path, call, capsys):
    for package in ("onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    weights, onnx, program, int8 = (
        tmp_path / name for name in ("k.safetensors", "k.onnx", "k.pt2", "k8.onnx")
    )
    words = ["--forget", "3", "--output", weights, "--samples", "20", "--int8", int8]
    call("bake", digits_run, *words, "--onnx", onnx, "--program", program)
    shown = capsys.readouterr().out
    assert shown.count("of images [batch, 1, 32, 32]; logits differ by at most") == 2
    assert f"{int8}: in 8 bits; accuracy on 20 forgotten test images" in shown
    plain, images = small_network().eval(), open_data("digits").test.images[:9].float() / 255
    plain.load_state_dict(load_file(weights))
    expected, loaded = plain(images), torch.export.load(program).module()
    for run in (onnx_logits(onnx), loaded):
        torch.testing.assert_close(run(images), expected, rtol=1e-4, atol=1e-4)
    error = (onnx_logits(int8)(images) - expected).abs().max() / expected.abs().max()
    assert 1e-4 < error < 0.1


def test_a_durable_run_is_baked_compact(arguments, tmp_path, call, capsys):
    """From the command line to a program that loads without this package."""
    pytest.importorskip("torch_pruning")
    run = tmp_path / "run"
    call("untrain --recipe durable --steps 2 --quiet --output", run, *arguments, "-b", "40")
    net = wfnet.WFNet.from_pretrained(run, models.create("resnet", 3, 3, seed=1, width=8))
    with torch.no_grad():
        for alpha in (layer.alpha_hard for layer in net.masked_layers.values()):
            alpha[1, ::3] = -1
    net.save_pretrained(run)
    words = ["--forget", "1", "--compact", "--verify", "--samples", "4", "--prune-below", "0.01"]
    call("bake", run, *words, "--threads", "1", "--debug")
    shown = capsys.readouterr().out
    assert "without closed channels" in shown
    assert "--cut-output takes it out" in shown
    assert "within rounding" in shown
    images = torch.randn(3, 3, 32, 32)
    program = torch.export.load(run / "forget_1.pt2").module()
    plain = models.create("resnet", 3, 3, width=8)
    plain.load_state_dict(load_file(run / "forget_1.safetensors"))
    torch.testing.assert_close(program(images), plain.eval()(images), rtol=1e-4, atol=1e-4)
    size = sum(p.numel() for p in program.parameters())
    assert size < 0.9 * sum(p.numel() for p in plain.parameters())
