"""The processes of one run, over `torch.distributed`: who is first, what they tell each other."""

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Result = TypeVar("Result")

# A rank that is silent for longer has failed or hangs; the others leave then.
TIMEOUT = datetime.timedelta(minutes=10)


class PeerFailed(RuntimeError):
    """Another rank has failed or gone; it says itself why."""


@contextlib.contextmanager
def _in_touch() -> Iterator[None]:
    """Turns the errors of a broken collective into one that says what happened."""
    try:
        yield
    except RuntimeError as error:  # DistError and all of its kinds
        if isinstance(error, PeerFailed):
            raise
        raise PeerFailed(
            "another process of this run has failed, left or hangs: its own message says why "
            f"({' '.join(str(error).split())[:200]})"
        ) from error


class Ranks:
    """The processes that share a run; one alone where `torch.distributed` is not initialised.

    Args:
        shared: False: this process alone, whatever others there are. With True every process must
            make its own at the same point.

    Attributes:
        rank, size: number of this process, and of all.
    """

    def __init__(self, shared: bool = True):
        self.size, self.rank, self.host = 1, 0, None
        if shared and dist.is_available() and dist.is_initialized():
            self.size, self.rank = dist.get_world_size(), dist.get_rank()
        if self.size > 1:
            # Messages between hosts never wait for a device, nor a device for them.
            self.host = dist.new_group(backend="gloo", timeout=TIMEOUT)

    @property
    def alone(self) -> bool:
        return self.size == 1

    @property
    def first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def share(self, items: Any) -> Any:
        """Every ``size``-th item of a sequence or tensor, from ``rank`` on."""
        return items[self.rank :: self.size]

    def first_does(self, action: Callable[[], Result]) -> Result:
        """The result of ``action`` on rank 0, on every rank; or its error.

        Raises:
            PeerFailed: on the other ranks, if it failed there.
        """
        if self.alone:
            return action()
        outcome: list[Any] = [None, ""]
        failure = None
        if self.first:
            try:
                outcome[0] = action()
            except Exception as error:
                failure, outcome[1] = error, f"{type(error).__name__}: {error}"
        with _in_touch():
            dist.broadcast_object_list(outcome, 0, group=self.host)
        if outcome[1]:
            raise failure or PeerFailed(f"rank 0 failed: {outcome[1]}")
        return outcome[0]

    def range(self, count: int) -> tuple[int, int]:
        """This rank's own part ``first .. last - 1`` of ``count`` items in order."""
        return count * self.rank // self.size, count * (self.rank + 1) // self.size

    @contextlib.contextmanager
    def first_ahead(self) -> Iterator[None]:
        """Rank 0 goes through the block first; the others find the files that it has written."""
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()

    def gather(self, value: Any) -> list[Any]:
        """What every rank has, on every rank, in the order of ranks."""
        if self.alone:
            return [value]
        found: list[Any] = [None] * self.size
        with _in_touch():
            dist.all_gather_object(found, value, group=self.host)
        return found

    def add(self, values: Tensor) -> Tensor:
        """Sums a tensor over ranks, in place; the result has the same bits on every rank."""
        if not self.alone:
            group = self.host if values.device.type == "cpu" else None
            with _in_touch():
                dist.all_reduce(values, group=group)
        return values

    def check_same(self, what: str, value: Any) -> None:
        """Raises ValueError unless ``value`` is the same on every rank."""
        for rank, other in enumerate(self.gather(value)):
            if other != value:
                raise ValueError(
                    f"rank {rank} has another {what} than rank {self.rank}: start every rank with "
                    "the same options, data and weights"
                )

    def join(self, parts: dict[int, Tensor], device: torch.device | str = "cpu") -> list[Tensor]:
        """The numbered tensors of all ranks on ``device``, in the order of their numbers."""
        if not self.alone:
            parts = {number: part.cpu() for number, part in parts.items()}
            parts = {k: v for own in self.gather(parts) for k, v in own.items()}
        return [parts[number].to(device) for number in sorted(parts)]

    def wait(self) -> None:
        """Returns when all ranks are here."""
        if not self.alone:
            with _in_touch():
                dist.barrier(group=self.host)


def launched() -> bool:
    """Whether torchrun (or what sets the same variables) started this process among others."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ)


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """Joins the other processes that torchrun started, and leaves them at the end.

    Args:
        device: of this process; NCCL for CUDA, gloo for the CPU.
    """
    if not launched() or (dist.is_available() and dist.is_initialized()):
        yield Ranks()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", timeout=TIMEOUT, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=TIMEOUT)
    yield Ranks()
    # Not after a failure: it would wait for ranks that are in a collective. They leave when this
    # process ends.
    dist.destroy_process_group()


def launched_rank() -> int:
    """The rank that torchrun gave this process; 0 without it."""
    return int(os.environ["RANK"]) if launched() else 0


def local_device(device: torch.device) -> torch.device:
    """The device of this process: of several CUDA devices, the one of its local rank."""
    if device.type == "cuda" and device.index is None and launched():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return device
