"""`untrain --classes`: images of some of a network's classes."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from wfnet.cli import main
from wfnet.cli.chosen_classes import choose_classes

NAMES = ["ant", "bee", "cat", "dog"]


@pytest.mark.parametrize(
    ("chosen", "found", "names", "numbers", "rows"),
    [
        ([], ["cat", "ant"], NAMES, [2, 0], (0, 2)),
        (["cat"], ["cat", "ant"], NAMES, [2, 0], (2,)),
        (["3", "ant"], ["ant", "dog"], NAMES, [0, 3], (0, 3)),
        (["3", "1"], ["husky", "tabby"], None, [3, 1], (1, 3)),
        (["husky=3", "tabby=1"], ["husky", "tabby"], None, [3, 1], (1, 3)),
        (["husky=dog"], ["husky", "ant"], NAMES, [3, 0], (3,)),
        ([], ["1", "3"], None, [1, 3], (1, 3)),
    ],
)
def test_classes_of_the_data_are_found_in_the_network(chosen, found, names, numbers, rows):
    result = choose_classes(chosen, found, 4, names)
    assert (result[0].tolist(), result[1]) == (numbers, rows)


@pytest.mark.parametrize(
    ("chosen", "found", "message"),
    [
        ([], ["husky"], "which of the network's 4 classes is 'husky'"),
        (["9"], ["husky"], "'9', but the network has classes 0 to 3, or by their names"),
        (["husky=9"], ["husky"], "gives 'husky' the class '9', but the network has classes 0 to 3"),
        (["wolf=1"], ["husky"], "'wolf', which is no class of the data"),
        (["ant=1", "bee"], ["ant", "bee"], "not both"),
        (["ant=1", "bee=1"], ["ant", "bee"], "the same number"),
        (["dog"], ["ant", "bee"], "no images of class 3"),
    ],
)
def test_what_cannot_be_found_is_said(chosen, found, message):
    with pytest.raises(ValueError, match=message):
        choose_classes(chosen, found, 4, NAMES)


def test_a_network_is_untrained_with_images_of_some_of_its_classes(image_folder, tmp_path, fails):
    network = [
        "--model",
        "small/resnet",
        "--model-kwargs",
        "width=8",
        "--img-size",
        "32",
        "-j",
        "0",
    ]
    base, run = tmp_path / "base", tmp_path / "run"
    call = ["train", "--data-dir", str(image_folder), *network, "--epochs", "1", "-b", "4"]
    assert main([*call, "--output", str(base)]) == 0
    for part in ("train", "val"):
        shutil.rmtree(image_folder / part / "bee")
    weights = ["--checkpoint", str(base / "base.safetensors")]
    call = [
        "untrain",
        "--data-dir",
        str(image_folder),
        *network,
        *weights,
        "--steps",
        "4",
        "-b",
        "4",
    ]
    call += ["--output", str(run)]
    fails(call, "--classes")
    assert main([*call, "--classes"]) == 0  # known by their names from the training
    filters = load_file(run / "wf_model.safetensors")
    moved = torch.stack([(value != 3).any(1) for value in filters.values()]).any(0)
    assert moved.tolist() == [True, False, True]
    assert json.loads((run / "config.json").read_text())["untraining"]["classes"] == [0, 2]
    assert main(["untrain", "--resume", str(run)]) == 0
    assert main(["bake", str(run), "--forget", "cat"]) == 0
    fails(["bake", str(run), "--forget", "bee"], "class 1 was not untrained")
    assert main(["evaluate", str(run), "-j", "0", "--no-figures"]) == 0
    classes = json.loads((run / "evaluation.json").read_text())["classes"]
    assert {record["name"] for record in classes} == {"ant", "cat"}
    assert main(["report", str(run), "-j", "0"]) == 0  # of these classes alone
    call = ["trust", str(run), "--classes", "cat", "--checks", "collateral", "-j", "0"]
    assert main(call) == 0  # the nearest class is one that there are images of
