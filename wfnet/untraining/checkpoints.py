"""Checkpoints of a long run: atomic, checksummed, the last few kept, a damaged one passed over.

The newest state of a run is ``untraining.safetensors``; before it is replaced it is kept as
``untraining-STEP.safetensors``, as many as :class:`Checkpoints` is told to keep. A file appears
under its name whole or not at all, so killing the process at any moment loses at most what was done
since the last one. One file holds all that a run needs to go on, so it is never half a state.
"""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor

from wfnet.services.files import digest, read_metadata, read_tensors, write_tensors

logger = logging.getLogger("wfnet")

CHECKPOINT_NAME = "untraining.safetensors"
FORMAT = 2
_OLDER = re.compile(r"untraining-(\d{8,})\.safetensors")


class Checkpoints:
    """The checkpoints in the folder of a run.

    Args:
        folder: made with the first checkpoint.
        keep: checkpoints that stay, the newest one counted; at least 1.
    """

    def __init__(self, folder: str | os.PathLike, keep: int = 2):
        self.folder = Path(folder)
        self.keep = keep
        self._damaged: list[Path] = []  # as `load` found them; a save removes them

    @property
    def newest(self) -> Path:
        """Where the newest checkpoint is, once there is one."""
        return self.folder / CHECKPOINT_NAME

    def older(self) -> list[Path]:
        """Earlier checkpoints, the latest first."""
        found = [path for path in self.folder.glob("*") if _OLDER.fullmatch(path.name)]
        return sorted(found, key=lambda path: int(_OLDER.fullmatch(path.name)[1]), reverse=True)

    def exist(self) -> bool:
        """Whether there is any checkpoint, damaged ones counted."""
        return self.newest.is_file() or bool(self.older())

    def save(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Writes a checkpoint of ``state["step"]`` and keeps the one before.

        Args:
            tensors: by name.
            state: what JSON can hold.

        Raises:
            OSError: if it cannot be written, on a full disk for example; the one before stays.
        """
        text = json.dumps({"format": FORMAT, **state})
        before = self._set_aside(state["step"])
        try:
            metadata = {"state": text, "sha256": checksum(tensors, text)}
            write_tensors(self.newest, tensors, metadata)
        except OSError as error:
            if before is not None:
                before.replace(self.newest)
            raise OSError(
                error.errno,
                f"the checkpoint of step {state['step']} could not be written ({error.strerror}): "
                f"free some space in {self.folder}; what was saved before stays",
            ) from error
        self._remove(path for path in self._damaged if path != self.newest)
        self._damaged.clear()
        self._remove(self.older()[self.keep - 1 :])

    def _set_aside(self, step: int) -> Path | None:
        """Gives the newest checkpoint the name under which it stays, unless it is of ``step``."""
        try:
            before = read_checkpoint(self.newest, header_only=True)[1]["step"]
        except (FileNotFoundError, ValueError):  # none, or damaged: not worth keeping
            return None
        if before == step or self.newest in self._damaged:
            return None
        return self.newest.replace(self.folder / f"untraining-{before:08d}.safetensors")

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any], Path]:
        """Tensors, state and file of the newest checkpoint that is whole.

        A damaged one is passed over with a line in the log.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if all are damaged; says what is wrong with the newest.
        """
        first: ValueError | None = None
        for path in (self.newest, *self.older()):
            try:
                tensors, state = read_checkpoint(path)
            except FileNotFoundError:
                continue
            except ValueError as error:
                logger.warning("%s", error)
                self._damaged.append(path)
                first = first or error
                continue
            if first is not None:
                logger.warning("going back to %s, step %d", path, state["step"])
            return tensors, state, path
        raise first or FileNotFoundError(f"{self.folder} holds no checkpoint")

    def remove(self) -> None:
        """Removes all checkpoints, before a new run takes their place."""
        self._remove([self.newest, *self.older()])

    @staticmethod
    def _remove(paths: Any) -> None:
        for path in paths:
            path.unlink(missing_ok=True)


# -- one file -------------------------------------------------------------------------------------


def checksum(tensors: dict[str, Tensor], text: str) -> str:
    """SHA-256 over ``text`` and name, dtype, shape and bytes of every tensor."""
    return digest({f"\n{name}": tensor for name, tensor in tensors.items()}, text)


def read_checkpoint(
    path: Path, header_only: bool = False
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and state of a checkpoint; of the header alone the state, which is then not checked.

    Raises:
        FileNotFoundError, ValueError: if there is no such file, or it is damaged.
    """
    try:
        metadata = read_metadata(path)
        state = json.loads(metadata["state"])
        if state["format"] != FORMAT:
            raise ValueError(f"its format is {state['format']}, this version reads {FORMAT}")
        tensors = {} if header_only else read_tensors(path)
        if not header_only and checksum(tensors, metadata["state"]) != metadata.get("sha256"):
            raise ValueError("its contents do not have the checksum that was written with them")
        return tensors, state | {"step": int(state["step"])}
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is truncated, damaged or not a checkpoint of untraining ({error}); delete it "
            "to start anew, or restore it from a copy"
        ) from error
