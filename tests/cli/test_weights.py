import pytest
import torch
from image_files import truncate

from wfnet import models
from wfnet.cli.weights import load_weights
from wfnet.services.files import write_tensors


def network(seed=1, classes=3):
    return models.create("vgg", classes, seed=seed, width=8)


def loaded(content, path):
    torch.save(content, path)
    model = network(seed=2)
    load_weights(model, path)
    return model.state_dict()


def under(prefix, state):
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


STATE = network().state_dict()
OLD = {name: tensor + 1 for name, tensor in STATE.items()}
CHECKPOINTS = {
    "plain": STATE,
    "averaged first": {"state_dict": OLD, "state_dict_ema": STATE, "epoch": 3},
    "averaged and wrapped": {
        "model": OLD,
        "model_ema": {"n_averaged": torch.tensor(3), **under("module._orig_mod.", STATE)},
        "optimizer": {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": []},
    },
    "with a loss": {"state_dict": {**under("model.", STATE), "criterion.weight": torch.ones(3)}},
    "own name": {"backbone": under("backbone.", STATE)},
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints_of_training_scripts(name, tmp_path):
    found = loaded(CHECKPOINTS[name], tmp_path / "weights.pth")
    assert all(torch.equal(tensor, STATE[name]) for name, tensor in found.items())


class Opens:
    """Would open a file when unpickled."""

    def __reduce__(self):
        return open, ("created_by_unpickling", "w")


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"save model.state_dict\(\) alone"):
        loaded({"state_dict": STATE, "args": Opens()}, "evil.pth")
    assert not (tmp_path / "created_by_unpickling").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (network(classes=4).state_dict(), "has weights for 4 classes, not for 3"),
        (models.create("vgg", 3, 3, width=8).state_dict(), r"is \[8, 3, 3, 3\] in the file and"),
        ({k: v for k, v in STATE.items() if "classifier" not in k}, "it lacks 'classifier.weight'"),
        ({**STATE, "more": torch.ones(1)}, "it has 'more', unknown to the model"),
        (torch.ones(3), "holds no weights by name"),
        ({**under("student.", STATE), **under("teacher.", OLD)}, r"several networks \(student"),
    ],
)
def test_weights_that_do_not_fit(content, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        loaded(content, tmp_path / "weights.pth")


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_damaged_files(name, tmp_path):
    path = tmp_path / name
    if path.suffix == ".pth":
        torch.save(STATE, path)
    else:
        write_tensors(path, STATE)
    truncate(path)
    with pytest.raises(ValueError, match="is truncated or"):
        load_weights(network(), path)
