"""Copies from the host to a device for which the host does not wait.

A device works behind the host: while it computes one step, the host prepares the next. A copy from
pageable memory may end that, because it may wait for all the work queued before it. A copy from
page-locked (pinned) memory is queued as well.
"""

from functools import lru_cache

import torch
from torch import Tensor


def pinned_for(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns a page-locked copy of a host tensor for a CUDA ``device``; any other as it is.

    For labels and indices. Large tensors are better read into page-locked memory from the start
    (``pin_memory`` of :func:`wfnet.data.batches`) than copied there.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory()
    return tensor


def to_device_async(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Returns ``tensor.to(device)``, without waiting for a CUDA device."""
    device = torch.device(device)
    return pinned_for(tensor, device).to(device, non_blocking=True)


def to_device_overlapped(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Returns ``tensor.to(device)``, copied on a stream of its own while the device computes.

    On the stream of the computation the copy would wait for the step before. Work that is queued
    afterwards on the current stream waits for the copy. Only page-locked host tensors are copied
    that way; others are copied on the current stream.
    """
    device = torch.device(device)
    if device.type != "cuda" or tensor.device.type != "cpu" or not tensor.is_pinned():
        return tensor.to(device, non_blocking=True)
    copy_stream, current = _copy_stream(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(copy_stream):
        moved = tensor.to(device, non_blocking=True)
    current.wait_stream(copy_stream)
    moved.record_stream(current)  # its memory is not reused before that work is done
    return moved


@lru_cache(16)
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
