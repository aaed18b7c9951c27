"""The history of a run: losses of its steps, and one record per validation."""

import contextlib
import importlib
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from wfnet.services.files import write_json
from wfnet.services.records import write_csv
from wfnet.untraining.objectives import Losses
from wfnet.untraining.run_state import RunState
from wfnet.untraining.untrain_config import UntrainConfig

Record = dict[str, float]
_NOT_PLOTTED = ("step", "epoch", "seconds")
# Reading a loss waits for the device, so there they are read this many steps at a time.
_READ_EVERY = 25


class LossWatch:
    """Collects the losses of steps, and reads them from the device a few steps at a time.

    Args:
        device: where they are.
        state: gets their sums.

    Attributes:
        latest: terms of the step that was last read.
    """

    def __init__(self, device: torch.device, state: RunState):
        self.device, self.state = device, state
        self.latest: dict[str, float] = {}
        self._pending: list[tuple[int, dict[str, Tensor | float]]] = []

    def add(self, losses: Losses, step: int) -> bool:
        """Remembers the losses of a step; whether it is time to :meth:`read` them."""
        self._pending.append((step, {"loss": losses.total.detach(), **losses.terms}))
        return self.device.type == "cpu" or len(self._pending) >= _READ_EVERY

    def read(self) -> str | None:
        """Adds the remembered losses to the sums; says so of one that is NaN or infinite.

        All are read at once: every number that is read by itself waits for the device.
        """
        pending, self._pending = self._pending, []
        scalars = [
            torch.as_tensor(value, device=self.device).reshape(())  # terms may be plain numbers
            for _, terms in pending
            for value in terms.values()
        ]
        values = iter(torch.stack(scalars).tolist() if scalars else ())
        for step, terms in pending:
            found = {name: next(values) for name in terms}
            if not math.isfinite(found["loss"]):
                shown = ", ".join(f"{name} {value:g}" for name, value in found.items())
                return f"the loss of step {step} is not finite ({shown})"
            for name, value in found.items():
                self.state.sums[name] = self.state.sums.get(name, 0.0) + value
            self.state.summed += 1
            self.latest = found
        return None

    def means(self) -> dict[str, float]:
        """Returns the means of all terms since the last call."""
        means = {name: value / self.state.summed for name, value in self.state.sums.items()}
        self.state.sums, self.state.summed = {}, 0
        return means


@contextlib.contextmanager
def record_log(
    folder: Path | None, step: int, callback: Callable[[Record], None] | None
) -> Iterator[Callable[[Record], None]]:
    """What passes every record on to TensorBoard, where it is installed, and to a callback.

    Args:
        folder: of the run; None for no TensorBoard events.
        step: from here on; events of later steps, of a session that was killed, are hidden.
        callback: called with every record; may be None.
    """
    writer = None
    if folder is not None:
        with contextlib.suppress(ImportError):
            tensorboard = importlib.import_module("torch.utils.tensorboard")
            writer = tensorboard.SummaryWriter(str(folder / "tensorboard"), purge_step=step)

    def log(record: Record) -> None:
        if callback is not None:
            callback(record)
        if writer is not None:
            for name in record.keys() - set(_NOT_PLOTTED):
                writer.add_scalar(f"untrain/{name}", record[name], int(record["step"]))

    try:
        yield log
    finally:
        if writer is not None:
            writer.close()


def write_history(folder: Path, config: UntrainConfig, history: list[Record]) -> None:
    """Writes ``history.json`` (with the settings) and ``history.csv``."""
    write_json(folder / "history.json", {"config": asdict(config), "history": history})
    columns = list(dict.fromkeys(name for record in history for name in record))
    write_csv(folder / "history.csv", history, columns)
