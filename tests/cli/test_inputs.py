import json
import os

import pytest
import torch
from image_files import pack_folder
from safetensors.torch import load_file

from wfnet import models
from wfnet.data import open_data
from wfnet.evaluation.partial import data_identity
from wfnet.services.files import read_metadata, write_tensors


@pytest.mark.parametrize("model", ["test_resnet.r160_in1k", "torchvision/squeezenet1_1"])
def test_networks_of_libraries(model, image_folder, tmp_path, call, capsys):
    pytest.importorskip("timm")
    pytest.importorskip("torchvision")
    words = ["--data-dir", image_folder, "--model", model, "--output", tmp_path / "run"]
    call("untrain --dry-run", *words)
    assert f"network     {model}" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.fixture
def untrain(arguments, tmp_path, call, monkeypatch):
    """Untrains three steps and returns the filters."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(data, name, *options):
        words = [*arguments, "--output", tmp_path / name, "--data-dir", data, *options]
        call("untrain --steps 3 --quiet", *words)
        return load_file(tmp_path / name / "wf_model.safetensors")

    return run


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def test_caches_and_shards_change_nothing(untrain, image_folder, tmp_path, call, capsys):
    plain = untrain(image_folder, "plain")
    assert same(plain, untrain(image_folder, "host", "--cache", "host"))
    assert same(plain, untrain(image_folder, "device", "--cache", "device", "-j1"))
    packed = pack_folder(image_folder, tmp_path / "packed")
    assert same(plain, untrain(packed, "shards", "--cache", "disk"))
    call("evaluate --no-figures -j0", tmp_path / "shards")
    assert "bee" in capsys.readouterr().out


RENAMED = {"ant": "asp", "bee": "boa", "cat": "cow"}


def test_data_of_other_classes_are_refused_by_name(arguments, image_folder, tmp_path, call, fails):
    run = tmp_path / "run"
    call("untrain --steps 2 --quiet", *arguments, "--output", run)
    call("evaluate --no-figures -j0 --quiet", run)
    for part in image_folder.iterdir():
        for folder in list(part.iterdir()):
            folder.rename(part / RENAMED[folder.name])
    for words in (
        ["evaluate", run],
        ["baseline", run, "--train-epochs", "1"],
        ["bake", run, "--forget", "1", "--verify"],
        ["trust", run, "--checks", "removal"],
        ["report", run],
    ):
        fails(words, "other classes than the run", "'asp', 'boa', 'cow'")


def test_untraining_compares_with_the_classes_of_the_weights(
    arguments, base, tmp_path, call, fails
):
    config = {"command": "train", "options": {}, "classes": ["ant", "bee", "dog"]}
    (base.parent / "config.json").write_text(json.dumps(config))
    words = [*arguments, "--steps", "2", "--output", tmp_path / "run", "--quiet"]
    fails(["untrain", *words], "other classes than the classifier", "'cat'")
    config["classes"] = ["cat", "ant", "bee"]
    (base.parent / "config.json").write_text(json.dumps(config))
    call("untrain", *words)
    run = json.loads((tmp_path / "run" / "config.json").read_text())
    assert run["classes"] == ["cat", "ant", "bee"]  # the order of the network's outputs


def test_class_names_that_are_no_utf8_or_look_like_formulas(
    image_folder, arguments, tmp_path, call, capsys
):
    names = {"ant": b"caf\xe9", "bee": b"=1+1", "cat": b"$x^$"}
    for part in image_folder.iterdir():
        for folder in list(part.iterdir()):
            folder.rename(part / os.fsdecode(names[folder.name]))
    run = tmp_path / "run"
    call("untrain --steps 2 --quiet", *arguments, "--output", run)
    call("evaluate -j0 --quiet", run)
    assert r"caf\xe9" in capsys.readouterr().out
    lines = (run / "evaluation.csv").read_text(encoding="utf-8").splitlines()
    assert [line.split(",")[2] for line in lines[1:4]] == ["$x^$", "'=1+1", r"caf\xe9"]
    for name in (r"caf\xe9", os.fsdecode(b"caf\xe9"), "=1+1"):
        call("bake", run, "--forget", name, "--quiet")


def test_classes_of_numbered_data_may_be_named_later(
    mnist_folder, base, tmp_path, network_options, call, fails
):
    config = {"command": "train", "options": {}, "classes": [str(k) for k in range(10)]}
    (base.parent / "config.json").write_text(json.dumps(config))
    write_tensors(base, models.create("resnet", 10, 1, seed=1, width=8).state_dict())
    names, run = list("abcdefghij"), tmp_path / "run"
    data = ["--data", "mnist", "--data-dir", mnist_folder, "--checkpoint", base, *network_options]
    words = [*data, "--class-names", *names, "--output", run]
    call("untrain --steps 2 -b 2 -M 1 -j0 --quiet", *words)
    evaluate = ["evaluate", run, "--no-figures", "-j0", "--quiet"]
    call("", *evaluate, "--classes", "a", "i")
    fails([*evaluate, "--class-names", *names[::-1][1:], "socks"], "unknown 'socks'")


def test_a_seed_does_not_move_images_between_the_parts_of_a_run(digits_run, tmp_path, call, caplog):
    words = ["--methods", "logit_masked", "--classes", "3", "--tune-classes", "0", "--no-relearn"]
    call("baseline --quiet -j0 --seed 8", digits_run, *words, "--output", tmp_path)
    metadata = read_metadata(tmp_path / "logit_masked" / "class_3.safetensors")
    data = data_identity(open_data("digits", seed=3).train, "training data")
    assert data.items() <= json.loads(metadata["identity"]).items()
    call("train --data digits --model small/resnet --epochs 1 --quiet --output", tmp_path / "base")
    untrain = "untrain --data digits --model small/resnet --dry-run --seed 8"
    call(untrain, "--checkpoint", tmp_path / "base" / "base.safetensors")
    assert "on the split of seed 0" in caplog.text
    assert "give --seed 0" in caplog.text
