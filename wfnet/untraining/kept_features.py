"""Features at the cut, kept: a run whose frozen front computes every image once.

What lies in front of the first mask does not change in a run, nor does what it makes of an image.
Where something lies there (masks in late layers alone), a run goes on with the rest of the network
and a store of features: on the device, on the host or on disk.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wfnet.data import (
    Batch,
    CorruptImages,
    Dataset,
    TensorImages,
    batches,
    classes_of,
    labels_of,
    multi_hot_of,
)
from wfnet.data.dataset import name_of
from wfnet.data.row_store import SHARE, RowStore, free_bytes
from wfnet.evaluation.forward import Forward
from wfnet.fusion.durable_run import DurableNetwork, KeptProducts, Product
from wfnet.fusion.plan import ConvStep
from wfnet.network import WFNet
from wfnet.services.files import cache_folder, digest, sha256
from wfnet.services.log import logger
from wfnet.split import SplitNetwork, split_network
from wfnet.untraining.objectives import full_precision
from wfnet.untraining.untrain_config import UntrainConfig

_SHARE_UNASKED = 0.25  # of free memory that is taken where nobody has asked for a store
_LOOK_AT = 16  # images that are read twice, to see whether they are transformed at random
_TOGETHER = 64  # images that go through the front, or for original logits, at a time


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
        self, front: Callable[[Tensor], Tensor], seed: int, replace_corrupt: bool, **reading: Any
    ) -> Iterator[int]:
        """Computes what is not in the store yet; yields the numbers of images, part by part.

        Args:
            front: images [n, C, H, W] to features [n, ...].
            seed: of random transforms; every view has others.
            replace_corrupt, reading: as for `wfnet.data.batches`; a corrupt image that is not
                replaced is left out of every batch from then on.
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
            about = {"seed": seed, "start": first, "replace_corrupt": replace_corrupt, **reading}
            stream = batches(self.dataset, [chunk - first for chunk in chunks], **about)
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


def keep_features(
    net: WFNet,
    train: Dataset,
    drawn: Callable[[], Tensor],
    validation: Dataset | None,
    looked_at: Tensor | None,
    config: UntrainConfig,
) -> tuple[SplitNetwork, list[FeatureImages]] | None:
    """Makes the stores of a run, still empty, or finds those on disk.

    Args:
        net: the whole network.
        train, validation: images.
        drawn, looked_at: positions of those that the run reads; ``drawn`` is asked if features can
            be kept.
        config: where features are kept, and in what dtype.

    Returns:
        The network in two parts, and features in the place of training images and of validation
        images, if there are any. None where ``config.features`` is "auto" and there is nothing to
        keep or no room.

    Raises:
        ValueError: where features are asked for and cannot be kept: the network has no frozen
            front, images are transformed at random without ``config.views``, or are not with it,
            or there is no room.
    """
    refusal, found = None, None
    forward, count = Forward.of(net, config.amp_dtype, config.channels_last), len(labels_of(train))
    first = torch.arange(min(_LOOK_AT, count))
    passed = CorruptImages(count)  # the run may never read these images
    few = next(batches(train, [first], 0, passed, replace_corrupt=True)).images
    images = forward.images(few)
    with torch.no_grad(), forward.autocast():
        split = split_network(net, images)
        example = None if split is None else split.front(images[:2])
    if split is None:
        refusal = (
            "nothing frozen lies in front of its first mask, or torch.fx cannot trace it; mask "
            "late layers alone (mask_from, targets)"
        )
    elif _is_random(train, first, few, passed) == (config.views is None):
        refusal = "training images are the same each time: leave out views, or add augmentation"
        if config.views is None:
            refusal = (
                "training images are transformed at random; say how many views of each image are "
                "to be kept (views=4, --views 4), or leave out augmentation"
            )
    else:
        net.image_shape = tuple(few.shape[1:])
        entries = torch.cat([drawn() + view * count for view in range(config.views or 1)])
        parts = [(train, entries, config)]
        if validation is not None:
            parts.append((validation, looked_at, replace(config, views=None)))
        try:
            found = split, [_store(*part, split, example) for part in parts]
        except ValueError as error:
            if config.features != "auto":
                raise
            refusal = str(error)
    if refusal is not None:
        if config.features != "auto" or config.views is not None:
            raise ValueError(f"features cannot be kept: {refusal}")
        if split is not None:
            logger.info("features are not kept: %s", refusal)
    return found


@torch.no_grad()
def original_logits(
    net: WFNet, dataset: Dataset, most: int, config: UntrainConfig
) -> Tensor | None:
    """The original network's logits ``[N, K]`` for all images, always in the same batches.

    None where neither images nor features of them are in memory, or may be transformed at random,
    or where they are more than ``most``, the images that a run reads.
    """
    if not isinstance(dataset, TensorImages | FeatureImages):
        return None
    every = torch.arange(len(dataset))
    kept = dataset.entries if isinstance(dataset, FeatureImages) else every
    if len(kept) > most:
        return None
    # As a step would compute them; durable rows are compared with the plain network.
    plain = net.gate == "durable"
    how = () if plain else (config.amp_dtype, config.channels_last)
    forward, whole = Forward.of(net, *how), None
    for part in kept.split(_TOGETHER):
        images = forward.images(dataset.batch(part).images)
        with forward.autocast():
            unfused = plain or net.fused_network(images) is None
            logits = full_precision(net(images, forget=None if unfused else -1))
        if whole is None:
            whole = logits.new_zeros(len(every), logits.shape[1])
        whole.index_copy_(0, part.to(logits.device), logits)
    return whole


@torch.no_grad()
def first_products(
    net: WFNet, dataset: TensorImages | FeatureImages, config: UntrainConfig
) -> KeptProducts | None:
    """What the first convolutions in front of durable gates make of all images.

    None where the network is not fused, or where they would take too much memory.
    """
    every = torch.arange(len(dataset))
    entries = dataset.entries if isinstance(dataset, FeatureImages) else every
    forward = Forward.of(net, config.amp_dtype, config.channels_last)
    kept: dict[ConvStep, Product] = {}
    for part in entries.split(_TOGETHER):
        images = forward.images(dataset.batch(part).images)
        with forward.autocast():
            network = net.fused_network(images)
            if not isinstance(network, DurableNetwork):
                return None
            found = network.first_products(images)
        if not kept:
            row = sum(t[0].nbytes for product in found.values() for t in product)
            if row * len(every) > _SHARE_UNASKED * free_bytes(images.device):
                return None
            # Pages that are never written to take no memory on the host.
            kept = {
                step: tuple(_rows_like(t, len(every)) for t in product)
                for step, product in found.items()
            }
        for step, product in found.items():
            for rows, new in zip(kept[step], product, strict=True):
                rows[part.to(new.device)] = new
    return KeptProducts(network, kept)


def _rows_like(t: Tensor, count: int) -> Tensor:
    """Memory for ``count`` rows as those of ``t``, in its layout."""
    last = t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    shape = (count, *t.shape[1:])
    return torch.empty(shape, dtype=t.dtype, device=t.device, memory_format=layout)


def _is_random(dataset: Dataset, positions: Tensor, images: Tensor, corrupt: CorruptImages) -> bool:
    """Whether images differ from ``images`` when they are read as part of another minibatch."""
    again = batches(dataset, [positions], 0, corrupt, seed=1, start=1, replace_corrupt=True)
    return not torch.equal(next(again).images, images)


def _store(
    dataset: Dataset, entries: Tensor, config: UntrainConfig, split: SplitNetwork, example: Tensor
) -> FeatureImages:
    """An empty store of features like ``example``, or the one that is on disk.

    Raises:
        ValueError: if there is no room, or images on disk could not be told from others.
    """
    place, share = config.features, SHARE
    if place == "auto":
        place, share = ("device" if example.is_cuda else "host"), _SHARE_UNASKED
    dtype = example.dtype if config.feature_dtype is None else getattr(torch, config.feature_dtype)
    views = config.views or 1
    rows, path = len(entries), None
    if place == "disk":
        rows = views * len(labels_of(dataset))
        path = Path(config.cache_dir or cache_folder(), f"features-{_key(dataset, split, config)}")
        path = path.with_suffix(f".{str(dtype).removeprefix('torch.')}")
    about = example.shape[1:], dtype, example.device, path
    store = RowStore(
        "features", place, rows, *about, needed=len(entries), checked=True, share=share
    )
    return FeatureImages(dataset, store, entries, views)


def _key(dataset: Dataset, split: SplitNetwork, config: UntrainConfig) -> str:
    """A digest of all that features depend on: images, preprocessing, weights, cut, dtypes."""
    if not hasattr(dataset, "versions"):
        raise ValueError(
            f"features on disk are found again by what {type(dataset).__name__} was made from, "
            "which it does not say (it has no versions()): keep them on the host or the device"
        )
    seed = None if config.views is None else config.seed
    about = [dataset.versions(), repr(getattr(dataset, "transform", None)), config.views, seed]
    # Its modules as they are printed: strides and paddings are neither code nor weights.
    about += [split.at, split.front.code, repr(split.front), config.amp, config.channels_last]
    weights = digest(split.front.state_dict())
    return sha256(f"{weights} {about}")[:32]
