"""Networks that mask linear maps (transformers): a prefix per source image, then the network's own.

:func:`split_at_first_mask` traces the network with torch.fx and cuts it before the first masked
layer: what comes before (patch embedding, positions, the first norm) runs once per source image and
is not differentiated; the tensors that cross the cut are expanded to the samples there, but for the
inputs of masked layers, which read source images and expand their result.

The rest is the network's own operations, with scales and shifts of all masked layers from one
table (:mod:`wfnet.tables`). :class:`TrunkRun` runs it in one of three ways:

- as it is: a masked layer keeps its branch ``u``, from which its result ``scale * u + shift`` is
  computed again when attention wants it in backward. What attention would keep of it, query, key
  and value, is then never held (:class:`_Kept`).
- compiled, for the backend "eager": tables are inputs of the compiled graph, ``scale * u + shift``
  is part of it, and new labels never compile anew.
- compiled, for kernels: masked layers are operators in the graph.
"""

from __future__ import annotations

import inspect
import logging
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FunctionType, MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo.exc import TorchDynamoException
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from wfnet import backends, functional, gates
from wfnet.backends import Backend
from wfnet.fusion.plan import EXPANDED, SOURCE, NotFusable, check_traceable, trace
from wfnet.fusion.rewriting import changed_in_place, erase_idle
from wfnet.fusion.tokens import drop_unread_tokens
from wfnet.labels import Selection, forgetting
from wfnet.layers import MaskedLayer, WFLinear
from wfnet.tables import GatedLayer, GateTables, StepTables

logger = logging.getLogger("wfnet")

# Batches of so many kinds have a compiled graph of their own (the compiler's own limit).
_MOST_GRAPHS = 8


class TrunkNetwork:
    """Runs a network in two parts: ``prefix`` per source image, ``rest`` per sample.

    Args:
        prefix: ``[N, C, H, W]`` images to the tensors that cross the cut.
        rest: from :func:`split_at_first_mask`: a run and those tensors to logits.
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
        self.prefix = prefix
        self.rest = rest
        self.layers = tuple(layers)
        self.compiled = compiled
        self.compiles_tables = set(names) <= {"auto", "eager"}
        self._backend = backends.get(names[0] if {*names} == {names[0]} != {"auto"} else "eager")
        self._tables: tuple[object, GateTables] | None = None
        self._weights: dict[tuple[int, torch.dtype], tuple[object, Tensor]] = {}
        self._kinds: set[tuple] = set()
        if compiled:
            traced = self._of_tables if self.compiles_tables else self._of_rows
            self.run = torch.compile(_own_code(traced), fullgraph=True, dynamic=False)

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

    def filters(self) -> list[Tensor]:
        """Filter matrices, layer by layer, weight before bias: the order of the gradients."""
        return [
            matrix
            for layer in self.layers
            for matrix in (layer.alpha_weight, layer.alpha_bias)
            if matrix is not None
        ]

    def start(
        self, images: Tensor, rows: Tensor, source: Tensor | None, save: bool = True
    ) -> TrunkRun:
        """A forward pass that may be followed by its backward pass if ``save``."""
        device = images.device.type
        autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        kind = (images.shape, images.dtype, autocast, rows.shape, source is None, save)
        compiled = self.compiled and (kind in self._kinds or len(self._kinds) < _MOST_GRAPHS)
        if compiled:
            self._kinds.add(kind)
        return TrunkRun(self, images, rows, source, save, compiled)

    def run_compiled(self, *inputs: object) -> Tensor | None:
        """Logits from the compiled graph; None if it cannot be compiled, from then on."""
        try:
            return self.run(*inputs)
        except TorchDynamoException as error:
            reason = " ".join(str(error).strip().split("\n\n")[0].split())
            logger.warning("the fused network runs uncompiled: compiling failed (%s)", reason)
            self.compiled = False
            return None

    def __call__(self, images: Tensor, rows: Tensor, source: Tensor | None) -> Tensor:
        """Logits ``[B, K]``; images ``[N, C, H, W]``, labels ``[B, J]``, ``source`` ``[B]``.

        Gradients reach the filters only; double backward raises.
        """
        filters = self.filters()
        if torch.is_grad_enabled() and any(f.requires_grad for f in filters):
            return _TrunkFunction.apply(self, images, rows, source, *filters)
        return self.start(images, rows, source, save=False).forward()

    def tables(self) -> GateTables:
        """Tables over the present filters and biases; made anew when these change."""
        biases = [layer.bias for layer in self.layers if layer.bias is not None]
        key = (*map(_state_of, biases), *(f.data_ptr() for f in self.filters()))
        if self._tables is None or self._tables[0] != key:
            layers = [
                GatedLayer(m.alpha_weight, m.alpha_bias, m.bias, gate_scale=m.gate_scale)
                for m in self.layers
            ]
            self._tables = (key, self._backend.gate_tables(layers))
        return self._tables[1]

    def weight(self, index: int, dtype: torch.dtype) -> Tensor:
        """The frozen weight of a layer in ``dtype``, converted once."""
        weight = self.layers[index].weight
        if weight.dtype == dtype:
            return weight
        key = _state_of(weight)
        cached = self._weights.get((index, dtype))
        if cached is None or cached[0] != key:
            cached = (key, weight.detach().to(dtype))
            self._weights[index, dtype] = cached
        return cached[1]

    def describe(self) -> str:
        """One line for the log: what runs how."""
        once = sum(node.op not in ("placeholder", "output") for node in self.prefix.graph.nodes)
        how = "compiled" if self.compiled else "as it is"
        return f"{once} operations before the first mask run once per image, the rest runs {how}"


def _own_code(method: MethodType) -> MethodType:
    """``method`` with a code object of its own: what is compiled is kept, and counted, by code."""
    function = method.__func__
    own = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    return MethodType(own, method.__self__)


def _state_of(t: Tensor) -> tuple[object, ...]:
    return (t.data_ptr(), 0 if t.is_inference() else t._version, t.dtype, t.device)


class TrunkRun:
    """One forward pass of a :class:`TrunkNetwork`, and the backward pass that belongs to it.

    Args:
        images, rows, source: as in :meth:`TrunkNetwork.__call__`.
        save: keep what :meth:`backward` needs.
        compiled: run the compiled graph.
    """

    def __init__(
        self,
        network: TrunkNetwork,
        images: Tensor,
        rows: Tensor,
        source: Tensor | None,
        save: bool,
        compiled: bool,
    ):
        self.network = network
        self.images = images
        self.rows = rows
        self.source = source
        self.save = save
        self.compiled = compiled
        self.tables: StepTables | None = None
        self.logits: Tensor | None = None  # with the graph of the rest

    def forward(self) -> Tensor:
        """Logits ``[B, K]``, without a graph."""
        network = self.network
        with torch.set_grad_enabled(self.save):
            logits = None
            if self.compiled and network.compiles_tables:
                logits = self._compiled_of_tables()
            elif self.compiled:
                self.inputs = [f for f in network.filters() if f.requires_grad]
                logits = network.run_compiled(self.images, self.source, self.rows)
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
        return self.network.run_compiled(self.images, self.source, scales, shifts)

    def _recorded(self) -> Tensor:
        network, sizes = self.network, (self.images.shape[0], self.rows.shape[0])
        self.tables = network.tables()(self.rows, self.save)
        run = _Recorded(network, *sizes, self.source, self.tables, self.save)
        self.inputs = [run.anchor]
        return network.rest(run, *network.crossing(self.images))

    def backward(self, dout: Tensor, into: Tensor | None = None) -> list[Tensor]:
        """Gradients of the filters, in the order of :meth:`TrunkNetwork.filters`.

        Args:
            dout: ``[B, K]``, gradient of the logits.
            into: ``[K, total]``, written instead of fresh memory (:meth:`StepTables.gradients`).
        """
        if self.logits is None:
            raise RuntimeError(
                "backward through a fused network a second time; its branches are freed by the "
                "first (retain_graph is not supported with fuse=True)"
            )
        logits, self.logits = self.logits, None
        found = torch.autograd.grad(logits, self.inputs, dout.to(logits.dtype), allow_unused=True)
        if self.tables is None:
            return self._of_operators(found, into)
        if self.compiled:
            self._write_sums(found)
        return self.tables.gradients(into)

    def _write_sums(self, found: Sequence[Tensor | None]) -> None:
        """Column sums of the gradients of all scales and shifts: ``t1`` is by the log of a gate."""
        tables, count = self.tables, len(self.network.layers)
        for t1, scale, dscale in zip(tables.t1, tables.scales, found[:count], strict=True):
            if dscale is not None:
                torch.mul(dscale, scale, out=t1)
        for t0, dshift in zip(tables.t0, found[count:], strict=True):
            if t0 is not None and dshift is not None:
                t0.copy_(dshift)

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


class _TrunkFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, network, images, rows, source, *filters):
        ctx.run = network.start(images, rows, source)
        ctx.save_for_backward(*filters)  # autograd notices filters that change before backward
        return ctx.run.forward()

    @staticmethod
    def backward(ctx, dout):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "double backward through a fused network is not supported; use fuse=False and "
                "backend='reference', which is plain PyTorch"
            )
        _ = ctx.saved_tensors
        return None, None, None, None, *ctx.run.backward(dout)


# -- what the graph of the rest asks of a run ------------------------------------------------------


@dataclass(eq=False)
class _Call:
    """A call of a masked layer, with the views of its result that are taken first.

    Attributes:
        index: of the layer.
        at_source: whether its input has one row per source image.
        constant: whether nobody changes the result in place.
        views: the result, in the shape of the layer's output, and sizes to a tuple of its views.
    """

    index: int
    at_source: bool
    constant: bool
    views: Callable[..., tuple]

    def __post_init__(self) -> None:
        self._tiled: dict[tuple, bool] = {}
        self._parts: dict[tuple, list[_Part] | None] = {}

    def tiles(self, shape: tuple[int, ...], sizes: tuple) -> bool:
        """Whether the views are tensors that hold every element of the result exactly once."""
        if not self.constant or any(not isinstance(size, int) for size in sizes):
            return False
        if (shape, sizes) not in self._tiled:
            seen = torch.zeros(shape, dtype=torch.uint8)
            views = self.views(seen, *sizes)
            whole = all(isinstance(view, Tensor) for view in views)
            if whole and sum(view.numel() for view in views) == seen.numel():
                for view in views:
                    view.fill_(1)
            self._tiled[shape, sizes] = whole and bool(seen.all())
        return self._tiled[shape, sizes]

    def parts(self, plain: torch.Size, shape: torch.Size, sizes: tuple) -> list[_Part] | None:
        """Where the views of :meth:`tiles` lie; None if a table has no such views of it.

        A table is the same for every token: a view that joins samples and tokens (windows among
        images, say) has no strides in it.

        Args:
            plain: ``(B, T, O)``.
            shape: of the same elements, as :attr:`views` take them, with ``sizes``.
        """
        key = (plain, shape, sizes)
        if key not in self._parts:
            self._parts[key] = self._find_parts(*key)
        return self._parts[key]

    def _find_parts(self, plain: torch.Size, shape: torch.Size, sizes: tuple) -> list[_Part] | None:
        batch, tokens, columns = plain
        whole = torch.empty(shape, dtype=torch.uint8)
        wide = torch.empty((batch, 2 * columns + 1), dtype=torch.uint8)  # its rows tell themselves
        try:
            table = wide[:, None, :columns].expand(-1, tokens, -1).view(shape)
            views = zip(self.views(whole, *sizes), self.views(table, *sizes), strict=True)
            views = list(views)
        except RuntimeError:
            return None
        memory, row = wide.untyped_storage().data_ptr(), wide.stride(0)
        for _, of_table in views:
            steps = [s for n, s in zip(of_table.shape, of_table.stride(), strict=True) if n > 1]
            if of_table.untyped_storage().data_ptr() != memory or any(
                step >= columns and step != row for step in steps
            ):
                return None
        return [_Part.of_views(*pair, row) for pair in views]


@dataclass(frozen=True)
class _Part:
    """Where a view lies in ``[B, T, O]``, and in a table ``[B, O]`` that all tokens share.

    Attributes:
        size, stride, offset: in the contiguous result.
        steps: strides in a table; None for the stride of its rows.
        first: offset in a table's row.
        spread: dimensions of tokens, which have no stride in a table.
    """

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    steps: tuple[int | None, ...]
    first: int
    spread: tuple[int, ...]

    @classmethod
    def of_views(cls, view: Tensor, of_table: Tensor, row: int) -> _Part:
        sizes_and_steps = list(zip(of_table.shape, of_table.stride(), strict=True))
        return cls(
            size=tuple(view.shape),
            stride=view.stride(),
            offset=view.storage_offset(),
            steps=tuple(None if step == row else step for _, step in sizes_and_steps),
            first=of_table.storage_offset(),
            spread=tuple(i for i, (n, step) in enumerate(sizes_and_steps) if n > 1 and step == 0),
        )

    def of(self, whole: Tensor) -> Tensor:
        return whole.as_strided(self.size, self.stride, whole.storage_offset() + self.offset)

    def of_table(self, table: Tensor) -> Tensor:
        row = table.stride(0)
        steps = [row if step is None else step for step in self.steps]
        return table.as_strided(self.size, steps, table.storage_offset() + self.first)

    def add_up(self, g: Tensor, table: Tensor) -> None:
        """Writes the sums of ``g`` over tokens."""
        into = self.of_table(table)
        if not self.spread:
            into.copy_(g)
            return
        for axis in reversed(self.spread):
            into = into.select(axis, 0)
        torch.sum(g, self.spread, dtype=table.dtype, out=into)


class _Samples:
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

    def masked(self, call: _Call, x: Tensor, sizes: tuple) -> tuple:
        """Views of the result of a masked layer, from the layer's input; ``sizes`` are theirs."""
        raise NotImplementedError


class _Operators(_Samples):
    """Masked layers are operators, with the labels that are bound."""

    def masked(self, call: _Call, x: Tensor, sizes: tuple) -> tuple:
        x = self.expanded(x) if call.at_source else x
        return call.views(self.layers[call.index](x), *sizes)


class _Affine(_Samples):
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

    def masked(self, call: _Call, x: Tensor, sizes: tuple) -> tuple:
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


class _Recorded(_Samples):
    """Masked layers as nodes of PyTorch's autograd, which write the column sums of ``tables``.

    Attention saves views of a masked layer's result, beside the branch that the layer keeps. Where
    a backend keeps ``u`` itself the result is one multiplication and sum away from it, so what
    autograd saves of it is taken down as a size and strides, and computed again in backward, once
    per layer. Not where the result was changed in place in between; and not where the branch is
    rounded after scaling: it would give the result rounded twice.
    """

    watches = True

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

    def masked(self, call: _Call, x: Tensor, sizes: tuple) -> tuple:
        source = self.source if call.at_source else None
        images = self.batch if source is None else self.sources
        device = x.device.type
        if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(device))
        tokens = self.tokens(x, images).contiguous()
        layer, weight = self.layers[call.index], self.network.weight(call.index, x.dtype)
        backend = functional.linear_backend(layer.backend, tokens, weight, self.batch)
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
            if shift.stride() != scale.stride():  # kernels read both with one
                scale, shift = scale.contiguous(), shift.contiguous()
        weight = self.network.weight(index, tokens.dtype)
        return backend.linear(tokens, weight, scale, shift, source, save)

    # -- results that are computed again --------------------------------------------------------

    def keep(self, kept: _Kept, out: Tensor) -> None:
        """Notes the result ``out`` ``[B, T, O]`` of a layer, to be known again by its storage."""
        keeps_u = kept.backend.saved_batch(1, 2) == 1
        if keeps_u and out.is_contiguous() and out.storage_offset() == 0:
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
    dx, sums1, sums0 = kept.backend.linear_backward(
        dout, branch, layers.network.weight(kept.index, dout.dtype),
        layers.tables.scales[kept.index], kept.source, tuple(ctx.input_shape),
        ctx.needs_input_grad[0], True, t0 is not None,
    )  # fmt: skip
    t1.add_(sums1)  # a layer may run twice
    if t0 is not None:
        t0.add_(sums0)
    return dx


def _by_parts(ctx, u: Tensor, gradients: Sequence[Tensor], parts: Sequence[_Part]) -> Tensor | None:
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
    return product @ ctx.layers.network.weight(kept.index, product.dtype)


# -- the cut --------------------------------------------------------------------------------------


def split_at_first_mask(
    model: nn.Module, images: Tensor
) -> tuple[fx.GraphModule, fx.GraphModule, list[MaskedLayer]]:
    """The network before its first masked layer, from there on, and its masked layers.

    The rest takes a run, which it asks for masked layers and for tensors of the cut as samples see
    them (:class:`_Samples`), and the tensors that cross the cut.

    Args:
        images: an example ``[N, C, H, W]``; the network is run on it, without labels.

    Raises:
        NotFusable: if the network cannot be traced, has hooks or a second input, or masks anything
            but linear maps.
    """
    check_traceable(model)
    graph, image = _graph_of(model)
    modules = dict(model.named_modules())
    erase_idle(graph, modules)
    shapes = _shapes_of(model, graph, images)
    drop_unread_tokens(graph, modules, shapes)
    level: dict[fx.Node, int] = {image: SOURCE}
    called: set[nn.Module] = set()
    for node in graph.nodes:
        masks = node.op == "call_module" and isinstance(modules[node.target], MaskedLayer)
        below = max((level.get(read, 0) for read in node.all_input_nodes), default=0)
        if node is not image:
            level[node] = EXPANDED if masks else below
        if masks:
            called.add(modules[node.target])
    for name, module in modules.items():
        if module in called and type(module).forward is not WFLinear.forward:
            raise NotFusable(f"{name!r} is no linear map")
    layers = [module for module in modules.values() if module in called]
    cut = _Cut(graph, level, set(shapes))
    return cut.prefix(model), cut.rest(model, layers), layers


def _graph_of(model: nn.Module) -> tuple[fx.Graph, fx.Node]:
    """The traced network, whose one input is the images; other inputs have their defaults."""
    others = list(inspect.signature(model.forward).parameters.values())[1:]
    constants = {
        p.name: None if p.default is p.empty else p.default
        for p in others
        if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    }
    graph = trace(model, constants)
    image, *extra = [node for node in graph.nodes if node.op == "placeholder"]
    for node in extra:
        _erase_assertions(graph, node)
    return graph, image


def _erase_assertions(graph: fx.Graph, node: fx.Node) -> None:
    """Removes an input that fx keeps only to assert that it has the value of the trace."""
    for user in list(node.users):
        if not user.users and "assert" not in getattr(user.target, "__name__", ""):
            raise NotFusable(f"its forward reads another input than the images in {user.name!r}")
        _erase_assertions(graph, user)
    graph.erase_node(node)


def _shapes_of(model: nn.Module, graph: fx.Graph, images: Tensor) -> dict[fx.Node, torch.Size]:
    """Shapes of the values that are tensors; the others are sizes and the like."""
    shapes: dict[fx.Node, torch.Size] = {}

    class Watch(fx.Interpreter):
        def run_node(self, node: fx.Node) -> object:
            value = super().run_node(node)
            if isinstance(value, Tensor):
                shapes[node] = value.shape
            return value

    with torch.no_grad(), forgetting(None):
        try:
            Watch(fx.GraphModule(model, graph), graph=graph).run(images.clone())
        except Exception as error:
            raise NotFusable(f"running its graph failed ({error})") from error
    return shapes


class _Cut:
    """Copies the nodes of a graph to both sides of the cut."""

    def __init__(self, graph: fx.Graph, level: dict[fx.Node, int], tensors: set[fx.Node]):
        self.graph, self.level, self.tensors = graph, level, tensors
        self.late = {n for n in graph.nodes if level[n] == EXPANDED or n.op == "output"}
        # A size of the batch counts source images before the cut: behind it, sizes are read anew.
        self.crossing: list[fx.Node] = []
        self.again: set[fx.Node] = set()
        for node in graph.nodes:
            if node in self.late:
                for read in node.all_input_nodes:
                    self._cross(read)

    def _cross(self, node: fx.Node) -> None:
        if node in self.late or node in self.again or node in self.crossing:
            return
        if node in self.tensors and self.level[node] == SOURCE:
            self.crossing.append(node)
            return
        self.again.add(node)
        for read in node.all_input_nodes:
            self._cross(read)

    def prefix(self, model: nn.Module) -> fx.GraphModule:
        graph, copies = fx.Graph(), {}
        for node in self.graph.nodes:
            if node not in self.late:
                copies[node] = graph.node_copy(node, lambda n: copies[n])
        graph.output(tuple(copies[node] for node in self.crossing))
        module = fx.GraphModule(model, graph)
        module.graph.eliminate_dead_code()
        module.recompile()
        return module

    def rest(self, model: nn.Module, layers: list[MaskedLayer]) -> fx.GraphModule:
        graph = fx.Graph()
        run = graph.placeholder("run")
        raw = {node: graph.placeholder(f"crossing_{i}") for i, node in enumerate(self.crossing)}
        copies: dict[fx.Node, fx.Node] = {}
        modules = dict(model.named_modules())
        changes = {changed_in_place(node, modules) for node in self.late} - {None}
        seen: dict[tuple[str, fx.Node], fx.Node] = {}  # tensors of the cut as samples see them

        def read(node: fx.Node, how: str) -> fx.Node:
            if node not in raw:
                return copies[node]
            if (how, node) not in seen:
                seen[how, node] = graph.call_method(how, (run, raw[node]))
            return seen[how, node]

        regions: dict[fx.Node, _Region] = {}  # by the values inside, until one is wanted outside

        def leave(region: _Region) -> None:
            x = region.input
            source = raw.get(x)
            index = layers.index(modules[region.root.target])
            call = region.function(index, x in raw, changes.isdisjoint(region.members))
            arguments = [copies[x] if source is None else source]
            arguments += [read(n, "expanded") for n in region.externals]
            made = graph.call_function(call, (run, *arguments))
            for i, node in enumerate(region.results):
                copies[node] = graph.call_function(operator.getitem, (made, i))
                of_masks.add(node)
            for node in region.members:
                del regions[node]

        of_masks: set[fx.Node] = set()  # results of masked layers, and views of them
        for node in self.graph.nodes:
            if node not in self.late and node not in self.again:
                continue
            module = modules.get(node.target) if node.op == "call_module" else None
            inside = dict.fromkeys(regions[n] for n in node.all_input_nodes if n in regions)
            if len(inside) == 1 and _is_view(node):
                (region,) = inside
                region.members.append(node)
                regions[node] = region
                continue
            for region in inside:
                leave(region)
            if isinstance(module, MaskedLayer):
                regions[node] = _Region(node)
                continue
            how = "shaped" if node in self.again else "expanded"
            copies[node] = copy = graph.node_copy(node, lambda n, how=how: read(n, how))
            if of_masks.intersection(node.all_input_nodes) and node.op != "output":
                if _is_view(node):
                    of_masks.add(node)
                else:
                    _watch(copy, run, module)
        return fx.GraphModule(model, graph)


@dataclass(eq=False)
class _Region:
    """A masked layer and the views of its result that come before anything else is done with it."""

    root: fx.Node

    def __post_init__(self) -> None:
        self.members = [self.root]

    @property
    def input(self) -> fx.Node:
        (x,) = self.root.all_input_nodes
        return x

    @property
    def externals(self) -> list[fx.Node]:
        """Sizes and the like that the views read."""
        read = [n for member in self.members[1:] for n in member.all_input_nodes]
        return [n for n in dict.fromkeys(read) if n not in self.members]

    @property
    def results(self) -> list[fx.Node]:
        """What is read from outside."""
        return [n for n in self.members if any(user not in self.members for user in n.users)]

    def function(self, index: int, at_source: bool, constant: bool) -> Callable[..., tuple]:
        """A run, the layer's input and :attr:`externals` to :attr:`results`."""
        graph = fx.Graph()
        copies = {self.root: graph.placeholder("y")}
        for node in self.externals:
            copies[node] = graph.placeholder(node.name)
        for node in self.members[1:]:
            copies[node] = graph.node_copy(node, lambda n: copies[n])
        graph.output(tuple(copies[node] for node in self.results))
        call = _Call(index, at_source, constant, fx.GraphModule({}, graph).forward)

        def masked(run: _Samples, x: Tensor, *sizes: object) -> tuple:
            return run.masked(call, x, sizes)

        return _named(masked, f"masked_{self.root.name}")


def _named(function: Callable, name: str) -> Callable:
    """The code that torch.fx writes calls a function by its name, which must be one of its own."""
    function.__name__ = name
    return function


# Operations whose result is a view of their first argument, or a copy that stands for it.
_VIEWS = {
    "chunk", "contiguous", "expand", "flatten", "getitem", "movedim", "narrow", "permute",
    "reshape", "select", "split", "squeeze", "swapaxes", "tensor_split", "transpose", "unbind",
    "unflatten", "unsqueeze", "view",
}  # fmt: skip


def _is_view(node: fx.Node) -> bool:
    if node.op == "call_module":
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name in _VIEWS


def _watch(node: fx.Node, run: fx.Node, module: nn.Module | None) -> None:
    """Lets the run see what autograd saves in the operation of ``node``."""
    call = node.target if module is None else module
    if node.op == "call_method":
        call = getattr(Tensor, node.target)

    def watched(run: _Samples, *args: object, **kwargs: object) -> object:
        if not run.watches:
            return call(*args, **kwargs)
        with saved_tensors_hooks(run.pack, run.unpack):
            return call(*args, **kwargs)

    node.op, node.args = "call_function", (run, *node.args)
    node.target = _named(watched, f"watched_{node.name}")
