import hashlib
import pickle

import numpy as np
import pytest
import torch
from scipy.io import savemat
from torchvision import datasets

from wfnet.data import open_data
from wfnet.data.published import read_published


def drawn(number, count=20):
    """Images [count, 3072] uint8; number 0 is the test part."""
    return np.random.default_rng(number).integers(0, 256, (count, 3072), dtype=np.uint8)


def write_pickles(root, reader, tables, monkeypatch):
    """The files of ``reader``, whose digests it then takes for the published ones."""
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


def test_cifar10(tmp_path, monkeypatch):
    reader = datasets.CIFAR10
    tables = {"batches.meta": {"label_names": list("abcdefghij")}}
    for number, (name, _) in enumerate([*reader.test_list, *reader.train_list]):
        tables[name] = {"data": drawn(number), "labels": [i % 10 for i in range(20)]}
    folder = write_pickles(tmp_path, reader, tables, monkeypatch)
    splits = open_data("cifar10", tmp_path, mean=0.0, std=1.0)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (90, 10, 20)
    expected = torch.from_numpy(drawn(0)).view(20, 3, 32, 32).float() / 255
    torch.testing.assert_close(splits.test.batch(torch.arange(20)).images, expected)
    assert splits.test.labels.tolist() == [i % 10 for i in range(20)]
    assert splits.classes == list("abcdefghij")
    (folder / "data_batch_3").write_bytes(pickle.dumps(pytest.fail))  # it is not unpickled
    with pytest.raises(ValueError, match=r"batches-py: incomplete, damaged or not as published"):
        open_data("cifar10", tmp_path)


@pytest.mark.parametrize(("name", "count"), [("cifar100", 100), ("cifar100-coarse", 20)])
def test_cifar100_has_fine_and_coarse_labels(name, count, tmp_path, monkeypatch):
    fine = np.arange(200) % 100
    labels = {"fine_labels": fine.tolist(), "coarse_labels": (fine * 7 % 20).tolist()}
    names = {
        f"{k}_label_names": [f"{k}{i}" for i in range(n)]
        for k, n in (("coarse", 20), ("fine", 100))
    }
    tables = {"meta": names}
    tables |= {
        part: {"data": drawn(number, 200), **labels}
        for number, part in enumerate(("test", "train"))
    }
    write_pickles(tmp_path, datasets.CIFAR100, tables, monkeypatch)
    parts, classes = read_published(name, tmp_path)
    kind = "fine" if count == 100 else "coarse"
    assert classes == names[f"{kind}_label_names"]
    for number, (images, found) in enumerate(parts[::-1]):
        assert torch.equal(images.flatten(1), torch.from_numpy(drawn(number, 200)))
        assert found.tolist() == labels[f"{kind}_labels"]


def test_svhn(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"train_32x32.mat does not exist: put the two"):
        open_data("svhn", tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 40), dtype=np.uint8)
    labels = np.arange(40) % 10 + 1  # the files call a zero 10
    for part in ("train", "test"):
        path = tmp_path / f"{part}_32x32.mat"
        savemat(path, {"X": images, "y": labels[:, None].astype(np.uint8)})
        digest = hashlib.md5(path.read_bytes()).hexdigest()
        monkeypatch.setitem(datasets.SVHN.split_list, part, ["", path.name, digest])
    test = open_data("svhn", tmp_path, mean=0.0, std=1.0).test
    assert test.labels.tolist() == [label % 10 for label in labels]
    expected = torch.from_numpy(images).permute(3, 2, 0, 1).float() / 255
    torch.testing.assert_close(test.batch(torch.arange(40)).images, expected)
