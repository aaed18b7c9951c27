"""What every evaluation does around its forward passes: modes kept, progress shown."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def evaluation_mode(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every module has the mode it had."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def as_input(images: Tensor, like: Tensor, channels_last: bool) -> Tensor:
    """``images [n, C, H, W]`` with device and dtype of ``like``, in the layout asked for."""
    layout = torch.channels_last if channels_last else torch.preserve_format
    return images.to(like.device, like.dtype, non_blocking=True, memory_format=layout)


class Progress:
    """One line on stderr: share done, pairs per second, time left.

    A terminal's line is rewritten; a log file gets a line every half minute.
    """

    def __init__(self, total: int, enabled: bool, what: str = "evaluating"):
        self.total, self.done, self.enabled, self.what = total, 0, enabled, what
        self.live = sys.stderr.isatty()
        self.interval = 0.2 if self.live else 30.0
        self.start = self.shown = time.perf_counter()

    def advance(self, count: int) -> None:
        self.done += count
        now = time.perf_counter()
        if self.enabled and now - self.shown >= self.interval:
            self.shown = now
            rate = self.done / (now - self.start)
            left = max(0, round((self.total - self.done) / rate))
            text = (
                f"{self.what} {self.done / self.total:4.0%}  {self.done:,}/{self.total:,} samples  "
                f"{rate:,.0f}/s  {left // 60}:{left % 60:02d} left"
            )
            print(f"\r{text:<78}" if self.live else text, end="" if self.live else "\n",
                  file=sys.stderr, flush=True)  # fmt: skip

    def close(self) -> None:
        if self.enabled and self.live and self.shown > self.start:
            print(f"\r{'':<78}\r", end="", file=sys.stderr, flush=True)
