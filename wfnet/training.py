"""Ordinary supervised training of a classifier: the networks that are untrained afterwards."""

import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wfnet.data.loading import CorruptImages, batches, corrupt_counter
from wfnet.data.multi_hot import label_loss, truth_of
from wfnet.evaluation.forward import Forward
from wfnet.head import first_output
from wfnet.services import settings
from wfnet.services.device_copies import to_device_async
from wfnet.services.layout import safe_layout
from wfnet.services.log import logger
from wfnet.services.modes import evaluation_mode
from wfnet.services.progress import Progress
from wfnet.services.settings import check_settings, setting

LEARNING_RATES = {"adam": 4e-3, "sgd": 0.1}
# Arguments of `fit_classifier` for each of `wfnet.models.SMALL_MODELS`, chosen on the validation
# part of the digits.
SMALL_MODEL_SETTINGS: dict[str, dict[str, Any]] = {
    "resnet": {"epochs": 8},
    "vgg": {"epochs": 6},
    "vit": {"epochs": 25, "lr": 5e-3, "shift": 1},
}


@dataclass(frozen=True)
class TrainingSettings:
    """What `fit_classifier` takes of the optimisation; `wfnet train --help` has these texts.

    Attributes:
        epochs: passes over the images
        lr: highest learning rate
        optimizer: AdamW, or Nesterov SGD
        schedule: of the learning rate
        batch_size: images of a minibatch
        weight_decay: of kernels and matrices
        label_smoothing: of labels
        shift: images are moved by up to that many
        amp, seed: autocast dtype, and what decides all that is random

    Raises ValueError for values out of range.
    """

    epochs: int = setting(8, settings.positive_int)
    lr: float | None = setting(None, settings.positive_float)
    optimizer: str = setting("adam", tuple(LEARNING_RATES), flags="--opt")
    schedule: str = setting("one_cycle", ("one_cycle", "cosine"), flags="--sched")
    batch_size: int = setting(64, settings.pair_batch_size, flags="-b --batch-size")
    weight_decay: float = setting(1e-3, settings.non_negative_float)
    label_smoothing: float = setting(0.0, settings.below_one, flags="--smoothing")
    shift: int = setting(0, settings.int_from(0, 1024), metavar="PIXELS")
    amp: str | None = setting(None, ("bfloat16",))
    seed: int = setting(0, settings.seed)

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def amp_dtype(self) -> torch.dtype | None:
        return None if self.amp is None else getattr(torch, self.amp)


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
    workers: int = 0,
    max_corrupt: int | None = None,
    channels_last: bool = True,
    progress: bool = True,
    **settings: Any,
) -> FitHistory:
    """Trains `model` in place to classify `dataset`; it is left in evaluation mode.

    Images with several labels (`wfnet.data.multi_hot`) are learned by binary cross entropy; their
    accuracy is the share of images whose largest logit is a true label. The result is deterministic
    given `seed`, the number of threads and the device; the caller's random state is left as it is.

    Args:
        model: a classifier, images [n, C, H, W] -> logits [n, K], on any device.
        dataset: see `wfnet.data`; an unreadable image is replaced by the next one of its class.
        lr: highest learning rate; None: 4e-3 for "adam" (AdamW), 0.1 for "sgd" (Nesterov).
        workers, max_corrupt: as in `wfnet.data.batches`.
        channels_last: memory format of images and weights; faster convolutions on CPU and GPU.
        progress: show a bar on a terminal, or lines in a log.
        settings: other fields of `TrainingSettings`. Schedule "one_cycle" warms up over 25% of the
            steps, then follows a cosine to about 0. Shifted images repeat their edges. With `amp`,
            weights and loss stay in fp32.

    Raises:
        ValueError: for settings that make no sense.
        FloatingPointError: at the end of the first epoch whose loss is not finite.
    """
    chosen = TrainingSettings(epochs=epochs, lr=lr, seed=seed, **settings)
    if len(dataset) < 2:
        raise ValueError(f"training needs at least 2 images, the data set has {len(dataset)}")
    lr = LEARNING_RATES[chosen.optimizer] if lr is None else lr
    if channels_last:
        model.to(memory_format=torch.channels_last)
    forward = Forward.of(model, chosen.amp_dtype, channels_last)
    device, size = forward.device, chosen.batch_size
    # A last batch of one is left out, because BatchNorm needs two.
    per_epoch = len(dataset) // size + (len(dataset) % size > 1)
    stepper = _optimizer(model, chosen.optimizer, lr, chosen.weight_decay)
    scheduler = _schedule(stepper, chosen.schedule, lr, epochs * per_epoch)
    generator = torch.Generator().manual_seed(seed)
    known = truth_of(dataset)
    corrupt = corrupt_counter(dataset, max_corrupt)
    history = FitHistory()
    started = time.perf_counter()
    with (
        safe_layout(model),
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        Progress(epochs * per_epoch, "training", progress) as bar,
    ):
        torch.manual_seed(seed)  # dropout
        model.train()
        for epoch in range(epochs):
            loss_sum = torch.zeros((), device=device, dtype=torch.float64)
            correct = torch.zeros((), device=device, dtype=torch.int64)
            seen = 0
            order = torch.randperm(len(dataset), generator=generator)
            stream = batches(
                dataset,
                (part for part in order.split(size) if len(part) > 1),
                workers,
                corrupt,
                pin_memory=device.type == "cuda",
                seed=seed,
                start=epoch * per_epoch,
                replace_corrupt=True,
            )
            for batch in stream:
                images = to_device_async(batch.images, device)
                if chosen.shift:
                    images = shift_images(images, chosen.shift, generator)
                truth = known[batch.indices]
                truth = to_device_async(truth, device)
                with forward.autocast():
                    logits = first_output(model(forward.images(images)))
                logits = logits if chosen.amp is None else logits.float()
                loss = label_loss(logits, truth, chosen.label_smoothing)
                stepper.zero_grad(set_to_none=True)
                loss.backward()
                stepper.step()
                scheduler.step()
                loss_sum += loss.detach().double() * len(truth)
                correct += _right(logits.detach(), truth).sum()
                seen += len(truth)
                bar.update()
            history.loss.append(float(loss_sum) / seen)
            history.accuracy.append(int(correct) / seen)
            if not math.isfinite(history.loss[-1]):
                raise FloatingPointError(
                    f"the loss became {history.loss[-1]} in epoch {epoch + 1}: lower lr ({lr:g})"
                )
            bar.set_postfix(loss=f"{history.loss[-1]:.3f}", accuracy=f"{history.accuracy[-1]:.2%}")
    model.eval()
    history.seconds = time.perf_counter() - started
    logger.info(
        f"trained {epochs} epochs in {history.seconds:.1f} s: loss {history.loss[-1]:.4f}, "
        f"training accuracy {history.accuracy[-1]:.2%}"
    )
    return history


@torch.no_grad()
def accuracy(
    model: nn.Module, dataset: Any, batch_size: int = 256, workers: int = 0, amp: str | None = None
) -> float:
    """Returns the fraction of `dataset` whose largest logit is the label, in evaluation mode.

    Images that cannot be read are left out.

    The model's mode is put back after. Raises ValueError for an empty data set.
    """
    if len(dataset) == 0:
        raise ValueError("the accuracy of an empty data set is not defined")
    forward = Forward.of(model, None if amp is None else getattr(torch, amp), channels_last=True)
    known = truth_of(dataset)
    order = torch.arange(len(dataset)).split(batch_size)
    correct = seen = 0
    with evaluation_mode(model), forward.autocast():
        for batch in batches(dataset, order, workers, CorruptImages(len(dataset))):
            logits = first_output(model(forward.images(batch.images))).cpu()
            truth = known[batch.indices]
            correct += int(_right(logits, truth).sum())
            seen += len(truth)
    return correct / max(seen, 1)


def _right(logits: Tensor, truth: Tensor) -> Tensor:
    """Returns whether the largest of logits [n, K] is a true label: [n] bool."""
    best = logits.argmax(1)
    if truth.dim() == 1:
        return best == truth
    return truth.gather(1, best.unsqueeze(1)).squeeze(1)


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
    # The warm-up of OneCycleLR divides by zero where it would have a single step.
    if name == "one_cycle" and steps > 4:
        return torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=lr, total_steps=steps, pct_start=0.25, cycle_momentum=False
        )
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=0.01 * lr)
