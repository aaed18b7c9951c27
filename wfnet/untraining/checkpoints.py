"""Checkpoints of a long run: atomic, checksummed, the last few kept, a damaged one passed over.

The newest state of a run is always ``untraining.safetensors``; before it is replaced it is kept as
``untraining-STEP.safetensors``, as many as :class:`Checkpoints` is told to keep. A file appears
under its name whole or not at all, so killing the process at any moment loses at most what was done
since the last one. One file holds all that a run needs to go on, so it is never half a state.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from wfnet.services.files import read_tensors, write_tensors

logger = logging.getLogger("wfnet")

CHECKPOINT_NAME = "untraining.safetensors"
FORMAT = 2
# Saves that may fail in a row; the run ends with the next one, as its work would not be kept.
_FAILED_SAVES = 3
_OLDER = re.compile(r"untraining-(\d{8,})\.safetensors")


class Checkpoints:
    """The checkpoints in the folder of a run.

    Args:
        folder: made with the first checkpoint.
        keep: checkpoints that stay, the newest one counted; at least 1.
    """

    def __init__(self, folder: str | os.PathLike, keep: int = 2):
        if keep < 1:
            raise ValueError(f"keep_checkpoints must be at least 1, got {keep}")
        self.folder = Path(folder)
        self.keep = keep
        self.failed = 0  # saves in a row
        self._newest_step: int | None = None
        self._damaged: set[Path] = set()  # as `load` found them

    @property
    def newest(self) -> Path:
        """Where the newest checkpoint is, once there is one."""
        return self.folder / CHECKPOINT_NAME

    def older(self) -> list[Path]:
        """Earlier checkpoints, the latest first."""
        if not self.folder.is_dir():
            return []
        found = [path for path in self.folder.iterdir() if _OLDER.fullmatch(path.name)]
        return sorted(found, key=_step_of, reverse=True)

    def exist(self) -> bool:
        """Whether there is any checkpoint, damaged ones counted."""
        return self.newest.is_file() or bool(self.older())

    def save(self, tensors: dict[str, Tensor], state: dict[str, Any], must: bool = False) -> bool:
        """Writes a checkpoint of ``state["step"]`` and keeps the one before.

        On a full disk the older checkpoints make room; if that is not enough, the log says so, what
        was saved before stays, and the run may go on: ``False``. The fourth failure in a row, or
        the first one with ``must`` (there will be no later one), is an error.

        Args:
            tensors: by name.
            state: what JSON can hold.
            must: raise on failure.

        Raises:
            OSError: as above, and for other errors than a lack of space.
        """
        metadata = describe(tensors, state)
        try:
            self._write(tensors, metadata)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            self.failed += 1
            intact = "; the one before is intact" if self.newest.is_file() else ""
            if must or self.failed > _FAILED_SAVES:
                raise OSError(
                    error.errno,
                    f"{os.strerror(error.errno)}: the checkpoint of step {state['step']} could "
                    f"not be written ({self.failed} in a row); free some space, then start again"
                    f"{' with resume' if intact else ''}{intact}",
                    str(self.newest),
                ) from error
            logger.warning(
                f"the checkpoint of step {state['step']} could not be written ({error.strerror}; "
                f"{self.failed} of at most {_FAILED_SAVES} in a row): free some space in "
                f"{self.folder}{intact}"
            )
            return False
        self.failed = 0
        return True

    def _write(self, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        now = json.loads(metadata["state"])["step"]
        kept = self._keep_newest(now)
        try:
            write_tensors(self.newest, tensors, metadata)
        except OSError as error:
            removable = [path for path in self.older() if path != kept]
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not removable:
                raise
            self._remove(removable)
            write_tensors(self.newest, tensors, metadata)
        self._newest_step = now
        self._damaged.discard(self.newest)
        self._remove(path for path in self.older() if path in self._damaged)
        _sync_folder(self.folder)
        self._remove(self.older()[self.keep - 1 :])

    def _keep_newest(self, now: int) -> Path | None:
        """Gives the newest checkpoint its second name, under which it stays; not one of ``now``.

        A hard link is no copy, and at no moment is there no newest checkpoint.
        """
        if self.keep == 1 or not self.newest.is_file() or self.newest in self._damaged:
            return None
        step = self._newest_step
        if step is None:
            try:
                step = read_state(self.newest)["step"]
            except ValueError:  # damaged: not worth keeping
                return None
        if step == now:
            return None
        kept = self.folder / f"untraining-{step:08d}.safetensors"
        with contextlib.suppress(FileNotFoundError):
            kept.unlink()
        try:
            os.link(self.newest, kept)
        except OSError:  # a file system without hard links; `load` finds it under this name
            self.newest.replace(kept)
        return kept

    def load(self, device: str = "cpu") -> tuple[dict[str, Tensor], dict[str, Any], Path]:
        """Tensors, state and file of the newest checkpoint that is whole.

        A damaged one is passed over with a line in the log.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if all are damaged; says what is wrong with the newest.
        """
        found = [path for path in (self.newest, *self.older()) if path.is_file()]
        if not found:
            raise FileNotFoundError(f"{self.folder} holds no checkpoint")
        first: ValueError | None = None
        for path in found:
            try:
                tensors, state = read_checkpoint(path)
            except ValueError as error:
                logger.warning("%s", error)
                self._damaged.add(path)
                first = first or error
                continue
            if first is not None:
                logger.warning("going back to %s, step %d", path, state["step"])
            return tensors, state, path
        raise first

    def remove(self) -> None:
        """Removes all checkpoints, before a new run takes their place."""
        self._remove([self.newest, *self.older()])

    def _remove(self, paths: Any) -> None:
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()


def _step_of(path: Path) -> int:
    return int(_OLDER.fullmatch(path.name)[1])


def _sync_folder(folder: Path) -> None:
    """Makes renamed files outlast a power failure, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# -- one file -------------------------------------------------------------------------------------


def describe(tensors: dict[str, Tensor], state: dict[str, Any]) -> dict[str, str]:
    """The metadata of a checkpoint: its state as JSON, and a checksum over that and all tensors."""
    text = json.dumps({"format": FORMAT, **state})
    return {"state": text, "sha256": checksum(tensors, text)}


def checksum(tensors: dict[str, Tensor], text: str) -> str:
    """SHA-256 over ``text`` and name, dtype, shape and bytes of every tensor."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_state(path: Path) -> dict[str, Any]:
    """The state in a checkpoint's header; its tensors are not read.

    Raises:
        ValueError: if the file is damaged or something else.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            return _parsed(path, file.metadata() or {})
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({error})") from error


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and state of a checkpoint.

    Raises:
        ValueError: if the file is damaged or something else.
    """
    tensors = read_tensors(path)
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    state = _parsed(path, metadata)
    if checksum(tensors, metadata["state"]) != metadata.get("sha256"):
        raise ValueError(
            f"{path} is damaged: its contents do not have the checksum that was written with them; "
            "delete it to start anew, or restore it from a copy"
        )
    return tensors, state


def _parsed(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    try:
        state = json.loads(metadata["state"])
        if state["format"] != FORMAT:
            raise ValueError(f"its format is {state['format']}, this version reads {FORMAT}")
        int(state["step"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged or not a checkpoint of untraining ({error}); delete it to start "
            "anew, or restore it from a copy"
        ) from error
    return state
