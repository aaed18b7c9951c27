"""Networks that mask linear maps (transformers): a prefix per source image, then the network's own.

:func:`wfnet.fusion.cut.split_at_first_mask` cuts the network before its first masked layer: what
comes before (patch embedding, positions, the first norm) runs once per source image and is not
differentiated; the tensors that cross the cut are expanded to the samples there, but for the inputs
of masked layers, which read source images and expand their result.

The rest is the network's own operations, with scales and shifts of all masked layers from one
table (:mod:`wfnet.gate_tables`). It runs in one of three ways:

- as it is: a masked layer keeps its branch ``u``, from which its result ``scale * u + shift`` is
  computed again when attention wants it in backward. What attention would keep of it, query, key
  and value, is then never held (:class:`_Kept`).
- compiled, for the backend "eager": tables are inputs of the compiled graph, ``scale * u + shift``
  is part of it, and new labels never compile anew.
- compiled, for kernels: masked layers are operators in the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from wfnet import backends, gates
from wfnet.backends.contract import Backend, Epilogue, LayerBelow
from wfnet.fusion.compiled import CompiledGraph, GraphRun
from wfnet.fusion.run import FusedNetwork, Run
from wfnet.fusion.trace import NotFusable
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
        names = {backends.requested(layer.backend) for layer in layers}
        if "reference" in names:
            raise NotFusable("the reference backend is never fused")
        of_tables = names.pop() if len(names) == 1 and "auto" not in names else "eager"
        self.compiles_tables = of_tables == "eager" and names <= {"auto", "eager"}
        super().__init__(layers, [(layer, None) for layer in layers], backends.get(of_tables))
        self.prefix = prefix
        self.rest = rest
        self.graph: CompiledGraph | None = None
        if compiled:
            self.graph = CompiledGraph(self._of_tables if self.compiles_tables else self._of_rows)

    @property
    def compiled(self) -> bool:
        """Whether the rest is compiled; not any more once compiling has failed."""
        return self.graph is not None and self.graph.works

    def _of_tables(
        self,
        images: Tensor,
        source: Tensor | None,
        weights: Sequence[Tensor],
        scales: Sequence[Tensor],
        shifts: Sequence[Tensor],
    ) -> Tensor:
        run = _Affine(self.layers, images.shape[0], scales[0].shape[0], source)
        run.weights, run.scales, run.shifts = weights, scales, shifts
        return self.logits(run, images)

    def _of_rows(self, images: Tensor, source: Tensor | None, rows: Tensor) -> Tensor:
        with forgetting(Selection(rows)):
            run = _Operators(self.layers, images.shape[0], rows.shape[0], source)
            return self.logits(run, images)

    def logits(self, run: Samples, images: Tensor) -> Tensor:
        with torch.no_grad():
            crossing = self.prefix(images)
        return self.rest(run, *crossing)

    def start(self, images: Tensor, rows: Tensor, source: Tensor | None, save: bool = True) -> Run:
        kind = TrunkRun
        if self.graph is not None and self.graph.takes(images, rows.shape, source is None, save):
            kind = GraphRun if self.compiles_tables else OperatorRun
        return kind(self, images, rows, source, save)

    def describe(self) -> str:
        once = sum(node.op not in ("placeholder", "output") for node in self.prefix.graph.nodes)
        how = "compiled" if self.compiled else "as it is"
        return f"{once} operations before the first mask run once per image, the rest runs {how}"


class TrunkRun(Run):
    """A run of the network's own operations, with masked layers that write the tables' sums."""

    network: TrunkNetwork

    def forward(self) -> Tensor:
        samples = _Recorded(self)
        # What every masked layer's node reads, so that it is one: no input of it needs a gradient.
        self.anchor = samples.anchor
        with torch.set_grad_enabled(self.save):
            if not self.save:
                return self.network.logits(samples, self.images)
            with saved_tensors_hooks(samples.pack, samples.unpack):
                self.logits = self.network.logits(samples, self.images)
        return self.logits.detach()

    def propagate(self, dout: Tensor) -> None:
        logits, self.logits = self.logits, None
        torch.autograd.grad(logits, self.anchor, dout.to(logits.dtype), allow_unused=True)


class OperatorRun(Run):
    """A run whose masked layers are operators of a compiled graph: they read the filters."""

    network: TrunkNetwork

    def _make_tables(self) -> None:
        return None

    def forward(self) -> Tensor:
        with torch.set_grad_enabled(self.save):
            self.logits = self.network.graph(self.images, self.source, self.rows)
        return self.logits.detach()

    def propagate(self, dout: Tensor) -> None:
        logits, self.logits = self.logits, None
        filters = self.network.filters()
        learned = [matrix for matrix in filters if matrix.requires_grad]
        found = torch.autograd.grad(logits, learned, dout.to(logits.dtype), allow_unused=True)
        self.others = {f: g for f, g in zip(learned, found, strict=True) if g is not None}


# -- what the graph of the rest asks of a run ------------------------------------------------------


class Samples:
    """Tensors with one row, or one row per window, for each source image; what samples see of them.

    Args:
        layers: masked layers by index.
        sources, batch: N and B.
        source: ``[B]``, or None: N is B.
    """

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

    def masked(self, index: int, x: Tensor, at_source: bool, views: Callable) -> tuple:
        """``views`` of the result of a masked layer.

        Args:
            x: one row per source image (``at_source``) or sample, or one per window of them.
        """
        images = self.sources if at_source else self.batch
        # The windows of an image are tokens of it.
        tokens = x.reshape(images, x.shape[:-1].numel() // max(images, 1), x.shape[-1])
        shape = self.batch * (x.shape[0] // max(images, 1)), *x.shape[1:-1]
        source = self.source if at_source else None
        return self.linear(index, tokens, source, lambda y: views(y.view(*shape, y.shape[-1])))

    def linear(self, index: int, tokens: Tensor, source: Tensor | None, views: Callable) -> tuple:
        """As :meth:`masked`, from tokens ``[N, T, C]`` of images, and to ``[B, T, O]`` of them."""
        raise NotImplementedError


class _Operators(Samples):
    """Masked layers are operators, with the labels that are bound."""

    def masked(self, index: int, x: Tensor, at_source: bool, views: Callable) -> tuple:
        return views(self.layers[index](self.expanded(x) if at_source else x))


class _Affine(Samples):
    """Masked layers are a product, a multiplication and a sum, for a compiler to fuse."""

    weights: Sequence[Tensor]
    scales: Sequence[Tensor]
    shifts: Sequence[Tensor]

    def linear(self, index: int, tokens: Tensor, source: Tensor | None, views: Callable) -> tuple:
        def result(u: Tensor, scale: Tensor, shift: Tensor | None) -> tuple:
            y = u * scale[:, None]
            return views((y if shift is None else y + shift[:, None]).to(u.dtype))

        u = gates.gather_samples(F.linear(tokens, self.weights[index]), source)
        shift = None if self.layers[index].bias is None else self.shifts[index]
        # For the compiler: computed again in backward, where it would keep both u and the result.
        return checkpoint(result, u, self.scales[index], shift, use_reentrant=False)


class _Kept:
    """What a masked layer keeps from forward to backward.

    Attributes:
        branch: what ``t1`` is summed from, as the backend returned it.
        version: of the layer's result, where ``branch`` tells it.
    """

    def __init__(self, index: int, backend: Backend, source: Tensor | None, branch: Tensor):
        self.index, self.backend, self.source, self.branch = index, backend, source, branch
        self.version: int | None = None
        self.again: Tensor | None = None  # the result, computed a second time


class _Recorded(Samples):
    """Masked layers as nodes of PyTorch's autograd, which write the column sums of the tables.

    Attention saves views of a masked layer's result, beside the branch that the layer keeps. Where
    a backend keeps ``u`` itself the result is one multiplication and sum away from it, so what
    autograd saves of it is taken down as a size and strides, and computed again in backward, once
    per layer. Not where the result was changed in place in between; and not where the branch is
    rounded after scaling: it would give the result rounded twice.
    """

    def __init__(self, run: TrunkRun):
        super().__init__(run.network.layers, len(run.images), len(run.rows), run.source)
        # Not the run: it holds the graph whose nodes refer to this.
        self.network, self.tables, self.save = run.network, run.tables, run.save
        self.anchor = torch.zeros(()).requires_grad_(run.save)
        self.kept: dict[int, tuple[StorageWeakRef, _Kept]] = {}  # by storage of the result

    def linear(self, index: int, tokens: Tensor, source: Tensor | None, views: Callable) -> tuple:
        device = tokens.device.type
        if torch.is_autocast_enabled(device) and tokens.dtype != torch.float64:
            tokens = tokens.to(torch.get_autocast_dtype(device))
        tokens, layer = tokens.contiguous(), self.layers[index]
        weight = self.network.weight(layer, tokens.dtype)
        backend = willing_backend(backends.resolve(layer.backend), tokens, weight)
        if self.save:
            options = (self, weight, backend, index, source)
            return views(_MaskedLinear.apply(tokens, self.anchor, *options))
        return views(backend.linear(tokens, weight, self.epilogue(index, source)).out)

    def epilogue(self, index: int, source: Tensor | None) -> Epilogue:
        scale, shift = self._tables_of(index)
        return Epilogue(scale, shift, source=source, save=self.save)

    def _tables_of(self, index: int) -> tuple[Tensor, Tensor | None]:
        bias = self.layers[index].bias
        return self.tables.scales[index], None if bias is None else self.tables.shifts[index]

    def keep(self, kept: _Kept, out: Tensor) -> None:
        """Notes the result ``out`` ``[B, T, O]`` of a layer, to be known again by its storage."""
        if not kept.backend.keeps_scaled_branch:  # it is one product and sum away from the branch
            storage = StorageWeakRef(out.untyped_storage())
            kept.version = out._version
            self.kept[storage.cdata] = storage, kept

    def pack(self, t: Tensor) -> tuple[object, ...]:
        _, kept = self.kept.get(t.untyped_storage()._cdata, (None, None))
        known = kept is not None and kept.branch is not None and t.dtype == kept.branch.dtype
        if known and t._version == kept.version:
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
        scale, shift = self._tables_of(kept.index)
        if shift is None:
            return torch.mul(u, scale[:, None], out=torch.empty_like(u))
        return torch.addcmul(shift[:, None], u, scale[:, None], out=torch.empty_like(u))


class _MaskedLinear(torch.autograd.Function):
    """A masked layer of a :class:`_Recorded` run."""

    @staticmethod
    def forward(ctx, tokens, anchor, samples, weight, backend, index, source):
        found = backend.linear(tokens, weight, samples.epilogue(index, source))
        ctx.tables, ctx.weight, ctx.input_shape = samples.tables, weight, tuple(tokens.shape)
        ctx.samples, ctx.kept = samples, _Kept(index, backend, source, found.branch)
        samples.keep(ctx.kept, found.out)
        return found.out

    @staticmethod
    def backward(ctx, dout):
        kept, tables = ctx.kept, ctx.tables
        t1, t0 = tables.t1[kept.index], tables.t0[kept.index]
        layer = LayerBelow(
            branch=kept.branch,
            scale=tables.scales[kept.index],
            t1=torch.empty_like(t1),
            t0=None if t0 is None else torch.empty_like(t0),
            source=kept.source,
            need_scaled_grad=ctx.needs_input_grad[0],
            images=ctx.input_shape[0],
        )
        kept.branch = kept.again = None
        dx = kept.backend.linear_backward(dout.contiguous(), layer, ctx.weight, ctx.input_shape)
        t1.add_(layer.t1)  # a layer may run twice
        if t0 is not None:
            t0.add_(layer.t0)
        return dx, None, None, None, None, None, None
