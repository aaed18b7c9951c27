import argparse
import copy
import enum
import pathlib
from collections import deque
from functools import partial

import numpy as np
import pytest
import torch
from image_files import truncate
from torch import nn

from wfnet import models
from wfnet.cli.weights import load_weights
from wfnet.services.files import write_tensors


class Kind(enum.Enum):
    GOOD = 1


class Table(dict):
    """As Lightning's hyperparameters: a dict of a class of its own."""


def network(seed=1, classes=3):
    return models.create("vgg", classes, seed=seed, width=8)


def loaded(content, path, **options):
    torch.save(content, path, **options)
    model = network(seed=2)
    load_weights(model, path)
    return model.state_dict()


def same(found, expected):
    return all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def under(prefix, state):
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


STATE = network().state_dict()
OLD = {name: tensor + 1 for name, tensor in STATE.items()}
CHECKPOINTS = {
    "plain": STATE,
    "averaged first": {"state_dict": OLD, "state_dict_ema": STATE},
    "two wrappers": under("module._orig_mod.", STATE),
    "torchvision": {
        "model": OLD,
        "model_ema": {"n_averaged": torch.tensor(3), **under("module.", STATE)},
        "optimizer": {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": []},
        "args": argparse.Namespace(lr=0.1, output=pathlib.Path("x"), kind=Kind.GOOD),
        "epoch": 3,
    },
    "many objects": {
        "state_dict": STATE,
        "random": np.random.default_rng(0).bit_generator.state,
        "losses": deque([0.5]),
        "names": {"a", "b"},
        "schedule": partial(max, 1),
    },
    "timm": {"state_dict": STATE, "args": argparse.Namespace(lr=0.1), "metric": np.float64(71.5)},
    "lightning": {
        "state_dict": {
            **under("model.", STATE),
            "criterion.weight": torch.ones(3),
            "train_accuracy.tp": torch.ones(3),
        },
        "hyper_parameters": Table(width=8),
        "pytorch-lightning_version": "2.0",
    },
    "own name": {"state_dict": under("backbone.", STATE)},
    "averaged model": torch.optim.swa_utils.AveragedModel(network()).state_dict(),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints_of_training_scripts(name, tmp_path):
    assert same(loaded(CHECKPOINTS[name], tmp_path / "weights.pth"), STATE)


def test_a_checkpoint_in_the_old_format(tmp_path):
    path = tmp_path / "weights.pth"
    found = loaded({"model": STATE, "epoch": 3}, path, _use_new_zipfile_serialization=False)
    assert same(found, STATE)


class Opens:
    """Would open a file when unpickled."""

    def __reduce__(self):
        return open, ("created_by_unpickling", "w")


class Module(nn.Module):
    pass


@pytest.mark.parametrize(
    "content",
    [{"state_dict": Opens()}, {"args": Opens(), "model": Opens()}, Module(), Opens()],
)
def test_nothing_is_unpickled(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(content, "evil.pth")
    with pytest.raises(ValueError, match="it is not unpickled"):
        load_weights(network(), "evil.pth")
    assert not (tmp_path / "created_by_unpickling").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (network(classes=4).state_dict(), "has weights for 4 classes, not for 3"),
        (models.create("vgg", 3, 3, width=8).state_dict(), r"is \[8, 3, 3, 3\] in the file and"),
        ({k: v for k, v in STATE.items() if "classifier" not in k}, "it lacks 'classifier.weight'"),
        ({**STATE, "more": torch.ones(1)}, "unknown to the model, 'more'"),
        (torch.ones(3), "holds no weights by name"),
        ({"epoch": 3}, "holds no weights by name"),
        ({**under("student.", STATE), **under("teacher.", OLD)}, r"several networks \(student"),
    ],
)
def test_weights_that_do_not_fit(content, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        loaded(content, tmp_path / "weights.pth")


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_damaged_files(name, tmp_path):
    path = tmp_path / name
    with pytest.raises(FileNotFoundError, match="do not exist"):
        load_weights(network(), path)
    if path.suffix == ".pth":
        torch.save(copy.copy(STATE), path)
    else:
        write_tensors(path, STATE)
    truncate(path)
    with pytest.raises(ValueError, match="truncated or"):
        load_weights(network(), path)
