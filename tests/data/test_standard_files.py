import gzip
import hashlib

import pytest

from wfnet.data import standard_files
from wfnet.data.standard_files import standard_name


def test_mnist_is_known_by_its_content(mnist_folder, monkeypatch):
    assert standard_name("mnist", mnist_folder, []) is None
    path = mnist_folder / "t10k-images-idx3-ubyte"
    content = path.read_bytes()
    monkeypatch.setattr(standard_files, "MNIST_DIGEST", hashlib.md5(content).hexdigest())
    assert standard_name("mnist", mnist_folder, []) == "mnist"
    path.unlink()
    (mnist_folder / f"{path.name}.gz").write_bytes(gzip.compress(content))
    assert standard_name("mnist", mnist_folder, []) == "mnist"


def test_imagenet_is_known_by_its_classes():
    info = pytest.importorskip("timm.data").ImageNetInfo("imagenet-1k")
    names = sorted(info.label_names())
    assert standard_name("/data/anywhere", None, names) == "imagenet"
    assert standard_name("/data/anywhere", None, [*names[:-1], "n99999999"]) is None
