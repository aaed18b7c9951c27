"""Reading batches in a given order; corrupt images are named, counted, and left out or replaced."""

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wfnet.data.dataset import (
    Batch,
    CorruptImage,
    image_and_label,
    is_decoding_error,
    is_table,
    labels_of,
    name_of,
)
from wfnet.services.log import logger
from wfnet.services.ranks import Ranks

# The position of a batch and its indices.
Request = tuple[int, list[int]]


class LostWorker(RuntimeError):
    """A process that reads images has died; reading again from the same position is safe."""


class CorruptImages:
    """The unreadable images met so far: each is logged and counted once, however often it is met.

    Hand the same object to several calls of `batches` to count over epochs and data sets.

    Attributes:
        limit: as soon as more are found, RuntimeError is raised.
        found: names and reasons.
    """

    def __init__(self, limit: int):
        if limit < 0:
            raise ValueError(f"max_corrupt must be 0 or more, got {limit}")
        self.limit = limit
        self.found: dict[str, str] = {}

    def add(self, name: str, reason: str) -> None:
        """Counts an image, and logs it the first time."""
        if name in self.found:
            return
        number = len(self.found) + 1
        logger.warning(
            "corrupt image left out (%d of at most %d): %s: %s", number, self.limit, name, reason
        )
        self._count({name: reason})

    def merge(self, ranks: Ranks) -> None:
        """Counts what the other processes of a run have found, and logged, on every one of them."""
        for found in ranks.gather(self.found):
            self._count(found)

    def _count(self, found: dict[str, str]) -> None:
        self.found.update(found)
        if len(self.found) > self.limit:
            name, reason = list(self.found.items())[-1]
            raise RuntimeError(
                f"{len(self.found)} corrupt images, more than max_corrupt={self.limit}; the last "
                f"is {name} ({reason}): repair or remove them, or raise the limit"
            )


def corrupt_limit(dataset: Any) -> int:
    """Returns how many corrupt images pass by default: 10, or one in a thousand."""
    return max(10, len(dataset) // 1000)


def corrupt_counter(dataset: Any, max_corrupt: int | CorruptImages | None) -> CorruptImages:
    """Returns the counter that several calls of `batches` share: `max_corrupt` itself, or a new one
    with this limit (None: `corrupt_limit(dataset)`)."""
    if isinstance(max_corrupt, CorruptImages):
        return max_corrupt
    return CorruptImages(corrupt_limit(dataset) if max_corrupt is None else max_corrupt)


def batches(
    dataset: Any,
    index_batches: Iterable[Tensor],
    workers: int = 0,
    max_corrupt: int | CorruptImages | None = None,
    pin_memory: bool = False,
    seed: int = 0,
    start: int = 0,
    replace_corrupt: bool = False,
) -> Iterator[Batch]:
    """Reads batches of a data set in exactly the order of `index_batches`.

    Args:
        dataset: `wfnet.data.Dataset`, or anything with labels (`labels_of`) whose items are
            (tensor [C, H, W], label) and perhaps more after these two.
        index_batches: LongTensor [n] (or lists of int) for each batch; may be endless. It is read a
            few batches ahead when there are workers.
        workers: processes that read files; 0 reads in this one. In-memory data sets (those with
            `batch(indices)`) are indexed directly and need none; cached ones (those with `stream`)
            need them for what is not in the cache yet.
        max_corrupt: how many distinct images may be corrupt; None: `corrupt_limit(dataset)`.
            A `CorruptImages` object counts over several calls.
        pin_memory: page-locked batches, for copies to a GPU that overlap with its work.
        seed, start: random transforms of an image in batch number p (counted from `start`) are
            drawn from (seed, p, index) alone: the same for any number of workers and of processes
            that share a batch, and a resumed run that passes its position as `start` repeats what
            it would have seen. The caller's random states are left as they are.
        replace_corrupt: for training: the next readable image of its class takes the place of a
            corrupt one, so that every batch has the size and the labels that were asked for;
            `indices` says what was read. False, for evaluation: corrupt images are left out, and a
            batch of which nothing remains is not yielded.

    Raises:
        IndexError: for indices outside the data set.
        ValueError: for items that are no image tensors, or whose labels are not those of `dataset`.
        RuntimeError: past the limit of corrupt images, if none of a class can be read, or for
            images of different shapes in a batch.
        LostWorker: when a worker dies.
    """
    corrupt = corrupt_counter(dataset, max_corrupt)
    pin_memory = pin_memory and torch.cuda.is_available()
    requests = _requests(index_batches, len(dataset), start)
    if hasattr(dataset, "batch") and not is_table(dataset):
        return _from_memory(dataset, requests, pin_memory)
    read = partial(
        _read, workers=workers, seed=seed, corrupt=corrupt, replace_corrupt=replace_corrupt
    )
    if hasattr(dataset, "stream"):
        return dataset.stream(requests, partial(read, floats=False), seed, pin_memory)
    return (batch for batch in read(dataset, requests, pin_memory=pin_memory) if batch is not None)


def _requests(index_batches: Iterable[Tensor], length: int, start: int) -> Iterator[Request]:
    for position, indices in enumerate(index_batches, start):
        indices = indices.tolist() if isinstance(indices, Tensor) else list(map(int, indices))
        for index in indices:
            if not 0 <= index < length:
                raise IndexError(f"index {index} is outside 0..{length - 1} ({length} images)")
        yield position, indices


def _from_memory(dataset: Any, requests: Iterator[Request], pin_memory: bool) -> Iterator[Batch]:
    for _, indices in requests:
        batch = dataset.batch(torch.tensor(indices, dtype=torch.int64))
        if indices and not len(batch.labels):  # corrupt, all of them
            continue
        yield Batch(*(p if p.is_cuda else p.pin_memory() for p in batch)) if pin_memory else batch


def _read(
    dataset: Any,
    requests: Iterator[Request],
    workers: int,
    seed: int,
    corrupt: CorruptImages,
    replace_corrupt: bool,
    pin_memory: bool,
    floats: bool = True,
) -> Iterator[Batch | None]:
    """Yields a batch for each request, in order; None where nothing remains."""
    loader = torch.utils.data.DataLoader(
        _Reader(dataset, seed, replace_corrupt, floats),
        batch_size=None,
        sampler=requests,
        num_workers=workers,
        pin_memory=pin_memory,
        # Without a generator of its own the loader would draw from the caller's random state.
        generator=torch.Generator().manual_seed(seed),
    )
    for batch, left_out, error in _until_lost(loader):
        for name, reason in left_out:
            corrupt.add(name, reason)
        if error is not None:
            raise error
        yield None if batch is None else Batch(*batch)


def _until_lost(loader: torch.utils.data.DataLoader) -> Iterator[Any]:
    """Iterates over the loader until one of its processes dies: between two batches, or with its
    last one on the way, which breaks the connection that hands shared memory on."""
    try:
        yield from loader
    except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
        of_dataset = str(error).startswith("Caught ")
        if of_dataset or (type(error) is RuntimeError and "exited unexpectedly" not in str(error)):
            raise
        raise LostWorker(
            "a data worker died, most often for lack of memory: use fewer workers, and check "
            f"/dev/shm and the system's log ({error})"
        ) from error


class _Reader(torch.utils.data.Dataset):
    """Reads one batch for each request, in a worker or in the main process.

    Corrupt images and errors travel with their batch: one process names and counts them all, and
    an error keeps its own message, to which the loader would add a traceback.
    """

    def __init__(self, dataset: Any, seed: int, replace_corrupt: bool, floats: bool):
        self.dataset = dataset
        self.floats = floats  # no bytes: they would reach the network unscaled
        self.seed = seed
        self.replace_corrupt = replace_corrupt
        self.labels = labels_of(dataset)

    def __getitem__(
        self, request: Request
    ) -> tuple[tuple[Tensor, Tensor, Tensor] | None, list[tuple[str, str]], Exception | None]:
        """Returns images, labels and indices, if any remain; names and reasons of corrupt images;
        an error."""
        corrupt: list[tuple[str, str]] = []
        try:
            with _random_states_put_back():
                items = [self._item(request[0], index, corrupt) for index in request[1]]
            items = [item for item in items if item is not None]
            if not items:
                return None, corrupt, None
            images, labels, found = zip(*items, strict=True)
            return (torch.stack(images), torch.tensor(labels), torch.tensor(found)), corrupt, None
        except (ValueError, OSError, EOFError, RuntimeError) as error:
            if type(error).__module__ != "builtins":  # it may not pass from process to process
                raise
            return None, corrupt, error

    def _item(
        self, position: int, index: int, corrupt: list[tuple[str, str]]
    ) -> tuple[Tensor, int, int] | None:
        """Returns image, label and index; None for an image that is left out."""
        for candidate in self._candidates(index):
            name = name_of(self.dataset, candidate)
            # What is random about an image does not depend on who reads it, or with what others.
            mixed = np.random.SeedSequence([self.seed % (1 << 63), position, index])
            _seed_all(int(mixed.generate_state(1)[0]))
            try:
                item = self.dataset[candidate]
            except CorruptImage as error:
                corrupt.append((error.name, error.reason))
            except Exception as error:
                if not is_decoding_error(error):
                    raise
                corrupt.append((name, str(error)))
            else:
                image, label = image_and_label(item, name)
                self._check(image, label, candidate, name)
                return image, label, candidate
        if self.replace_corrupt:
            name, reason = corrupt[-1]
            raise RuntimeError(
                f"no image of the class of {name} can be read ({reason}): repair them, or leave "
                "the class out"
            )
        return None

    def _candidates(self, index: int) -> Iterator[int]:
        """Yields `index`, then what may replace it: the others of its class from there on."""
        yield index
        if self.replace_corrupt:
            same = (self.labels == self.labels[index]).nonzero().flatten()
            yield from same[same > index].tolist()
            yield from same[same < index].tolist()

    def _check(self, image: Any, label: int, index: int, name: str) -> None:
        is_tensor = isinstance(image, Tensor)
        wrong_type = not is_tensor or (self.floats and not image.is_floating_point())
        if wrong_type or image.dim() != 3:
            what = f"{image.dtype} {list(image.shape)}" if is_tensor else type(image)
            raise ValueError(
                f"{name} is {what}: give the data set a transform that ends in a float32 tensor "
                "[C, H, W] (ToTensor, or ToDtype(torch.float32, scale=True))"
            )
        if label != self.labels[index]:
            raise ValueError(
                f"{name} comes with label {label}, but the labels of {type(self.dataset).__name__} "
                f"say {int(self.labels[index])}: give it `labels` that its items have"
            )


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
