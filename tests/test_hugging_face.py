import logging
from functools import partial

import pytest
import torch
from image_files import CLASS_NAMES
from PIL import Image
from torch import nn

import wfnet
from wfnet import hugging_face, models
from wfnet.cli import main
from wfnet.evaluation import reinitialise

transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")

SIZE, CLASSES = 32, 3
_BLOCKS = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "patch_size": 8,
}
_STAGES = {"hidden_sizes": [8, 16], "depths": [1, 1]}
CONFIGS = {
    "ViT": _BLOCKS,
    "DeiT": _BLOCKS,
    "Swin": {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4},
    "ConvNext": {**_STAGES, "num_stages": 2},
    "ResNet": {**_STAGES, "embedding_size": 8, "layer_type": "basic"},
}
FUSED = ("ConvNext", "ResNet")


def create(kind, seed=0, **more):
    torch.manual_seed(seed)
    settings = {"image_size": SIZE, "num_labels": CLASSES, **CONFIGS[kind], **more}
    config = getattr(transformers, f"{kind}Config")(**settings)
    model = getattr(transformers, f"{kind}ForImageClassification")(config).eval()
    for parameter in model.parameters():  # biases of zeros, and small branches, hide their gates
        parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
    return model


@pytest.fixture
def named_vit(tmp_path):
    """A folder with a ViT that names its classes in another order than folders have."""
    names = dict(enumerate(reversed(CLASS_NAMES)))
    labels = {"id2label": names, "label2id": {name: number for number, name in names.items()}}
    folder = tmp_path / "vit"
    create("ViT", **labels).save_pretrained(folder)
    processor = transformers.ViTImageProcessor(size={"height": SIZE, "width": SIZE})
    processor.image_mean = [0.4, 0.5, 0.6]
    processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", CONFIGS)
def test_classifiers_wrap_untrain_bake_and_fuse_or_say_why_not(kind, caplog, tmp_path):
    model = create(kind)
    net = wfnet.WFNet(model, CLASSES)
    images = torch.randn(4, 3, SIZE, SIZE)
    rows = torch.tensor([[0, 2], [1, -1], [-1, -1], [2, 2]])
    with torch.no_grad():
        assert torch.equal(net(images, None), model(images).logits)
    if kind not in FUSED:
        last = {name.rpartition(".")[2] for name in net.masked_layers}
        assert last == {"q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"}
    for parameter in net.filter_parameters():
        nn.init.normal_(parameter, 1.0, 2.0)
    net(images, rows).sum().backward()
    assert all(alpha.grad.any() for alpha in net.filter_parameters())
    plain = net.bake([0, 2])
    assert type(plain) is type(model)
    expected = net(images, rows).detach()
    assert (expected - model(images).logits)[0].abs().max() > 0.02 * expected.abs().max()
    assert torch.allclose(plain(images).logits[0], expected[0], atol=1e-5)
    assert torch.allclose(plain(images, return_dict=False)[0][0], expected[0], atol=1e-5)
    with caplog.at_level(logging.INFO):
        net.fuse = True
        assert torch.allclose(net(images, rows), expected, atol=1e-5)
    assert ("fused" if kind in FUSED else "runs unfused: torch.fx cannot trace it") in caplog.text
    # what the library saved it loads, and filters know their base again
    hugging_face.save_classifier(plain, tmp_path / "plain")
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "plain")
    assert type(again) is type(model)
    assert torch.equal(again(images).logits, plain(images).logits)
    net.save_pretrained(tmp_path / "filters")
    loaded = wfnet.WFNet.from_pretrained(tmp_path / "filters", create(kind))
    assert torch.allclose(loaded(images, rows), expected, atol=1e-5)
    with pytest.raises(ValueError, match="the base model is not the one"):
        wfnet.WFNet.from_pretrained(tmp_path / "filters", create(kind, seed=1))


@pytest.mark.parametrize("kind", CONFIGS)
def test_zrf_initialises_as_the_library_does(kind, caplog, tmp_path):
    create(kind).save_pretrained(tmp_path)
    loaded = hugging_face.load_classifier(str(tmp_path))
    new = reinitialise(wfnet.WFNet(loaded, CLASSES))
    # Nothing is left that cannot be initialised.
    assert not [record for record in caplog.records if record.name == "wfnet"]
    other = reinitialise(create(kind, seed=1)).state_dict()
    assert all(torch.equal(other[name], tensor) for name, tensor in new.state_dict().items())
    if kind == "ViT":
        positions = new.vit.embeddings.position_embeddings
        assert positions.std().item() == pytest.approx(new.config.initializer_range, rel=0.2)


def test_the_processor_is_the_transform_and_names_are_known(named_vit):
    model = hugging_face.load_classifier(str(named_vit))
    assert hugging_face.class_names(model) == list(reversed(CLASS_NAMES))
    assert hugging_face.class_names(create("ViT")) is None
    found = hugging_face.data_settings(model)
    transform = found.pop("transform")
    std = (0.5, 0.5, 0.5)
    assert found == {
        "image_size": SIZE,
        "channels": 3,
        "mean": (0.4, 0.5, 0.6),
        "std": std,
        "interpolation": "bilinear",
    }
    grey = transform(Image.new("RGB", (50, 40), (128, 128, 128)))
    expected = (torch.full((3,), 128 / 255) - torch.tensor(found["mean"])) / torch.tensor(std)
    assert grey.shape == (3, SIZE, SIZE)
    assert torch.allclose(grey[:, 3, 5], expected, atol=1e-6)


def test_what_is_missing_is_said_in_a_sentence(named_vit, tmp_path, caplog):
    load = hugging_face.load_classifier
    with pytest.raises(FileNotFoundError, match=r"no folder.* `hf download someone/unknown`"):
        load("someone/unknown")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        load(str(empty))
    with pytest.raises(ValueError, match="have 3 classes, not 4"):
        load(str(named_vit), num_classes=4)
    with pytest.raises(ValueError, match="has no 'widht'"):
        load(str(named_vit), widht=8)
    (named_vit / "preprocessor_config.json").unlink()
    new = load(str(named_vit), weights=False, num_classes=4, num_hidden_layers=1)
    assert (new.config.num_labels, len(new.vit.layers)) == (4, 1)
    (named_vit / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors"):
        load(str(named_vit))
    create("ViT").vit.save_pretrained(named_vit)  # a backbone without a head
    with pytest.raises(ValueError, match=r"lack 'classifier\.bias', which would be random"):
        load(str(named_vit))
    assert "transform" not in hugging_face.data_settings(new)
    assert "normalised as ImageNet's" in caplog.text
    with pytest.raises(ValueError, match="only mean and std can be changed"):
        hugging_face.save_classifier(new, tmp_path, preprocessing={"crop_pct": 1.0})


def test_commands(named_vit, image_folder, tmp_path, capsys):
    run = tmp_path / "run"
    data = ["--data-dir", str(image_folder), "-j", "0", "--device", "cpu", "--quiet"]
    options = ["--model", f"hf:{named_vit}", "-b", "4", "-M", "2", "--steps", "2"]
    assert main(["untrain", *data, *options, "--output", str(run)]) == 0
    plain = ["--output", str(run / "plain"), "--verify"]
    assert main(["bake", str(run), "--forget", "ant", *plain]) == 0
    assert "forgotten class 2 (ant)" in capsys.readouterr().out
    load = transformers.AutoModelForImageClassification.from_pretrained
    plain = load(run / "plain")
    assert plain.config.id2label[2] == "ant"
    processor = transformers.AutoImageProcessor.from_pretrained(run / "plain")
    assert tuple(processor.image_mean) == (0.4, 0.5, 0.6)
    net = wfnet.WFNet.from_pretrained(run, load(named_vit))
    images = torch.randn(2, 3, SIZE, SIZE)
    assert torch.allclose(plain(images).logits, net(images, forget=2), atol=1e-5)
    assert main(["untrain", *data, "--model", "hf:nowhere", "--output", str(tmp_path / "x")]) == 2
    assert "'nowhere' is no folder" in capsys.readouterr().err


def test_classes_of_other_names_are_taken_in_order_with_a_warning(
    named_vit, image_folder, tmp_path, caplog
):
    model = create("ViT", id2label={0: "x", 1: "y", 2: "z"}, label2id={"x": 0, "y": 1, "z": 2})
    model.save_pretrained(named_vit)
    options = ["--data-dir", str(image_folder), "-j", "0", "--quiet", "--dry-run"]
    assert main(["untrain", *options, "--model", f"hf:{named_vit}"]) == 0
    assert "calls its classes 'ant', ..., the network 'x', ...: they are taken" in caplog.text
    model.config.id2label[0] = "ant"
    model.save_pretrained(named_vit)
    assert main(["untrain", *options, "--model", f"hf:{named_vit}"]) == 2


def test_folders_of_timm(tmp_path):
    timm = pytest.importorskip("timm")
    create_vit = partial(timm.create_model, "vit_tiny_patch16_224", img_size=32, depth=1)
    net = wfnet.WFNet(create_vit(num_classes=CLASSES), CLASSES)
    plain = net.bake(1).to(memory_format=torch.channels_last)
    changed = {"mean": (0.1, 0.2, 0.3), "crop_pct": 0.5, "image_size": 32}
    hugging_face.save_classifier(plain, tmp_path, CLASS_NAMES, changed)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(again(images), plain(images))
    found = timm.data.resolve_model_data_config(again)
    assert (*found["mean"], found["crop_pct"]) == (0.1, 0.2, 0.3, 0.5)
    assert tuple(found["input_size"]) == (3, 32, 32)
    assert again.pretrained_cfg["label_names"] == list(CLASS_NAMES)
    assert torch.equal(hugging_face.load_saved(tmp_path, plain)(images), plain(images))
    with pytest.raises(ValueError, match="neither timm nor transformers"):
        hugging_face.save_classifier(models.create("resnet", 3, width=8), tmp_path)
