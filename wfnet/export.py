"""Bakes one row's gates into the weights: a plain model without filters."""

import copy
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from wfnet.head import cut_from_head, example_images, first_output
from wfnet.labels import check_range, select
from wfnet.services.log import logger
from wfnet.services.modes import evaluation_mode

if TYPE_CHECKING:
    from wfnet.network import WFNet


def bake(
    net: "WFNet",
    forget: int | Sequence[int] | Tensor | None,
    prune_below: float = 0.0,
    cut_output: bool = False,
    images: Tensor | None = None,
) -> nn.Module:
    """A plain copy of the model of ``net`` with the gates of ``forget`` in its weights.

    The work of :meth:`wfnet.WFNet.bake`, which see.
    """
    if not 0 <= prune_below <= 1:
        raise ValueError(
            f"prune_below={prune_below} must be a number from 0 to 1, the gate of an untouched "
            "filter: gates below it become 0 (0 prunes nothing)"
        )
    labels = forget_list(forget, net.num_classes)
    for name, layer in net.masked_layers.items():
        if any(filters[labels].isnan().any() for filters in layer.named_filters().values()):
            raise ValueError(
                f"the filters of layer {name!r} are NaN for what is to be forgotten, so the export "
                "would compute NaN: untrain again with a smaller learning rate"
            )
    # Masked layers are left shared: they are about to be replaced.
    plain = copy.deepcopy(net.model, {id(m): m for m in net.masked_layers.values()})
    for name, layer in net.masked_layers.items():
        baked = layer.bake(labels, prune_below)
        if name:
            replace_module(plain, layer, baked)
        else:
            plain = baked
    if images is not None and len(labels) > 1 and net.named_statistics():
        _measure_statistics(net, plain, labels, images)
    if net.gate == "durable":
        _close_producers(plain, net.masked_layers, net.image_shape)
    if cut_output:
        cut_from_head(plain, labels, net.num_classes, net.head, net.image_shape)
    return plain.requires_grad_(True).eval()


def forget_list(forget: int | Sequence[int] | Tensor | None, num_classes: int) -> list[int]:
    """The labels to forget, each once; ``[]`` for None, the original network.

    Raises:
        TypeError: if one is no integer.
        ValueError: if one is out of range, or if there is none at all: an empty list or -1 from a
            mistake would otherwise export a network that has forgotten nothing.
    """
    if forget is None:
        return []
    if isinstance(forget, Sequence) and not isinstance(forget, str):
        forget = torch.tensor(forget or -1, device="cpu")
    selection = select(forget.cpu() if isinstance(forget, Tensor) else forget)
    check_range(selection.low, selection.high, num_classes)
    labels = dict.fromkeys(selection.rows.flatten().tolist())
    chosen = [label for label in labels if label != -1]
    if not chosen:
        raise ValueError(
            f"forget={forget!r} names no class to forget, so the export would be the original "
            "model; name a class, or give forget=None where the original is wanted"
        )
    return chosen


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts ``new`` under every name that ``old`` has in ``model``: a layer may be used twice."""
    for parent in list(model.modules()):
        for child, module in parent._modules.items():
            if module is old:
                parent._modules[child] = new


@torch.no_grad()
def _measure_statistics(net: "WFNet", plain: nn.Module, labels: list[int], images: Tensor) -> None:
    """Gives the norms of ``plain`` the moments of ``images`` under all of ``labels`` at once."""
    weight = next(net.parameters())
    rows = torch.tensor(labels, device=weight.device).expand(len(images), -1)

    def keep(name: str, mean: Tensor, var: Tensor) -> None:
        norm = plain.get_submodule(name)
        alive = norm.weight.ne(0) | norm.bias.ne(0)
        norm.running_mean[alive] = mean[0, alive].to(norm.running_mean)
        norm.running_var[alive] = var[0, alive].to(norm.running_var)

    fuse = net.fuse
    net.fuse = False
    try:
        with evaluation_mode(net), net.gate_mode.grouped(rows, moments=keep):
            net(images.to(weight.device, weight.dtype), rows)
    finally:
        net.fuse = fuse


def _close_producers(
    plain: nn.Module, names: Iterable[str], image_shape: Sequence[int] | None
) -> None:
    """Zeroes what convolutions compute for closed channels of the BatchNorms ``names``.

    Only where nothing else reads these channels: the logits are then bit by bit the same without
    them, and with their opposites.
    """
    norms = {n: m for n in names if isinstance(m := plain.get_submodule(n), nn.BatchNorm2d)}
    closed = {m: (m.weight.eq(0) & m.bias.eq(0)) for m in norms.values()}
    if not any(channels.any() for channels in closed.values()):
        return
    try:
        images = example_images(plain, image_shape or ())
    except ValueError as error:
        logger.warning("closed channels keep their convolutions' weights: %s", error)
        return
    with evaluation_mode(plain), torch.no_grad():
        logits, producers = _run_with_producers(plain, closed, images)

        def close(pairs: list[tuple[nn.Module, nn.Conv2d]]) -> bool:
            columns = [
                (parameter, closed[norm])
                for norm, producer in pairs
                for parameter in producer.parameters()
            ]
            before = [parameter.clone() for parameter, _ in columns]
            for factor in (-1.0, 0.0):
                for (parameter, channels), old in zip(columns, before, strict=True):
                    parameter[channels] = factor * old[channels]
                if not torch.equal(first_output(plain(images)), logits):
                    for (parameter, _), old in zip(columns, before, strict=True):
                        parameter.copy_(old)
                    return False
            return True

        if not close(producers):
            for pair in producers:
                close([pair])


def _run_with_producers(
    model: nn.Module, norms: Iterable[nn.Module], images: Tensor
) -> tuple[Tensor, list[tuple[nn.Module, nn.Conv2d]]]:
    """Logits, and each of ``norms`` with the convolution whose output it normalises."""
    outputs: dict[int, tuple[nn.Conv2d, Tensor]] = {}  # the tensors too: their ids stay taken
    found: dict[nn.Module, nn.Conv2d] = {}

    def computed(module: nn.Conv2d, args: object, output: Tensor) -> None:
        outputs[id(output)] = module, output

    def taken(module: nn.Module, args: tuple[Tensor]) -> None:
        if id(args[0]) in outputs:
            found[module] = outputs[id(args[0])][0]

    convolutions = (m for m in model.modules() if isinstance(m, nn.Conv2d))
    handles = [m.register_forward_hook(computed) for m in convolutions]
    handles += [norm.register_forward_pre_hook(taken) for norm in norms]
    try:
        return first_output(model(images)), list(found.items())
    finally:
        for handle in handles:
            handle.remove()
