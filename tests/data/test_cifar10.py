import pickle

import numpy as np
import pytest
import torch
from image_files import cifar10_batch, truncate, write_cifar10, write_tar

from wfnet.data import open_data


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
    write_tar(path, {"cifar-10-batches-py/readme.html": b""}, "gz")
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
        (b"N" + b"r\xff\xff\xff\x7f.", "no batch"),  # a memo of two thousand million entries
        ({"data": np.zeros((1, 3072), np.uint8)}, "labels"),
        (table(np.zeros((2, 3), np.uint8), [0, 1]), r"images are \[2, 3\]"),
        (table(np.zeros((2, 3072), np.uint8), [0]), "images are"),
        (table(np.zeros((1, 3072), np.float32), [1]), "images are of type 'f4'"),
        (table([[0] * 3072], [1]), "no batch"),
        (table(np.zeros((1, 3072), np.uint8), ["a"]), "labels are not 0 to 9"),
        (table(np.zeros((1, 3072), np.uint8), [10]), "labels are not 0 to 9"),
    ],
)
def test_pickles_build_arrays_and_nothing_else(tmp_path, value, message):
    path = write_cifar10(tmp_path, "py") / "test_batch"
    path.write_bytes(value if isinstance(value, bytes) else pickle.dumps(value, protocol=2))
    with pytest.raises(ValueError, match=rf"test_batch is .*{message}"):
        open_data("cifar10", tmp_path)
