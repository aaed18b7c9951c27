"""Drop-in masked layers, and the registry that says which layer types can be masked.

A masked layer is its base layer plus filter matrices: same arguments, same state-dict keys for
weight and bias, the forget labels taken from :func:`wfnet.forgetting`. A new maskable type is one
class here with :func:`register_maskable` in front.
"""

import copy
import math
from collections.abc import Callable, Sequence
from numbers import Integral

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from wfnet import backends, functional, gates
from wfnet.labels import active_selection, check_range

# Base layer type, or its qualified name for types of packages that are not imported here.
Registry = dict[type | str, type["MaskedLayer"]]
_MASKABLE: Registry = {}


def register_maskable(base: type | str, registry: Registry = _MASKABLE) -> Callable[[type], type]:
    """Class decorator: layers of exactly type ``base`` are wrapped by the decorated class.

    Args:
        base: the type, or "module.ClassName" of a type whose package is an optional dependency.
        registry: where it is entered; :data:`wfnet.durable_layers.DURABLE` for durable gates.
    """

    def register(wrapper: type) -> type:
        registry[base] = wrapper
        return wrapper

    return register


def registered(kind: type, registry: Registry) -> "type[MaskedLayer] | None":
    """The class that wraps layers of exactly type ``kind``; None if there is none."""
    return registry.get(kind) or registry.get(f"{kind.__module__}.{kind.__qualname__}")


class MaskedLayer(nn.Module):
    """What all masked layers share: filter matrices next to a frozen weight and bias.

    Attributes:
        alpha_weight: ``[num_classes, out_channels]``, masks the weight's output channels.
        alpha_bias: the same for the bias; None where the layer has no bias.
        gate_scale: factor in front of the sigmoid.
    """

    num_classes: int
    alpha_init: float
    gate_scale: float
    backend: str
    layer_name: str | None = None
    _base_type: type[nn.Module]

    def named_filters(self) -> dict[str, nn.Parameter]:
        """Filter matrices by name, weight before bias."""
        return {
            name: parameter
            for name, parameter in self._parameters.items()
            if name.startswith("alpha_") and parameter is not None
        }

    def filter_starts(self) -> dict[str, float]:
        """First values of the entries of :meth:`named_filters`, by the same names."""
        names = ["alpha_weight"] if self.bias is None else ["alpha_weight", "alpha_bias"]
        return dict.fromkeys(names, self.alpha_init)

    def _add_filters(
        self,
        num_classes: int,
        alpha_init: float = 3.0,
        normalize_gate: bool = True,
        backend: str = "auto",
        filter_dtype: torch.dtype | None = None,
    ) -> None:
        if (
            isinstance(num_classes, bool)
            or not isinstance(num_classes, Integral)
            or num_classes < 1
        ):
            raise ValueError(f"num_classes must be a positive integer; got {num_classes!r}")
        if not math.isfinite(alpha_init):
            raise ValueError(f"alpha_init must be finite; got {alpha_init}")
        backends.requested(backend)  # an unknown name is an error now, not at the first call
        if filter_dtype is None:
            filter_dtype = torch.promote_types(self.weight.dtype, torch.float32)
        self.num_classes = int(num_classes)
        self.alpha_init = float(alpha_init)
        self.normalize_gate = normalize_gate
        self.backend = backend
        self._check_start(filter_dtype)
        shape = (self.num_classes, self.weight.shape[0])
        for name, start in self.filter_starts().items():
            full = torch.full(shape, start, dtype=filter_dtype, device=self.weight.device)
            self.register_parameter(name, nn.Parameter(full))
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                parameter.requires_grad_(False)

    def _check_start(self, filter_dtype: torch.dtype) -> None:
        """Sets the scale of the gates, or raises a ValueError where a fresh one would not be 1."""
        self.gate_scale = gates.gate_scale(self.alpha_init, self.normalize_gate)
        alpha = torch.tensor(self.alpha_init, dtype=filter_dtype, device="cpu")
        if self.normalize_gate and gates.gate(alpha, self.gate_scale).item() != 1:
            raise ValueError(
                f"alpha_init={self.alpha_init} in {filter_dtype} does not give a fresh gate of "
                "exactly 1; choose a value that this dtype holds (near 3), or normalize_gate=False"
            )
        if self.bias is None:
            self.register_parameter("alpha_bias", None)

    @classmethod
    def check_plain(cls, layer: nn.Module) -> None:
        """Raises ValueError unless ``layer`` can become one of this class."""
        if parametrize.is_parametrized(layer) or "weight" not in layer._parameters:
            raise ValueError(
                f"the weight of this {type(layer).__name__} is computed; make it a plain parameter "
                "first: remove_parametrizations of torch.nn.utils.parametrize, or "
                "remove_weight_norm, remove_spectral_norm or prune.remove of torch.nn.utils"
            )

    @classmethod
    def adopt(cls, layer: nn.Module, num_classes: int, **filters: object) -> "MaskedLayer":
        """Turns ``layer`` into a masked layer that owns its parameters, buffers and hooks."""
        cls.check_plain(layer)
        masked = cls.__new__(cls)
        masked.__dict__ = layer.__dict__
        masked._base_type = type(layer)
        masked._add_filters(num_classes, **filters)
        return masked

    def gates(self, kind: str = "weight") -> Tensor:
        """Gates ``[num_classes, out_channels]`` of the weight, or of the bias (``kind="bias"``)."""
        alpha = getattr(self, f"alpha_{kind}")
        if alpha is None:
            raise ValueError(f"{self._title()} has no bias, so there are no bias gates")
        return gates.gate(alpha, self.gate_scale)

    def bake(self, forget: Sequence[int], prune_below: float = 0.0) -> nn.Module:
        """A plain layer of the base type with the gates of ``forget`` multiplied into its weights.

        Args:
            forget: labels; their gates are multiplied. Empty for the original layer.
            prune_below: products of gates below this are taken as exactly 0.
        """
        plain = self._base_type.__new__(self._base_type)
        plain.__dict__ = {
            key: copy.copy(value) if isinstance(value, dict | set) else value  # hooks, for one
            for key, value in self.__dict__.items()
            if key not in _FILTER_STATE
        }
        plain._parameters = {
            name: None if p is None else nn.Parameter(self._baked(name, p, forget, prune_below))
            for name, p in self._parameters.items()
            if not name.startswith("alpha_")
        }
        plain._buffers = {
            name: None if b is None else b.clone() for name, b in self._buffers.items()
        }
        return plain

    def close_below(self, threshold: float, forget: Sequence[int]) -> None:
        """Sets gates of the rows ``forget`` to 0 where their product is below ``threshold``."""
        for kind in ("weight", "bias") if self.alpha_bias is not None else ("weight",):
            self._close(getattr(self, f"alpha_{kind}"), kind, threshold, forget)

    def _close(self, alpha: Tensor, kind: str, threshold: float, forget: Sequence[int]) -> None:
        closed = torch.zeros_like(alpha, dtype=torch.bool)
        closed[list(forget)] = self._gate_of(kind, self._label_list(forget)) < threshold
        alpha.data.masked_fill_(closed, -torch.inf)

    def _gate_of(self, kind: str, labels: Tensor) -> Tensor:
        """``[O]``: the product of the gates of ``labels [1, J]`` on the weight or the bias."""
        return gates.gate_rows(getattr(self, f"alpha_{kind}").detach(), labels, self.gate_scale)[0]

    def _label_list(self, forget: Sequence[int]) -> Tensor:
        check_range(min(forget), max(forget), self.num_classes)
        return torch.tensor([list(forget)], device=self.weight.device)

    def _baked(
        self, name: str, parameter: Tensor, forget: Sequence[int], prune_below: float
    ) -> Tensor:
        if not forget:
            return parameter.detach().clone()
        gate = self._gate_of(name, self._label_list(forget))
        gate = gate.masked_fill(gate < prune_below, 0.0)
        scaled = parameter.to(gate.dtype) * gate.reshape(-1, *[1] * (parameter.dim() - 1))
        return scaled.detach().to(parameter.dtype)

    def _title(self) -> str:
        kind = type(self).__name__
        return f"{kind} {self.layer_name!r}" if self.layer_name else kind

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_classes={self.num_classes}, backend={self.backend!r}"


# Attributes that a baked layer leaves behind, or that it gets copies of.
_FILTER_STATE = frozenset(
    ("num_classes", "alpha_init", "normalize_gate", "gate_scale", "backend", "layer_name", "mode")
    + ("soft_init", "_base_type", "_parameters", "_buffers")
)


@register_maskable(nn.Conv2d)
class WFConv2d(MaskedLayer, nn.Conv2d):
    """``nn.Conv2d`` whose output channels are scaled by the gates of the current forget label.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device, dtype: as ``nn.Conv2d``.
        num_classes: rows of the filter matrices.
        alpha_init: start of every filter entry.
        normalize_gate: ``gate = sigmoid(alpha) / sigmoid(alpha_init)``, so that a fresh layer is
            the original one; False gives the paper's plain sigmoid.
        backend: "auto", "reference", "eager" or another registered backend.
        filter_dtype: dtype of the filter matrices; fp32 (fp64 for fp64 weights) by default.

    Shapes: ``[B, C, H, W]`` -> ``[B, O, P, Q]`` with B forget labels bound by
    :func:`wfnet.forgetting`. The weight and the bias are frozen.

    Raises:
        RuntimeError: when called outside :func:`wfnet.forgetting`.
    """

    _base_type = nn.Conv2d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        num_classes: int,
        alpha_init: float = 3.0,
        normalize_gate: bool = True,
        backend: str = "auto",
        filter_dtype: torch.dtype | None = None,
    ):
        shape = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups)
        super().__init__(*shape, bias, padding_mode, device, dtype)
        self._add_filters(num_classes, alpha_init, normalize_gate, backend, filter_dtype)

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, num_classes: int, **options: object) -> "WFConv2d":
        """A masked copy of ``conv``, which stays as it is; options as above.

        Raises:
            TypeError: if ``conv`` is of a subclass that computes something else.
        """
        return _copy_of(conv, WFConv2d, num_classes, **options)

    def _padded(self, x: Tensor) -> tuple[Tensor, tuple[int, int] | str]:
        """``x`` with the padding that is not plain zeros applied, and the padding left to do."""
        if self.padding_mode == "zeros":
            return x, self.padding
        x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
        return x, (0, 0)

    def forward(self, x: Tensor) -> Tensor:
        selection = active_selection(self._title())
        x, padding = self._padded(x)
        geometry = (self.stride, padding, self.dilation, self.groups)
        masked = (x, self.weight, self.bias, self.alpha_weight, self.alpha_bias, selection)
        return functional.wf_conv2d(*masked, *geometry, self.gate_scale, backend=self.backend)


@register_maskable("timm.layers.conv2d_same.Conv2dSame")
class WFConv2dSame(WFConv2d):
    """Masked form of timm's ``Conv2dSame``: TensorFlow's input-size dependent 'same' padding."""

    def _padded(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        total = [
            max((math.ceil(size / step) - 1) * step + (k - 1) * dil + 1 - size, 0)
            for size, k, step, dil in zip(
                x.shape[-2:], self.kernel_size, self.stride, self.dilation, strict=True
            )
        ]
        if any(total):
            high, wide = total
            x = F.pad(x, [wide // 2, wide - wide // 2, high // 2, high - high // 2])
        return x, (0, 0)


@register_maskable(nn.Linear)
class WFLinear(MaskedLayer, nn.Linear):
    """``nn.Linear`` whose output features are scaled by the gates of the current forget label.

    Inputs: ``[B, C]``, ``[B, ..., C]`` or window-batched ``[B * windows, N, C]`` (windows of one
    image side by side). Arguments and errors as :class:`WFConv2d`.
    """

    _base_type = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        num_classes: int,
        alpha_init: float = 3.0,
        normalize_gate: bool = True,
        backend: str = "auto",
        filter_dtype: torch.dtype | None = None,
    ):
        super().__init__(in_features, out_features, bias, device, dtype)
        self._add_filters(num_classes, alpha_init, normalize_gate, backend, filter_dtype)

    @classmethod
    def from_linear(cls, linear: nn.Linear, num_classes: int, **options: object) -> "WFLinear":
        """A masked copy of ``linear``, which stays as it is."""
        return _copy_of(linear, WFLinear, num_classes, **options)

    def forward(self, x: Tensor) -> Tensor:
        selection = active_selection(self._title())
        masked = (x, self.weight, self.bias, self.alpha_weight, self.alpha_bias, selection)
        return functional.wf_linear(*masked, self.gate_scale, backend=self.backend)


def masked_type(layer: nn.Module) -> type[MaskedLayer] | None:
    """The masked class for ``layer``: of its exact type, or of a base whose forward it keeps.

    None if there is none: a subclass that overrides forward computes something else (standardised
    weights, say), and wrapping it as its base would be silently wrong.
    """
    kind = type(layer)
    if not {"forward", "_conv_forward"}.isdisjoint(vars(layer)):  # replaced on the instance
        return None
    if parametrize.is_parametrized(layer):  # a generated subclass of the original type
        kind = kind.__mro__[1]
    found = registered(kind, _MASKABLE)
    if found is not None:
        return found
    for base in (nn.Conv2d, nn.Linear):
        same = isinstance(layer, base) and all(
            getattr(kind, name, None) is getattr(base, name, None)
            for name in ("forward", "_conv_forward", "__call__")
        )
        if same:
            return _MASKABLE[base]
    return None


class LayerNames(tuple):
    """Targets that are full names of layers, as in a checkpoint: no suffixes, no patterns."""


def refuse_layer(layer: nn.Module, name: str = "") -> str:
    """Why ``layer`` cannot be masked, and what to do."""
    kind = type(layer)
    title = f"layer {name!r}, a " if name else "a "
    return (
        f"{title}{kind.__module__}.{kind.__qualname__}, overrides the forward of its base class "
        "(or had it replaced) or is no convolution or linear layer, so it cannot be masked as one; "
        "leave it out of targets, or teach wfnet about it with wfnet.layers.register_maskable"
    )


def _copy_of(
    layer: nn.Module, wanted: type[MaskedLayer], num_classes: int, **options: object
) -> MaskedLayer:
    found = masked_type(layer)
    if found is None or not issubclass(found, wanted):
        raise TypeError(refuse_layer(layer))
    found.check_plain(layer)  # a computed weight cannot be copied
    return found.adopt(copy.deepcopy(layer), num_classes, **options)
