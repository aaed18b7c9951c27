import pytest
import torch
from PIL import Image

from wfnet.data import evaluation_transform, model_data_config, open_data


def test_evaluation_transform_equals_timm(image_folder):
    import timm.data

    image = Image.open(image_folder / "train" / "ant" / "1.png").convert("RGB").resize((300, 260))
    theirs = timm.data.create_transform(224, interpolation="bicubic", crop_pct=0.9)
    torch.testing.assert_close(evaluation_transform(224, crop_pct=0.9)(image), theirs(image))
    with pytest.raises(ValueError, match="'cubic' is not a valid"):
        evaluation_transform(224, interpolation="cubic")
    with pytest.raises(ValueError, match="crop_pct must lie in"):
        evaluation_transform(224, crop_pct=0.0)


def test_model_data_config(image_folder):
    import timm
    import torchvision

    config = model_data_config(timm.create_model("resnet18.a1_in1k"))
    assert config["image_size"] == 224
    assert config["interpolation"] == "bicubic"
    assert "transform" not in config
    assert open_data(image_folder, **config).train[0][0].shape == (3, 224, 224)
    assert model_data_config(torchvision.models.resnet18()) == {}
