"""What all fused networks share: how they are called and differentiated.

A :class:`FusedNetwork` makes a :class:`Run` for every batch: forward, then the filters' gradients
from that of the logits. Called as a function it is one autograd node around such a run
(:class:`wfnet.untraining.step.UntrainingStep` uses runs directly, and has the gradients written in
place).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from wfnet.backends.contract import Backend
from wfnet.gate_tables import GatedLayer, GateTables, StepTables
from wfnet.layers import MaskedLayer


class FusedNetwork(ABC):
    """A frozen network that runs by a plan made once.

    Args:
        layers: all its masked layers, in the order of its modules.
        folded: those that tables are made for, each with the frozen norm behind it, if any.
        backend: who makes the tables.
    """

    def __init__(
        self,
        layers: Sequence[MaskedLayer],
        folded: Sequence[tuple[nn.Module, nn.Module | None]],
        backend: Backend,
    ):
        self.layers = tuple(layers)
        self.folded = tuple(folded)
        self.backend = backend
        self._weights: dict[tuple[MaskedLayer, torch.dtype], tuple[object, Tensor]] = {}
        self._tables: tuple[object, GateTables] | None = None

    @abstractmethod
    def start(
        self, images: Tensor, rows: Tensor, source: Tensor | None, save: bool = True
    ) -> "Run":
        """One pass over a batch, arguments as in :meth:`__call__`.

        Args:
            save: keep what :meth:`Run.backward` needs.
        """

    @abstractmethod
    def describe(self) -> str:
        """One line for the log: what runs how."""

    def __call__(self, images: Tensor, rows: Tensor, source: Tensor | None) -> Tensor:
        """Logits ``[B, K]``; images ``[N, C, H, W]``, labels ``[B, J]``, ``source`` ``[B]``.

        Gradients reach the filters only; double backward raises.
        """
        filters = self.filters()
        if torch.is_grad_enabled() and any(f.requires_grad for f in filters):
            return _RunFunction.apply(self, images, rows, source, *filters)
        return self.start(images, rows, source, save=False).forward()

    def filters(self) -> list[Tensor]:
        """Filter matrices, layer by layer, weight before bias: the order of the gradients."""
        return [matrix for layer in self.layers for matrix in layer.named_filters().values()]

    def filters_in_tables(self) -> list[Tensor]:
        """Those that tables have gradients of; of a layer that is called twice, twice."""
        masked = [norm if isinstance(norm, MaskedLayer) else layer for layer, norm in self.folded]
        return [matrix for layer in masked for matrix in layer.named_filters().values()]

    def weight(self, layer: nn.Module, dtype: torch.dtype) -> Tensor:
        """The frozen weight of a layer in ``dtype``, converted once."""
        weight = layer.weight
        if weight.dtype == dtype:
            return weight
        state = _state_of(weight)
        cached = self._weights.get((layer, dtype))
        if cached is None or cached[0] != state:
            cached = (state, weight.detach().to(dtype))
            self._weights[layer, dtype] = cached
        return cached[1]

    def tables(self, rows: Tensor, save: bool) -> StepTables:
        """Tables of one pass over labels ``rows`` ``[B, J]``; ``save``: with column sums.

        What they are made from is made anew where filters lie elsewhere or constants have changed.
        """
        layers = [_gated(*pair) for pair in self.folded]
        constants = ((m.bias, m.gamma, m.beta, m.mean, m.var) for m in layers)
        key = (
            *(None if t is None else _state_of(t) for tensors in constants for t in tensors),
            *(matrix.data_ptr() for layer in layers for matrix in layer.filters),
        )
        if self._tables is None or self._tables[0] != key:
            self._tables = (key, GateTables(layers, self.backend))
        return self._tables[1](rows, save)


def _gated(layer: nn.Module, norm: nn.Module | None) -> GatedLayer:
    of_norm = {}
    if norm is not None:
        of_norm = {
            "gamma": norm.weight,
            "beta": norm.bias,
            "mean": norm.running_mean,
            "var": norm.running_var,
            "eps": norm.eps,
        }
    return GatedLayer(
        layer.alpha_weight, layer.alpha_bias, layer.bias, gate_scale=layer.gate_scale, **of_norm
    )


def _state_of(t: Tensor) -> tuple[object, ...]:
    """What changes with a tensor's values, dtype or place, without reading a value."""
    return (t.data_ptr(), 0 if t.is_inference() else t._version, t.dtype, t.device)


def run_dtype(images: Tensor) -> torch.dtype:
    """The dtype that masked layers compute in: that of the images, or of autocast."""
    device = images.device.type
    autocast = torch.is_autocast_enabled(device) and images.dtype != torch.float64
    return torch.get_autocast_dtype(device) if autocast else images.dtype


class Run(ABC):
    """One forward pass of a fused network, and the backward pass that belongs to it.

    Args:
        network, images, rows, source, save: as in :meth:`FusedNetwork.start`.

    Attributes:
        dtype: of the masked layers: that of the images, or of autocast.
        tables: of the batch, with room for the column sums that :meth:`propagate` writes.
    """

    def __init__(
        self, network: FusedNetwork, images: Tensor, rows: Tensor, source: Tensor | None, save: bool
    ):
        self.network = network
        self.images = images
        self.rows = rows
        self.source = source
        self.save = save
        self.dtype = run_dtype(images)
        self.tables = self._make_tables()
        self.others: dict[Tensor, Tensor] = {}  # gradients of filters that are not in the tables
        self._freed = not save

    def _make_tables(self) -> StepTables:
        return self.network.tables(self.rows, self.save)

    @abstractmethod
    def forward(self) -> Tensor:
        """Logits ``[B, K]``, detached."""

    @abstractmethod
    def propagate(self, dout: Tensor) -> None:
        """Takes the gradient ``[B, K]`` of the logits down and frees what forward kept."""

    def gradients(self, into: Tensor | None) -> list[Tensor]:
        """Of the filters, after :meth:`propagate`; arguments and result of :meth:`backward`."""
        network, in_tables = self.network, self.network.filters_in_tables()
        if self.tables is not None:
            if len(in_tables) == len(network.filters()) and not self.others:
                return self.tables.gradients(into)
            for matrix, gradient in zip(in_tables, self.tables.gradients(), strict=True):
                self.add_filter(matrix, gradient)
        found = [self.others.get(matrix) for matrix in network.filters()]
        self.others.clear()
        return in_columns(found, network.filters(), into)

    def add_filter(self, matrix: Tensor, gradient: Tensor) -> None:
        """Adds a gradient of a filter matrix that is not, or not only, in the tables."""
        known = self.others.get(matrix)
        self.others[matrix] = gradient if known is None else known + gradient

    def backward(self, dout: Tensor, into: Tensor | None = None) -> list[Tensor]:
        """Gradients of the filters, in the order of :meth:`FusedNetwork.filters`.

        Args:
            dout: ``[B, K]``, gradient of the logits.
            into: ``[K, total]``, written instead of fresh memory; the results are its columns.

        Raises:
            RuntimeError: the second time.
        """
        if self._freed:
            raise RuntimeError(
                "backward through a fused network a second time; its branches are freed by the "
                "first (retain_graph is not supported with fuse=True)"
            )
        self._freed = True
        self.propagate(dout)
        return self.gradients(into)


def in_columns(
    found: Sequence[Tensor | None], filters: Sequence[Tensor], into: Tensor | None
) -> list[Tensor]:
    """Gradients ``[K, O]`` of ``filters``, 0 for None; as columns of ``into``, if given."""
    pairs = zip(found, filters, strict=True)
    gradients = [torch.zeros_like(matrix) if g is None else g for g, matrix in pairs]
    if into is None:
        return gradients
    torch.cat(gradients, 1, out=into)
    return list(into.split([gradient.shape[1] for gradient in gradients], 1))


class _RunFunction(torch.autograd.Function):
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
