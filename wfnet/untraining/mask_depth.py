"""From which stage on a network is masked: chosen on validation images, by runs from the back.

Late masks cost less a step, and everything in front of them is computed once per image. How late
they may be depends on the network and its data: a row must still forget its class and leave the
others alone.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from wfnet.data import Dataset
from wfnet.network import WFNet
from wfnet.targets import stages_of
from wfnet.untraining.loop import configured_objective, untrain
from wfnet.untraining.untrain_config import UntrainConfig
from wfnet.untraining.validation import AccuracyValidator

# What is enough on validation images: Acc_f at most, and Acc_r lost at most.
MOST_FORGOTTEN_RIGHT, MOST_RETAINED_LOST = 0.005, 0.01


@dataclass(frozen=True)
class DepthTrial:
    """A short run with masks from ``mask_from`` on.

    Attributes:
        stages: masked, from the back.
        acc_r, acc_f: on validation images (fractions).
        steps, seconds: of the run.
        enough: whether it forgets and retains.
    """

    mask_from: str
    stages: int
    acc_r: float
    acc_f: float
    steps: int
    seconds: float
    enough: bool


def choose_mask_from(
    wrap: Callable[[str | None], WFNet],
    train: Dataset,
    validation: Dataset,
    config: UntrainConfig,
    trials: int = 4,
) -> tuple[str, list[DepthTrial]]:
    """Chooses the latest stage whose masks are enough on validation images.

    The last stage alone is tried first, then twice as many, and so on, each by a run of recipe
    "quick"; the first one is taken with Acc_f of at most 0.5% and Acc_r at most 1 point below the
    original network's. Where none is, all stages are masked.

    Args:
        wrap: the network with sigmoid gates from a stage on; None: in all.
        train, validation: images with one label each.
        config: settings of the run that is to follow: classes, seed, how images are read and run.
        trials: short runs at most.

    Returns:
        The stage, or "all", and what was tried.
    """
    whole = wrap(None)
    stages = [*stages_of(whole.model, [*whole.masked_layers])]
    count = whole.num_classes if config.classes is None else max(2, len(config.classes))
    same = ("classes", "seed", "workers", "max_corrupt", "amp", "channels_last", "fuse")
    same += ("features", "feature_dtype", "views", "cache_dir")
    quick = UntrainConfig.recipe("quick", count, **{n: getattr(config, n) for n in same})
    rows = None if config.classes is None else torch.tensor(config.classes)
    judge = AccuracyValidator(
        validation,
        whole.num_classes,
        configured_objective(quick, False),
        replace(quick, validation_images=config.validation_images),
        rows,
    )
    original = judge(whole).acc_r
    tried: list[DepthTrial] = []
    for depth in (1 << n for n in range(trials)):
        if depth >= len(stages):
            break
        net = wrap(stages[-depth])
        result = untrain(net, train, None, quick, progress=False)
        found = judge(net)
        enough = found.acc_f <= MOST_FORGOTTEN_RIGHT
        enough &= found.acc_r >= original - MOST_RETAINED_LOST
        about = found.acc_r, found.acc_f, result.steps, round(result.seconds, 2), enough
        tried.append(DepthTrial(stages[-depth], depth, *about))
        if enough:
            return stages[-depth], tried
    return "all", tried


def depth_report(chosen: str, tried: list[DepthTrial]) -> str:
    """What was tried and chosen, in a line each."""
    lines = [
        f"{t.mask_from} on ({t.stages} of the last stages, {t.steps} steps): Acc_r {t.acc_r:.2%}, "
        f"Acc_f {t.acc_f:.2%}{': enough' if t.enough else ''}"
        for t in tried
    ]
    return "\n".join([*lines, f"chosen: {chosen}"])
