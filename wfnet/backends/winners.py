"""Measured winners: which backend was fastest for an operation, a shape, a dtype and a device.

``winners.json`` beside this file is written by ``benchmarks/bench_ops.py --winners`` and
``benchmarks/bench_plan.py --winners`` from runs on a real device, and holds nothing else: ``auto``
takes a backend other than ``eager`` only where a measurement says so. ``WFNET_WINNERS=PATH`` names
a further table, of one's own device and networks, which comes first. Each entry keeps what it was
measured with::

    {"op": "conv2d", "shape": "n512_56x56_64-64_3x3_s1x1_p1x1_d1x1", "dtype": "bfloat16",
     "device": "NVIDIA H100 80GB HBM3", "winner": "triton", "ms": {"eager": 1.9, "triton": 1.1},
     "torch": "2.11.0", "triton": "3.6.0", "commit": "0123abc"}

``alone_ms``, where it is there, has the time of ``eager`` in a plan of its own, without the passes
that it takes beside kernels.

Shape keys are those of ``wfnet.kernels.config.ConvShape.key()`` and ``LinearShape.key()``. A batch
that was not measured takes the entry of the nearest one, by ratio.

========================= ==========================================================================
``conv2d``, ``linear``    a layer by itself, forward and backward together
``fused_conv2d``          a fused plan's convolution with all that follows
``conv2d_dgrad``          its input gradient, with the elementwise backward of the layer below
========================= ==========================================================================
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from wfnet.backends import ConvGeometry

TABLE = Path(__file__).with_name("winners.json")
_OWN = "WFNET_WINNERS"
FIELDS = ("op", "shape", "dtype", "device", "winner", "ms", "torch", "triton", "commit")
_BATCH = re.compile(r"[nb](\d+)_(.+)")

Entry = dict[str, object]


def read(path: Path = TABLE) -> list[Entry]:
    """The table as it was written.

    Raises:
        ValueError: if the file is not there, or not a list of complete entries.
    """
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(
            f"the table of winners {path} cannot be read: {error.strerror}; {_OWN} may name one "
            "that benchmarks/bench_plan.py has written"
        ) from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise ValueError(f"{path} is no table of winners: it must be a list of entries")
    for position, entry in enumerate(found):
        missing = [name for name in FIELDS if name not in entry]
        if missing:
            raise ValueError(f"entry {position} of {path} lacks {', '.join(missing)}")
        ms, winner = entry["ms"], entry["winner"]
        if not isinstance(ms, dict) or not all(
            isinstance(time, int | float) and time > 0 for time in ms.values()
        ):
            raise ValueError(f"entry {position} of {path}: ms must be milliseconds by backend")
        if winner not in ms:
            raise ValueError(f"entry {position} of {path}: its winner {winner!r} has no time")
    return found


@functools.cache
def _by_shape(
    path: Path, own: str | None
) -> dict[tuple[str, str, str, str], list[tuple[int, Entry]]]:
    """Entries with their batches, by operation, shape without the batch, dtype and device."""
    found: dict[tuple[str, str, str, str], dict[int, Entry]] = {}
    for table in (path, *([Path(own)] if own else [])):
        for entry in read(table):
            batch, rest = _split(entry["shape"])
            key = (entry["op"], rest, entry["dtype"], entry["device"])
            found.setdefault(key, {})[batch] = entry
    return {key: list(batches.items()) for key, batches in found.items()}


@functools.cache
def _devices(path: Path, own: str | None) -> frozenset[str]:
    """Names of all devices in the tables: asked at every run, where nothing was measured."""
    return frozenset(device for _, _, _, device in _by_shape(path, own))


def _split(shape_key: str) -> tuple[int, str]:
    """Batch and the rest of a shape's key."""
    parts = _BATCH.fullmatch(shape_key)
    return (max(int(parts[1]), 1), parts[2]) if parts else (1, shape_key)


def measured(op: str, shape_key: str, dtype: str, device_name: str) -> Entry | None:
    """The entry of a shape at the nearest batch; None where nothing was measured.

    Args:
        op: see the module.
        shape_key: ``ConvShape.key()`` or ``LinearShape.key()``.
        dtype: ``bfloat16``, ``float16`` or ``float32``.
        device_name: as ``torch.cuda.get_device_name`` has it.
    """
    batch, rest = _split(shape_key)
    batches = _by_shape(TABLE, os.environ.get(_OWN)).get((op, rest, dtype, device_name))
    if batches is None:
        return None
    return min(batches, key=lambda item: abs(math.log(item[0] / batch)))[1]


def know(device: torch.device) -> bool:
    """Whether anything was measured on a device like this one."""
    return device_name(device) in _devices(TABLE, os.environ.get(_OWN))


def winner(op: str, shape_key: str, dtype: str, device_name: str) -> str | None:
    """The backend that measured fastest, or None where nothing was; as :func:`measured`."""
    entry = measured(op, shape_key, dtype, device_name)
    return None if entry is None else entry["winner"]


def conv_key(
    input_shape: tuple[int, ...], weight: Tensor, geometry: ConvGeometry, batch: int
) -> str:
    """Key of a convolution without groups of ``[N, C, H, W]``, with ``batch`` samples."""
    from wfnet.kernels.config import ConvShape  # shape keys only

    shape = ConvShape(
        batch, input_shape[2], input_shape[3], input_shape[1], weight.shape[0],
        tuple(weight.shape[2:]), geometry.stride, geometry.padding, geometry.dilation,
    )  # fmt: skip
    return shape.key()


def winner_conv2d(x: Tensor, weight: Tensor, geometry: ConvGeometry, batch: int) -> str | None:
    """The winner for a convolution without groups of ``batch`` samples, on the device of ``x``."""
    key = conv_key(tuple(x.shape), weight, geometry, batch)
    return winner("conv2d", key, dtype_name(x.dtype), device_name(x.device))


def winner_linear(x: Tensor, weight: Tensor, batch: int) -> str | None:
    """The winner for a linear map of ``batch`` samples, on the device of ``x``."""
    from wfnet.kernels.config import LinearShape

    shape = LinearShape(batch, x.shape[1], x.shape[2], weight.shape[0])
    return winner("linear", shape.key(), dtype_name(x.dtype), device_name(x.device))


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16`` and so on, as the table has it."""
    return str(dtype).removeprefix("torch.")


def device_name(device: torch.device) -> str:
    """A CUDA device's name, as the table has it; ``cpu`` and so on for others."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
