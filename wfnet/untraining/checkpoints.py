"""The checkpoint of a long run: atomic and checksummed.

One file, ``untraining.safetensors`` in the run's folder, holds all that a run needs to go on. It
appears under its name whole or not at all, so killing the process at any moment loses at most what
was done since it was last written.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor

from wfnet.services.files import digest, read_metadata, read_tensors, write_tensors

CHECKPOINT_NAME = "untraining.safetensors"
FORMAT = 2


def write_checkpoint(path: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Writes ``tensors`` and ``state`` (what JSON can hold, with its ``step``).

    Raises:
        OSError: if they cannot be written, on a full disk for example; the file before stays.
    """
    text = json.dumps({"format": FORMAT, **state})
    try:
        write_tensors(path, tensors, {"state": text, "sha256": _checksum(tensors, text)})
    except OSError as error:
        raise OSError(
            error.errno,
            f"the checkpoint of step {state['step']} could not be written ({error.strerror}): "
            f"free some space in {path.parent}; what was saved before stays",
        ) from error


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns tensors and state.

    Raises:
        FileNotFoundError, ValueError: if there is no such file, or it is damaged.
    """
    try:
        metadata, tensors = read_metadata(path), read_tensors(path)
        state = json.loads(metadata["state"])
        if state["format"] != FORMAT:
            raise ValueError(f"its format is {state['format']}, this version reads {FORMAT}")
        if _checksum(tensors, metadata["state"]) != metadata.get("sha256"):
            raise ValueError("its contents do not have the checksum that was written with them")
        return tensors, state | {"step": int(state["step"])}
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is truncated, damaged or not a checkpoint of untraining ({error}); delete it "
            "to start anew, or restore it from a copy"
        ) from error


def _checksum(tensors: dict[str, Tensor], text: str) -> str:
    """SHA-256 over ``text`` and name, dtype, shape and bytes of every tensor."""
    return digest({f"\n{name}": tensor for name, tensor in tensors.items()}, text)
