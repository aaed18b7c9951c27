"""Rows of one shape, one for each image, that are kept once they are known: pixels or features."""

import math
import os
import shutil
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from wfnet.services.device_copies import to_device_async
from wfnet.services.log import logger

PLACES = ("device", "host", "disk")
# Part of the free space that a store may take: the network, batches and everybody else need some.
SHARE = 0.8


class RowStore:
    """A tensor [count, *shape] that is filled row by row, and knows which rows are there.

    what:     the rows are called so in messages.
    place:    "device" (memory of `device`), "host" (main memory) or "disk" (a file that later runs
              find again; several processes may fill it).
    needed:   rows that will be filled at most; None: all.
    path:     of the file on disk.
    checked:  on disk, keep a CRC-32 of each row: rows whose bytes have changed since are not there.
    share:    of the free space that may be taken.

    The size is logged first. Raises ValueError for a place that is none of these, or too small.
    """

    def __init__(
        self,
        what: str,
        place: str,
        count: int,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device | str,
        path: Path | None = None,
        needed: int | None = None,
        checked: bool = False,
        share: float = SHARE,
    ):
        if place not in PLACES:
            raise ValueError(f"{what} are kept on {', '.join(PLACES)}, not on {place!r}")
        self.what, self.checked = what, checked and place == "disk"
        needed = (count if needed is None else needed, *shape)
        marks = torch.int64 if self.checked else torch.uint8  # of rows that are there; 0: is not
        if place == "disk":
            path.parent.mkdir(parents=True, exist_ok=True)
            taken = path.stat().st_blocks * 512 if path.exists() else 0
            free = shutil.disk_usage(path.parent).free + taken
            _check_room(what, place, needed, dtype, free, share)
            self._rows = _mapped(path, (count, *shape), dtype)
            self._marks = _mapped(path.with_suffix(".filled"), (count,), marks)
            self._drop_damaged()
            return
        where = torch.device(device if place == "device" else "cpu")
        _check_room(what, place, needed, dtype, free_bytes(where), share)
        # Pages that are never written to take no memory on the host.
        self._rows = torch.empty((count, *shape), dtype=dtype, device=where)
        self._marks = torch.zeros(count, dtype=marks)

    def __len__(self) -> int:
        return len(self._marks)

    def has(self, positions: Tensor) -> Tensor:
        """Whether rows [n] are there: [n] bool; none is at -1."""
        return (self._marks[positions] != 0) & (positions >= 0)

    def put(self, positions: Tensor, rows: Tensor) -> None:
        """Keeps rows [n, *shape]; before their mark: an interruption leaves no half row.

        Raises ValueError for float16 where numbers are too large for it.
        """
        device, dtype = self._rows.device, self._rows.dtype
        kept = rows.to(dtype)
        if dtype == torch.float16 and bool((kept.isinf() & rows.isfinite()).any()):
            raise ValueError(
                f"{self.what} up to {rows.abs().max():.3g} are too large for float16 (65504): keep "
                "them in bfloat16 or float32"
            )
        rows = to_device_async(kept, device)
        self._rows[to_device_async(positions, device)] = rows
        self._marks[positions] = self._checksums(rows) if self.checked else 1

    def get(self, positions: Tensor, pin_memory: bool = False) -> Tensor:
        """A copy of rows [n, *shape]; on the host page-locked if that is asked for."""
        device = self._rows.device
        if device.type != "cpu":
            return self._rows[to_device_async(positions, device)]
        shape = (len(positions), *self._rows.shape[1:])
        out = torch.empty(shape, dtype=self._rows.dtype, pin_memory=pin_memory)
        return torch.index_select(self._rows, 0, positions, out=out)

    def _checksums(self, rows: Tensor) -> Tensor:
        numbers = [
            # 0 stands for rows that are not there.
            zlib.crc32(row.contiguous().view(torch.uint8).numpy().data) or 1
            for row in rows.flatten(1).unbind()
        ]
        return torch.tensor(numbers, dtype=torch.int64)

    def _drop_damaged(self) -> None:
        there = self._marks.nonzero().flatten()
        if self.checked:
            for part in there.split(64):
                wrong = part[self._checksums(self._rows[part]) != self._marks[part]]
                self._marks[wrong] = 0
            lost = len(there) - int(self._marks.count_nonzero())
            if lost:
                logger.warning("%d %s on disk are damaged, and made again", lost, self.what)
        if len(there):
            found = int(self._marks.count_nonzero())
            logger.info("cache: %d of %d %s are there already", found, len(self._marks), self.what)


def _mapped(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A file as a tensor; bytes that are there stay."""
    with open(path, "ab") as file:
        file.truncate(math.prod(shape) * dtype.itemsize)
    data = np.memmap(path, np.uint8, "r+", shape=(math.prod(shape) * dtype.itemsize,))
    return torch.from_numpy(data).view(dtype).view(shape)


def _check_room(
    what: str, place: str, shape: tuple[int, ...], dtype: torch.dtype, free: int, share: float
) -> None:
    """Logs how large the store becomes.

    Raises ValueError if it takes more than `share` of `free` bytes.
    """
    needed = math.prod(shape) * dtype.itemsize
    size = " x ".join(map(str, shape[1:]))
    text = f"{shape[0]:,} {what} of {size} in {str(dtype).removeprefix('torch.')}"
    text += f" = {needed / 2**30:.2f} GiB on {place}, {free / 2**30:.2f} GiB are free there"
    if needed > share * free:
        raise ValueError(
            f"the cache does not fit: {text} and {share:.0%} of that may be used; choose another "
            f"place ({', '.join(PLACES)}), or do without"
        )
    logger.info("cache: %s", text)


def free_bytes(device: torch.device) -> int:
    """Of memory of a CUDA device, or of the host."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()


def free_memory() -> int:
    """Bytes of main memory that can be had, under the limit of the container if there is one."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        return min(free, limit - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # no container, or "max"
        return free
