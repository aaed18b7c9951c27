"""The same network newly initialised: what ZRF compares with."""

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from wfnet.network import WFNet
from wfnet.services.log import logger

# Raw parameters (owned by a module that has no way to reset them) by the last part of their name,
# as timm and torchvision initialise them.
_TOKENS = {"cls_token", "class_token", "dist_token", "reg_token", "mask_token"}
_TOKENS |= {"pos_embed", "pos_embedding", "position_embedding", "relative_position_bias_table"}
_TOKEN_STD = 0.02
_LAYER_SCALES = {"gamma", "gamma1", "gamma2", "gamma_1", "gamma_2", "layer_scale", "ls1", "ls2"}
_LAYER_SCALE = 1e-6
_METHODS = ("reset_parameters", "_reset_parameters", "init_weights", "_initialize_weights")
_STATISTICS = {"running_mean": 0, "running_var": 1, "num_batches_tracked": 0}


def reinitialise(model: nn.Module, seed: int = 0) -> nn.Module:
    """The same network newly initialised: a copy without filters, in evaluation mode.

    Every parameter is drawn anew by ``reset_parameters`` of its module and by the initialisation
    of the modules above it where they have one (``init_weights`` in timm and transformers). Tokens,
    position embeddings and layer scales that nothing resets get the distributions of timm; any
    other raw parameter keeps its values in random order, and the log says so. Running statistics
    start again.
    The result depends on the architecture and the seed, never on the learned weights (but for those
    raw parameters). The caller's random state is left as it is.

    Args:
        model: a classifier or a :class:`wfnet.WFNet`; not changed.
        seed: of the initialisation.

    Returns:
        A frozen module on the same device.
    """
    new = model.bake(None) if isinstance(model, WFNet) else copy.deepcopy(model)
    new.requires_grad_(False).eval()
    old = {name: p.detach().clone() for name, p in new.named_parameters()}
    devices = sorted({p.device.index for p in new.parameters() if p.device.type == "cuda"})
    with torch.no_grad(), torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        # What nothing initialises is recognised by the NaN it keeps.
        for parameter in new.parameters():
            if parameter.is_floating_point():
                parameter.fill_(torch.nan)
        for module in reversed(list(new.modules())):  # a parent's own initialisation comes last
            vars(module).pop("_is_hf_initialized", None)  # transformers would skip it
            for name in _METHODS:
                _call_without_arguments(getattr(module, name, None))
            for name, value in _STATISTICS.items():
                if module._buffers.get(name) is not None:
                    module._buffers[name].fill_(value)
        _initialise_raw(new, old)
    return new.requires_grad_(False).eval()


def _call_without_arguments(method: Any) -> None:
    """Calls a method if it is one and needs no argument."""
    try:
        inspect.signature(method).bind()
    except TypeError:
        return
    method()


def _initialise_raw(model: nn.Module, old: Mapping[str, Tensor]) -> None:
    unknown = []
    for name, parameter in model.named_parameters():
        if not parameter.isnan().any():
            continue
        last = name.rpartition(".")[2]
        if last in _TOKENS:
            nn.init.trunc_normal_(parameter, std=_TOKEN_STD)
        elif last in _LAYER_SCALES:
            parameter.fill_(_LAYER_SCALE)
        else:
            values = old[name].flatten()
            order = torch.randperm(values.numel()).to(values.device)
            parameter.copy_(values[order].view_as(parameter))
            unknown.append(name)
    if unknown:
        logger.warning(
            "%s cannot initialise %s anew; for ZRF their values were put in random order (pass a "
            "newly built network as `initialised` to avoid this)",
            type(model).__name__,
            ", ".join(unknown),
        )
