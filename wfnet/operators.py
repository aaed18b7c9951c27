"""The ``torch.library`` operators ``wfnet::conv2d`` and ``wfnet::linear`` and their backward.

An operator turns filter matrices and forget labels into tables (gates), lets a backend compute
``scale * u + shift``, and in backward folds the backend's column sums back into filter gradients:

    dalpha_weight[l] = (1 - sigmoid(alpha_weight[l])) * sum over b with label l of T1[b]
    dalpha_bias[l]   = (1 - sigmoid(alpha_bias[l])) * the same sum of gate_bias * bias * T0[b]

Weights and biases are frozen and get no gradient. Operators return ``(out, saved, scale, shift)``;
the last three are private to backward (empty where backward will not need them). Arguments are
checked in :mod:`wfnet.functional`. Schemas are flat, as the dispatcher wants them;
:class:`_Forward` and :class:`_Backward` name their arguments.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from wfnet import backends
from wfnet.backends.contract import Backend, ConvGeometry, Epilogue, LayerBelow

# Registered on the dispatcher directly: the wrapper layers of torch.library.custom_op would cost
# several times the launch of a small convolution for operators with this many arguments.
_library = torch.library.Library("wfnet", "DEF")

_FILTERS = "Tensor alpha_weight, Tensor? alpha_bias, Tensor forget, Tensor? source"
_NEEDED = "bool need_dx, bool need_weight, bool need_bias"
_LEARNABLE = 0, 3, 4  # x, alpha_weight and alpha_bias among the arguments


def memory_format_of(x: Tensor, weight: Tensor) -> torch.memory_format:
    """Returns the layout of the output: channels-last if the input or the weight clearly is."""
    for t in (x, weight):
        if t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous():
            return torch.channels_last
    return torch.contiguous_format


def _laid_out(t: Tensor, memory_format: torch.memory_format) -> Tensor:
    """``t`` with the strides of a fresh tensor; a copy only where they differ.

    A dimension of size 1 leaves strides ambiguous, and a view would forbid in-place activations.
    """
    fresh = torch.empty(t.shape, device="meta", memory_format=memory_format).stride()
    if t.stride() == fresh:
        return t
    return torch.empty(t.shape, dtype=t.dtype, device=t.device, memory_format=memory_format).copy_(
        t
    )


class _Forward(NamedTuple):
    """Arguments of a forward operator, in the order of its schema.

    Convolutions: ``x`` ``[N, C, H, W]``, ``weight`` ``[O, C / groups, R, S]``; linear maps, without
    ``geometry``: ``x`` ``[N, T, C]``, ``weight`` ``[O, C]``.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None  # [O]
    alpha_weight: Tensor  # [K, O]
    alpha_bias: Tensor | None
    forget: Tensor  # [B, J]
    source: Tensor | None  # [B]
    gate_scale: float
    backend: str
    save: bool  # whether backward will sum T1
    geometry: ConvGeometry | None = None


class _Backward(NamedTuple):
    """Arguments of a backward operator, in the order of its schema."""

    dout: Tensor
    saved: Tensor
    weight: Tensor
    alpha_weight: Tensor
    alpha_bias: Tensor | None
    forget: Tensor
    source: Tensor | None
    scale: Tensor  # [B, O]
    shift: Tensor
    input_shape: list[int]
    channels_last: bool
    backend: str
    need_dx: bool
    need_weight: bool
    need_bias: bool
    geometry: ConvGeometry | None = None

    @property
    def layout(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format


def _named(kind: type, arguments: tuple):
    """``arguments`` of an operator as ``kind``, :class:`_Forward` or :class:`_Backward`."""
    count = len(kind._fields) - 1
    if len(arguments) == count:
        return kind(*arguments)
    *pairs, groups = arguments[count:]
    return kind(*arguments[:count], ConvGeometry(*map(tuple, pairs), groups))


def willing_backend(
    name: str, x: Tensor, weight: Tensor, geometry: ConvGeometry | None = None
) -> Backend:
    """Returns the backend called ``name``, never another one.

    Raises:
        RuntimeError: if it cannot run the call, with its reason.
    """
    backend = backends.get(name)
    if geometry is None:
        reason = backend.refuse_linear(x, weight)
    else:
        reason = backend.refuse_conv2d(x, weight, geometry)
    if reason is not None:
        raise RuntimeError(
            f"backend {name!r} cannot run this call: {reason}; choose another backend, or 'auto'"
        )
    return backend


def _layout(x: Tensor, weight: Tensor) -> torch.memory_format:
    """The memory format of ``out`` and ``saved``."""
    return memory_format_of(x, weight) if weight.dim() == 4 else torch.contiguous_format


def _forward(*arguments: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``out``, ``saved``, ``scale`` and ``shift``."""
    call = _named(_Forward, arguments)
    engine = willing_backend(call.backend, call.x, call.weight, call.geometry)
    layout = _layout(call.x, call.weight)
    scale, shift = engine.gate_rows(call.alpha_weight, call.forget, call.gate_scale), None
    if call.bias is not None:
        shift = engine.gate_rows(call.alpha_bias, call.forget, call.gate_scale)
        shift = shift * call.bias.to(scale.dtype)
    epilogue = Epilogue(scale, shift, source=call.source, save=call.save)
    x = call.x.contiguous(memory_format=layout)
    if call.geometry is None:
        found = engine.linear(x, call.weight, epilogue)
    else:
        found = engine.conv2d(x, call.weight, call.geometry, epilogue)
    return (
        _laid_out(found.out, layout),
        x.new_empty(0) if found.branch is None else _laid_out(found.branch, layout),
        scale,
        scale.new_empty(0) if shift is None else shift,
    )


def _fake_forward(*arguments: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Results of :func:`_forward` without values."""
    call = _named(_Forward, arguments)
    engine = willing_backend(call.backend, call.x, call.weight, call.geometry)
    batch, columns = call.forget.shape[0], call.weight.shape[0]
    if call.geometry is None:
        shape = batch, call.x.shape[1], columns
    else:
        kernel = call.weight.shape[2], call.weight.shape[3]
        shape = batch, columns, *call.geometry.output_size(*call.x.shape[2:], kernel)
    layout = _layout(call.x, call.weight)
    out = call.x.new_empty(shape).to(memory_format=layout)
    saved = out.new_empty(0)
    if call.save:
        rows = batch if engine.keeps_scaled_branch else call.x.shape[0]
        saved = call.x.new_empty((rows, *shape[1:])).to(memory_format=layout)
    dtype = torch.promote_types(call.alpha_weight.dtype, torch.float32)
    scale = call.alpha_weight.new_empty((batch, columns), dtype=dtype)
    return out, saved, scale, scale.new_empty(0) if call.bias is None else torch.empty_like(scale)


def _backward(*arguments: object) -> tuple[Tensor, Tensor, Tensor]:
    """``dx``, ``dalpha_weight`` and ``dalpha_bias`` ``[K, O]``; empty where not needed."""
    call = _named(_Backward, arguments)
    engine = backends.get(call.backend)
    layer = LayerBelow(
        branch=call.saved if call.need_weight else None,
        scale=call.scale,
        t1=torch.empty_like(call.scale) if call.need_weight else None,
        t0=torch.empty_like(call.scale) if call.need_bias else None,
        source=call.source,
        need_scaled_grad=call.need_dx,
        images=call.input_shape[0],
    )
    dout = call.dout.contiguous(memory_format=call.layout)
    passed = dout, layer, call.weight, tuple(call.input_shape)
    if call.geometry is None:
        dx = engine.linear_backward(*passed)
    else:
        dx = engine.conv2d_backward(*passed, call.geometry)
    nothing = call.alpha_weight.new_empty(0)
    dalpha_weight = dalpha_bias = nothing
    if call.need_weight:
        dalpha_weight = engine.gate_rows_backward(layer.t1, call.alpha_weight, call.forget)
    if call.need_bias:
        dalpha_bias = engine.gate_rows_backward(layer.t0 * call.shift, call.alpha_bias, call.forget)
    dx = call.dout.new_empty(0) if dx is None else _laid_out(dx, call.layout)
    return dx, dalpha_weight, dalpha_bias


def _fake_backward(*arguments: object) -> tuple[Tensor, Tensor, Tensor]:
    """Results of :func:`_backward` without values."""
    call = _named(_Backward, arguments)
    nothing = call.alpha_weight.new_empty(0)
    dx = call.dout.new_empty(call.input_shape).to(memory_format=call.layout)
    return (
        dx if call.need_dx else call.dout.new_empty(0),
        torch.empty_like(call.alpha_weight) if call.need_weight else nothing,
        torch.empty_like(call.alpha_bias) if call.need_bias else nothing,
    )


class _MaskedOperator:
    """``wfnet::<name>`` and ``wfnet::<name>_backward``, registered when an instance is made.

    ``geometry`` is the tail of both schemas, empty for a linear map.
    """

    def __init__(self, name: str, geometry: str):
        _library.define(
            f"{name}(Tensor x, Tensor weight, Tensor? bias, {_FILTERS}, float gate_scale, "
            f"str backend, bool save{geometry}) "
            "-> (Tensor out, Tensor saved, Tensor scale, Tensor shift)"
        )
        _library.define(
            f"{name}_backward(Tensor dout, Tensor saved, Tensor weight, {_FILTERS}, "
            "Tensor scale, Tensor shift, SymInt[] input_shape, bool channels_last, str backend, "
            f"{_NEEDED}{geometry}) "
            "-> (Tensor dx, Tensor dalpha_weight, Tensor dalpha_bias)"
        )
        self.operator = getattr(torch.ops.wfnet, name).default
        self.backward_operator = getattr(torch.ops.wfnet, f"{name}_backward").default
        for suffix, run, fake in (
            ("", _forward, _fake_forward),
            ("_backward", _backward, _fake_backward),
        ):
            _library.impl(name + suffix, run, "CompositeExplicitAutograd")
            torch.library.register_fake(f"wfnet::{name}{suffix}", fake, lib=_library)
        _library.impl(name, self.autograd, "Autograd")

    def autograd(self, *arguments: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The forward pass, recorded where anything needs a gradient."""
        learnable = (arguments[position] for position in _LEARNABLE)
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in learnable):
            return _Recorded.apply(self, *arguments)
        return _below_autograd(self.operator, *arguments)


class _Recorded(torch.autograd.Function):
    """A call of a :class:`_MaskedOperator` in autograd's graph."""

    @staticmethod
    def forward(ctx, operator, x, weight, bias, alpha_weight, alpha_bias, forget, source, *options):
        out, saved, scale, shift = _below_autograd(
            operator.operator, x, weight, bias, alpha_weight, alpha_bias, forget, source, *options
        )
        ctx.save_for_backward(saved, weight, alpha_weight, alpha_bias, forget, source, scale, shift)
        ctx.mark_non_differentiable(saved, scale, shift)
        ctx.set_materialize_grads(False)
        _, backend, _, *ctx.geometry = options
        channels_last = _layout(x, weight) is torch.channels_last
        ctx.operator, ctx.options = operator, (list(x.shape), channels_last, backend)
        ctx.arguments = 8 + len(options)
        return out, saved, scale, shift

    @staticmethod
    def backward(ctx, dout, *_):
        """None for every input that is frozen or needs no gradient."""
        if torch.is_grad_enabled():  # create_graph=True; gradients of gradients would be wrong
            raise RuntimeError(
                "double backward through wfnet's operators is not supported; use "
                "backend='reference', which is plain PyTorch"
            )
        gradients = [None] * ctx.arguments
        needed = [ctx.needs_input_grad[position + 1] for position in _LEARNABLE]
        if dout is not None:
            found = ctx.operator.backward_operator(
                dout, *ctx.saved_tensors, *ctx.options, *needed, *ctx.geometry
            )
            for position, gradient, need in zip(_LEARNABLE, found, needed, strict=True):
                gradients[position + 1] = gradient if need else None
        return tuple(gradients)


def _below_autograd(operator, *arguments):
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)


OPERATORS = (
    _MaskedOperator("conv2d", ", int[] stride, int[] padding, int[] dilation, int groups"),
    _MaskedOperator("linear", ""),
)
conv2d, linear = (operator.operator for operator in OPERATORS)
conv2d_backward, linear_backward = (operator.backward_operator for operator in OPERATORS)
