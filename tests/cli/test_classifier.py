import pytest
import torch
from image_files import truncate

from wfnet import models
from wfnet.cli.classifier import create_classifier, load_weights


@pytest.mark.parametrize("wrap", ["plain", "ema", "prefix", "nested"])
def test_weights_of_training_scripts(wrap, tmp_path):
    state = models.create("vgg", 3, seed=1, width=8).state_dict()
    content = {
        "plain": state,
        "ema": {"state_dict": {k: v + 1 for k, v in state.items()}, "state_dict_ema": state},
        "prefix": {f"module._orig_mod.{k}": v for k, v in state.items()},
        "nested": {"model": state, "epoch": 3, "args": {"lr": 0.1}},
    }[wrap]
    torch.save(content, tmp_path / "weights.pth")
    model = models.create("vgg", 3, seed=2, width=8)
    load_weights(model, tmp_path / "weights.pth")
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


class Opens:
    """Would open a file when unpickled."""

    def __reduce__(self):
        return open, ("created_by_unpickling", "w")


def test_weights_are_never_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Opens()}, "evil.pth")
    with pytest.raises(ValueError, match="it is not unpickled"):
        load_weights(models.create("vgg", 3), "evil.pth")
    assert not (tmp_path / "created_by_unpickling").exists()


def test_weights_that_do_not_fit(tmp_path):
    state = models.create("vgg", 3, width=8).state_dict()
    path = tmp_path / "weights.pth"

    def load(content, num_classes=3):
        torch.save(content, path)
        load_weights(models.create("vgg", num_classes, width=8), path)

    with pytest.raises(ValueError, match="has weights for 3 classes, not for 4"):
        load(state, num_classes=4)
    with pytest.raises(ValueError, match=r"is \[8, 3, 3, 3\] in the file and \[8, 1, 3, 3\]"):
        load(models.create("vgg", 3, 3, width=8).state_dict())
    with pytest.raises(ValueError, match="it lacks"):
        load({k: v for k, v in state.items() if "classifier" not in k})
    with pytest.raises(ValueError, match="unknown to the model, 'more'"):
        load({**state, "more": torch.ones(1)})
    with pytest.raises(ValueError, match="holds no weights by name"):
        load(torch.ones(3))
    torch.save(state, path)
    truncate(path)
    with pytest.raises(ValueError, match="truncated or damaged"):
        load_weights(models.create("vgg", 3, width=8), path)


def test_pretrained_heads_are_not_replaced():
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match="have 1000 classes, not 3"):
        create_classifier("resnet18", 3, pretrained=True)
    with pytest.raises(ValueError, match="have 1000 classes, not 3"):
        create_classifier("torchvision/resnet18", 3, pretrained=True)
    with pytest.raises(ValueError, match="has no pretrained weights"):
        create_classifier("small/resnet", 3, pretrained=True)
