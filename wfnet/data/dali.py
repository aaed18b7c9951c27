"""NVIDIA DALI as the decoder: JPEG files become pixels on the GPU (or on the CPU, without one).

The geometry is that of `evaluation_transform`, computed for each image from its header; pixels
differ from Pillow's by a grey level or two, as decoders and resampling differ. An image that DALI
refuses is tried by Pillow, which says what is wrong with it.

https://docs.nvidia.com/deeplearning/dali, `pip install wfnet[dali]`.
"""

from __future__ import annotations

import io
import math
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wfnet.data.dataset import CorruptImage
from wfnet.data.encoded import EncodedImages
from wfnet.services.extras import require

Pixels = tuple[Tensor, Tensor, Tensor]  # [n, C, S, S] uint8, labels [n], indices [n]
Corrupt = list[tuple[str, str]]  # name and reason

# Batches that are read and decoded ahead of the one that is asked for.
_AHEAD = 2
_INTERPOLATIONS = {"nearest": "INTERP_NN", "bilinear": "INTERP_LINEAR", "bicubic": "INTERP_CUBIC"}


@dataclass(frozen=True)
class _Encoded:
    """The readable images of a request."""

    indices: list[int]
    files: list[np.ndarray]  # bytes
    extents: list[np.ndarray]  # resized (height, width), float32
    anchors: list[np.ndarray]  # (top, left) of the crop in the resized image, int64 as float32
    corrupt: Corrupt


class DaliReader:
    """Reads requests of an image data set through a DALI pipeline, in their order.

    size, interpolation, crop_pct: as for `evaluation_transform`.
    device:  where decoding happens and pixels end up.
    threads: of DALI's CPU stages.

    Raises ImportError without DALI, ValueError for an interpolation that DALI has not.
    """

    def __init__(
        self,
        size: int,
        interpolation: str,
        crop_pct: float,
        device: torch.device,
        threads: int = 4,
    ):
        self.dali = require("nvidia.dali", "dali")
        if interpolation not in _INTERPOLATIONS:
            raise ValueError(
                f"DALI has no interpolation {interpolation!r}: choose one of "
                f"{', '.join(_INTERPOLATIONS)}, or decode with Pillow"
            )
        self.size = size
        self.shorter = math.floor(size / crop_pct)
        self.interpolation = interpolation
        self.device = device
        self.threads = threads

    def read(
        self, dataset: EncodedImages, requests: Iterator[tuple[int, list[int]]], workers: int
    ) -> Iterator[tuple[Pixels | None, Corrupt]]:
        """For each (position, indices): pixels, labels and indices, and what was corrupt.

        `workers` threads read files; decoding has its own.
        """
        decoder = _Decoder(self, dataset)
        under_way: deque[Future] = deque()
        with ThreadPoolExecutor(1, "wfnet-dali") as decoding:
            for encoded in self._encoded(dataset, requests, max(1, workers)):
                under_way.append(decoding.submit(decoder.decode, encoded))
                if len(under_way) > _AHEAD:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()

    def _encoded(
        self, dataset: EncodedImages, requests: Iterator[tuple[int, list[int]]], workers: int
    ) -> Iterator[_Encoded]:
        """Files of each request, read ahead by threads."""
        with ThreadPoolExecutor(workers, "wfnet-read") as pool:
            under_way: deque[tuple[list[int], list[Future]]] = deque()
            for _, indices in requests:
                under_way.append((indices, [pool.submit(self._load, dataset, i) for i in indices]))
                if len(under_way) > _AHEAD:
                    yield self._gathered(*under_way.popleft())
            while under_way:
                yield self._gathered(*under_way.popleft())

    def _load(self, dataset: EncodedImages, index: int) -> Any:
        """Bytes, resized extent and crop of one image, or why not."""
        try:
            with dataset.open(index) as file:
                content = file.read()
            image = require("PIL.Image", "train").open(io.BytesIO(content))
            width, height = image.size
        except Exception as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            return dataset.name_of(index), str(error) or type(error).__name__
        short, long = min(width, height), max(width, height)
        longer = int(self.shorter * long / short)
        extent = (self.shorter, longer) if height <= width else (longer, self.shorter)
        # torchvision rounds half to even here, as Python does.
        anchor = [round((side - self.size) / 2.0) for side in extent]
        return (
            np.frombuffer(content, np.uint8),
            np.array(extent, np.float32),
            np.array(anchor, np.float32),
        )

    def _gathered(self, indices: list[int], loads: list[Future]) -> _Encoded:
        encoded = _Encoded([], [], [], [], [])
        for index, load in zip(indices, loads, strict=True):
            found = load.result()
            if len(found) == 2:
                encoded.corrupt.append(found)
                continue
            encoded.indices.append(index)
            encoded.files.append(found[0])
            encoded.extents.append(found[1])
            encoded.anchors.append(found[2])
        return encoded

    def pipeline(self, batch_size: int, channels: int) -> Any:
        """Bytes, extents and anchors to pixels, for up to `batch_size` images."""
        fn, types = require("nvidia.dali.fn", "dali"), require("nvidia.dali.types", "dali")
        on_gpu = self.device.type == "cuda"
        pipeline = self.dali.Pipeline(
            batch_size=batch_size,
            num_threads=self.threads,
            device_id=(self.device.index or 0) if on_gpu else None,
            prefetch_queue_depth=1,
            exec_async=False,  # a thread of ours decodes ahead, a batch at a time
            exec_pipelined=False,
        )
        with pipeline:
            files = fn.external_source(name="files", dtype=types.UINT8, ndim=1)
            extents = fn.external_source(name="extents", dtype=types.FLOAT, ndim=1)
            anchors = fn.external_source(name="anchors", dtype=types.FLOAT, ndim=1)
            images = fn.decoders.image(
                files,
                device="mixed" if on_gpu else "cpu",
                output_type=types.RGB if channels == 3 else types.GRAY,
                adjust_orientation=False,  # Pillow does not turn images by their metadata either
            )
            images = fn.resize(
                images,
                size=extents,
                interp_type=getattr(types, _INTERPOLATIONS[self.interpolation]),
                antialias=self.interpolation != "nearest",
            )
            images = fn.slice(
                images, anchors, [float(self.size)] * 2,
                axes=[0, 1], normalized_anchor=False, normalized_shape=False,
            )  # fmt: skip
            pipeline.set_outputs(fn.transpose(images, perm=[2, 0, 1]))
        pipeline.build()
        return pipeline


class _Decoder:
    """A pipeline of one read, made anew for larger batches and after errors."""

    def __init__(self, reader: DaliReader, dataset: EncodedImages):
        self.reader = reader
        self.dataset = dataset
        self.pipeline: Any = None
        self.largest = 0

    def decode(self, encoded: _Encoded) -> tuple[Pixels | None, Corrupt]:
        """Pixels, labels and indices of one request, and what was corrupt."""
        if not encoded.indices:
            return None, encoded.corrupt
        device = self.reader.device
        if len(encoded.indices) > self.largest:
            self.largest = len(encoded.indices)
            self.pipeline = self.reader.pipeline(self.largest, self.dataset.channels)
        try:
            self.pipeline.feed_input("files", encoded.files)
            self.pipeline.feed_input("extents", encoded.extents)
            self.pipeline.feed_input("anchors", encoded.anchors)
            (output,) = self.pipeline.run()
        except RuntimeError:  # DALI names no image and may be of no use any more; Pillow names it
            self.largest = 0
            return self._one_by_one(encoded)
        if device.type == "cuda":
            pixels = torch.from_dlpack(output.as_tensor()).clone()
            torch.cuda.current_stream(device).synchronize()  # of this thread, before reuse
        else:
            pixels = torch.from_numpy(np.array(output.as_tensor()))
        indices = torch.tensor(encoded.indices, dtype=torch.int64)
        return (pixels, self.dataset.labels[indices], indices), encoded.corrupt

    def _one_by_one(self, encoded: _Encoded) -> tuple[Pixels | None, Corrupt]:
        """The same request through the data set's own transform."""
        kept, pixels, corrupt = [], [], list(encoded.corrupt)
        for index in encoded.indices:
            try:
                pixels.append(self.dataset[index][0])
                kept.append(index)
            except CorruptImage as error:
                corrupt.append((error.name, error.reason))
        if not kept:
            return None, corrupt
        indices = torch.tensor(kept, dtype=torch.int64)
        stacked = torch.stack(pixels).to(self.reader.device)
        return (stacked, self.dataset.labels[indices], indices), corrupt
