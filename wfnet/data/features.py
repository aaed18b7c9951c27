"""Features of images in the place of the images: what a network's frozen front makes of them.

They are computed once per image and kept (`wfnet.data.row_store`). A run of untraining then reads
neither files nor pixels: a minibatch is gathered from the store.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from wfnet.data.dataset import Batch, Dataset, classes_of, labels_of, name_of
from wfnet.data.loading import CorruptImages, batches
from wfnet.data.multi_hot import multi_hot_of
from wfnet.data.row_store import RowStore

_TOGETHER = 64  # images that go through the front at a time


class FeatureImages(torch.utils.data.Dataset):
    """A data set with features [...] in the place of images [C, H, W].

    dataset: of N images.
    store:   rows of features: one for each of `entries`, in their order, or for all.
    entries: [n] ascending, that will be asked for; of `views * N`. Entry `v * N + i` is view v of
             image i, and has its label.
    views:   how often each image is read, with other random transforms each time.
    """

    def __init__(self, dataset: Dataset, store: RowStore, entries: Tensor, views: int = 1):
        self.dataset, self.store, self.entries, self.views = dataset, store, entries, views
        labels, multi_hot = labels_of(dataset), multi_hot_of(dataset)
        self.images = len(labels)
        self.labels, self.classes = labels.repeat(views), classes_of(dataset)
        self.multi_hot = None if multi_hot is None else multi_hot.repeat(views, 1)
        # Of each entry; -1: it is not kept.
        self._rows = torch.full_like(self.labels, -1)
        whole = len(store) == len(self.labels)
        self._rows[entries] = entries if whole else torch.arange(len(entries))

    def __len__(self) -> int:
        return len(self.labels)

    def fill(
        self,
        front: Callable[[Tensor], Tensor],
        workers: int,
        corrupt: CorruptImages,
        seed: int,
        replace_corrupt: bool,
        pin_memory: bool = False,
    ) -> Iterator[int]:
        """Computes what is not in the store yet; yields the numbers of images, part by part.

        Args:
            front: images [n, C, H, W] to features [n, ...].
            workers, corrupt, replace_corrupt, pin_memory: as for `wfnet.data.batches`; a corrupt
                image that is not replaced is left out of every batch from then on.
            seed: of random transforms; every view has others.
        """
        missing = self.entries[~self.store.has(self._rows[self.entries])]
        for view in range(self.views):
            first = view * self.images
            # Of a single image some kernels round otherwise than of several.
            chunks = [
                chunk if len(chunk) > 1 else chunk.repeat(2)
                for chunk in missing[missing // self.images == view].split(_TOGETHER)
                if len(chunk)
            ]
            stream = batches(
                self.dataset,
                [chunk - first for chunk in chunks],
                workers,
                corrupt,
                pin_memory,
                seed,
                start=first,
                replace_corrupt=replace_corrupt,
            )
            for number, batch in enumerate(stream):
                read = chunks[number] if replace_corrupt else batch.indices + first
                self.store.put(self._rows[read], front(batch.images))
                yield len(read)

    def batch(self, indices: Tensor) -> Batch:
        """Features [n, ...], labels [n] and the entries [n] that they are of."""
        rows = self._rows[indices]
        there = self.store.has(rows)
        if not bool(there.all()):
            indices, rows = indices[there], rows[there]
        return Batch(self.store.get(rows), self.labels[indices], indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        batch = self.batch(torch.tensor([index]))
        return batch.images[0], int(batch.labels[0])

    def name_of(self, index: int) -> str:
        return name_of(self.dataset, index % self.images)
