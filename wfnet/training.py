"""Ordinary supervised training of a classifier: the networks that are untrained afterwards."""

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wfnet.data.loading import CorruptImages, batches, corrupt_limit
from wfnet.data.multi_hot import multi_hot_of
from wfnet.services.device_copies import to_device_async
from wfnet.services.progress import Progress

logger = logging.getLogger("wfnet")

LEARNING_RATES = {"adam": 4e-3, "sgd": 0.1}
# Arguments of `fit_classifier` for each of `wfnet.models.SMALL_MODELS`, chosen on the validation
# part of the digits.
SMALL_MODEL_SETTINGS: dict[str, dict[str, Any]] = {
    "resnet": {"epochs": 8},
    "vgg": {"epochs": 6},
    "vit": {"epochs": 25, "lr": 5e-3, "shift": 1},
}


@dataclass
class FitHistory:
    """What happened in training: one entry for each epoch."""

    loss: list[float] = field(default_factory=list)  # mean cross entropy
    accuracy: list[float] = field(default_factory=list)  # of the training images, 0..1
    seconds: float = 0.0


def fit_classifier(
    model: nn.Module,
    dataset: Any,
    epochs: int = 8,
    lr: float | None = None,
    seed: int = 0,
    *,
    batch_size: int = 64,
    optimizer: str = "adam",
    schedule: str = "one_cycle",
    weight_decay: float = 1e-3,
    label_smoothing: float = 0.0,
    shift: int = 0,
    workers: int = 0,
    max_corrupt: int | None = None,
    channels_last: bool = True,
    amp: str | None = None,
    progress: bool = True,
) -> FitHistory:
    """Train `model` in place to classify `dataset`; it is left in evaluation mode.

    Images with several labels (`wfnet.data.multi_hot`) are learned by binary cross entropy; their
    accuracy is the share of images whose largest logit is a true label.

    lr:        highest learning rate; None: 4e-3 for "adam" (AdamW), 0.1 for "sgd" (Nesterov).
    schedule:  "one_cycle" (warm-up over 25%, then cosine to about 0) or "cosine".
    shift:     images are moved by up to that many pixels, at random, edges repeated.
    channels_last: memory format of images and weights; faster convolutions on CPU and GPU.
    amp:       autocast dtype, "bfloat16" or None; weights and loss stay in fp32.
    progress:  show a bar on a terminal, or lines in a log.

    Deterministic given `seed`, the number of threads and the device; the caller's random state is
    left as it is. Raises ValueError for settings that make no sense and FloatingPointError at the
    end of the first epoch whose loss is not finite.
    """
    if optimizer not in LEARNING_RATES:
        raise ValueError(f"optimizer {optimizer!r} is unknown: choose adam or sgd")
    if schedule not in ("one_cycle", "cosine"):
        raise ValueError(f"schedule {schedule!r} is unknown: choose one_cycle or cosine")
    if amp not in (None, "bfloat16"):
        raise ValueError(f"amp {amp!r} is unknown: choose 'bfloat16' or None")
    if epochs < 1 or batch_size < 2 or shift < 0:
        raise ValueError(
            "epochs must be 1 or more, batch_size 2 or more and shift 0 or more, got "
            f"{epochs}, {batch_size} and {shift}"
        )
    if len(dataset) < 2:
        raise ValueError(f"training needs at least 2 images, the data set has {len(dataset)}")
    lr = LEARNING_RATES[optimizer] if lr is None else lr
    device = next(model.parameters()).device
    if channels_last:
        model.to(memory_format=torch.channels_last)
    steps = epochs * _batches_per_epoch(len(dataset), batch_size)
    stepper = _optimizer(model, optimizer, lr, weight_decay)
    scheduler = _schedule(stepper, schedule, lr, steps)
    generator = torch.Generator().manual_seed(seed)
    multi_hot = multi_hot_of(dataset)
    corrupt = CorruptImages(corrupt_limit(dataset) if max_corrupt is None else max_corrupt)
    history = FitHistory()
    started = time.perf_counter()
    bar = Progress(steps, "training", progress)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)  # dropout
        model.train()
        for epoch in range(epochs):
            order = _epoch_order(len(dataset), batch_size, generator)
            loss_sum = torch.zeros((), device=device, dtype=torch.float64)
            correct = torch.zeros((), device=device, dtype=torch.int64)
            seen = 0
            stream = batches(
                dataset,
                order,
                workers,
                corrupt,
                pin_memory=device.type == "cuda",
                seed=seed,
                start=epoch * _batches_per_epoch(len(dataset), batch_size),
                replace_corrupt=True,
            )
            for batch in stream:
                images, labels = (
                    to_device_async(part, device) for part in (batch.images, batch.labels)
                )
                if shift:
                    images = shift_images(images, shift, generator)
                if channels_last:
                    images = images.contiguous(memory_format=torch.channels_last)
                with _autocast(device, amp):
                    logits = model(images)
                if amp is not None:
                    logits = logits.float()
                if multi_hot is None:
                    loss = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
                    right = logits.detach().argmax(1) == labels
                else:
                    truth = multi_hot[batch.indices].to(device)
                    loss = F.binary_cross_entropy_with_logits(logits, truth.float())
                    right = _named_right(logits.detach(), truth)
                stepper.zero_grad(set_to_none=True)
                loss.backward()
                stepper.step()
                scheduler.step()
                loss_sum += loss.detach().double() * len(labels)
                correct += right.sum()
                seen += len(labels)
                bar.update(1)
            history.loss.append(float(loss_sum) / max(seen, 1))
            history.accuracy.append(int(correct) / max(seen, 1))
            if not math.isfinite(history.loss[-1]):
                bar.close()
                raise FloatingPointError(
                    f"the loss became {history.loss[-1]} in epoch {epoch + 1}: lower lr ({lr:g})"
                )
            bar.set_postfix(loss=f"{history.loss[-1]:.3f}", accuracy=f"{history.accuracy[-1]:.2%}")
    bar.close()
    model.eval()
    history.seconds = time.perf_counter() - started
    logger.info(
        "trained %d epochs in %.1f s: loss %.4f, training accuracy %.2f%%",
        epochs,
        history.seconds,
        history.loss[-1],
        100 * history.accuracy[-1],
    )
    return history


def _autocast(device: torch.device, amp: str | None) -> torch.autocast:
    dtype = None if amp is None else getattr(torch, amp)
    return torch.autocast(device.type, dtype, enabled=amp is not None)


@torch.no_grad()
def accuracy(
    model: nn.Module,
    dataset: Any,
    batch_size: int = 256,
    workers: int = 0,
    amp: str | None = None,
) -> float:
    """The fraction of `dataset` whose largest logit is the label, in evaluation mode.

    The model's mode is put back after. Raises ValueError for an empty data set.
    """
    if len(dataset) == 0:
        raise ValueError("the accuracy of an empty data set is not defined")
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    correct = seen = 0
    multi_hot = multi_hot_of(dataset)
    order, pin = torch.arange(len(dataset)).split(batch_size), device.type == "cuda"
    for batch in batches(dataset, order, workers, pin_memory=pin):
        images = to_device_async(batch.images, device).contiguous(memory_format=torch.channels_last)
        with _autocast(device, amp):
            logits = model(images).cpu()
        if multi_hot is None:
            correct += int((logits.argmax(1) == batch.labels).sum())
        else:
            correct += int(_named_right(logits, multi_hot[batch.indices]).sum())
        seen += len(batch.labels)
    model.train(was_training)
    return correct / max(seen, 1)


def _named_right(logits: Tensor, truth: Tensor) -> Tensor:
    """[n] bool: whether the largest of `logits` [n, K] is a true label by `truth` [n, K] bool."""
    return truth.gather(1, logits.argmax(1, keepdim=True)).squeeze(1)


def shift_images(images: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Move every image of [n, C, H, W] by up to `most` pixels each way, edges repeated."""
    n, _, height, width = images.shape
    offsets = torch.randint(0, 2 * most + 1, (n, 2), generator=generator).to(images.device)
    padded = F.pad(images, [most] * 4, mode="replicate")
    rows = offsets[:, :1] + torch.arange(height, device=images.device)  # [n, H]
    columns = offsets[:, 1:] + torch.arange(width, device=images.device)  # [n, W]
    sample = torch.arange(n, device=images.device)
    moved = padded.permute(0, 2, 3, 1)[sample[:, None, None], rows[:, :, None], columns[:, None]]
    return moved.permute(0, 3, 1, 2)


def _batches_per_epoch(length: int, batch_size: int) -> int:
    full, rest = divmod(length, batch_size)
    return full + (1 if rest > 1 else 0)


def _epoch_order(length: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Shuffled index batches; a last batch of one is left out, because BatchNorm needs two."""
    order = torch.randperm(length, generator=generator)
    return (part for part in order.split(batch_size) if len(part) > 1)


def _optimizer(
    model: nn.Module, name: str, lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Weight decay on matrices and kernels only, not on biases and normalisation."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if name == "adam":
        return torch.optim.AdamW(groups, lr=lr)
    return torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True)


def _schedule(
    optimizer: torch.optim.Optimizer, name: str, lr: float, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    if name == "one_cycle":
        return torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=lr, total_steps=steps, pct_start=0.25, cycle_momentum=False
        )
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=0.01 * lr)
