"""Checkpoints: whole or not there, checksummed, the last few kept, damage passed over."""

import errno
import logging
import os
import resource

import pytest
import torch

from wfnet import untrain
from wfnet.services.files import write_tensors
from wfnet.untraining import checkpoints
from wfnet.untraining.checkpoints import CHECKPOINT_NAME, Checkpoints, read_checkpoint, read_state


def tensors(step):
    generator = torch.Generator().manual_seed(step)
    return {
        "filters.a": torch.randn(4, 3, generator=generator),
        "filters.b": torch.randn(4, 2, generator=generator).bfloat16(),
        "steps": torch.full((4, 1), step),
    }


def save(store, *steps, **more):
    return [store.save(tensors(step), {"step": step, "note": "x" * step}, **more) for step in steps]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def assert_holds(store, step):
    found, state, _ = store.load()
    assert state["step"] == step
    assert found.keys() == tensors(step).keys()
    assert all(torch.equal(found[name], value) for name, value in tensors(step).items())


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_last_few_are_kept(tmp_path, keep):
    store = Checkpoints(tmp_path / "run", keep)
    assert not store.exist()
    assert save(store, 5, 10, 15, 20) == [True] * 4
    older = [f"untraining-{step:08d}.safetensors" for step in (5, 10, 15)][4 - keep :]
    assert names(tmp_path / "run") == [*older, CHECKPOINT_NAME]
    assert_holds(store, 20)
    for path in store.older():
        assert read_checkpoint(path)[1]["step"] == int(path.stem.rpartition("-")[2])


def test_the_same_step_again_takes_no_place(tmp_path):
    store = Checkpoints(tmp_path)
    save(store, 5, 10, 10)
    save(Checkpoints(tmp_path), 10)
    assert names(tmp_path) == ["untraining-00000005.safetensors", CHECKPOINT_NAME]


def test_a_later_process_keeps_what_is_there(tmp_path):
    save(Checkpoints(tmp_path), 5, 10)
    save(Checkpoints(tmp_path, 3), 15)
    older = [f"untraining-{step:08d}.safetensors" for step in (5, 10)]
    assert names(tmp_path) == [*older, CHECKPOINT_NAME]
    save(Checkpoints(tmp_path, 1), 20)  # fewer are wanted now
    assert names(tmp_path) == [CHECKPOINT_NAME]


def test_any_flipped_byte_is_noticed(tmp_path):
    """Of tensors, of the state and of the names; the padding of the header says nothing."""
    save(Checkpoints(tmp_path), 7)
    path = tmp_path / CHECKPOINT_NAME
    content = path.read_bytes()
    size = 8 + int.from_bytes(content[:8], "little")
    padding = len(content[:size]) - len(content[:size].rstrip(b" "))
    places = [*range(0, size - padding, 7), *range(size, len(content))]
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"damaged|truncated|not a checkpoint"):
            read_checkpoint(path)
    path.write_bytes(content)
    assert_holds(Checkpoints(tmp_path), 7)


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "foreign", "missing"])
def test_a_damaged_newest_one_falls_back_to_the_one_before(tmp_path, damage, caplog):
    store = Checkpoints(tmp_path, 3)
    save(store, 5, 10, 15)
    path = store.newest
    content = path.read_bytes()
    if damage == "foreign":
        write_tensors(path, {"x": torch.zeros(1)})
    elif damage == "missing":
        path.unlink()
    else:
        # A new file: the old one shares its content with nobody, but a test must not rely on it.
        path.unlink()
        flipped = content[:-1] + bytes([content[-1] ^ 1])
        path.write_bytes({"cut": content[:-3], "empty": b"", "flipped": flipped}[damage])
    later = Checkpoints(tmp_path, 3)
    with caplog.at_level(logging.WARNING, "wfnet"):
        assert_holds(later, 10)
    if damage != "missing":
        assert f"{path} is " in caplog.text
        assert "going back to" in caplog.text
        assert "step 10" in caplog.text
    save(later, 20)
    assert_holds(later, 20)
    assert [read_state(path)["step"] for path in later.older()] == [10, 5]  # the damaged is gone


def test_nothing_whole_and_nothing_at_all(tmp_path):
    store = Checkpoints(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        store.load()
    save(store, 5, 10)
    for path in (store.newest, *store.older()):
        path.unlink()
        path.write_bytes(b"nothing")
    assert store.exist()
    with pytest.raises(ValueError, match=rf"{CHECKPOINT_NAME} is truncated"):
        store.load()


def test_another_format_says_so(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "FORMAT", 99)
        save(Checkpoints(tmp_path), 5)
    with pytest.raises(ValueError, match="its format is 99, this version reads"):
        Checkpoints(tmp_path).load()


def test_without_hard_links(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    store = Checkpoints(tmp_path)
    save(store, 5, 10, 15)
    assert names(tmp_path) == ["untraining-00000010.safetensors", CHECKPOINT_NAME]
    assert_holds(store, 15)


def full_disk(monkeypatch, room):
    """Writing raises ENOSPC unless ``room()``."""
    write = checkpoints.write_tensors

    def limited(path, *args):
        if not room():
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, *args)

    monkeypatch.setattr(checkpoints, "write_tensors", limited)


def test_a_full_disk_is_survived_a_few_times(tmp_path, monkeypatch, caplog):
    store = Checkpoints(tmp_path)
    save(store, 5)
    with monkeypatch.context() as patch:
        full_disk(patch, lambda: False)
        assert save(store, 10, 15, 20) == [False] * 3
        assert "step 10 could not be written (No space left on device; 1 of at most 3" in (
            caplog.text
        )
        assert_holds(store, 5)
        with pytest.raises(OSError, match=r"step 25 .*\(4 in a row\).*is intact") as error:
            save(store, 25)
        assert error.value.errno == errno.ENOSPC
        with pytest.raises(OSError, match="step 30"):
            save(Checkpoints(tmp_path), 30, must=True)
        with pytest.raises(OSError, match="then start again") as error:
            save(Checkpoints(tmp_path / "nothing yet"), 5, must=True)
        assert "intact" not in error.value.strerror
    assert_holds(store, 5)
    assert save(store, 35) == [True]  # the count starts anew
    assert store.failed == 0
    assert_holds(store, 35)


def test_older_checkpoints_make_room_on_a_full_disk(tmp_path, monkeypatch):
    store = Checkpoints(tmp_path, 4)
    save(store, 5, 10, 15)
    full_disk(monkeypatch, lambda: len(store.older()) < 2)
    assert save(store, 20) == [True]
    assert names(tmp_path) == ["untraining-00000015.safetensors", CHECKPOINT_NAME]
    assert_holds(store, 20)


def test_a_real_limit_on_file_size(tmp_path):
    """The write breaks off in the middle, as on a full disk; the file before stays."""
    store = Checkpoints(tmp_path)
    save(store, 5)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    big = {"big": torch.zeros(50_000)}
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        assert store.save(big, {"step": 10}) is False
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_holds(store, 5)
    assert not [name for name in names(tmp_path) if name.startswith(".")]
    assert store.save(big, {"step": 10}) is True


def test_other_errors_of_the_system_are_not_survived(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(checkpoints, "write_tensors", refuse)
    with pytest.raises(OSError, match="Input/output error"):
        save(Checkpoints(tmp_path), 5)


# -- runs on a disk that fails --------------------------------------------------------------------


@pytest.fixture
def go(runs):
    def run(folder, train=None):
        net = runs.network()
        data = train or runs.images(), runs.images(4, 1)
        return net, untrain(net, *data, runs.config(), folder, True, False)

    return run


def test_a_disk_that_is_full_for_a_while(tmp_path, runs, go, monkeypatch, caplog):
    write, attempts = checkpoints.write_tensors, []

    def full_for_a_while(*arguments):
        attempts.append(None)
        if 5 <= len(attempts) < 8:
            raise OSError(28, "No space left on device")
        write(*arguments)

    expected = go(None)
    monkeypatch.setattr(checkpoints, "write_tensors", full_for_a_while)
    runs.assert_same_run(*go(tmp_path), *expected)
    assert "could not be written (No space left on device; 1 of at most 3" in caplog.text


def test_a_damaged_newest_checkpoint_costs_one_interval(tmp_path, runs, go, caplog):
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, runs.raising(runs.images(), 4, 11))
    path = tmp_path / CHECKPOINT_NAME
    assert Checkpoints(tmp_path).load()[1]["step"] == 10
    content = bytearray(path.read_bytes())
    content[-5] ^= 16
    path.unlink()
    path.write_bytes(content)
    caplog.set_level(logging.INFO, "wfnet")
    found = go(tmp_path)
    assert "do not have the checksum" in caplog.text
    assert "at step 9" in caplog.text
    runs.assert_same_run(*found, *go(None))
