"""Masked linear maps that are not called as layers: packed in attention, or left to a parent."""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from wfnet import functional
from wfnet.labels import Selection, active_selection, bound_selection
from wfnet.layers import MaskedLayer, WFLinear, register_maskable


def weight_and_bias(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The parameters that gates scale: of attention its packed in-projection."""
    if isinstance(layer, nn.MultiheadAttention):
        return layer.in_proj_weight, layer.in_proj_bias
    return layer.weight, layer.bias


@register_maskable(nn.MultiheadAttention)
class WFMultiheadAttention(MaskedLayer, nn.MultiheadAttention):
    """``nn.MultiheadAttention`` whose query, key and value are scaled by gates: self-attention.

    The filters ``[K, 3 E]`` are those of the packed in-projection (``in_proj_weight [3 E, E]``,
    ``in_proj_bias``); ``out_proj`` is a layer of its own. Without a label the base's forward runs,
    its fast path included; with labels the in-projection is masked and
    ``F.scaled_dot_product_attention`` follows. Arguments of the call are those of the base.

    Raises:
        ValueError: if it is not batch-first, keys and values have sizes or biases of their own, or
            it is called with other keys than queries.
    """

    weight = property(lambda self: self.in_proj_weight)
    bias = property(lambda self: self.in_proj_bias)

    @classmethod
    def check_plain(cls, layer: nn.MultiheadAttention) -> None:
        if not layer.batch_first:
            raise ValueError("its tokens come before its samples: make it with batch_first=True")
        if layer.in_proj_weight is None or layer.bias_k is not None or layer.add_zero_attn:
            raise ValueError("its keys or values have sizes or biases of their own")

    def _baked(
        self, name: str, parameter: Tensor, forget: Sequence[int], prune_below: float
    ) -> Tensor:
        kind = name.removeprefix("in_proj_")
        return super()._baked(kind, parameter, forget, prune_below)

    def bake(self, forget: Sequence[int], prune_below: float = 0.0) -> nn.Module:
        plain = super().bake(forget, prune_below)
        plain._modules = {  # masked ones are baked after this
            name: m if isinstance(m, MaskedLayer) else copy.deepcopy(m)
            for name, m in plain._modules.items()
        }
        return plain

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        selection = active_selection(self._title())
        if selection.rows is None:
            options = need_weights, attn_mask, average_attn_weights, is_causal
            return super().forward(query, key, value, key_padding_mask, *options)
        if query is not key or key is not value or query.dim() != 3:
            raise ValueError(
                f"{self._title()} is masked as self-attention over [B, T, E], but was called with "
                "other keys or values than queries; leave it out of targets"
            )
        masked = (query, self.weight, self.bias, self.alpha_weight, self.alpha_bias, selection)
        qkv = functional.wf_linear(*masked, self.gate_scale, backend=self.backend)
        q, k, v = qkv.unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # [B, H, T, D]
        mask = self._mask(attn_mask, key_padding_mask, q)
        if need_weights:
            scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
            weights = (scores if mask is None else scores + mask).softmax(3)
            heads, shown = weights @ v, weights.mean(1) if average_attn_weights else weights
        else:
            heads, shown = F.scaled_dot_product_attention(q, k, v, mask), None
        return self.out_proj(heads.transpose(1, 2).flatten(2)), shown

    @staticmethod
    def _mask(attention: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
        """The sum of the masks of :meth:`forward`, to be added to scores ``[B, H, T, T]``."""
        if attention is not None and attention.dim() == 3:  # [B * H, T, T]
            attention = attention.unflatten(0, q.shape[:2])
        if padding is not None:
            padding = padding[:, None, None]
        masks = [
            q.new_zeros(mask.shape).masked_fill(mask, -torch.inf)  # true is not attended to
            if mask.dtype == torch.bool
            else mask
            for mask in (attention, padding)
            if mask is not None
        ]
        return sum(masks) if masks else None


class DirectLinear(WFLinear):
    """A linear map whose parent computes ``F.linear(x, layer.weight, bias)`` itself.

    While labels are bound, ``weight`` and ``bias`` are handles: ``F.linear`` with them is the
    masked map, everything else that would compute with them raises. A ``bias`` that is not the
    layer's own is added without gates; :meth:`bake` leaves it as it is, too.
    """

    weight = property(lambda self: self._handle("weight"))
    bias = property(lambda self: self._handle("bias"))

    def _handle(self, name: str) -> Tensor | None:
        parameter, selection = self._parameters[name], bound_selection()
        if parameter is None or selection is None or selection.rows is None:
            return parameter
        handle = parameter.as_subclass(_Handle)
        handle.layer = self
        return handle

    def forward(self, x: Tensor) -> Tensor:
        return self.computed(x, self._parameters["bias"], active_selection(self._title()))

    def computed(self, x: Tensor, bias: Tensor | None, selection: Selection) -> Tensor:
        """The masked map, with the bias of this layer or another one."""
        own = bias is not None and bias is self._parameters["bias"]
        parameters = self._parameters["weight"], bias if own else None
        filters = self.alpha_weight, self.alpha_bias if own else None
        options = {"backend": self.backend}
        y = functional.wf_linear(x, *parameters, *filters, selection, self.gate_scale, **options)
        return y if own or bias is None else y + bias.to(y.dtype)


class _Handle(Tensor):
    """A parameter of a :class:`DirectLinear` in the hands of its parent."""

    layer: DirectLinear

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.linear:
            found = _of_linear(*args, **kwargs)
            if found is not None:
                return found
        result = super().__torch_function__(func, types, args, kwargs)
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            layer = next(a for a in tree_leaves((args, kwargs)) if isinstance(a, cls)).layer
            raise ValueError(
                f"layer {layer.layer_name!r} cannot be masked: its parent computes with its weight "
                f"by {getattr(func, '__name__', func)}, not by F.linear alone; leave it out of "
                "targets="
            )
        return result


def _of_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """``F.linear`` of a layer's weight handle; None for another use of a handle."""
    foreign = isinstance(bias, _Handle) and bias.layer is not getattr(weight, "layer", None)
    if isinstance(x, _Handle) or not isinstance(weight, _Handle) or foreign:
        return None
    layer = weight.layer
    own = layer._parameters["bias"] if isinstance(bias, _Handle) else bias
    return layer.computed(x, own, active_selection(layer._title()))
