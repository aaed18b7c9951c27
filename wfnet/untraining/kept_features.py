"""Features at the cut, kept: a run whose frozen front computes every image once.

What lies in front of the first mask does not change in a run, nor does what it makes of an image.
Where something lies there (masks in late layers alone), a run goes on with the rest of the network
and a store of features: on the device, on the host or on disk.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from wfnet.data import CorruptImages, Dataset, batches, labels_of
from wfnet.data.features import FeatureImages
from wfnet.data.row_store import SHARE, RowStore
from wfnet.evaluation.forward import Forward
from wfnet.network import WFNet
from wfnet.services.files import cache_folder, digest
from wfnet.split import SplitNetwork, split_network
from wfnet.untraining.objectives import full_precision
from wfnet.untraining.untrain_config import UntrainConfig

logger = logging.getLogger("wfnet")

_SHARE_UNASKED = 0.25  # of free memory that is taken where nobody has asked for a store
_LOOK_AT = 16  # images that are read twice, to see whether they are transformed at random
_TOGETHER = 64  # images whose original logits are computed at a time


@dataclass
class KeptFeatures:
    """The rest of a network, and features in the place of the images of a run.

    Attributes:
        split: the network in two parts.
        train, validation: features; validation: None without such images.
        corrupt: counts unreadable images.
    """

    split: SplitNetwork
    config: UntrainConfig
    train: FeatureImages
    validation: FeatureImages | None
    corrupt: CorruptImages

    @classmethod
    def of(
        cls,
        net: WFNet,
        train: Dataset,
        drawn: Callable[[], Tensor],
        validation: Dataset | None,
        looked_at: Tensor | None,
        config: UntrainConfig,
        corrupt: CorruptImages,
    ) -> KeptFeatures | None:
        """Makes the stores, still empty, or finds those on disk.

        Args:
            net: the whole network.
            train, validation: images.
            drawn, looked_at: positions of those that the run reads; ``drawn`` is asked if
                features can be kept.
            config: where features are kept, and in what dtype.
            corrupt: as in :func:`wfnet.data.batches`.

        Returns:
            None where ``config.features`` is "auto" and there is nothing to keep or no room.

        Raises:
            ValueError: where features are asked for and cannot be kept: the network has no frozen
                front, images are transformed at random without ``config.views``, or are not with
                it, or there is no room.
        """
        refusal, split = None, None
        forward = Forward.of(net, config.amp_dtype, config.channels_last)
        first = torch.arange(min(_LOOK_AT, len(labels_of(train))))
        passed = CorruptImages(len(labels_of(train)))  # the run may never read these images
        few = next(batches(train, [first], 0, passed, replace_corrupt=True)).images
        images = forward.images(few)
        with torch.no_grad(), forward.autocast():
            split = split_network(net, images)
            example = None if split is None else split.front(images[:2])
        if split is None:
            refusal = (
                "nothing frozen lies in front of its first mask, or torch.fx cannot trace it; "
                "mask late layers alone (mask_from, targets)"
            )
        elif _is_random(train, first, few, passed) == (config.views is None):
            refusal = "training images are the same each time: leave out views, or add augmentation"
            if config.views is None:
                refusal = (
                    "training images are transformed at random; say how many views of each image "
                    "are to be kept (views=4, --views 4), or leave out augmentation"
                )
        if refusal is None:
            net.image_shape = tuple(few.shape[1:])
            try:
                kept = [
                    None if dataset is None else _store(dataset, entries, split, example, part)
                    for dataset, entries, part in (
                        (train, _entries(drawn(), len(labels_of(train)), config.views), config),
                        (validation, looked_at, replace(config, views=None)),
                    )
                ]
            except ValueError as error:
                if config.features != "auto":
                    raise
                refusal = str(error)
        if refusal is not None:
            if config.features != "auto" or config.views is not None:
                raise ValueError(f"features cannot be kept: {refusal}")
            if split is not None:
                logger.info("features are not kept: %s", refusal)
            return None
        return cls(split, config, *kept, corrupt)

    @property
    def entries(self) -> int:
        """Features that the run asks for."""
        return sum(len(part.entries) for part in (self.train, self.validation) if part is not None)

    def fill(self) -> Iterator[int]:
        """Computes what is not there yet; yields the numbers of images, part by part."""
        config = self.config
        forward = Forward.of(self.split.net, config.amp_dtype, config.channels_last)

        def front(images: Tensor) -> Tensor:
            with torch.no_grad(), forward.autocast():
                return self.split.front(forward.images(images))

        pin = forward.device.type == "cuda"
        for part, replaced in ((self.train, True), (self.validation, False)):
            if part is not None:
                about = config.workers, self.corrupt, config.seed, replaced, pin
                yield from part.fill(front, *about)

    @torch.no_grad()
    def original_logits(self) -> Tensor | None:
        """``[len(train), K]`` of the original network, computed as a step would do it.

        None where they are more than the minibatches of the run ask for.
        """
        net, config, entries = self.split.net, self.config, self.train.entries
        if len(entries) > config.total_steps(self.train.images) * config.images:
            return None
        forward = Forward.of(net, config.amp_dtype, config.channels_last)
        found = []
        for part in entries.split(_TOGETHER):
            images = forward.images(self.train.batch(part).images)
            with forward.autocast():
                fused = net.fused_network(images) is not None
                found.append(full_precision(net(images, forget=-1 if fused else None)))
        logits = torch.cat(found)
        if len(logits) == len(self.train):
            return logits
        whole = logits.new_zeros(len(self.train), logits.shape[1])
        return whole.index_copy_(0, entries.to(logits.device), logits)


def _entries(drawn: Tensor, images: int, views: int | None) -> Tensor:
    return torch.cat([drawn + view * images for view in range(views or 1)])


def _is_random(dataset: Dataset, positions: Tensor, images: Tensor, corrupt: CorruptImages) -> bool:
    """Whether images differ from ``images`` when they are read as part of another minibatch."""
    again = batches(dataset, [positions], 0, corrupt, seed=1, start=1, replace_corrupt=True)
    return not torch.equal(next(again).images, images)


def _store(
    dataset: Dataset, entries: Tensor, split: SplitNetwork, example: Tensor, config: UntrainConfig
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
    return hashlib.sha256(f"{weights} {about}".encode()).hexdigest()[:32]
