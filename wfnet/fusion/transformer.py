"""Networks that mask linear maps (transformers): a prefix per source image, then the network's own.

:func:`wfnet.fusion.cut.split_at_first_mask` cuts the network before its first masked layer: what
comes before (patch embedding, positions, the first norm) runs once per source image and is not
differentiated; the tensors that cross the cut are expanded to the samples there, but for the inputs
of masked layers, which read source images and expand their result.

The rest is the network's own operations, with scales and shifts of all masked layers from one
table (:mod:`wfnet.gate_tables`). :class:`TrunkRun` runs it in one of three ways:

- as it is: a masked layer keeps its branch ``u``, from which its result ``scale * u + shift`` is
  computed again when attention wants it in backward. What attention would keep of it, query, key
  and value, is then never held (:class:`_Kept`).
- compiled, for the backend "eager": tables are inputs of the compiled graph, ``scale * u + shift``
  is part of it, and new labels never compile anew.
- compiled, for kernels: masked layers are operators in the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import FunctionType, MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from wfnet import backends, gates
from wfnet.backends.contract import Backend, Epilogue, LayerBelow
from wfnet.fusion.run import CompiledGraph, FusedNetwork, Run, write_sums
from wfnet.fusion.trace import NotFusable
from wfnet.fusion.views import MaskedCall, Part
from wfnet.gate_tables import GatedLayer, GateTables, StepTables
from wfnet.labels import Selection, forgetting
from wfnet.layers import MaskedLayer
from wfnet.operators import willing_backend


class TrunkNetwork(FusedNetwork):
    """Runs a network in two parts: ``prefix`` per source image, ``rest`` per sample.

    Args:
        prefix: ``[N, C, H, W]`` images to the tensors that cross the cut.
        rest: from :func:`wfnet.fusion.cut.split_at_first_mask`: a run and those tensors to logits.
        layers: the masked layers of the rest, in the order of the network's modules.
        compiled: compile it, anew for every size. Further sizes than a few run as they are; so does
            everything if compiling fails, with a line in the log.

    Raises:
        NotFusable: if a layer asks for the reference backend.
    """

    def __init__(
        self, prefix: nn.Module, rest: nn.Module, layers: Sequence[MaskedLayer], compiled: bool
    ):
        names = [backends.requested(layer.backend) for layer in layers]
        if "reference" in names:
            raise NotFusable("the reference backend is never fused")
        super().__init__()
        self.prefix = prefix
        self.rest = rest
        self._layers = tuple(layers)
        self.compiles_tables = set(names) <= {"auto", "eager"}
        self._backend = backends.get(names[0] if {*names} == {names[0]} != {"auto"} else "eager")
        self.graph: CompiledGraph | None = None
        if compiled:
            traced = self._of_tables if self.compiles_tables else self._of_rows
            self.graph = CompiledGraph(_own_code(traced))

    @property
    def layers(self) -> tuple[MaskedLayer, ...]:
        return self._layers

    @property
    def compiled(self) -> bool:
        """Whether the rest is compiled; not any more once compiling has failed."""
        return self.graph is not None and self.graph.works

    def _of_tables(
        self,
        images: Tensor,
        source: Tensor | None,
        scales: Sequence[Tensor],
        shifts: Sequence[Tensor],
    ) -> Tensor:
        sizes = images.shape[0], scales[0].shape[0]
        run = _Affine(self.layers, *sizes, source, scales, shifts)
        return self.rest(run, *self.crossing(images))

    def _of_rows(self, images: Tensor, source: Tensor | None, rows: Tensor) -> Tensor:
        with forgetting(Selection(rows)):
            run = _Operators(self.layers, images.shape[0], rows.shape[0], source)
            return self.rest(run, *self.crossing(images))

    def crossing(self, images: Tensor) -> tuple[Tensor, ...]:
        """The tensors that cross the cut."""
        with torch.no_grad():
            return self.prefix(images)

    def start(
        self, images: Tensor, rows: Tensor, source: Tensor | None, save: bool = True
    ) -> TrunkRun:
        compiled = self.graph is not None and self.graph.takes(
            images, rows.shape, source is None, save
        )
        return TrunkRun(self, images, rows, source, save, compiled)

    def tables(self) -> GateTables:
        """Tables over the present filters and biases; made anew when these change."""
        return self._tables_over(
            self.filters(),
            (layer.bias for layer in self.layers if layer.bias is not None),
            lambda: self._backend.gate_tables(
                [
                    GatedLayer(m.alpha_weight, m.alpha_bias, m.bias, gate_scale=m.gate_scale)
                    for m in self.layers
                ]
            ),
        )

    def describe(self) -> str:
        once = sum(node.op not in ("placeholder", "output") for node in self.prefix.graph.nodes)
        how = "compiled" if self.compiled else "as it is"
        return f"{once} operations before the first mask run once per image, the rest runs {how}"


def _own_code(method: MethodType) -> MethodType:
    """``method`` with a code object of its own: what is compiled is kept, and counted, by code."""
    function = method.__func__
    own = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    return MethodType(own, method.__self__)


class TrunkRun(Run):
    """A run of a :class:`TrunkNetwork`.

    Args:
        compiled: run the compiled graph.
    """

    network: TrunkNetwork

    def __init__(
        self,
        network: TrunkNetwork,
        images: Tensor,
        rows: Tensor,
        source: Tensor | None,
        save: bool,
        compiled: bool,
    ):
        super().__init__(network, images, rows, source, save)
        self.compiled = compiled
        self.tables: StepTables | None = None
        self.logits: Tensor | None = None  # with the graph of the rest

    def forward(self) -> Tensor:
        network = self.network
        with torch.set_grad_enabled(self.save):
            logits = None
            if self.compiled and network.compiles_tables:
                logits = self._compiled_of_tables()
            elif self.compiled:
                self.inputs = [f for f in network.filters() if f.requires_grad]
                logits = network.graph(self.images, self.source, self.rows)
            if logits is None:
                self.compiled = False
                logits = self._recorded()
        if self.save:
            self.logits = logits
        return logits.detach()

    def _compiled_of_tables(self) -> Tensor | None:
        self.tables = self.network.tables()(self.rows, self.save)
        scales, shifts = self.tables.scales, self.tables.shifts
        if self.save:
            scales = [scale.detach().requires_grad_() for scale in scales]
            shifts = [shift.detach().requires_grad_() for shift in shifts]
        self.inputs = [*scales, *shifts]
        return self.network.graph(self.images, self.source, scales, shifts)

    def _recorded(self) -> Tensor:
        network, sizes = self.network, (self.images.shape[0], self.rows.shape[0])
        self.tables = network.tables()(self.rows, self.save)
        run = _Recorded(network, *sizes, self.source, self.tables, self.save)
        self.inputs = [run.anchor]
        return network.rest(run, *network.crossing(self.images))

    def propagate(self, dout: Tensor) -> None:
        logits, self.logits = self.logits, None
        found = torch.autograd.grad(logits, self.inputs, dout.to(logits.dtype), allow_unused=True)
        if self.tables is None:
            self.found = found
        elif self.compiled:
            count = len(self.network.layers)
            write_sums(self.tables, found[:count], found[count:])

    def gradients(self, into: Tensor | None) -> list[Tensor]:
        if self.tables is not None:
            return self.tables.gradients(into)
        return self._of_operators(self.found, into)

    def _of_operators(self, found: Sequence[Tensor | None], into: Tensor | None) -> list[Tensor]:
        of_filter = dict(zip(map(id, self.inputs), found, strict=True))
        gradients = []
        for matrix in self.network.filters():
            gradient = of_filter.get(id(matrix))
            gradients.append(torch.zeros_like(matrix) if gradient is None else gradient)
        if into is None:
            return gradients
        columns = into.split([gradient.shape[1] for gradient in gradients], 1)
        torch._foreach_copy_(columns, gradients)
        return list(columns)


# -- what the graph of the rest asks of a run ------------------------------------------------------


class Samples:
    """Tensors with one row, or one row per window, for each source image; what samples see of them.

    Args:
        layers: masked layers by index.
        sources, batch: N and B.
        source: ``[B]``, or None: N is B.
    """

    watches = False

    def __init__(
        self, layers: Sequence[MaskedLayer], sources: int, batch: int, source: Tensor | None
    ):
        self.layers, self.sources, self.batch, self.source = layers, sources, batch, source

    def expanded(self, x: Tensor) -> Tensor:
        """``x`` with the windows of image ``source[b]`` for sample b."""
        if self.source is None:
            return x
        if x.shape[0] == self.sources:
            return gates.gather_samples(x, self.source)
        windows = x.unflatten(0, (self.sources, -1))
        return windows.index_select(0, self.source).flatten(0, 1)

    def shaped(self, x: Tensor) -> Tensor:
        """A tensor of the shape of :meth:`expanded` that takes no memory."""
        if self.source is None:
            return x
        windows = x.shape[0] // self.sources
        return x.new_empty(()).expand(self.batch * windows, *x.shape[1:])

    def tokens(self, x: Tensor, images: int) -> Tensor:
        """``[images, T, C]``: the windows of an image are tokens of it."""
        return x.reshape(images, x.shape[:-1].numel() // max(images, 1), x.shape[-1])

    def shape_of(self, channels: int, x: Tensor, images: int) -> tuple[int, ...]:
        """The shape of the output of a layer whose input is ``x``, which holds so many images."""
        return self.batch * (x.shape[0] // max(images, 1)), *x.shape[1:-1], channels

    def masked(self, call: MaskedCall, x: Tensor, sizes: tuple) -> tuple:
        """Views of the result of a masked layer, from the layer's input; ``sizes`` are theirs."""
        raise NotImplementedError


class _Operators(Samples):
    """Masked layers are operators, with the labels that are bound."""

    def masked(self, call: MaskedCall, x: Tensor, sizes: tuple) -> tuple:
        x = self.expanded(x) if call.at_source else x
        return call.views(self.layers[call.index](x), *sizes)


class _Affine(Samples):
    """Masked layers are a product, a multiplication and a sum, for a compiler to fuse."""

    def __init__(
        self,
        layers: Sequence[MaskedLayer],
        sources: int,
        batch: int,
        source: Tensor | None,
        scales: Sequence[Tensor],
        shifts: Sequence[Tensor],
    ):
        super().__init__(layers, sources, batch, source)
        self.scales, self.shifts = scales, shifts

    def masked(self, call: MaskedCall, x: Tensor, sizes: tuple) -> tuple:
        images = self.sources if call.at_source else self.batch
        layer = self.layers[call.index]
        u = F.linear(self.tokens(x, images), layer.weight)
        if call.at_source:
            u = gates.gather_samples(u, self.source)
        shape = self.shape_of(u.shape[-1], x, images)

        def result(u: Tensor, scale: Tensor, shift: Tensor | None) -> tuple:
            return call.views(_affine(u, scale, shift).reshape(shape), *sizes)

        # For the compiler: computed again in backward, where it would keep both u and the result.
        shift = None if layer.bias is None else self.shifts[call.index]
        return checkpoint(result, u, self.scales[call.index], shift, use_reentrant=False)


def _affine(u: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    """``scale * u + shift`` in the dtype of ``u`` ``[B, T, O]``; tables are ``[B, O]``."""
    y = u * scale[:, None]
    return (y if shift is None else y + shift[:, None]).to(u.dtype)


class _Kept:
    """What a masked layer keeps from forward to backward.

    Attributes:
        branch: what ``t1`` is summed from, as the backend returned it.
        out: the storage and version of the layer's result, where ``branch`` tells it.
    """

    def __init__(self, index: int, backend: Backend, source: Tensor | None, branch: Tensor):
        self.index, self.backend, self.source, self.branch = index, backend, source, branch
        self.out: tuple[StorageWeakRef, int] | None = None
        self.again: Tensor | None = None  # the result, computed a second time


class _Recorded(Samples):
    """Masked layers as nodes of PyTorch's autograd, which write the column sums of ``tables``.

    Attention saves views of a masked layer's result, beside the branch that the layer keeps. Where
    a backend keeps ``u`` itself the result is one multiplication and sum away from it, so what
    autograd saves of it is taken down as a size and strides, and computed again in backward, once
    per layer. Not where the result was changed in place in between; and not where the branch is
    rounded after scaling: it would give the result rounded twice.
    """

    def __init__(
        self,
        network: TrunkNetwork,
        sources: int,
        batch: int,
        source: Tensor | None,
        tables: StepTables,
        save: bool,
    ):
        super().__init__(network.layers, sources, batch, source)
        self.network, self.tables, self.save = network, tables, save
        self.watches = save
        # What every masked layer's node reads, so that it is one: no input of it needs a gradient.
        self.anchor = torch.zeros(()).requires_grad_(save)
        self.kept: dict[int, _Kept] = {}  # by storage of the result

    def masked(self, call: MaskedCall, x: Tensor, sizes: tuple) -> tuple:
        source = self.source if call.at_source else None
        images = self.batch if source is None else self.sources
        device = x.device.type
        if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(device))
        tokens = self.tokens(x, images).contiguous()
        layer, weight = self.layers[call.index], self.weight(call.index, x.dtype)
        backend = willing_backend(backends.resolve(layer.backend), tokens, weight)
        shape = self.shape_of(weight.shape[0], x, images)
        if not self.save:
            out, _ = self.run(tokens, backend, call.index, source, False)
            return call.views(out.view(shape), *sizes)
        if call.tiles(shape, sizes):
            return _MaskedLinear.apply(
                tokens, self.anchor, self, backend, call, source, shape, sizes
            )
        out = _MaskedLinear.apply(tokens, self.anchor, self, backend, call, source, None, None)
        return call.views(out.view(shape), *sizes)

    def run(
        self, tokens: Tensor, backend: Backend, index: int, source: Tensor | None, save: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The backend's forward pass, with the tables of a layer."""
        scale, shift = self.tables.scales[index], None
        if self.layers[index].bias is not None:
            shift = self.tables.shifts[index]
        weight = self.weight(index, tokens.dtype)
        found = backend.linear(tokens, weight, Epilogue(scale, shift, source=source, save=save))
        return found.out, found.branch

    def weight(self, index: int, dtype: torch.dtype) -> Tensor:
        """The frozen weight of a layer in ``dtype``."""
        return self.network.weight(self.layers[index], dtype)

    # -- results that are computed again --------------------------------------------------------

    def keep(self, kept: _Kept, out: Tensor) -> None:
        """Notes the result ``out`` ``[B, T, O]`` of a layer, to be known again by its storage."""
        known = not kept.backend.keeps_scaled_branch  # from the branch, by one product and sum
        if known and out.is_contiguous() and out.storage_offset() == 0:
            storage = StorageWeakRef(out.untyped_storage())
            kept.out = (storage, out._version)
            self.kept[storage.cdata] = kept

    def pack(self, t: Tensor) -> tuple[object, ...]:
        kept = self.kept.get(t.untyped_storage()._cdata)
        known = kept is not None and kept.branch is not None and t.dtype == kept.branch.dtype
        if known and t._version == kept.out[1]:
            return kept, t.shape, t.stride(), t.storage_offset()
        return t.detach(), t._version  # not t, which may hold the node that keeps it

    def unpack(self, packed: tuple[object, ...]) -> Tensor:
        first, *view = packed
        if not isinstance(first, _Kept):
            if first._version != view[0]:  # autograd's own check does not see what hooks hold
                raise RuntimeError(
                    f"a tensor {list(first.shape)} that backward needs was changed in place after "
                    "it was used in a fused network; use the operation that makes a new tensor"
                )
            return first
        if first.again is None:
            first.again = self.result_of(first)
        return first.again.as_strided(*view)

    def result_of(self, kept: _Kept) -> Tensor:
        """``scale * u + shift``, by the operation that gave it in forward."""
        u = gates.gather_samples(kept.branch, kept.source)
        scale = self.tables.scales[kept.index][:, None]
        if self.layers[kept.index].bias is None:
            return torch.mul(u, scale, out=torch.empty_like(u))
        shift = self.tables.shifts[kept.index][:, None]
        return torch.addcmul(shift, u, scale, out=torch.empty_like(u))


class _MaskedLinear(torch.autograd.Function):
    """A masked layer of a :class:`_Recorded` run, and the views into which its result falls apart.

    Gradients of query, key and value meet here, once, as the projection's own gradient; undoing the
    views one by one would copy them twice.

    Args:
        shape: of the result of which the views are taken, of ``sizes``; None: of the whole result.
    """

    @staticmethod
    def forward(ctx, tokens, anchor, layers, backend, call, source, shape, sizes):
        out, branch = layers.run(tokens, backend, call.index, source, True)
        ctx.layers, ctx.input_shape, ctx.output_shape = layers, tokens.shape, out.shape
        ctx.call, ctx.shape, ctx.sizes = call, shape, sizes
        ctx.kept = _Kept(call.index, backend, source, branch)
        layers.keep(ctx.kept, out)
        return out if shape is None else call.views(out.view(shape), *sizes)

    @staticmethod
    def backward(ctx, *gradients):
        kept, parts = ctx.kept, None
        branch, kept.branch, kept.again = kept.branch, None, None
        if ctx.shape is not None and kept.out is not None:
            parts = ctx.call.parts(ctx.output_shape, ctx.shape, ctx.sizes)
        if parts is None:
            dx = _by_backend(ctx, branch, gradients)
        else:
            dx = _by_parts(ctx, branch, gradients, parts)
        return dx, *[None] * 7


def _by_backend(ctx, branch: Tensor, gradients: Sequence[Tensor]) -> Tensor | None:
    """The gradient of the layer's input, from gradients that are laid side by side first."""
    kept, layers = ctx.kept, ctx.layers
    if ctx.shape is None:
        dout = gradients[0].contiguous()
    else:
        dout = gradients[0].new_empty(ctx.output_shape)
        views = ctx.call.views(dout.view(ctx.shape), *ctx.sizes)
        for part, gradient in zip(views, gradients, strict=True):
            part.copy_(gradient)
    t1, t0 = layers.tables.t1[kept.index], layers.tables.t0[kept.index]
    layer = LayerBelow(
        branch=branch,
        scale=layers.tables.scales[kept.index],
        t1=torch.empty(t1.shape, dtype=t1.dtype, device=t1.device),
        t0=None if t0 is None else torch.empty(t0.shape, dtype=t0.dtype, device=t0.device),
        source=kept.source,
        need_scaled_grad=ctx.needs_input_grad[0],
        images=ctx.input_shape[0],
    )
    weight = layers.weight(kept.index, dout.dtype)
    dx = kept.backend.linear_backward(dout, layer, weight, tuple(ctx.input_shape))
    t1.add_(layer.t1)  # a layer may run twice
    if t0 is not None:
        t0.add_(layer.t0)
    return dx


def _by_parts(ctx, u: Tensor, gradients: Sequence[Tensor], parts: Sequence[Part]) -> Tensor | None:
    """As :func:`_by_backend` where the branch is ``u``: every gradient is read where it lies."""
    kept, tables = ctx.kept, ctx.layers.tables
    scale, t1, t0 = tables.scales[kept.index], tables.t1[kept.index], tables.t0[kept.index]
    u = gates.gather_samples(u, kept.source)
    product = torch.empty_like(u)
    for part, g in zip(parts, gradients, strict=True):
        torch.mul(g, part.of(u), out=part.of(product))
    t1.addcmul_(product.sum(1, dtype=t1.dtype), scale)  # a layer may run twice
    if t0 is not None:
        sums = torch.empty_like(t0, memory_format=torch.contiguous_format)
        for part, g in zip(parts, gradients, strict=True):
            part.add_up(g, sums)
        t0.add_(sums)
    if not ctx.needs_input_grad[0]:
        return None
    for part, g in zip(parts, gradients, strict=True):
        torch.mul(g, part.of_table(scale), out=part.of(product))
    return product @ ctx.layers.weight(kept.index, product.dtype)
