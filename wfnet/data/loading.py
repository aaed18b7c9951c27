"""Reading batches in a given order, with corrupt images left out, named and counted."""

import logging
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wfnet.data.dataset import Batch, CorruptImage, name_of

logger = logging.getLogger("wfnet")


class LostWorker(RuntimeError):
    """A process that reads images has died; reading again from the same position is safe."""


class CorruptImages:
    """The corrupt images met so far: each is logged once, and counts once however often it is met.

    Hand the same object to several calls of `batches` to count over epochs and data sets.
    `found` maps names to reasons. Raises RuntimeError as soon as more than `limit` are found.
    """

    def __init__(self, limit: int):
        if limit < 0:
            raise ValueError(f"max_corrupt must be 0 or more, got {limit}")
        self.limit = limit
        self.found: dict[str, str] = {}

    def add(self, name: str, reason: str) -> None:
        if name in self.found:
            return
        self.found[name] = reason
        logger.warning(
            "corrupt image left out (%d of at most %d): %s: %s",
            len(self.found),
            self.limit,
            name,
            reason,
        )
        if len(self.found) > self.limit:
            raise RuntimeError(
                f"{len(self.found)} corrupt images, more than max_corrupt={self.limit}; the last "
                f"is {name} ({reason}): repair or remove them, or raise the limit"
            )


def corrupt_limit(dataset: Any) -> int:
    """How many corrupt images pass unless the caller says otherwise: 10, or one in a thousand."""
    return max(10, len(dataset) // 1000)


def batches(
    dataset: Any,
    index_batches: Iterable[Tensor],
    workers: int = 0,
    max_corrupt: int | CorruptImages | None = None,
    pin_memory: bool = False,
    seed: int = 0,
    start: int = 0,
) -> Iterator[Batch]:
    """Read batches of a data set in exactly the order of `index_batches`.

    dataset:       `wfnet.data.Dataset`, or anything whose items are (tensor [C, H, W], label).
    index_batches: LongTensor [n] (or lists of int) for each batch; may be endless. It is read a few
                   batches ahead when there are workers.
    workers:       processes that read files; 0 reads in this one. In-memory data sets (those with
                   `batch(indices)`) are indexed directly and need none; cached ones (those with
                   `stream`) need them for what is not in the cache yet.
    max_corrupt:   how many distinct images may be corrupt; None: `corrupt_limit(dataset)`.
                   A `CorruptImages` object counts over several calls.
    pin_memory:    page-locked batches, for copies to a GPU that overlap with its work.
    seed, start:   random transforms of an image in batch number p (counted from `start`) are drawn
                   from (seed, p, index) alone: the same for any number of workers and of processes
                   that share a batch, and a resumed run that passes its position as `start`
                   repeats what it would have seen. The caller's random states are left as they are.

    Corrupt images are left out of their batch and a batch of which nothing remains is not yielded.
    Raises IndexError for indices outside the data set, ValueError for items that are not tensors
    of one shape, RuntimeError past the limit of corrupt images, LostWorker when a worker dies.
    """
    if workers < 0:
        raise ValueError(f"workers must be 0 or more, got {workers}")
    if max_corrupt is None:
        max_corrupt = corrupt_limit(dataset)
    corrupt = max_corrupt if isinstance(max_corrupt, CorruptImages) else CorruptImages(max_corrupt)
    return _batches(dataset, index_batches, workers, corrupt, pin_memory, seed, start)


def _batches(
    dataset: Any,
    index_batches: Iterable[Tensor],
    workers: int,
    corrupt: CorruptImages,
    pin_memory: bool,
    seed: int,
    start: int,
) -> Iterator[Batch]:
    pin_memory = pin_memory and torch.cuda.is_available()
    requests = _requests(index_batches, len(dataset), start)
    if hasattr(dataset, "batch"):
        for _, indices in requests:
            batch = dataset.batch(torch.tensor(indices, dtype=torch.int64))
            yield Batch(*(part.pin_memory() for part in batch)) if pin_memory else batch
        return
    if hasattr(dataset, "stream"):
        read = partial(_read, workers=workers, seed=seed)
        yield from dataset.stream(requests, read, corrupt.add, workers, seed, pin_memory)
        return
    for batch, left_out in _read(dataset, requests, workers, pin_memory, seed):
        for name, reason in left_out:
            corrupt.add(name, reason)
        if batch is not None:
            yield Batch(*batch)


def _read(
    dataset: Any,
    requests: Iterator[tuple[int, list[int]]],
    workers: int,
    pin_memory: bool,
    seed: int,
) -> Iterator[tuple[tuple[Tensor, Tensor, Tensor] | None, list[tuple[str, str]]]]:
    """For each request images, labels and indices (None: none remained), and corrupt images."""
    loader = torch.utils.data.DataLoader(
        _Reader(dataset, seed),
        batch_size=None,
        sampler=requests,
        collate_fn=_as_it_is,
        num_workers=workers,
        pin_memory=pin_memory,
        # Without a generator of its own the loader would draw from the caller's random state.
        generator=torch.Generator().manual_seed(seed),
    )
    try:
        yield from loader
    except Exception as error:
        if workers and _is_lost_worker(error):
            raise LostWorker(
                "a data worker died, most often for lack of memory: use fewer workers, and check "
                f"/dev/shm and the system's log ({error})"
            ) from error
        plain = _as_raised_there(error)
        if plain is error:
            raise
        raise plain from error


def _as_raised_there(error: Exception) -> Exception:
    """An error of a worker with its own message alone: the loader puts the traceback in its place.

    Everything else is returned as it is.
    """
    text = str(error).strip()
    if not text.startswith("Caught ") or "DataLoader worker process" not in text:
        return error
    message = text.splitlines()[-1]
    kind, _, own = message.partition(": ")
    same = kind.rpartition(".")[2] == type(error).__name__
    try:
        return type(error)(own if same else message)
    except TypeError:  # an error that takes other arguments
        return error


def _is_lost_worker(error: Exception) -> bool:
    """Whether an error of the loader means that one of its processes is gone.

    It dies between two batches, or with its last one on the way: then the connection over which
    the shared memory is handed on breaks. What a data set raises arrives as "Caught ...".
    """
    if isinstance(error, RuntimeError):
        return "DataLoader worker" in str(error) and "exited unexpectedly" in str(error)
    gone = isinstance(error, ConnectionError | EOFError | FileNotFoundError)
    return gone and not str(error).startswith("Caught ")


def _requests(
    index_batches: Iterable[Tensor], length: int, start: int
) -> Iterator[tuple[int, list[int]]]:
    """(position, indices) for each batch, checked: workers would report errors less plainly."""
    for position, indices in enumerate(index_batches, start):
        indices = indices.tolist() if isinstance(indices, Tensor) else list(map(int, indices))
        for index in indices:
            if not 0 <= index < length:
                raise IndexError(f"index {index} is outside 0..{length - 1} ({length} images)")
        yield position, indices


def _as_it_is(item: Any) -> Any:
    return item


class _Reader(torch.utils.data.Dataset):
    """Reads one batch for each request, in a worker or in the main process.

    The corrupt images travel with their batch, so that one process names and counts them all.
    """

    def __init__(self, dataset: Any, seed: int):
        self.dataset = dataset
        self.seed = seed

    def __getitem__(
        self, request: tuple[int, list[int]]
    ) -> tuple[tuple[Tensor, Tensor, Tensor] | None, list[tuple[str, str]]]:
        position, indices = request
        images, labels, kept, corrupt = [], [], [], []
        with _random_states_put_back():
            for index in indices:
                _seed_all(mixed_seed(self.seed, position, index))
                try:
                    image, label = self.dataset[index]
                except CorruptImage as error:
                    corrupt.append((error.name, error.reason))
                    continue
                except Exception as error:
                    if not is_decoding_error(error):
                        raise
                    corrupt.append((name_of(self.dataset, index), str(error)))
                    continue
                self._check(index, image, images)
                images.append(image)
                labels.append(int(label))
                kept.append(index)
        if not images:
            return None, corrupt
        return (torch.stack(images), torch.tensor(labels), torch.tensor(kept)), corrupt

    def _check(self, index: int, image: Any, images: list[Tensor]) -> None:
        if not isinstance(image, Tensor):
            raise ValueError(
                f"{name_of(self.dataset, index)} is a {type(image).__name__}, not a tensor: give "
                "the data set a transform that ends in a float32 tensor [C, H, W]"
            )
        if images and image.shape != images[0].shape:
            raise ValueError(
                f"{name_of(self.dataset, index)} has shape {list(image.shape)} and others of its "
                f"batch {list(images[0].shape)}: give the data set a transform with one size"
            )


def is_decoding_error(error: Exception) -> bool:
    """Whether an error of an image decoder says "this file is damaged".

    Pillow raises OSError without an errno for damaged data (SyntaxError for some PNG files); an
    OSError with an errno comes from the system (a lost disk, too many open files) and is no
    property of the image.
    """
    if isinstance(error, OSError):
        return error.errno is None
    return isinstance(error, SyntaxError) or type(error).__name__ == "DecompressionBombError"


def mixed_seed(seed: int, position: int, index: int) -> int:
    """The seed of what is random about image `index` in batch `position`: whoever reads it, and
    with whatever other images."""
    mixed = np.random.SeedSequence([seed % (1 << 63), position, index])
    return int(mixed.generate_state(1)[0])


def _seed_all(seed: int) -> None:
    torch.random.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002, transforms use these


@contextmanager
def _random_states_put_back() -> Iterator[None]:
    """Puts the states of torch, numpy and random back as they were."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
