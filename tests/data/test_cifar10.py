import pickle

import numpy as np
import pytest
import torch
from image_files import (
    cifar10_batch,
    cifar10_binary,
    cifar10_names,
    cifar10_pickle,
    truncate,
    write_archive,
)

from wfnet.data import open_data


def write_cifar10(root, version):
    binary = version.startswith("bin")
    folder = "cifar-10-batches-bin" if binary else "cifar-10-batches-py"
    members = {f"{folder}/readme.html": b"x"}
    for number, name in cifar10_names().items():
        if binary:
            members[f"{folder}/{name}.bin"] = cifar10_binary(number)
        else:
            members[f"{folder}/{name}"] = cifar10_pickle(number, byte_keys="bytes" in version)
    if "archive" in version:
        kind = "binary" if binary else "python"
        return write_archive(root / f"cifar-10-{kind}.tar.gz", members)
    (root / folder).mkdir()
    for name, content in members.items():
        (root / name).write_bytes(content)
    return root


@pytest.mark.parametrize("version", ["bin", "py", "py bytes", "bin archive", "py archive"])
def test_versions(tmp_path, version):
    write_cifar10(tmp_path, version)
    splits = open_data("cifar10", tmp_path, mean=0.0, std=1.0)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (90, 10, 20)
    images, labels = cifar10_batch(0)
    expected = torch.from_numpy(images).view(20, 3, 32, 32).float() / 255
    torch.testing.assert_close(splits.test.batch(torch.arange(20)).images, expected)
    assert splits.test.labels.tolist() == labels.tolist()
    assert splits.classes[0] == "airplane"


@pytest.mark.parametrize("version", ["bin", "py"])
def test_damaged_files_are_named(tmp_path, version):
    write_cifar10(tmp_path, version)
    path = next(tmp_path.rglob("data_batch_3*"))
    truncate(path, keep=0.49)
    with pytest.raises(ValueError, match=r"data_batch_3.* fetch it again"):
        open_data("cifar10", tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"data_batch_3.* incomplete"):
        open_data("cifar10", tmp_path)


def test_damaged_archive(tmp_path):
    path = truncate(write_cifar10(tmp_path, "py archive"))
    with pytest.raises(ValueError, match=r"python.tar.gz is truncated or damaged"):
        open_data("cifar10", tmp_path)
    write_archive(path, {"cifar-10-batches-py/readme.html": b""})
    with pytest.raises(ValueError, match="has no member data_batch_1"):
        open_data("cifar10", tmp_path)


class RunsCode:
    def __reduce__(self):
        return (eval, ("1 + 1",))


def table(images, labels):
    return {"data": images, "labels": labels}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (RunsCode(), "eval, which is refused"),
        (torch.Size([1]), r"torch\.Size, which is refused"),
        ([1, 2], "no batch"),
        ({"data": np.zeros((1, 3072), np.uint8)}, "labels"),
        (table(np.zeros((2, 3), np.uint8), [0, 1]), r"images are \[2, 3\]"),
        (table(np.zeros((2, 3072), np.uint8), [0]), "images are"),
        (table(np.zeros((1, 3072), np.float32), [1]), "images are"),
        (table(np.zeros((1, 3072), np.uint8), ["a"]), "labels are not 0 to 9"),
        (table(np.zeros((1, 3072), np.uint8), [10]), "labels are not 0 to 9"),
    ],
)
def test_pickles_build_arrays_and_nothing_else(tmp_path, value, message):
    path = write_cifar10(tmp_path, "py") / "cifar-10-batches-py" / "test_batch"
    path.write_bytes(pickle.dumps(value, protocol=2))
    with pytest.raises(ValueError, match=rf"test_batch is .*{message}"):
        open_data("cifar10", tmp_path)
