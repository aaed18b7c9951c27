"""The ``torch.library`` operators ``wfnet::conv2d`` and ``wfnet::linear`` and their backward.

An operator turns filter matrices and forget labels into tables (gates), lets a backend compute
``scale * u + shift``, and in backward folds the backend's column sums back into filter gradients:

    dalpha_weight[l] = (1 - sigmoid(alpha_weight[l])) * sum over b with label l of T1[b]
    dalpha_bias[l]   = (1 - sigmoid(alpha_bias[l])) * the same sum of gate_bias * bias * T0[b]

Weights and biases are frozen and get no gradient. Operators return ``(out, saved, scale, shift)``;
the last three are private to backward (empty where backward will not need them). Arguments are
checked in :mod:`wfnet.functional`. Schemas are flat, as the dispatcher wants them; the objects that
backends take are built here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from wfnet import backends
from wfnet.backends.contract import Activation, Backend, ConvGeometry, Epilogue, LayerBelow

# Registered on the dispatcher directly: the wrapper layers of torch.library.custom_op would cost
# several times the launch of a small convolution for operators with this many arguments.
_library = torch.library.Library("wfnet", "DEF")

_FILTERS = "Tensor alpha_weight, Tensor? alpha_bias, Tensor forget, Tensor? source"
_NEEDED = "bool need_dx, bool need_weight, bool need_bias"


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


def linear_backend(name: str, x: Tensor, weight: Tensor) -> Backend:
    """Returns the backend called ``name``, or raises a RuntimeError: why it cannot run the call."""
    backend = backends.get(name)
    return _willing(backend, backend.refuse_linear(x, weight))


def _willing(backend: Backend, reason: str | None) -> Backend:
    """``backend``, or a clear error if it cannot run the call; never another one."""
    if reason is not None:
        raise RuntimeError(
            f"backend {backend.name!r} cannot run this call: {reason}; choose another backend, or "
            "'auto'"
        )
    return backend


class _MaskedOperator(ABC):
    """``wfnet::<name>`` and ``wfnet::<name>_backward``, registered when an instance is made.

    Subclasses say what convolutions and linear maps do not share. Their geometry is the tail of
    both schemas: :attr:`geometry` there, ``*geometry`` in every method.
    """

    name: str
    geometry: str

    def __init__(self) -> None:
        _library.define(
            f"{self.name}(Tensor x, Tensor weight, Tensor? bias, {_FILTERS}, float gate_scale, "
            f"str backend, bool save{self.geometry}) "
            "-> (Tensor out, Tensor saved, Tensor scale, Tensor shift)"
        )
        _library.define(
            f"{self.name}_backward(Tensor dout, Tensor saved, Tensor weight, {_FILTERS}, "
            "Tensor scale, Tensor shift, SymInt[] input_shape, bool channels_last, str backend, "
            f"{_NEEDED}{self.geometry}) "
            "-> (Tensor dx, Tensor dalpha_weight, Tensor dalpha_bias)"
        )
        self.operator = getattr(torch.ops.wfnet, self.name).default
        self.backward_operator = getattr(torch.ops.wfnet, f"{self.name}_backward").default
        for name, run, fake in (
            (self.name, self.forward, self.fake_forward),
            (f"{self.name}_backward", self.backward, self.fake_backward),
        ):
            _library.impl(name, run, "CompositeExplicitAutograd")
            torch.library.register_fake(f"wfnet::{name}", fake, lib=_library)
        _library.impl(self.name, self.autograd, "Autograd")

    @abstractmethod
    def engine(self, name: str, x: Tensor, weight: Tensor, *geometry: object) -> Backend:
        """The backend called ``name``, or a RuntimeError that says why it cannot run the call."""

    @abstractmethod
    def layout(self, x: Tensor, weight: Tensor) -> torch.memory_format:
        """The memory format of ``out`` and ``saved``."""

    @abstractmethod
    def output_shape(
        self, x: Tensor, weight: Tensor, batch: int, *geometry: object
    ) -> tuple[int, ...]:
        """The shape of ``out`` for ``batch`` samples."""

    @abstractmethod
    def run(
        self, engine: Backend, x: Tensor, weight: Tensor, epilogue: Epilogue, *geometry: object
    ) -> Activation:
        """The backend's forward pass."""

    @abstractmethod
    def run_backward(
        self,
        engine: Backend,
        dout: Tensor,
        layer: LayerBelow,
        weight: Tensor,
        input_shape: tuple[int, ...],
        *geometry: object,
    ) -> Tensor | None:
        """The backend's backward pass: ``dx``."""

    def forward(
        self,
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
        *geometry: object,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``out``, ``saved``, ``scale`` and ``shift`` for labels ``forget`` ``[B, J]``."""
        engine = self.engine(backend, x, weight, *geometry)
        layout = self.layout(x, weight)
        scale, shift = engine.gate_rows(alpha_weight, forget, gate_scale), None
        if bias is not None:
            shift = engine.gate_rows(alpha_bias, forget, gate_scale) * bias.to(scale.dtype)
        epilogue = Epilogue(scale, shift, source=source, save=save)
        found = self.run(engine, x.contiguous(memory_format=layout), weight, epilogue, *geometry)
        return (
            _laid_out(found.out, layout),
            x.new_empty(0) if found.branch is None else _laid_out(found.branch, layout),
            scale,
            scale.new_empty(0) if shift is None else shift,
        )

    def fake_forward(
        self,
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
        *geometry: object,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Results of :meth:`forward` without values."""
        engine = self.engine(backend, x, weight, *geometry)
        layout = self.layout(x, weight)
        shape = self.output_shape(x, weight, forget.shape[0], *geometry)
        out = x.new_empty(shape).to(memory_format=layout)
        saved = out.new_empty(0)
        if save:
            rows = shape[0] if engine.keeps_scaled_branch else x.shape[0]
            saved = x.new_empty((rows, *shape[1:])).to(memory_format=layout)
        dtype = torch.promote_types(alpha_weight.dtype, torch.float32)
        scale = alpha_weight.new_empty((shape[0], alpha_weight.shape[1]), dtype=dtype)
        return out, saved, scale, scale.new_empty(0) if bias is None else torch.empty_like(scale)

    def backward(
        self,
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
        backend: str,
        need_dx: bool,
        need_weight: bool,
        need_bias: bool,
        *geometry: object,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``dx``, ``dalpha_weight`` and ``dalpha_bias`` ``[K, O]``; empty where not needed."""
        engine = backends.get(backend)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        layer = LayerBelow(
            branch=saved if need_weight else None,
            scale=scale,
            t1=torch.empty_like(scale) if need_weight else None,
            t0=torch.empty_like(scale) if need_bias else None,
            source=source,
            need_scaled_grad=need_dx,
            images=input_shape[0],
        )
        dout = dout.contiguous(memory_format=layout)
        dx = self.run_backward(engine, dout, layer, weight, tuple(input_shape), *geometry)
        return (
            dout.new_empty(0) if dx is None else _laid_out(dx, layout),
            engine.gate_rows_backward(layer.t1, alpha_weight, forget)
            if need_weight
            else alpha_weight.new_empty(0),
            engine.gate_rows_backward(layer.t0 * shift, alpha_bias, forget)
            if need_bias
            else alpha_weight.new_empty(0),
        )

    def fake_backward(
        self,
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
        backend: str,
        need_dx: bool,
        need_weight: bool,
        need_bias: bool,
        *geometry: object,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Results of :meth:`backward` without values."""
        layout = torch.channels_last if channels_last else torch.contiguous_format
        return (
            dout.new_empty(input_shape).to(memory_format=layout) if need_dx else dout.new_empty(0),
            torch.empty_like(alpha_weight) if need_weight else alpha_weight.new_empty(0),
            torch.empty_like(alpha_bias) if need_bias else alpha_weight.new_empty(0),
        )

    def autograd(self, *arguments: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """:meth:`forward`, recorded where anything needs a gradient."""
        x, alpha_weight, alpha_bias = arguments[0], arguments[3], arguments[4]
        if torch.is_grad_enabled() and (
            x.requires_grad
            or alpha_weight.requires_grad
            or (alpha_bias is not None and alpha_bias.requires_grad)
        ):
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
        channels_last = operator.layout(x, weight) is torch.channels_last
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
        learnable = 1, 4, 5  # x, alpha_weight, alpha_bias
        needed = [ctx.needs_input_grad[i] for i in learnable]
        if dout is not None:
            found = ctx.operator.backward_operator(
                dout, *ctx.saved_tensors, *ctx.options, *needed, *ctx.geometry
            )
            for position, gradient, need in zip(learnable, found, needed, strict=True):
                gradients[position] = gradient if need else None
        return tuple(gradients)


def _below_autograd(operator, *arguments):
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)


class _Convolution(_MaskedOperator):
    """``x`` ``[N, C, H, W]``, ``weight`` ``[O, C / groups, R, S]``, ``out`` ``[B, O, P, Q]``."""

    name = "conv2d"
    geometry = ", int[] stride, int[] padding, int[] dilation, int groups"

    def engine(self, name, x, weight, *geometry):
        backend = backends.get(name)
        return _willing(backend, backend.refuse_conv2d(x, weight, _geometry(*geometry)))

    def layout(self, x, weight):
        return memory_format_of(x, weight)

    def output_shape(self, x, weight, batch, *geometry):
        kernel = weight.shape[2], weight.shape[3]
        size = _geometry(*geometry).output_size(x.shape[2], x.shape[3], kernel)
        return batch, weight.shape[0], *size

    def run(self, engine, x, weight, epilogue, *geometry):
        return engine.conv2d(x, weight, _geometry(*geometry), epilogue)

    def run_backward(self, engine, dout, layer, weight, input_shape, *geometry):
        return engine.conv2d_backward(dout, layer, weight, input_shape, _geometry(*geometry))


def _geometry(
    stride: list[int], padding: list[int], dilation: list[int], groups: int
) -> ConvGeometry:
    return ConvGeometry(tuple(stride), tuple(padding), tuple(dilation), groups)


class _Linear(_MaskedOperator):
    """``x`` ``[N, T, C]``, ``weight`` ``[O, C]``, ``out`` ``[B, T, O]``."""

    name = "linear"
    geometry = ""

    def engine(self, name, x, weight):
        return linear_backend(name, x, weight)

    def layout(self, x, weight):
        return torch.contiguous_format

    def output_shape(self, x, weight, batch):
        return batch, x.shape[1], weight.shape[0]

    def run(self, engine, x, weight, epilogue):
        return engine.linear(x, weight, epilogue)

    def run_backward(self, engine, dout, layer, weight, input_shape):
        return engine.linear_backward(dout, layer, weight, input_shape)


OPERATORS = (_Convolution(), _Linear())
conv2d, linear = (operator.operator for operator in OPERATORS)
conv2d_backward, linear_backward = (operator.backward_operator for operator in OPERATORS)
