"""`untrain --classes`: images of some of a network's classes."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from wfnet.cli.chosen_classes import choose_classes

NAMES = ["ant", "bee", "cat", "dog"]


@pytest.mark.parametrize(
    ("chosen", "found", "names", "numbers", "rows"),
    [
        ([], ["cat", "ant"], NAMES, [2, 0], (0, 2)),
        (["cat"], ["cat", "ant"], NAMES, [2, 0], (2,)),
        (["3", "1"], ["husky", "tabby"], None, [3, 1], (1, 3)),
        (["husky=3", "tabby=1"], ["husky", "tabby"], None, [3, 1], (1, 3)),
        (["husky=dog"], ["husky", "ant"], NAMES, [3, 0], (3,)),
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
        (["wolf=1"], ["husky"], "'wolf', which is no class of the data"),
        (["ant=1", "bee"], ["ant", "bee"], "not both"),
        (["ant=1", "bee=1"], ["ant", "bee"], "the same number"),
        (["dog"], ["ant", "bee"], "no images of class 3"),
    ],
)
def test_what_cannot_be_found_is_said(chosen, found, message):
    with pytest.raises(ValueError, match=message):
        choose_classes(chosen, found, 4, NAMES)


@pytest.mark.parametrize("recipe", ["balanced", "durable"])
def test_a_network_is_untrained_with_images_of_some_of_its_classes(
    image_folder, tmp_path, network_options, call, fails, recipe
):
    base, run = tmp_path / "base", tmp_path / "run"
    data = ["--data-dir", image_folder, *network_options, "-j0"]
    call("train --epochs 1 -b 4", *data, "--output", base)
    for part in ("train", "val"):
        shutil.rmtree(image_folder / part / "bee")
    words = [*data, "--checkpoint", base / "base.safetensors", "--steps", "4", "--output", run]
    words += ["--recipe", recipe, "-b", "8"]
    words += ["--forget-images", "2", "--retain-images", "2"] if recipe == "durable" else []
    fails(["untrain", *words], "--classes")
    call("untrain", *words, "--classes")  # known by their names from the training
    filters = [v for n, v in load_file(run / "wf_model.safetensors").items() if "alpha" in n]
    moved = torch.stack([(value != value[1]).any(1) for value in filters]).any(0)
    assert moved.tolist() == [True, False, True]
    assert all(len(value[1].unique()) == 1 for value in filters)
    assert json.loads((run / "config.json").read_text())["untraining"]["classes"] == [0, 2]
    call("untrain --resume", run)
    call("bake", run, "--forget", "cat")
    call("bake", run, "--forget", "cat", "ant", "--output", run / "both.safetensors")
    fails(["bake", run, "--forget", "bee"], "class 1 was not untrained")
    call("evaluate -j0 --no-figures", run)
    classes = json.loads((run / "evaluation.json").read_text())["classes"]
    assert {record["name"] for record in classes} == {"ant", "cat"}
    call("report -j0", run)  # of these classes alone
    # The nearest class is one that there are images of.
    call("trust", run, "--classes", "cat", "--checks", "collateral", "-j0")
