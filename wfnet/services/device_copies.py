"""Tensors on their way from the host to a device, for which the host does not wait.

A device works behind the host: while it computes one step, the host prepares the next. A copy from
ordinary memory may end that, because it may wait for all that the device was asked to do before.
From page-locked memory it is done when the device comes to it.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def ready_for(tensor: Tensor, device: torch.device) -> Tensor:
    """What a copy to ``device`` that does not wait reads: of host memory a page-locked copy.

    For labels and indices: what is large is better read into page-locked memory from the start
    (``pin_memory`` of :func:`wfnet.data.batches`) than copied there.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory()
    return tensor


def sent(tensor: Tensor, device: torch.device | str) -> Tensor:
    """``tensor.to(device)``, without waiting for a CUDA device."""
    device = torch.device(device)
    return ready_for(tensor, device).to(device, non_blocking=True)


def sent_beside(tensor: Tensor, device: torch.device | str) -> Tensor:
    """``tensor.to(device)`` beside what a CUDA device computes; later work there finds it whole.

    The copy has a stream of its own: in the stream of the work it would be done after the step
    before, while the device computes nothing. For tensors that are large, in page-locked memory;
    any other is sent as it is.
    """
    device = torch.device(device)
    if device.type != "cuda" or tensor.device.type != "cpu" or not tensor.is_pinned():
        return tensor.to(device, non_blocking=True)
    copying, working = _copying(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(copying):
        moved = tensor.to(device, non_blocking=True)
    working.wait_stream(copying)
    moved.record_stream(working)  # its memory is not given away before that work is done
    return moved


@lru_cache(16)
def _copying(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
