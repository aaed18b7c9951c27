"""Reading batches in a given order; corrupt images are named, counted, and left out or replaced."""

import logging
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wfnet.data.dataset import Batch, CorruptImage, image_and_label, labels_of, name_of
from wfnet.services.ranks import Ranks

logger = logging.getLogger("wfnet")


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
        logger.warning(
            "corrupt image left out (%d of at most %d): %s: %s",
            len(self.found) + 1,
            self.limit,
            name,
            reason,
        )
        self._count(name, reason, "")

    def merge(self, ranks: Ranks) -> None:
        """Counts what the other processes of a run have found, and logged, on every one of them."""
        for found in ranks.gather(self.found):
            for name, reason in found.items():
                if name not in self.found:
                    self._count(name, reason, " on all ranks")

    def _count(self, name: str, reason: str, where: str) -> None:
        self.found[name] = reason
        if len(self.found) > self.limit:
            raise RuntimeError(
                f"{len(self.found)} corrupt images{where}, more than max_corrupt={self.limit}; the "
                f"last is {name} ({reason}): repair or remove them, or raise the limit"
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
        dataset: `wfnet.data.Dataset`, or anything whose items are (tensor [C, H, W], label), more
            after these two, or dictionaries of `image` and `label`.
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
        ValueError: for items that are not tensors of one shape.
        RuntimeError: past the limit of corrupt images, or if none of a class can be read.
        LostWorker: when a worker dies.
    """
    if workers < 0:
        raise ValueError(f"workers must be 0 or more, got {workers}")
    corrupt = corrupt_counter(dataset, max_corrupt)
    pin_memory = pin_memory and torch.cuda.is_available()
    requests = _requests(index_batches, len(dataset), start)
    if hasattr(dataset, "batch"):
        return _from_memory(dataset, requests, pin_memory)
    read = partial(
        _read, workers=workers, seed=seed, corrupt=corrupt, replace_corrupt=replace_corrupt
    )
    if hasattr(dataset, "stream"):
        return dataset.stream(requests, partial(read, floats=False), seed, pin_memory)
    return (batch for batch in read(dataset, requests, pin_memory=pin_memory) if batch is not None)


def _from_memory(
    dataset: Any, requests: Iterator[tuple[int, list[int]]], pin_memory: bool
) -> Iterator[Batch]:
    for _, indices in requests:
        batch = dataset.batch(torch.tensor(indices, dtype=torch.int64))
        yield Batch(*(part.pin_memory() for part in batch)) if pin_memory else batch


def _read(
    dataset: Any,
    requests: Iterator[tuple[int, list[int]]],
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
        collate_fn=_as_it_is,
        num_workers=workers,
        pin_memory=pin_memory,
        # Without a generator of its own the loader would draw from the caller's random state.
        generator=torch.Generator().manual_seed(seed),
    )
    for batch, left_out in _with_plain_errors(loader, workers):
        for name, reason in left_out:
            corrupt.add(name, reason)
        if batch is None and left_out and replace_corrupt:
            name, reason = left_out[-1]
            raise RuntimeError(
                f"no image of the class of {name} can be read ({reason}): repair them, or leave "
                "the class out"
            )
        yield None if batch is None else Batch(*batch)


def _with_plain_errors(loader: torch.utils.data.DataLoader, workers: int) -> Iterator[Any]:
    """Iterates over the loader; errors of its workers are raised as if they had been read here."""
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

    def __init__(self, dataset: Any, seed: int, replace_corrupt: bool, floats: bool):
        self.dataset = dataset
        self.floats = floats  # no bytes: they would reach the network unscaled
        self.seed = seed
        self.replace_corrupt = replace_corrupt
        try:
            self.labels = labels_of(dataset)
        except ValueError:  # only the items have labels
            self.labels = None

    def __getitem__(
        self, request: tuple[int, list[int]]
    ) -> tuple[tuple[Tensor, Tensor, Tensor] | None, list[tuple[str, str]]]:
        """Returns images, labels and indices, and names and reasons of corrupt images.

        None in place of a batch of which nothing remains, or in which an image has no replacement.
        """
        position, indices = request
        images, labels, found = [], [], []
        corrupt: list[tuple[str, str]] = []
        with _random_states_put_back():
            for index in indices:
                for candidate in self._candidates(index):
                    _seed_all(mixed_seed(self.seed, position, index))
                    item = self._item(candidate, corrupt)
                    if item is not None:
                        self._check(candidate, item[0], images)
                        images.append(item[0])
                        labels.append(self._label(candidate, item[1]))
                        found.append(candidate)
                        break
                else:
                    if self.replace_corrupt:
                        return None, corrupt
        if not images:
            return None, corrupt
        return (torch.stack(images), torch.tensor(labels), torch.tensor(found)), corrupt

    def _candidates(self, index: int) -> Iterator[int]:
        """Yields `index`, then what may replace it: the others of its class from there on."""
        yield index
        if self.replace_corrupt:
            labels = labels_of(self.dataset)
            same = (labels == labels[index]).nonzero().flatten()
            yield from same[same > index].tolist()
            yield from same[same < index].tolist()

    def _item(self, index: int, corrupt: list[tuple[str, str]]) -> tuple[Any, Any] | None:
        """Returns image and label; None for a corrupt image, which is added to `corrupt`."""
        try:
            item = self.dataset[index]
        except CorruptImage as error:
            corrupt.append((error.name, error.reason))
        except Exception as error:
            if not is_decoding_error(error):
                raise
            corrupt.append((name_of(self.dataset, index), str(error)))
        else:
            return image_and_label(item, name_of(self.dataset, index))
        return None

    def _label(self, index: int, label: Any) -> int:
        """The label of an item, which must be the one that is known without reading it."""
        if self.labels is not None and int(label) != self.labels[index]:
            raise ValueError(
                f"{name_of(self.dataset, index)} comes with label {int(label)}, but the labels of "
                f"{type(self.dataset).__name__} say {int(self.labels[index])}: give the data set "
                "an attribute `labels` with the labels that its items have"
            )
        return int(label)

    def _check(self, index: int, image: Any, images: list[Tensor]) -> None:
        if not isinstance(image, Tensor):
            raise ValueError(
                f"{name_of(self.dataset, index)} is a {type(image).__name__}, not a tensor: give "
                "the data set a transform that ends in a float32 tensor [C, H, W]"
            )
        if image.dim() != 3 or (self.floats and not image.is_floating_point()):
            raise ValueError(
                f"{name_of(self.dataset, index)} is {image.dtype} {list(image.shape)}: give the "
                "data set a transform that ends in a float32 tensor [C, H, W] (ToTensor, or "
                "ToDtype(torch.float32, scale=True))"
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
