"""Tokens that nobody reads: behind the last attention, a class token is all that the head wants.

Norms, linear maps and activations treat every token alone. Where a head selects the first token
(or the first few) of ``[B, T, C]``, the selection is moved up in front of them, as far as all
readers of a value agree: to the last attention's result, so that the last block's projection and
MLP run for the class token alone, forward and backward.
"""

from __future__ import annotations

import operator

import torch
from torch import fx, nn

from wfnet.fusion.rewrite import title_of

# Of [..., C]: they treat every token alone. LayerNorm is one where it norms the last dimension.
_PER_TOKEN = {
    "timm.layers.drop.DropPath",
    "timm.layers.layer_scale.LayerScale",
    "timm.layers.mlp.GluMlp",
    "timm.layers.mlp.Mlp",
    "timm.layers.mlp.SwiGLU",
    "timm.models.vision_transformer.LayerScale",
    "torch.nn.modules.activation.GELU",
    "torch.nn.modules.activation.ReLU",
    "torch.nn.modules.activation.SiLU",
    "torch.nn.modules.activation.Sigmoid",
    "torch.nn.modules.activation.Tanh",
    "torch.nn.modules.dropout.Dropout",
    "torch.nn.modules.linear.Identity",
    "torch.nn.modules.linear.Linear",
}
_NORMS = {"timm.layers.norm.LayerNorm", "torch.nn.modules.normalization.LayerNorm"}
_SUMS = {operator.add, operator.mul, torch.add, torch.mul}


def drop_unread_tokens(graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
    """Changes ``graph`` so that values hold their first tokens only, where no others are read.

    Args:
        graph: with shapes (:func:`wfnet.fusion.trace.run_example`), which are kept up to date.
        modules: of the network, by name.
    """
    read = _tokens_read(graph, modules)
    most = max(read.values(), default=0)
    read = {node: _shape(node) for node in read if _shape(node)[1] > most}
    moved = {node for node in read if _is_per_token(node, modules)}
    for node in [node for node in graph.nodes if node in read]:
        if node not in moved:
            first = _first_tokens(graph, node, most)
            node.replace_all_uses_with(first, lambda user, first=first: user is not first)
            continue
        for source in node.all_input_nodes:
            if _shape(source)[1] > most:  # others read more of it
                node.replace_input_with(source, _first_tokens(graph, source, most))
        node.meta["shape"] = torch.Size((read[node][0], most, read[node][2]))


def _shape(node: fx.Node) -> tuple[int, ...]:
    """The shape of a tensor; empty for any other value."""
    return node.meta.get("shape", ())


def _first_tokens(graph: fx.Graph, node: fx.Node, count: int) -> fx.Node:
    """A new value: ``node[:, :count]``."""
    with graph.inserting_after(node):
        first = graph.call_function(operator.getitem, (node, (slice(None), slice(None, count))))
    first.meta["shape"] = torch.Size((_shape(node)[0], count, _shape(node)[2]))
    return first


def _tokens_read(graph: fx.Graph, modules: dict[str, nn.Module]) -> dict[fx.Node, int]:
    """Values ``[B, T, C]`` of which only the first few tokens are read, and how many these are."""
    read: dict[fx.Node, int] = {}
    for node in reversed(graph.nodes):
        if len(_shape(node)) != 3 or not node.users:
            continue
        counts = []
        for user in node.users:
            count = _selected(user, node)
            if count is None and user in read and _is_per_token(user, modules):
                count = read[user]
            counts.append(count)
        if None not in counts:
            read[node] = max(counts)
    return read


def _selected(user: fx.Node, node: fx.Node) -> int | None:
    """How many of the first tokens of ``node`` an indexing reads; None for anything else."""
    if user.target is not operator.getitem or user.args[0] is not node:
        return None
    index = user.args[1]
    if not isinstance(index, tuple) or len(index) != 2 or index[0] != slice(None):
        return None
    if isinstance(index[1], int) and index[1] >= 0:
        return index[1] + 1
    if isinstance(index[1], slice):
        bounds = index[1].start or 0, index[1].stop, index[1].step or 1
        if all(isinstance(bound, int) and bound > 0 for bound in bounds[1:]) and bounds[0] == 0:
            return bounds[1]
    return None


def _is_per_token(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether ``node`` computes every token ``[b, t]`` from that token of its inputs."""
    if any(len(_shape(x)) != 3 or _shape(x)[:2] != _shape(node)[:2] for x in node.all_input_nodes):
        return False
    if node.op == "call_function":
        return node.target in _SUMS and not node.kwargs
    return node.op == "call_module" and all(map(_alone, modules[node.target].modules()))


def _alone(module: nn.Module) -> bool:
    title = title_of(module)
    if title in _NORMS:
        return len(module.normalized_shape) == 1
    in_place = getattr(module, "inplace", False)
    return title in _PER_TOKEN and not in_place
