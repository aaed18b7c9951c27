import hashlib

import numpy as np
import pytest
import torch
from scipy.io import savemat
from torchvision.datasets import SVHN

from wfnet.data import open_data


def test_svhn(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"train_32x32.mat does not exist: put the two"):
        open_data("svhn", tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 40), dtype=np.uint8)
    labels = np.arange(40) % 10 + 1  # the files call a zero 10
    for part in ("train", "test"):
        path = tmp_path / f"{part}_32x32.mat"
        savemat(path, {"X": images, "y": labels[:, None].astype(np.uint8)})
        digest = hashlib.md5(path.read_bytes()).hexdigest()
        monkeypatch.setitem(SVHN.split_list, part, ["", path.name, digest])
    test = open_data("svhn", tmp_path, mean=0.0, std=1.0).test
    assert test.labels.tolist() == [label % 10 for label in labels]
    expected = torch.from_numpy(images).permute(3, 2, 0, 1).float() / 255
    torch.testing.assert_close(test.batch(torch.arange(40)).images, expected)
    path.write_bytes(b"x")
    with pytest.raises(ValueError, match=r"test_32x32.mat is damaged or not the published one"):
        open_data("svhn", tmp_path)
