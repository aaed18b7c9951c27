"""A store of rows: what is there, whether it fits, what a damaged file does."""

import logging

import pytest
import torch

from wfnet.data import row_store
from wfnet.data.row_store import RowStore


def test_rows_on_disk_are_found_again_but_for_damaged_ones(tmp_path, caplog):
    about = "features", "disk", 5, (2, 3), torch.bfloat16, "cpu", tmp_path / "features.bfloat16"
    rows = torch.randn(3, 2, 3).bfloat16()
    RowStore(*about, checked=True).put(torch.tensor([4, 0, 2]), rows)
    again = RowStore(*about, checked=True)
    assert again.has(torch.tensor([0, 1, 2, 3, 4, -1])).tolist() == [1, 0, 1, 0, 1, 0]
    assert torch.equal(again.get(torch.tensor([4, 0, 2])), rows)
    with open(tmp_path / "features.bfloat16", "r+b") as file:
        file.seek(2 * 12 + 3)
        byte = file.read(1)[0]
        file.seek(2 * 12 + 3)
        file.write(bytes([byte ^ 1]))
    assert RowStore(*about, checked=True).has(torch.arange(5)).tolist() == [1, 0, 0, 0, 1]
    assert "1 features on disk are damaged" in caplog.text


def test_numbers_that_float16_cannot_hold_are_refused():
    store = RowStore("features", "host", 2, (2,), torch.float16, "cpu")
    with pytest.raises(ValueError, match="features up to 7e\\+04 are too large for float16"):
        store.put(torch.tensor([0, 1]), torch.tensor([[1.0, 2.0], [3.0, -7e4]]))
    assert not store.has(torch.tensor([0, 1])).any()


def test_the_size_is_logged_and_checked(tmp_path, monkeypatch, caplog):
    about = 18, (3, 16, 16), torch.uint8, "cpu", tmp_path / "images"
    with caplog.at_level(logging.INFO, "wfnet"):
        RowStore("images", "host", *about)
    assert "18 images of 3 x 16 x 16 in uint8" in caplog.text
    with pytest.raises(ValueError, match="device, host, disk, not on 'ram'"):
        RowStore("images", "ram", *about)
    monkeypatch.setattr(row_store, "free_memory", lambda: 3000)
    with pytest.raises(ValueError, match=r"does not fit.*on host.*choose another place"):
        RowStore("images", "host", *about)
    RowStore("images", "host", *about, needed=3)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(row_store.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match="on disk"):
        RowStore("images", "disk", *about)
