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
        ({"data": np.zeros((1, 3072), np.uint8), "labels": [True]}, "labels are not integers"),
        ({"data": np.zeros((1, 3072), np.uint8), "labels": [10]}, "labels are not 0 to 9"),
        ({"data": np.zeros((1, 3072), np.float32), "labels": [1]}, "'f4', which is refused"),
        ([1, 2], "it lacks `data`"),
    ],
)
def test_pickles_build_arrays_and_nothing_else(value, message):
    with pytest.raises(ValueError, match=message):
        decode_pickle("batch", pickle.dumps(value, protocol=2))


class Raw:
    """Pickles as a numpy array with a state of one's own."""

    def __init__(self, *state):
        self.state = state

    def __reduce__(self):
        return np.ndarray(0, np.uint8).__reduce__()[0], (np.ndarray, (0,), b"b"), self.state


@pytest.mark.parametrize(
    "state",
    [
        (1, (1 << 40, 3072), np.dtype("u1"), False, b"x"),
        (1, (-1, 3072), np.dtype("u1"), False, bytes(3072)),
        (1, (1,), np.dtype("O"), False, b"12345678"),
        (1, (1,), np.dtype([("a", "u1")]), False, b"1"),
        (1, (1, 3072), np.dtype("u1"), False, [1] * 3072),
        (1, (1, 3072), None, False, bytes(3072)),
        ({}, (), 0),
    ],
)
def test_crafted_arrays_are_refused(state):
    content = pickle.dumps({"data": Raw(*state), "labels": [1]}, protocol=2)
    with pytest.raises(ValueError, match=r"is not a CIFAR-10 batch|truncated or damaged"):
        decode_pickle("batch", content)


@pytest.mark.parametrize(
    "content",
    [
        b"N" + b"r\xff\xff\xff\x7f.",  # a memo of two thousand million entries
        b"cnumpy\nndarray\n}X\x04\x00\x00\x00makeNsb.",  # changes a stand-in
        b"cnumpy\ndtype\n(X\x02\x00\x00\x00u1tR(I3\nX\x01\x00\x00\x00?tb.",
        b"}}X\x01\x00\x00\x00aNsb.",  # a state for a dict
        b"(" * 100_000 + b"t" * 100_000 + b".",
        b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x7f.",
    ],
)
def test_crafted_pickles_end_in_one_sentence(content):
    with pytest.raises(ValueError, match="batch is"):
        decode_pickle("batch", content)


def test_labels_outside_cifar10(tmp_path):
    write_cifar10(tmp_path, "bin")
    path = tmp_path / "cifar-10-batches-bin" / "test_batch.bin"
    path.write_bytes(bytes([10]) + path.read_bytes()[1:])
    with pytest.raises(ValueError, match="has label 10: it is not CIFAR-10"):
        open_data("cifar10", tmp_path)
