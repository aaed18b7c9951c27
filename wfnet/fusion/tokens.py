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
        graph: with shapes (:func:`wfnet.fusion.trace.run_example`).
        modules: of the network, by name.
    """
    for node in reversed(list(graph.nodes)):
        counts = [_selected(user, node) for user in node.users]
        if not counts or None in counts or not _is_per_token(node, modules):
            continue
        count = max(counts)
        for source in node.all_input_nodes:
            with graph.inserting_before(node):
                index = (slice(None), slice(None, count))
                first = graph.call_function(operator.getitem, (source, index))
            first.meta = dict(source.meta)
            node.replace_input_with(source, first)


def _selected(user: fx.Node, node: fx.Node) -> int | None:
    """How many of the first tokens of ``node`` an indexing reads; None for anything else."""
    if user.target is not operator.getitem or user.args[0] is not node:
        return None
    index = user.args[1]
    if not isinstance(index, tuple) or len(index) != 2 or index[0] != slice(None):
        return None
    if isinstance(index[1], int) and index[1] >= 0:
        return index[1] + 1
    one = index[1] if isinstance(index[1], slice) else slice(1, None)
    first = one.start in (None, 0) and one.step in (None, 1)
    return one.stop if first and isinstance(one.stop, int) and one.stop > 0 else None


def _is_per_token(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether ``node`` computes every token ``[b, t]`` from that token of its inputs."""
    shapes = [x.meta.get("shape", ()) for x in [node, *node.all_input_nodes]]
    if any(len(shape) != 3 or shape[:2] != shapes[0][:2] for shape in shapes):
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
