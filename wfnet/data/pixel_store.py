"""Where decoded pixels are kept: in memory, on the device, or in a file that later runs find again.

Whether there is room is checked and logged first, and space on disk is reserved.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from wfnet.services.device_copies import to_device_async

logger = logging.getLogger("wfnet")

PLACES = ("device", "host", "disk")
# Part of the free space that a cache may take: the network, batches and everybody else need some.
_SHARE = 0.8


def cache_folder() -> Path:
    """Returns `$XDG_CACHE_HOME/wfnet`, or `~/.cache/wfnet`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "wfnet")


class PixelStore:
    """Pixels of the images that were put there.

    Args:
        pixels: [N, C, S, S] uint8.
        filled: [N], 0 for images that are not there; on the host.
        chosen: [n] positions in `pixels` of the images that this store has; None: all.
    """

    def __init__(self, pixels: Tensor, filled: Tensor, chosen: Tensor | None = None):
        self.pixels, self.filled, self.chosen = pixels, filled, chosen

    @classmethod
    def in_memory(cls, place: str, shape: tuple[int, ...], device: torch.device) -> PixelStore:
        """Returns an empty store on a device; ValueError if there is no room."""
        on_gpu = device.type == "cuda"
        free = torch.cuda.mem_get_info(device)[0] if on_gpu else free_memory()
        _check_room(place, shape, free)
        # Pages that are never written to take no memory on the host.
        return cls(torch.empty(shape, dtype=torch.uint8, device=device), torch.zeros(shape[0]))

    @classmethod
    def on_disk(cls, folder: Path, digest: str, shape: tuple[int, ...]) -> PixelStore:
        """Returns the store in two files, of pixels and of marks, named by a digest of what they
        hold; ValueError if there is no room.

        Pixels are written before their mark, so that an interrupted run leaves no half image that
        counts. Several processes may fill one store: they write the same bytes.
        """
        _check_room("disk", shape, _free_on_disk(folder, digest))
        files = {
            _pixel_file(folder, digest): shape,
            folder / f"images-{digest}.filled": shape[:1],
        }
        _reserve({path: math.prod(size) for path, size in files.items()})
        pixels, filled = (
            torch.from_numpy(np.memmap(path, np.uint8, "r+", shape=size))
            for path, size in files.items()
        )
        there = int(filled.sum())
        if there:
            logger.info("cache: %d of %d images are there from an earlier run", there, shape[0])
        return cls(pixels, filled)

    def has(self, indices: Tensor) -> Tensor:
        """Returns which of the images are there, [n] bool."""
        return self.filled[self._positions(indices)] != 0

    def put(self, indices: Tensor, pixels: Tensor) -> None:
        """Keeps pixels [n, C, S, S]."""
        positions, device = self._positions(indices), self.pixels.device
        self.pixels[to_device_async(positions, device)] = to_device_async(pixels, device)
        self.filled[positions] = 1

    def get(self, indices: Tensor, pin_memory: bool = False) -> Tensor:
        """Returns a copy of pixels [n, C, S, S]; on the host page-locked if that is asked for."""
        positions = self._positions(indices)
        if self.pixels.device.type != "cpu":
            return self.pixels[to_device_async(positions, self.pixels.device)]
        shape = (len(positions), *self.pixels.shape[1:])
        out = torch.empty(shape, dtype=torch.uint8, pin_memory=pin_memory)
        return torch.index_select(self.pixels, 0, positions, out=out)

    def select(self, chosen: Tensor) -> PixelStore:
        """Returns the store of some of the images."""
        return PixelStore(self.pixels, self.filled, self._positions(chosen))

    def _positions(self, indices: Tensor) -> Tensor:
        return indices if self.chosen is None else self.chosen[indices]


def _pixel_file(folder: Path, digest: str) -> Path:
    return folder / f"images-{digest}.uint8"


# -- room -----------------------------------------------------------------------------------------

_RESERVED_AT_ONCE = 256 * 2**20  # bytes; between two pieces a signal is heard
# What a file system answers that reserves nothing.
_NO_RESERVATION = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


def _reserve(files: dict[Path, int]) -> None:
    """Gives every file its size and its space on disk; bytes that are there stay.

    A write through a memory map to a file without its space kills the process when the disk is
    full. Where the file system cannot reserve, the space is taken as it is written to.

    Raises ValueError if there is no room, and leaves nothing behind that was not there before.
    """
    fresh: list[Path] = []
    try:
        for path, size in files.items():
            fresh += [folder for folder in path.parents if not folder.exists()][::-1]
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                fresh.append(path)
            with open(path, "ab") as file:
                if file.tell() != size:
                    file.truncate(size)
                for start in range(0, size, _RESERVED_AT_ONCE):
                    if not _allocate(file.fileno(), start, min(_RESERVED_AT_ONCE, size - start)):
                        break
    except BaseException as error:
        for made in reversed(fresh):
            with contextlib.suppress(OSError):
                made.rmdir() if made.is_dir() else made.unlink()
        if isinstance(error, OSError):
            needed = sum(files.values()) / 2**30
            raise ValueError(
                f"the cache of {needed:.2f} GiB cannot be made in {path.parent}: "
                f"{error.strerror or error}; make room there, choose another folder, or put it on "
                "host or device"
            ) from error
        raise


def _allocate(file: int, start: int, size: int) -> bool:
    """Space for a piece of a file; False where that cannot be had in advance."""
    if not hasattr(os, "posix_fallocate"):
        return False
    try:
        os.posix_fallocate(file, start, size)
    except OSError as error:
        if error.errno in _NO_RESERVATION:
            return False
        raise
    return True


def _check_room(place: str, shape: tuple[int, ...], free: int) -> None:
    """Logs how large the cache becomes.

    Raises ValueError if it does not fit into `free` bytes.
    """
    needed = math.prod(shape)
    images = f"{shape[0]:,} images of {shape[1]} x {shape[2]} x {shape[3]} bytes"
    text = f"{images} = {needed / 2**30:.2f} GiB on {place}, {free / 2**30:.2f} GiB are free there"
    if needed > _SHARE * free:
        others = [other for other in PLACES if other != place]
        raise ValueError(
            f"the cache does not fit: {text} and {_SHARE:.0%} of that may be used; put it on "
            f"{' or '.join(others)}, or do without"
        )
    logger.info("cache: %s", text)


def _free_on_disk(folder: Path, digest: str) -> int:
    """Free bytes, with those that this cache takes already."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    pixels = _pixel_file(folder, digest)
    return free + (pixels.stat().st_blocks * 512 if pixels.exists() else 0)


def free_memory() -> int:
    """Bytes of main memory that can be had, under the limit of the container if there is one."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = (
            next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024
        )
    except (OSError, StopIteration):
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
    except OSError:
        return free
    return free if limit == "max" else min(free, int(limit) - used)
