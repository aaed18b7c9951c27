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

from wfnet.data import (
    open_data,
)
from wfnet.data.cifar10 import decode_pickle


def cifar10_members(version):
    folder = "cifar-10-batches-bin" if version.startswith("bin") else "cifar-10-batches-py"
    members = {}
    for number, name in cifar10_names().items():
        if folder.endswith("bin"):
            members[f"{folder}/{name}.bin"] = cifar10_binary(number)
        else:
            members[f"{folder}/{name}"] = cifar10_pickle(number, byte_keys="bytes" in version)
    return {f"{folder}/readme.html": b"x", **members}


def write_cifar10(root, version):
    members = cifar10_members(version)
    if "archive" in version:
        kind = "binary" if version.startswith("bin") else "python"
        return write_archive(root / f"cifar-10-{kind}.tar.gz", members)
    for name, content in members.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


VERSIONS = ["bin", "py", "py bytes", "bin archive", "py archive"]


@pytest.mark.parametrize("version", VERSIONS)
def test_cifar10_versions(tmp_path, version):
    write_cifar10(tmp_path, version)
    splits = open_data("cifar10", tmp_path, mean=0.0, std=1.0)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (90, 10, 20)
    images, labels = cifar10_batch(0)
    expected = torch.from_numpy(images).view(20, 3, 32, 32).float() / 255
    torch.testing.assert_close(splits.test.batch(torch.arange(20)).images, expected)
    assert splits.test.labels.tolist() == labels.tolist()
    assert splits.classes[0] == "airplane"


@pytest.mark.parametrize("version", ["bin", "py"])
def test_damaged_cifar10_files_are_named(tmp_path, version):
    write_cifar10(tmp_path, version)
    path = next(tmp_path.rglob("data_batch_3*"))
    truncate(path, keep=0.49)
    with pytest.raises(ValueError, match=r"data_batch_3.* fetch it again"):
        open_data("cifar10", tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"data_batch_3.* incomplete"):
        open_data("cifar10", tmp_path)


def test_damaged_cifar10_archive(tmp_path):
    path = write_cifar10(tmp_path, "py archive")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"python.tar.gz is truncated or damaged"):
        open_data("cifar10", tmp_path)
    write_archive(path, {"cifar-10-batches-py/readme.html": b""})
    with pytest.raises(ValueError, match="has no member data_batch_1"):
        open_data("cifar10", tmp_path)


class RunsCode:
    def __reduce__(self):
        return (eval, ("1 + 1",))


class AsksForCodec:
    def __reduce__(self):
        import codecs

        return (codecs.encode, ("x", "rot13"))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (RunsCode(), r"eval, which is refused"),
        (AsksForCodec(), "'rot13', which is refused"),
        (torch.Size([1]), r"torch\.Size, which is refused"),
        ({"data": np.zeros((2, 3), np.uint8), "labels": [0, 1]}, "it lacks `data`"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [0]}, "it lacks `data`"),
        ({"data": np.zeros((1, 3072), np.uint8), "labels": ["a"]}, "labels are not integers"),
        ([1, 2], "it lacks `data`"),
    ],
)
def test_pickles_build_arrays_and_nothing_else(value, message):
    with pytest.raises(ValueError, match=message):
        decode_pickle("batch", pickle.dumps(value, protocol=2))


def test_labels_outside_cifar10(tmp_path):
    write_cifar10(tmp_path, "bin")
    path = tmp_path / "cifar-10-batches-bin" / "test_batch.bin"
    path.write_bytes(bytes([10]) + path.read_bytes()[1:])
    with pytest.raises(ValueError, match="has label 10: it is not CIFAR-10"):
        open_data("cifar10", tmp_path)
