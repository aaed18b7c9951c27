import gzip

import numpy as np
import pytest
import torch
from image_files import truncate, write_idx

from wfnet.data import open_data
from wfnet.data.mnist import count_classes


def test_mnist(mnist_folder, tmp_path):
    (tmp_path / "MNIST").mkdir()
    raw_folder = mnist_folder.rename(tmp_path / "MNIST" / "raw")  # as torchvision has them
    assert open_data("mnist", tmp_path, channels=3).test[0][0].shape == (3, 32, 32)
    splits = open_data("mnist", raw_folder, image_size=28, mean=0.0, std=1.0, seed=2)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (30, 10, 20)
    raw = np.frombuffer((raw_folder / "t10k-images-idx3-ubyte").read_bytes()[16:], np.uint8)
    expected = torch.from_numpy(raw.copy()).view(20, 1, 28, 28).float() / 255
    torch.testing.assert_close(splits.test.batch(torch.arange(20)).images, expected)
    assert splits.test.labels.tolist() == [i % 10 for i in range(20)]


def test_damaged_files_are_named(mnist_folder):
    path = mnist_folder / "t10k-labels-idx1-ubyte"
    good = path.read_bytes()
    for content in (good[:-3], good[:6], good[:2], b"", b"\x00\x00\x0d" + good[3:]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"t10k-labels-idx1-ubyte is .*fetch it again"):
            open_data("mnist", mnist_folder)
    path.write_bytes(good)
    (mnist_folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(good))
    with pytest.raises(ValueError, match="do not belong together"):
        open_data("mnist", mnist_folder)
    truncate(mnist_folder / "train-images-idx3-ubyte.gz")
    with pytest.raises(ValueError, match=r"train-images.*gz is truncated or damaged"):
        open_data("mnist", mnist_folder)


def test_other_sets_in_the_format_of_mnist(mnist_folder):
    """Fashion-MNIST has names, EMNIST has more classes."""
    names = [f"garment {number}" for number in range(10)]
    splits = open_data("mnist", mnist_folder, class_names=names)
    assert splits.classes == splits.test.classes == names
    for part, count, suffix in (("train", 40, ".gz"), ("t10k", 20, "")):
        path = mnist_folder / f"{part}-labels-idx1-ubyte{suffix}"
        write_idx(path, np.arange(count) % 13)
    assert count_classes(mnist_folder) == 13
    assert len(open_data("mnist", mnist_folder, validation_fraction=0.5).classes) == 13
