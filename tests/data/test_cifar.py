import hashlib
import pickle

import pytest
import torch
from image_files import cifar10_batch, truncate, write_cifar10, write_tar
from torchvision.datasets import CIFAR10

from wfnet.data import open_data
from wfnet.data.cifar10 import read_cifar10


def write_pickles(root, monkeypatch):
    """The Python version, whose digests torchvision then takes for the published ones."""
    folder = root / CIFAR10.base_folder
    folder.mkdir()
    tables = {CIFAR10.meta["filename"]: {"label_names": []}}
    for number, (name, _) in enumerate([*CIFAR10.test_list, *CIFAR10.train_list]):
        images, labels = cifar10_batch(number)
        tables[name] = {"data": images, "labels": labels.tolist()}
    digests = {}
    for name, table in tables.items():
        (folder / name).write_bytes(pickle.dumps(table, protocol=2))
        digests[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    monkeypatch.setitem(CIFAR10.meta, "md5", digests[CIFAR10.meta["filename"]])
    for part in ("train_list", "test_list"):
        names = [name for name, _ in getattr(CIFAR10, part)]
        monkeypatch.setattr(CIFAR10, part, [[name, digests[name]] for name in names])
    return folder


def test_both_versions_have_the_same_images(tmp_path, monkeypatch):
    folder = write_pickles(tmp_path, monkeypatch)
    pickled = read_cifar10(tmp_path)
    (folder / "data_batch_3").write_bytes(pickle.dumps(pytest.fail))  # it is not unpickled
    with pytest.raises(ValueError, match=r"batches-py is incomplete or not the published one"):
        read_cifar10(tmp_path)
    write_cifar10(tmp_path)
    for mine, theirs in zip(read_cifar10(tmp_path), pickled, strict=True):
        assert torch.equal(mine[0], theirs[0])
        assert torch.equal(mine[1], theirs[1])
    splits = open_data("cifar10", tmp_path, mean=0.0, std=1.0)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (90, 10, 20)
    images, labels = cifar10_batch(0)
    expected = torch.from_numpy(images).view(20, 3, 32, 32).float() / 255
    torch.testing.assert_close(splits.test.batch(torch.arange(20)).images, expected)
    assert splits.test.labels.tolist() == labels.tolist()
    assert splits.classes[0] == "airplane"


def test_a_damaged_archive_is_named(tmp_path):
    path = truncate(write_cifar10(tmp_path))
    with pytest.raises(ValueError, match=r"binary.tar.gz is truncated or damaged"):
        open_data("cifar10", tmp_path)
    names = [name for name, _ in CIFAR10.train_list]
    write_tar(path, {f"{name}.bin": b"\x0a" + bytes(3072) for name in names}, "gz")
    with pytest.raises(ValueError, match=r"has no member test_batch"):
        open_data("cifar10", tmp_path)
    write_tar(path, {f"{name}.bin": b"\x0a" + bytes(3072) for name in [*names, "test_batch"]}, "gz")
    with pytest.raises(ValueError, match="does not hold records of CIFAR-10"):
        open_data("cifar10", tmp_path)
