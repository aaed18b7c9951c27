"""What a step of untraining takes on a device, before a run starts."""

from collections.abc import Sequence
from functools import partial

import torch

from wfnet.gate_tables import flatten_filters
from wfnet.network import WFNet
from wfnet.services.peak_memory import peak_bytes
from wfnet.services.seeds import generator_for
from wfnet.untraining.expansion import expand
from wfnet.untraining.objectives import BalancedObjective
from wfnet.untraining.optimizers import RowAdam
from wfnet.untraining.step import UntrainingStep
from wfnet.untraining.untrain_config import UntrainConfig


def bytes_per_image(
    net: WFNet, image_shape: Sequence[int], config: UntrainConfig, images: int = 8
) -> int:
    """Estimates what a step takes for each of its images, from one small forward and backward pass.

    Args:
        net: as it will run (backend, ``fuse``, device, dtype); its filters stay as they are.
        image_shape: ``(C, H, W)``.
        config: settings of the run.
        images: two or more, of the small step.
    """
    params, labels = net.filter_parameters(), torch.arange(images) % net.num_classes
    with flatten_filters(params):
        about = RowAdam(params), config.amp_dtype, config.channels_last
        step = UntrainingStep(net, BalancedObjective(), *about)
        half = config.share_images, None, config.compound
        batch = expand(labels, net.num_classes, config.label_expansion, generator_for(0), *half)
        work = partial(step.differentiate, [(torch.zeros(images, *image_shape), batch)])
        work()  # fills caches
        peak = peak_bytes(work, step.device)
    for parameter in params:
        parameter.grad = None
    return max(0, peak) // images
