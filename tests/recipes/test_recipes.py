"""Recipes fit their commands, and run on files in the real formats."""

import json

import numpy as np
import pytest
from image_files import write_idx, write_tiny_imagenet

from wfnet import models, recipes
from wfnet.cli import build_parser, main
from wfnet.cli.option_files import fill_from_files


def mnist_files(folder):
    rng = np.random.default_rng(0)
    for part, count in (("train", 60), ("t10k", 20)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        write_idx(folder / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte", np.arange(count) % 10)


@pytest.mark.parametrize(
    ("cell", "write", "kwargs"),
    [
        ("mnist/vgg16", mnist_files, ["width=8"]),
        ("tiny_imagenet/resnet18", write_tiny_imagenet, ["width=8"]),
    ],
)
def test_recipes_run_on_files_in_the_real_formats(cell, write, kwargs, tmp_path, capsys):
    write(tmp_path / "files")
    config = ["--config", cell, "--data-dir", str(tmp_path / "files"), "--model-kwargs", *kwargs,
              "--workers", "0", "--quiet"]  # fmt: skip
    base, run = tmp_path / "base", tmp_path / "run"
    assert main(["train", *config, "--epochs", "1", "--output", str(base)]) == 0
    hint = capsys.readouterr().out.splitlines()[-1].split()  # names data and network
    assert hint[:2] == ["wfnet", "untrain"]
    quick = ["-j0", "--steps", "2", "-b", "4", "-M", "1", "--output", str(run)]
    assert main([*hint[1:], *quick]) == 0
    more = ["--no-figures", "--attribution-steps", "1", "--groups", "2", "--relearn-epochs", "1"]
    assert main(["evaluate", str(run), "--config", cell, *config[2:], *more]) == 0
    content = json.loads((run / "tables.json").read_text())
    assert content["cell"] is None  # only the names of data and model are those of the paper
    assert content["rows"][-1]["published"] == {}


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_fits_its_commands(name, tmp_path):
    parser = build_parser()
    sections = ("train", "untrain", "evaluate", "baseline")
    for command in sections:
        arguments = [command, "--config", name]
        options = fill_from_files(parser, arguments)
        for key, value in recipes.read(name, command).items():
            assert getattr(options, key) == value, (command, key)
        parser = build_parser()
    kind = options.model.removeprefix("small/")
    if options.model.startswith("small/"):
        assert kind in models.SMALL_MODELS
    else:
        timm = pytest.importorskip("timm")
        assert options.model in timm.list_pretrained()


def test_an_unknown_recipe_is_refused():
    with pytest.raises(ValueError, match="there is no recipe"):
        recipes.read("mnist/alexnet", "train")
