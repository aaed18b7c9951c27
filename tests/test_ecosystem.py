"""The examples for other libraries run as they stand in docs/ecosystem.md, and do what they say."""

import re
from pathlib import Path

import pytest
import torch

import wfnet

TEXT = (Path(__file__).resolve().parent.parent / "docs/ecosystem.md").read_text()
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", TEXT, re.DOTALL | re.MULTILINE))


def run(title, names):
    (block,) = re.findall(r"^```python\n(.*?)^```$", SECTIONS[title], re.DOTALL | re.MULTILINE)
    exec(block, names)


@pytest.fixture
def names(patches, linear, tmp_path, monkeypatch):
    """What the examples start from: a network that knows three classes, and a loader of images."""
    monkeypatch.chdir(tmp_path)
    (flatten, head), data, between = linear(), patches(), torch.nn.Linear(36, 36)
    torch.nn.init.eye_(between.weight)
    torch.nn.init.zeros_(between.bias)
    net = wfnet.WFNet(torch.nn.Sequential(flatten, between, head), 3, targets="1")
    images = data.batch(torch.arange(len(data))).images
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(images, data.labels), batch_size=20, shuffle=True
    )
    return {"wfnet": wfnet, "torch": torch, "net": net, "loader": loader, "data": data}


@pytest.mark.parametrize(
    ("title", "package"), [("Lightning", "lightning"), ("Accelerate", "accelerate")]
)
def test_a_loop_of_another_library_makes_the_network_forget(title, package, names, tmp_path):
    pytest.importorskip(package)
    names["F"] = torch.nn.functional
    run(title, names)
    table = wfnet.evaluate(names["net"], names["data"], progress=False).table()
    mean = next(line for line in table.splitlines() if line.startswith("mean"))
    acc_r, acc_f = map(float, mean.split()[4:6])
    assert acc_r > 95
    assert acc_f < 5
    assert (tmp_path / "filters/wf_model.safetensors").is_file()


def test_a_table_of_datasets(names):
    for package in ("datasets", "torchvision"):
        pytest.importorskip(package)
    from torchvision.transforms.functional import to_pil_image, to_tensor

    pictures = [to_pil_image(image) for image, _ in names["loader"].dataset]
    run("Loaders, streams and datasets", {**names, "pictures": pictures, "to_tensor": to_tensor})
    assert any((p != p[0]).any() for p in names["net"].filter_parameters())
