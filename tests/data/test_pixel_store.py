import errno
import logging
import os
import resource

import pytest
import torch

from wfnet.data import pixel_store
from wfnet.data.pixel_store import PixelStore

SHAPE = (18, 3, 16, 16)
BYTES = 18 * 3 * 16 * 16
reserves = pytest.mark.skipif(
    not hasattr(os, "posix_fallocate"), reason="the platform reserves nothing"
)


def on_disk(folder):
    return PixelStore.on_disk(folder, "digest", SHAPE)


def pixels(seed, count):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, *SHAPE[1:]), generator=generator, dtype=torch.uint8)


def refuses(number):
    def fails(file, start, size):
        raise OSError(number, os.strerror(number))

    return fails


@pytest.mark.parametrize("place", ["host", "disk"])
def test_what_is_put_is_there_also_in_a_selection(tmp_path, place):
    memory = PixelStore.in_memory("host", SHAPE, torch.device("cpu"))
    store = memory if place == "host" else on_disk(tmp_path)
    store.put(torch.tensor([5, 2]), pixels(0, 2))
    part = store.select(torch.tensor([2, 7, 5]))
    assert part.has(torch.arange(3)).tolist() == [True, False, True]
    part.put(torch.tensor([1]), pixels(1, 1))
    assert torch.equal(store.get(torch.tensor([7, 5])), torch.cat([pixels(1, 1), pixels(0, 2)[:1]]))
    if place == "disk":
        assert int(on_disk(tmp_path).has(torch.arange(18)).sum()) == 3


def test_the_size_is_logged_and_checked(tmp_path, monkeypatch, caplog):
    with caplog.at_level(logging.INFO, "wfnet"):
        PixelStore.in_memory("host", SHAPE, torch.device("cpu"))
    assert "18 images of 3 x 16 x 16 bytes" in caplog.text
    monkeypatch.setattr(pixel_store, "free_memory", lambda: 1000)
    with pytest.raises(ValueError, match=r"does not fit.*on host.*put it on device or disk"):
        PixelStore.in_memory("host", SHAPE, torch.device("cpu"))
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(pixel_store.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match="on disk"):
        on_disk(tmp_path / "not" / "there")
    assert not (tmp_path / "not").exists()


@reserves
def test_space_on_disk_is_reserved_when_the_file_is_made(tmp_path, monkeypatch):
    """A write through the map would kill the process once others have filled the disk."""
    monkeypatch.setattr(pixel_store, "_RESERVED_AT_ONCE", 5000)  # in several pieces
    on_disk(tmp_path)
    for path, size in zip(sorted(tmp_path.iterdir(), reverse=True), (BYTES, 18), strict=True):
        assert path.stat().st_size == size
        assert path.stat().st_blocks * 512 >= size


def test_a_full_disk_is_said_before_any_work_and_nothing_is_left(tmp_path, monkeypatch):
    reserved = []

    def full_after_a_while(file, start, size):
        reserved.append(start)
        if len(reserved) == 3:
            refuses(errno.ENOSPC)(file, start, size)

    monkeypatch.setattr(pixel_store, "_RESERVED_AT_ONCE", 5000)
    monkeypatch.setattr(os, "posix_fallocate", full_after_a_while, raising=False)
    with pytest.raises(ValueError, match=r"made in .*/not/there: No space left on device; make"):
        on_disk(tmp_path / "not" / "there")
    assert reserved == [0, 5000, 10000]
    assert not (tmp_path / "not").exists()


def test_a_full_disk_leaves_an_earlier_cache_as_it_was(tmp_path, monkeypatch):
    on_disk(tmp_path).put(torch.arange(3), pixels(0, 3))
    with monkeypatch.context() as full:
        full.setattr(os, "posix_fallocate", refuses(errno.ENOSPC), raising=False)
        with pytest.raises(ValueError, match="No space left"):
            on_disk(tmp_path)
    assert torch.equal(on_disk(tmp_path).get(torch.arange(3)), pixels(0, 3))


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EINVAL])
def test_file_systems_that_reserve_nothing(tmp_path, monkeypatch, number):
    monkeypatch.setattr(os, "posix_fallocate", refuses(number), raising=False)
    store = on_disk(tmp_path)
    store.put(torch.tensor([2]), pixels(0, 1))
    assert torch.equal(store.get(torch.tensor([2])), pixels(0, 1))


def test_a_file_past_the_limit_of_the_process(tmp_path):
    """The real system's refusal, not a pretended one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        with pytest.raises(ValueError, match=r"cannot be made in .*File too large"):
            on_disk(tmp_path / "c")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "c").exists()


def test_an_interruption_while_space_is_reserved_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(file, start, size):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "posix_fallocate", interrupted, raising=False)
    with pytest.raises(KeyboardInterrupt):
        on_disk(tmp_path / "c")
    assert not (tmp_path / "c").exists()
