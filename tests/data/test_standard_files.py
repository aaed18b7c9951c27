import gzip
import hashlib

import pytest
from image_files import cifar10_binary, cifar10_names

from wfnet.data import standard_files
from wfnet.data.standard_files import standard_name


def md5(content):
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


@pytest.fixture
def known_mnist(mnist_folder, monkeypatch):
    """A folder whose files count as those of MNIST."""
    for name in standard_files.MNIST_FILES:
        path = next(mnist_folder.glob(f"{name}*"))
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        monkeypatch.setitem(standard_files.MNIST_FILES, name, md5(content))
    return mnist_folder


def test_mnist_is_known_by_its_content_packed_or_not(known_mnist):
    assert standard_name("mnist", known_mnist, []) == "mnist"
    packed = known_mnist / "train-labels-idx1-ubyte.gz"
    (known_mnist / "train-labels-idx1-ubyte").write_bytes(gzip.decompress(packed.read_bytes()))
    packed.unlink()
    assert standard_name("mnist", known_mnist, []) == "mnist"
    labels = known_mnist / "train-labels-idx1-ubyte"
    labels.write_bytes(labels.read_bytes()[:-1] + b"\x07")
    assert standard_name("mnist", known_mnist, []) is None


def test_files_that_only_have_the_names_are_something_else(mnist_folder, tmp_path):
    assert standard_name("mnist", mnist_folder, []) is None
    for number, name in cifar10_names().items():
        (tmp_path / f"{name}.bin").write_bytes(cifar10_binary(number))
    assert standard_name("cifar10", tmp_path, []) is None
    assert standard_name("/data/birds", None, [str(k) for k in range(1000)]) is None
    assert standard_name("digits", None, []) is None


def test_cifar10_is_known_as_an_archive(tmp_path, monkeypatch):
    archive = tmp_path / "cifar-10-python.tar.gz"
    archive.write_bytes(b"anything")
    monkeypatch.setattr("wfnet.data.cifar10.found_files", lambda folder: [archive])
    assert standard_name("cifar10", tmp_path, []) is None
    monkeypatch.setitem(standard_files.CIFAR10_ARCHIVES, archive.name, md5(b"anything"))
    assert standard_name("cifar10", tmp_path, []) == "cifar10"


def test_imagenet_is_known_by_its_classes():
    info = pytest.importorskip("timm.data").ImageNetInfo("imagenet-1k")
    names = sorted(info.label_names())
    assert standard_name("/data/anywhere", None, names) == "imagenet"
    assert standard_name("/data/anywhere", None, [*names[:-1], "n99999999"]) is None
