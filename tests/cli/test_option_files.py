import json

import pytest
import torch
from safetensors.torch import load_file


def test_options_from_a_file(arguments, tmp_path, call):
    content = {"lr": 0.25, "epochs": 1, "label-expansion": 3, "amp": False, "targets": ["conv1"]}
    content |= {"model_kwargs": {"width": 8}, "log_wandb": False}  # the latter of an older version
    path = tmp_path / "run.yaml"
    path.write_text(pytest.importorskip("yaml").safe_dump(content))
    folder = tmp_path / "run"
    call("untrain", *arguments, "--config", path, "--steps", "2", "--output", folder)
    options = json.loads((folder / "config.json").read_text())["options"]
    assert options["lr"] == 0.25
    assert options["label_expansion"] == 2  # the command line wins
    assert (options["steps"], options["epochs"]) == (2, None)  # one of the two, the given one
    assert options["targets"] == ["conv1"]
    call("untrain --config", folder / "config.json", "--output", tmp_path / "b")
    first, second = (load_file(f / "wf_model.safetensors") for f in (folder, tmp_path / "b"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ({"learning_rate": 1}, "no option 'learning_rate'"),
        ({"label_expansoin": 1}, "did you mean 'label_expansion'?"),
        ({"lr": "fast"}, "--lr: 'fast' is not a number"),
        ({"amp": "yes"}, "amp must be true or false"),
        ({"lr": [1, 2]}, "--lr: '[1, 2]' is not a number"),
        ([1, 2], "must hold options by name"),
    ],
)
def test_bad_options_in_a_file(content, part, tmp_path, fails):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(content))
    fails(["untrain", "--config", path], str(path), part)


def test_unreadable_option_files(tmp_path, fails):
    (tmp_path / "bad.json").write_text("{")
    fails(["untrain", "--config", tmp_path / "bad.json"], "not a readable options file")


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["bake", "run", "--forget", "1", "--data-dir="], "--data-dir"),
        (["untrain", "--classes", "1", ""], "--classes"),
        (["evaluate", ""], "RUN"),
    ],
)
def test_empty_values_are_refused(arguments, option, fails):
    fails(arguments, f"{option} is empty: give it a value")
