"""Forget labels: what a caller may pass, how it is checked, and how it reaches the masked layers.

A *forget label* is the class that a sample's forward pass must behave as never having known; it
selects one row of every filter matrix. ``-1`` selects no row (the original model). Labels are
bound by :func:`forgetting` and read by every WF layer that runs inside.
"""

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor

ForgetLabels = int | Tensor | None


@dataclass(frozen=True)
class Selection:
    """Forget labels in the one form that layers and operators understand.

    Attributes:
        rows: ``[B, J]`` int64, padded with -1; ``[1, J]`` if ``uniform``; None: original model.
        uniform: one label for every sample of whatever batch comes (given as an integer).
        low, high: smallest and largest label where the values are known on the host, else None.
    """

    rows: Tensor | None
    uniform: bool = False
    low: int | None = None
    high: int | None = None

    def expand(self, batch: int, device: torch.device, num_classes: int) -> Tensor:
        """``[batch, J]`` labels on ``device``, or an error that says what does not fit."""
        if not torch.compiler.is_compiling():  # compiled code would be specialised on the values
            check_range(self.low, self.high, num_classes)
        rows = self.rows if self.rows.device == device else self.rows.to(device, non_blocking=True)
        if self.uniform:
            return rows.expand(batch, -1)
        if rows.shape[0] != batch:
            raise ValueError(
                f"{rows.shape[0]} forget labels were given for a batch of {batch} samples; "
                "give one label per sample, or one integer for all of them"
            )
        return rows


def select(forget: ForgetLabels | Selection) -> Selection:
    """Brings forget labels into the form of :class:`Selection`.

    Args:
        forget: an int (all samples), an integer tensor ``[]``, ``[B]`` or ``[B, J]`` (several
            labels at once, padded with -1), or None (the original model).

    Raises:
        TypeError: for bool, floating-point labels or other Python types.
        ValueError: for a tensor of more than two dimensions, or without a label per sample.
    """
    if isinstance(forget, Selection):
        return forget
    if forget is None:
        return Selection(None)
    if isinstance(forget, Integral) and not isinstance(forget, bool | int):
        forget = int(forget)  # numpy's integers
    if isinstance(forget, bool) or not isinstance(forget, int | Tensor):
        raise TypeError(
            "forget must be an int, an integer tensor [B] or [B, J], or None (the original "
            f"model); got {type(forget).__name__}; wrap sequences in torch.tensor(...)"
        )
    if isinstance(forget, int):
        return Selection(
            torch.tensor([[forget]], device="cpu"), uniform=True, low=forget, high=forget
        )
    if forget.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8):
        raise TypeError(f"forget labels must be integers (torch.int64); got {forget.dtype}")
    if forget.dim() > 2 or (forget.dim() == 2 and forget.shape[1] == 0):
        raise ValueError(
            f"forget labels must have shape [B] or [B, J] with J >= 1; got {list(forget.shape)}"
        )
    rows = forget.long()
    uniform = rows.dim() == 0
    if rows.dim() < 2:
        rows = rows.reshape(-1, 1)
    low = high = None
    if not torch.compiler.is_compiling() and rows.device.type == "cpu" and rows.numel():
        low, high = (int(v) for v in torch.aminmax(rows))
    return Selection(rows, uniform, low, high)


def check_range(low: int | None, high: int | None, num_classes: int) -> None:
    """Raises ValueError if host-known labels leave ``-1 .. num_classes - 1``."""
    for value in (low, high):
        if value is not None and not -1 <= value < num_classes:
            raise ValueError(
                f"forget label {value} is out of range: the filters have {num_classes} classes, "
                f"so labels run from 0 to {num_classes - 1}, and -1 selects the original model"
            )


def check_source(source: Tensor, images: int) -> None:
    """Raises ValueError unless ``source`` is a LongTensor ``[B]`` of positions among ``images``.

    The positions of a tensor on a device are not read: that would wait for the device.
    """
    if not isinstance(source, Tensor) or source.dim() != 1 or source.dtype != torch.int64:
        found = [*source.shape, source.dtype] if isinstance(source, Tensor) else type(source)
        raise ValueError(f"source must be a LongTensor [B]; got {found}")
    if source.device.type == "cpu" and source.numel() and not torch.compiler.is_compiling():
        low, high = (int(v) for v in torch.aminmax(source))
        if low < 0 or high >= images:
            raise ValueError(
                f"source must lie in 0 .. {images - 1} (positions in the batch of {images}); "
                f"got {low if low < 0 else high}"
            )


class _Active(threading.local):
    """The selection bound in this thread (None where no labels are bound), and the outer ones."""

    # Not attributes of the class: Dynamo of torch 2.11 reads those instead of the thread's own.
    def __init__(self) -> None:
        self.selection: Selection | None = None
        # (selection, outer): a chain, so that a context may nest in itself
        self.outer: tuple | None = None


_active = _Active()


def bound_selection() -> Selection | None:
    """The labels bound by the innermost :func:`forgetting`; None outside of any."""
    return _active.selection


def active_selection(layer: str = "a WF layer") -> Selection:
    """The labels bound by the innermost :func:`forgetting`.

    Raises:
        RuntimeError: outside any :func:`forgetting`; a layer that ran without its labels would
            silently be the original layer and give no gradients.
    """
    selection = _active.selection
    if selection is None:
        raise RuntimeError(
            f"{layer} ran without forget labels; call it inside `with wfnet.forgetting(labels):` "
            "(labels None for the original model), and give activation checkpointing "
            "`context_fn=wfnet.checkpoint_context` and `use_reentrant=False`"
        )
    return selection


class forgetting:
    """Binds forget labels for every WF layer called inside.

    Args:
        labels: int, LongTensor ``[B]``, LongTensor ``[B, J]``, or None for the original model.

    Example::

        with wfnet.forgetting(labels):
            y = conv(x)
    """

    def __init__(self, labels: ForgetLabels | Selection):
        self.selection = select(labels)

    def __enter__(self) -> None:
        _active.outer = (_active.selection, _active.outer)
        _active.selection = self.selection

    def __exit__(self, *exc: object) -> None:
        _active.selection, _active.outer = _active.outer


def checkpoint_context() -> tuple[AbstractContextManager, AbstractContextManager]:
    """``context_fn`` for :func:`torch.utils.checkpoint.checkpoint`: keeps labels for recomputation.

    Recomputation runs in backward, outside :func:`forgetting` and possibly in another thread.

    Returns:
        Contexts for the forward pass and for the recomputation.
    """
    selection = _active.selection
    return nullcontext(), nullcontext() if selection is None else forgetting(selection)


_patch = threading.Lock()
_patch_depth = 0


@contextmanager
def labels_in_checkpoints() -> Iterator[None]:
    """Makes :func:`checkpoint_context` the default ``context_fn`` of activation checkpointing.

    For networks that call ``torch.utils.checkpoint.checkpoint`` themselves and offer no way to
    pass a ``context_fn`` (timm's ``set_grad_checkpointing``). Reentrant checkpointing cannot carry
    a context, and torch says so.
    """
    global _patch_depth
    function = torch.utils.checkpoint.checkpoint
    defaults = getattr(function, "__wrapped__", function).__kwdefaults__
    with _patch:
        if _patch_depth == 0:
            defaults["context_fn"] = checkpoint_context
        _patch_depth += 1
    try:
        yield
    finally:
        with _patch:
            _patch_depth -= 1
            if _patch_depth == 0:
                defaults["context_fn"] = torch.utils.checkpoint.noop_context_fn


class DeferredLabelCheck:
    """Range check of labels that live on a device, without a synchronisation.

    :meth:`submit` queues the check behind the current stream; :meth:`poll` raises for checks that
    have finished; :meth:`wait` synchronises and raises for all. Until then a sample whose label is
    out of range holds NaN, so a wrong label is never a wrong number.
    """

    def __init__(self) -> None:
        self._pending: list[tuple[torch.cuda.Event, Tensor, int]] = []

    def submit(self, rows: Tensor, num_classes: int) -> None:
        if rows.device.type != "cuda" or not rows.numel() or _capturing():
            return
        with torch.cuda.device(rows.device):  # the event belongs behind the copy, on its device
            found = torch.empty(2, dtype=torch.int64, pin_memory=True)
            found.copy_(torch.stack(torch.aminmax(rows)), non_blocking=True)
            done = torch.cuda.Event()
            done.record()
        self._pending.append((done, found, num_classes))

    def poll(self) -> None:
        if self._pending and _capturing():  # asking an event would end the capture
            return
        while self._pending and self._pending[0][0].query():
            _, found, num_classes = self._pending.pop(0)
            check_range(int(found[0]), int(found[1]), num_classes)

    def wait(self) -> None:
        for done, _, _ in self._pending:
            done.synchronize()
        self.poll()

    def __reduce__(self) -> tuple:
        """A copy, or a pickled network, starts without pending checks: events cannot travel."""
        return DeferredLabelCheck, ()


def _capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
