import pytest

from wfnet.cli.classifier import create_classifier


def test_pretrained_heads_are_not_replaced():
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match="have 1000 classes, not 3"):
        create_classifier("resnet18", 3, pretrained=True)
    with pytest.raises(ValueError, match="have 1000 classes, not 3"):
        create_classifier("torchvision/resnet18", 3, pretrained=True)
    with pytest.raises(ValueError, match="has no pretrained weights"):
        create_classifier("small/resnet", 3, pretrained=True)
