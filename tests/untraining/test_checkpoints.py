"""Checkpoints: whole or not there, and checksummed."""

import resource

import pytest
import torch

from wfnet.services.files import write_tensors
from wfnet.untraining import checkpoints
from wfnet.untraining.checkpoints import read_checkpoint, write_checkpoint


@pytest.fixture
def path(tmp_path):
    drawn = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    tensors = {"filters.a": drawn, "filters.b": drawn[:, :2].bfloat16()}
    write_checkpoint(tmp_path / "run" / "c.safetensors", tensors, {"step": 7, "note": "x"})
    return tmp_path / "run" / "c.safetensors"


def test_any_flipped_byte_is_noticed(path):
    """Of tensors, of the state and of the names; the padding of the header says nothing."""
    content = path.read_bytes()
    size = 8 + int.from_bytes(content[:8], "little")
    padding = len(content[:size]) - len(content[:size].rstrip(b" "))
    for place in (*range(0, size - padding, 7), *range(size, len(content))):
        damaged = bytearray(content)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"damaged|truncated"):
            read_checkpoint(path)


def test_what_is_no_checkpoint(path, monkeypatch):
    for content in (b"", path.read_bytes()[:-1]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="truncated, damaged or not a checkpoint"):
            read_checkpoint(path)
    write_tensors(path, {"x": torch.zeros(1)})
    with pytest.raises(ValueError, match="not a checkpoint"):
        read_checkpoint(path)
    monkeypatch.setattr(checkpoints, "FORMAT", 99)
    write_checkpoint(path, {}, {"step": 5})
    monkeypatch.undo()
    with pytest.raises(ValueError, match="its format is 99, this version reads"):
        read_checkpoint(path)


def test_a_disk_that_is_full(path):
    """The write breaks off in the middle; the file before stays."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        with pytest.raises(OSError, match=r"checkpoint of step 10 could not be .* free some space"):
            write_checkpoint(path, {"big": torch.zeros(50_000)}, {"step": 10})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    tensors, state = read_checkpoint(path)
    assert (state["step"], state["note"]) == (7, "x")
    assert torch.equal(tensors["filters.b"], tensors["filters.a"][:, :2].bfloat16())
    assert [found.name for found in path.parent.iterdir()] == [path.name]
