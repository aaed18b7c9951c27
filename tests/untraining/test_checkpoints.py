"""Checkpoints: whole or not there, checksummed, the last few kept, damage passed over."""

import logging
import resource

import pytest
import torch

from wfnet.services.files import write_tensors
from wfnet.untraining import checkpoints
from wfnet.untraining.checkpoints import CHECKPOINT_NAME, Checkpoints, read_checkpoint


def tensors(step):
    generator = torch.Generator().manual_seed(step)
    return {
        "filters.a": torch.randn(4, 3, generator=generator),
        "filters.b": torch.randn(4, 2, generator=generator).bfloat16(),
    }


def save(store, *steps):
    for step in steps:
        store.save(tensors(step), {"step": step, "note": "x" * step})


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def older(*steps):
    return [f"untraining-{step:08d}.safetensors" for step in steps]


def assert_holds(store, step):
    found, state, _ = store.load()
    assert state["step"] == step
    assert found.keys() == tensors(step).keys()
    assert all(torch.equal(found[name], value) for name, value in tensors(step).items())


@pytest.mark.parametrize("keep", [1, 3])
def test_the_last_few_are_kept_and_the_same_step_takes_no_place(tmp_path, keep):
    folder = tmp_path / "run"
    store = Checkpoints(folder, keep)
    assert not store.exist()
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        store.load()
    save(store, 5, 10, 15, 20, 20)
    save(Checkpoints(folder, keep), 20)  # a later process
    assert names(folder) == [*older(5, 10, 15)[4 - keep :], CHECKPOINT_NAME]
    assert_holds(store, 20)
    save(Checkpoints(folder, 1), 25)  # fewer are wanted now
    assert names(folder) == [CHECKPOINT_NAME]


def test_any_flipped_byte_is_noticed(tmp_path):
    """Of tensors, of the state and of the names; the padding of the header says nothing."""
    save(Checkpoints(tmp_path), 7)
    path = tmp_path / CHECKPOINT_NAME
    content = path.read_bytes()
    size = 8 + int.from_bytes(content[:8], "little")
    padding = len(content[:size]) - len(content[:size].rstrip(b" "))
    for place in (*range(0, size - padding, 7), *range(size, len(content))):
        damaged = bytearray(content)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"damaged|truncated"):
            read_checkpoint(path)


@pytest.mark.parametrize("damage", ["empty", "foreign", "missing"])
def test_a_damaged_newest_one_falls_back_to_the_one_before(tmp_path, damage, caplog):
    save(Checkpoints(tmp_path, 3), 5, 10, 15)
    path = tmp_path / CHECKPOINT_NAME
    path.unlink()
    if damage == "foreign":
        write_tensors(path, {"x": torch.zeros(1)})
    elif damage == "empty":
        path.touch()
    later = Checkpoints(tmp_path, 3)
    with caplog.at_level(logging.WARNING, "wfnet"):
        assert_holds(later, 10)
    assert damage == "missing" or "going back to" in caplog.text
    save(later, 20)
    assert_holds(later, 20)
    older_steps = [read_checkpoint(path)[1]["step"] for path in later.older()]
    assert older_steps == [10, 5]  # the damaged is gone


def test_nothing_whole_and_another_format(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "FORMAT", 99)
    save(Checkpoints(tmp_path), 5)
    monkeypatch.undo()
    assert Checkpoints(tmp_path).exist()
    with pytest.raises(ValueError, match="its format is 99, this version reads"):
        Checkpoints(tmp_path).load()


def test_a_disk_that_is_full(tmp_path):
    """The write breaks off in the middle; the file before stays."""
    store = Checkpoints(tmp_path)
    save(store, 5)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        with pytest.raises(OSError, match=r"checkpoint of step 10 could not be .* free some space"):
            store.save({"big": torch.zeros(50_000)}, {"step": 10})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_holds(store, 5)
    assert names(tmp_path) == [CHECKPOINT_NAME]
