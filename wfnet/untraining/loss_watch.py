"""Losses of the steps that were done: summed for the history, checked for being finite."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from wfnet.untraining.objectives import Losses
from wfnet.untraining.run_state import RunState

# Reading a loss waits for the device, so there they are read this many steps at a time.
_READ_EVERY = 25


@dataclass(frozen=True)
class NotFinite:
    """A loss that is NaN or infinite.

    Attributes:
        step: the step that gave it.
        values: its terms by name.
    """

    step: int
    values: dict[str, float]

    def __str__(self) -> str:
        shown = ", ".join(f"{name} {value:g}" for name, value in self.values.items())
        return f"the loss of step {self.step} is not finite ({shown})"


class LossWatch:
    """Collects the losses of steps, and reads them from the device a few steps at a time.

    Args:
        state: gets their sums.
        device: where they are.

    Attributes:
        latest: terms of the step that was last read.
    """

    def __init__(self, state: RunState, device: torch.device):
        self.state = state
        self.device = device
        self.latest: dict[str, float] = {}
        self._pending: list[tuple[dict[str, Tensor | float], int]] = []

    def add(self, losses: Losses, step: int) -> None:
        """Remembers the losses of a step."""
        self._pending.append(({"loss": losses.total.detach(), **losses.terms}, step))

    @property
    def due(self) -> bool:
        """Whether :meth:`read` is due: on the host always, elsewhere every few steps."""
        return self.device.type == "cpu" or len(self._pending) >= _READ_EVERY

    def read(self) -> NotFinite | None:
        """Adds the remembered losses to the sums; returns the first that is not finite, if any.

        All are read at once: every number that is read by itself waits for the device.
        """
        if not self._pending:
            return None
        scalars = [
            torch.as_tensor(value, device=self.device).reshape(())  # terms may be plain numbers
            for terms, _ in self._pending
            for value in terms.values()
        ]
        values = iter(torch.stack(scalars).tolist())
        pending, self._pending = self._pending, []
        for terms, step in pending:
            found = {name: next(values) for name in terms}
            if not math.isfinite(found["loss"]):
                return NotFinite(step, found)
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
