import gzip
import hashlib

import pytest
from image_files import write_cifar10

from wfnet.data import standard_files
from wfnet.data.standard_files import standard_name


def known(monkeypatch, name, content):
    digest = hashlib.md5(content, usedforsecurity=False).hexdigest()
    monkeypatch.setitem(standard_files.DIGESTS, name, digest)


def test_mnist_and_cifar10_are_known_by_their_content(mnist_folder, tmp_path, monkeypatch):
    assert standard_name("mnist", mnist_folder, []) is None
    path = mnist_folder / "t10k-images-idx3-ubyte"
    content = path.read_bytes()
    known(monkeypatch, "mnist", content)
    assert standard_name("mnist", mnist_folder, []) == "mnist"
    path.unlink()
    (mnist_folder / f"{path.name}.gz").write_bytes(gzip.compress(content))
    assert standard_name("mnist", mnist_folder, []) == "mnist"
    archive = write_cifar10(tmp_path)
    assert standard_name("cifar10", tmp_path, []) is None
    known(monkeypatch, "cifar10", archive.read_bytes())
    assert standard_name("cifar10", tmp_path, []) == "cifar10"


def test_imagenet_is_known_by_its_classes():
    info = pytest.importorskip("timm.data").ImageNetInfo("imagenet-1k")
    names = sorted(info.label_names())
    assert standard_name("/data/anywhere", None, names) == "imagenet"
    assert standard_name("/data/anywhere", None, [*names[:-1], "n99999999"]) is None
