"""The ``torch.library`` operators ``wfnet::conv2d`` and ``wfnet::linear`` and their backward.

An operator turns filter matrices and forget labels into tables (gates), lets a backend compute
``scale * u + shift``, and in backward folds the backend's column sums back into filter gradients:

    dalpha_weight[l] = (1 - sigmoid(alpha_weight[l])) * sum over b with label l of T1[b]
    dalpha_bias[l]   = (1 - sigmoid(alpha_bias[l])) * the same sum of gate_bias * bias * T0[b]

Weights and biases are frozen and get no gradient. Operators return ``(out, saved, scale, shift)``;
the last three are private to backward (empty where backward will not need them). Arguments are
checked in :mod:`wfnet.functional`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from wfnet import backends
from wfnet.backends import Backend, ConvGeometry

# Registered on the dispatcher directly: the wrapper layers of torch.library.custom_op would cost
# several times the launch of a small convolution for operators with this many arguments.
_library = torch.library.Library("wfnet", "DEF")

_FILTERS = "Tensor alpha_weight, Tensor? alpha_bias, Tensor forget, Tensor? source"
_GEOMETRY = "int[] stride, int[] padding, int[] dilation, int groups"
_NEEDED = "bool need_dx, bool need_weight, bool need_bias"
_library.define(
    f"conv2d(Tensor x, Tensor weight, Tensor? bias, {_FILTERS}, {_GEOMETRY}, float gate_scale, "
    "str backend, bool save) -> (Tensor out, Tensor saved, Tensor scale, Tensor shift)"
)
_library.define(
    f"conv2d_backward(Tensor dout, Tensor saved, Tensor weight, {_FILTERS}, Tensor scale, "
    f"Tensor shift, SymInt[] input_shape, bool channels_last, {_GEOMETRY}, str backend, {_NEEDED})"
    " -> (Tensor dx, Tensor dalpha_weight, Tensor dalpha_bias)"
)
_library.define(
    f"linear(Tensor x, Tensor weight, Tensor? bias, {_FILTERS}, float gate_scale, str backend, "
    "bool save) -> (Tensor out, Tensor saved, Tensor scale, Tensor shift)"
)
_library.define(
    f"linear_backward(Tensor dout, Tensor saved, Tensor weight, {_FILTERS}, Tensor scale, "
    f"Tensor shift, SymInt[] input_shape, str backend, {_NEEDED})"
    " -> (Tensor dx, Tensor dalpha_weight, Tensor dalpha_bias)"
)


def memory_format_of(x: Tensor, weight: Tensor) -> torch.memory_format:
    """The layout of the output: channels-last if the input or the weight clearly is."""
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


def _tables(
    backend: Backend,
    bias: Tensor | None,
    alpha_weight: Tensor,
    alpha_bias: Tensor | None,
    forget: Tensor,
    gate_scale: float,
) -> tuple[Tensor, Tensor | None]:
    """Scale ``[B, O]`` and shift ``[B, O]`` (None without a bias)."""
    scale = backend.gate_rows(alpha_weight, forget, gate_scale)
    if bias is None:
        return scale, None
    return scale, backend.gate_rows(alpha_bias, forget, gate_scale) * bias.to(scale.dtype)


def _filter_gradients(
    backend: Backend,
    t1: Tensor | None,
    t0: Tensor | None,
    shift: Tensor,
    alpha_weight: Tensor,
    alpha_bias: Tensor | None,
    forget: Tensor,
) -> tuple[Tensor, Tensor]:
    """dalpha_weight and dalpha_bias ``[K, O]``, empty where not needed."""
    return (
        alpha_weight.new_empty(0)
        if t1 is None
        else backend.gate_rows_backward(t1, alpha_weight, forget),
        alpha_weight.new_empty(0)
        if t0 is None
        else backend.gate_rows_backward(t0 * shift, alpha_bias, forget),
    )


def _conv2d_backend(name: str, x: Tensor, weight: Tensor, geometry: ConvGeometry) -> Backend:
    return _willing(name, lambda backend: backend.refuse_conv2d(x, weight, geometry))


def linear_backend(name: str, x: Tensor, weight: Tensor) -> Backend:
    """The backend called ``name``, or a RuntimeError that says why it cannot run the call."""
    return _willing(name, lambda backend: backend.refuse_linear(x, weight))


def _willing(name: str, refuse: Callable[[Backend], str | None]) -> Backend:
    """The backend called ``name``; a clear error if it cannot run the call, never another one."""
    backend = backends.get(name)
    reason = refuse(backend)
    if reason is not None:
        raise RuntimeError(
            f"backend {name!r} cannot run this call: {reason}; choose another backend, or 'auto'"
        )
    return backend


def _geometry(
    stride: list[int], padding: list[int], dilation: list[int], groups: int
) -> ConvGeometry:
    return ConvGeometry(tuple(stride), tuple(padding), tuple(dilation), groups)


@torch.library.impl(_library, "conv2d", "CompositeExplicitAutograd")
def _conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    alpha_weight: Tensor,
    alpha_bias: Tensor | None,
    forget: Tensor,
    source: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    gate_scale: float,
    backend: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Masked convolution; ``x`` [N,C,H,W], ``forget`` [B,J], ``out`` [B,O,P,Q]."""
    geometry = _geometry(stride, padding, dilation, groups)
    engine = _conv2d_backend(backend, x, weight, geometry)
    memory_format = memory_format_of(x, weight)
    scale, shift = _tables(engine, bias, alpha_weight, alpha_bias, forget, gate_scale)
    out, saved = engine.conv2d(
        x.contiguous(memory_format=memory_format), weight, scale, shift, source, geometry, save
    )
    return (
        _laid_out(out, memory_format),
        x.new_empty(0) if saved is None else _laid_out(saved, memory_format),
        scale,
        scale.new_empty(0) if shift is None else shift,
    )


@torch.library.register_fake("wfnet::conv2d", lib=_library)
def _(
    x, weight, bias, alpha_weight, alpha_bias, forget, source,
    stride, padding, dilation, groups, gate_scale, backend, save,
):  # fmt: skip
    geometry = _geometry(stride, padding, dilation, groups)
    engine = _conv2d_backend(backend, x, weight, geometry)
    memory_format = memory_format_of(x, weight)
    size = geometry.output_size(x.shape[2], x.shape[3], (weight.shape[2], weight.shape[3]))
    out = x.new_empty((forget.shape[0], weight.shape[0], *size)).to(memory_format=memory_format)
    saved = out.new_empty(0)
    if save:
        rows = engine.saved_batch(x.shape[0], out.shape[0])
        saved = x.new_empty((rows, *out.shape[1:])).to(memory_format=memory_format)
    scale = _fake_table(alpha_weight, forget)
    return out, saved, scale, torch.empty_like(scale) if bias is not None else scale.new_empty(0)


def _fake_table(alpha: Tensor, forget: Tensor) -> Tensor:
    dtype = torch.promote_types(alpha.dtype, torch.float32)
    return alpha.new_empty((forget.shape[0], alpha.shape[1]), dtype=dtype)


@torch.library.impl(_library, "conv2d_backward", "CompositeExplicitAutograd")
def _conv2d_backward(
    dout: Tensor,
    saved: Tensor,
    weight: Tensor,
    alpha_weight: Tensor,
    alpha_bias: Tensor | None,
    forget: Tensor,
    source: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    input_shape: list[int],
    channels_last: bool,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    backend: str,
    need_dx: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``dx`` [N,C,H,W], ``dalpha_weight`` and ``dalpha_bias`` [K,O]; empty where not needed."""
    engine = backends.get(backend)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    dx, t1, t0 = engine.conv2d_backward(
        dout.contiguous(memory_format=memory_format),
        saved,
        weight,
        scale,
        source,
        tuple(input_shape),
        _geometry(stride, padding, dilation, groups),
        need_dx,
        need_weight,
        need_bias,
    )
    dx = dout.new_empty(0) if dx is None else _laid_out(dx, memory_format)
    return dx, *_filter_gradients(engine, t1, t0, shift, alpha_weight, alpha_bias, forget)


@torch.library.register_fake("wfnet::conv2d_backward", lib=_library)
def _(
    dout, saved, weight, alpha_weight, alpha_bias, forget, source, scale, shift, input_shape,
    channels_last, stride, padding, dilation, groups, backend, need_dx, need_weight, need_bias,
):  # fmt: skip
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    dx = dout.new_empty(input_shape).to(memory_format=memory_format)
    return (dx if need_dx else dout.new_empty(0)), *_fake_filter_gradients(
        alpha_weight, alpha_bias, need_weight, need_bias
    )


def _fake_filter_gradients(
    alpha_weight: Tensor, alpha_bias: Tensor | None, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor]:
    return (
        alpha_weight.new_empty(alpha_weight.shape if need_weight else 0),
        alpha_bias.new_empty(alpha_bias.shape) if need_bias else alpha_weight.new_empty(0),
    )


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, alpha_weight, alpha_bias, forget, source, *options):
        out, saved, scale, shift = _below_autograd(
            conv2d, x, weight, bias, alpha_weight, alpha_bias, forget, source, *options
        )
        ctx.save_for_backward(saved, weight, alpha_weight, alpha_bias, forget, source, scale, shift)
        ctx.mark_non_differentiable(saved, scale, shift)
        ctx.set_materialize_grads(False)
        *geometry, _, backend, _ = options
        channels_last = memory_format_of(x, weight) is torch.channels_last
        ctx.options = (list(x.shape), channels_last, *geometry, backend)
        ctx.arguments = 7 + len(options)
        return out, saved, scale, shift

    @staticmethod
    def backward(ctx, dout, *_):
        return _input_gradients(ctx, conv2d_backward, dout)


@torch.library.impl(_library, "linear", "CompositeExplicitAutograd")
def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    alpha_weight: Tensor,
    alpha_bias: Tensor | None,
    forget: Tensor,
    source: Tensor | None,
    gate_scale: float,
    backend: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Masked linear map; ``x`` [N,T,C], ``forget`` [B,J], ``out`` [B,T,O]."""
    engine = linear_backend(backend, x, weight)
    scale, shift = _tables(engine, bias, alpha_weight, alpha_bias, forget, gate_scale)
    out, saved = engine.linear(x.contiguous(), weight, scale, shift, source, save)
    return (
        _laid_out(out, torch.contiguous_format),
        x.new_empty(0) if saved is None else _laid_out(saved, torch.contiguous_format),
        scale,
        scale.new_empty(0) if shift is None else shift,
    )


@torch.library.register_fake("wfnet::linear", lib=_library)
def _(
    x, weight, bias, alpha_weight, alpha_bias, forget, source, gate_scale, backend, save,
):  # fmt: skip
    engine = linear_backend(backend, x, weight)
    out = x.new_empty((forget.shape[0], x.shape[1], weight.shape[0]))
    saved = out.new_empty(0)
    if save:
        rows = engine.saved_batch(x.shape[0], out.shape[0])
        saved = x.new_empty((rows, *out.shape[1:]))
    scale = _fake_table(alpha_weight, forget)
    return out, saved, scale, torch.empty_like(scale) if bias is not None else scale.new_empty(0)


@torch.library.impl(_library, "linear_backward", "CompositeExplicitAutograd")
def _linear_backward(
    dout: Tensor,
    saved: Tensor,
    weight: Tensor,
    alpha_weight: Tensor,
    alpha_bias: Tensor | None,
    forget: Tensor,
    source: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    input_shape: list[int],
    backend: str,
    need_dx: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``dx`` [N,T,C], ``dalpha_weight`` and ``dalpha_bias`` [K,O]; empty where not needed."""
    engine = backends.get(backend)
    dx, t1, t0 = engine.linear_backward(
        dout.contiguous(), saved, weight, scale, source, tuple(input_shape),
        need_dx, need_weight, need_bias,
    )  # fmt: skip
    dx = dout.new_empty(0) if dx is None else _laid_out(dx, torch.contiguous_format)
    return dx, *_filter_gradients(engine, t1, t0, shift, alpha_weight, alpha_bias, forget)


@torch.library.register_fake("wfnet::linear_backward", lib=_library)
def _(
    dout, saved, weight, alpha_weight, alpha_bias, forget, source, scale, shift, input_shape,
    backend, need_dx, need_weight, need_bias,
):  # fmt: skip
    return (dout.new_empty(input_shape if need_dx else 0)), *_fake_filter_gradients(
        alpha_weight, alpha_bias, need_weight, need_bias
    )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, alpha_weight, alpha_bias, forget, source, *options):
        out, saved, scale, shift = _below_autograd(
            linear, x, weight, bias, alpha_weight, alpha_bias, forget, source, *options
        )
        ctx.save_for_backward(saved, weight, alpha_weight, alpha_bias, forget, source, scale, shift)
        ctx.mark_non_differentiable(saved, scale, shift)
        ctx.set_materialize_grads(False)
        _, backend, _ = options
        ctx.options = (list(x.shape), backend)
        ctx.arguments = 7 + len(options)
        return out, saved, scale, shift

    @staticmethod
    def backward(ctx, dout, *_):
        return _input_gradients(ctx, linear_backward, dout)


def _below_autograd(operator, *arguments):
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)


def _input_gradients(ctx, operator, dout: Tensor | None) -> tuple[Tensor | None, ...]:
    """Runs a backward operator; None for every input that is frozen or needs no gradient."""
    if torch.is_grad_enabled():  # create_graph=True; gradients of gradients would be wrong
        raise RuntimeError(
            "double backward through wfnet's operators is not supported; use backend='reference', "
            "which is plain PyTorch"
        )
    gradients = [None] * ctx.arguments
    needed = [ctx.needs_input_grad[i] for i in (0, 3, 4)]
    if dout is not None:
        found = operator(dout, *ctx.saved_tensors, *ctx.options, *needed)
        for position, gradient, need in zip((0, 3, 4), found, needed, strict=True):
            gradients[position] = gradient if need else None
    return tuple(gradients)


def _register_autograd(name: str, function: type[torch.autograd.Function], operator) -> None:
    def autograd(*arguments):
        x, alpha_weight, alpha_bias = arguments[0], arguments[3], arguments[4]
        if torch.is_grad_enabled() and (
            x.requires_grad
            or alpha_weight.requires_grad
            or (alpha_bias is not None and alpha_bias.requires_grad)
        ):
            return function.apply(*arguments)
        return _below_autograd(operator, *arguments)

    _library.impl(name, autograd, "Autograd")


conv2d = torch.ops.wfnet.conv2d.default
conv2d_backward = torch.ops.wfnet.conv2d_backward.default
linear = torch.ops.wfnet.linear.default
linear_backward = torch.ops.wfnet.linear_backward.default
_register_autograd("conv2d", _Conv2d, conv2d)
_register_autograd("linear", _Linear, linear)
