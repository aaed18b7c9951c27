"""Measured winners: which backend was fastest for an operation, a shape, a dtype and a device.

``winners.json`` beside this file is written by ``benchmarks/bench_ops.py --winners`` from runs on a
real device, and holds nothing else: ``auto`` takes a backend other than ``eager`` only where a
measurement says so. Each entry keeps what it was measured with::

    {"op": "conv2d", "shape": "n512_56x56_64-64_3x3_s1x1_p1x1_d1x1", "dtype": "bfloat16",
     "device": "NVIDIA H100 80GB HBM3", "winner": "triton", "ms": {"eager": 1.9, "triton": 1.1},
     "torch": "2.11.0", "triton": "3.6.0", "commit": "0123abc"}

Shape keys are those of ``wfnet.kernels.config.ConvShape.key()`` and ``LinearShape.key()``.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from wfnet.backends import ConvGeometry

TABLE = Path(__file__).with_name("winners.json")
_FIELDS = ("op", "shape", "dtype", "device", "winner", "ms", "torch", "triton", "commit")


@functools.cache
def load(path: Path = TABLE) -> dict[tuple[str, str, str, str], str]:
    """The table as ``{(op, shape, dtype, device): winner}``.

    Raises:
        ValueError: if the file is not a list of complete entries.
    """
    try:
        entries = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    table = {}
    for position, entry in enumerate(entries):
        missing = [name for name in _FIELDS if name not in entry]
        if missing:
            raise ValueError(f"entry {position} of {path} lacks {', '.join(missing)}")
        table[entry["op"], entry["shape"], entry["dtype"], entry["device"]] = entry["winner"]
    return table


def winner(op: str, shape_key: str, dtype: str, device_name: str) -> str | None:
    """The backend that measured fastest, or None where nothing was measured.

    Args:
        op: ``conv2d`` or ``linear`` (forward and backward together).
        shape_key: ``ConvShape.key()`` or ``LinearShape.key()``.
        dtype: ``bfloat16``, ``float16`` or ``float32``.
        device_name: as ``torch.cuda.get_device_name`` has it.
    """
    return load().get((op, shape_key, dtype, device_name))


def winner_conv2d(x: Tensor, weight: Tensor, geometry: ConvGeometry, batch: int) -> str | None:
    """The winner for a convolution without groups of ``batch`` samples, on the device of ``x``."""
    from wfnet.kernels.config import ConvShape  # shape keys only

    shape = ConvShape(
        batch, x.shape[2], x.shape[3], x.shape[1], weight.shape[0], tuple(weight.shape[2:]),
        geometry.stride, geometry.padding, geometry.dilation,
    )  # fmt: skip
    return _winner_of("conv2d", shape.key(), x)


def winner_linear(x: Tensor, weight: Tensor, batch: int) -> str | None:
    """The winner for a linear map of ``batch`` samples, on the device of ``x``."""
    from wfnet.kernels.config import LinearShape

    shape = LinearShape(batch, x.shape[1], x.shape[2], weight.shape[0])
    return _winner_of("linear", shape.key(), x)


def _winner_of(op: str, key: str, x: Tensor) -> str | None:
    dtype = str(x.dtype).removeprefix("torch.")
    return winner(op, key, dtype, torch.cuda.get_device_name(x.device))
