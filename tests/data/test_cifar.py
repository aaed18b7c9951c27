import hashlib
import pickle

import pytest
import torch
from image_files import (
    cifar10_batch,
    cifar100_part,
    truncate,
    write_cifar10,
    write_cifar100,
    write_tar,
)
from torchvision.datasets import CIFAR10, CIFAR100

from wfnet.data import open_data
from wfnet.data.cifar import read_cifar


def write_pickles(root, reader, tables, monkeypatch):
    """The Python version, whose digests torchvision then takes for the published ones."""
    folder = root / reader.base_folder
    folder.mkdir()
    digests = {}
    for name, table in tables.items():
        (folder / name).write_bytes(pickle.dumps(table, protocol=2))
        digests[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    monkeypatch.setattr(reader, "meta", {**reader.meta, "md5": digests[reader.meta["filename"]]})
    for part in ("train_list", "test_list"):
        names = [name for name, _ in getattr(reader, part)]
        monkeypatch.setattr(reader, part, [[name, digests[name]] for name in names])
    return folder


def write_cifar10_pickles(root, monkeypatch):
    tables = {CIFAR10.meta["filename"]: {"label_names": list("abcdefghij")}}
    for number, (name, _) in enumerate([*CIFAR10.test_list, *CIFAR10.train_list]):
        images, labels = cifar10_batch(number)
        tables[name] = {"data": images, "labels": labels.tolist()}
    return write_pickles(root, CIFAR10, tables, monkeypatch)


def test_both_versions_have_the_same_images(tmp_path, monkeypatch):
    folder = write_cifar10_pickles(tmp_path, monkeypatch)
    pickled, _ = read_cifar("cifar10", tmp_path)
    (folder / "data_batch_3").write_bytes(pickle.dumps(pytest.fail))  # it is not unpickled
    with pytest.raises(ValueError, match=r"batches-py is incomplete or not the published one"):
        read_cifar("cifar10", tmp_path)
    write_cifar10(tmp_path)
    for mine, theirs in zip(read_cifar("cifar10", tmp_path)[0], pickled, strict=True):
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
    names = [f"{name}.bin" for name, _ in CIFAR10.train_list]
    members = dict.fromkeys([*names, "batches.meta.txt"], b"\x0a" + bytes(3072))
    write_tar(path, members, "gz")
    with pytest.raises(ValueError, match=r"has no member test_batch"):
        open_data("cifar10", tmp_path)
    write_tar(path, members | {"test_batch.bin": b"\x0a" + bytes(3072)}, "gz")
    with pytest.raises(ValueError, match="does not hold the records of cifar10"):
        open_data("cifar10", tmp_path)


@pytest.mark.parametrize(
    ("name", "kind", "count"), [("cifar100", "fine", 100), ("cifar100-coarse", "coarse", 20)]
)
def test_cifar100_has_fine_and_coarse_labels_in_both_versions(
    name, kind, count, tmp_path, monkeypatch
):
    names = {
        f"{k}_label_names": [f"{k}{i}" for i in range(n)]
        for k, n in (("coarse", 20), ("fine", 100))
    }
    tables = {"meta": names}
    for number, part in enumerate(("test", "train")):
        images, coarse, fine = cifar100_part(number)
        tables[part] = {
            "data": images,
            "coarse_labels": coarse.tolist(),
            "fine_labels": fine.tolist(),
        }
    write_pickles(tmp_path, CIFAR100, tables, monkeypatch)
    pickled, classes = read_cifar(name, tmp_path)
    write_cifar100(tmp_path)
    parts, same = read_cifar(name, tmp_path)
    assert same == classes == [f"{kind}{number}" for number in range(count)]
    for number, (mine, theirs) in enumerate(zip(parts[::-1], pickled[::-1], strict=True)):
        assert torch.equal(mine[0], theirs[0])
        assert torch.equal(mine[1], theirs[1])
        assert mine[1].tolist() == cifar100_part(number)[1 if kind == "coarse" else 2].tolist()
    assert len(open_data(name, tmp_path).test) == 200
