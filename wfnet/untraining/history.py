"""The history of a run: one record per validation, in files, in TensorBoard, and for a callback."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from wfnet.services.files import write_json
from wfnet.services.records import write_csv
from wfnet.untraining.untrain_config import UntrainConfig

Record = dict[str, float]
_NOT_PLOTTED = ("step", "epoch", "seconds")


class HistoryLog:
    """Passes every record on to TensorBoard, where it is installed, and to a callback.

    Args:
        folder: of the run; None for no TensorBoard events.
        step: from here on; events of later steps, of a session that was killed, are hidden.
        callback: called with every record; may be None.
    """

    def __init__(self, folder: Path | None, step: int, callback: Callable[[Record], None] | None):
        self.callback = callback
        self.writer = None
        if folder is not None:
            try:
                tensorboard = importlib.import_module("torch.utils.tensorboard")
            except ImportError:
                return
            self.writer = tensorboard.SummaryWriter(str(folder / "tensorboard"), purge_step=step)

    def add(self, record: Record) -> None:
        """Passes a record on."""
        if self.callback is not None:
            self.callback(record)
        if self.writer is not None:
            for name in record.keys() - set(_NOT_PLOTTED):
                self.writer.add_scalar(f"untrain/{name}", record[name], int(record["step"]))

    def close(self) -> None:
        """Closes the file of TensorBoard events."""
        if self.writer is not None:
            self.writer.close()


def write_history(folder: Path, config: UntrainConfig, history: list[Record]) -> None:
    """Writes ``history.json`` (with the settings) and ``history.csv``."""
    write_json(folder / "history.json", {"config": asdict(config), "history": history})
    columns = list(dict.fromkeys(name for record in history for name in record))
    write_csv(folder / "history.csv", history, columns)
