"""What all fused networks share: how they are called, differentiated and compiled.

A :class:`FusedNetwork` makes a :class:`Run` for every batch: forward, then the filters' gradients
from that of the logits. Called as a function it is one autograd node around such a run
(:class:`wfnet.untraining.step.UntrainingStep` uses runs directly, and has the gradients written in
place).
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from wfnet.gate_tables import GateTables, StepTables
from wfnet.layers import MaskedLayer

logger = logging.getLogger("wfnet")

# So many batches that differ in size, dtype or use have a compiled graph of their own: as many as
# the compiler itself keeps of one function.
_MOST_GRAPHS = 8


class FusedNetwork(ABC):
    """A frozen network that runs by a plan made once; masked ``layers`` in module order."""

    def __init__(self) -> None:
        self._weights: dict[tuple[MaskedLayer, torch.dtype], tuple[object, Tensor]] = {}
        self._tables: tuple[object, GateTables] | None = None

    @property
    @abstractmethod
    def layers(self) -> tuple[MaskedLayer, ...]:
        """All masked layers of the network, in the order of its modules."""

    @abstractmethod
    def start(self, images: Tensor, rows: Tensor, source: Tensor | None, save: bool = True) -> Run:
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

    def weight(self, layer: MaskedLayer, dtype: torch.dtype) -> Tensor:
        """The frozen weight of a layer in ``dtype``, converted once."""
        weight = layer.weight
        if weight.dtype == dtype:
            return weight
        state = state_of(weight)
        cached = self._weights.get((layer, dtype))
        if cached is None or cached[0] != state:
            cached = (state, weight.detach().to(dtype))
            self._weights[layer, dtype] = cached
        return cached[1]

    def _tables_over(
        self,
        filters: Iterable[Tensor],
        constants: Iterable[Tensor],
        make: Callable[[], GateTables],
    ) -> GateTables:
        """What ``make`` gives, made anew when filters lie elsewhere or constants have changed."""
        key = (*map(state_of, constants), *(matrix.data_ptr() for matrix in filters))
        if self._tables is None or self._tables[0] != key:
            self._tables = (key, make())
        return self._tables[1]


class Run(ABC):
    """One forward pass of a fused network, and the backward pass that belongs to it.

    Args:
        network, images, rows, source, save: as in :meth:`FusedNetwork.start`.

    Attributes:
        dtype: of the masked layers: that of the images, or of autocast.
    """

    def __init__(
        self,
        network: FusedNetwork,
        images: Tensor,
        rows: Tensor,
        source: Tensor | None,
        save: bool,
    ):
        self.network = network
        self.images = images
        self.rows = rows
        self.source = source
        self.save = save
        device = images.device.type
        autocast = torch.is_autocast_enabled(device) and images.dtype != torch.float64
        self.dtype = torch.get_autocast_dtype(device) if autocast else images.dtype
        self._freed = not save

    @abstractmethod
    def forward(self) -> Tensor:
        """Logits ``[B, K]``, detached."""

    @abstractmethod
    def propagate(self, dout: Tensor) -> None:
        """Takes the gradient ``[B, K]`` of the logits down and frees what forward kept."""

    @abstractmethod
    def gradients(self, into: Tensor | None) -> list[Tensor]:
        """Of the filters, after :meth:`propagate`; arguments and result of :meth:`backward`."""

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


class CompiledGraph:
    """A function that is compiled anew for every kind of batch, up to as many as are kept.

    Args:
        function: takes tensors, and lists of tensors, to logits.
    """

    def __init__(self, function: Callable[..., Tensor]):
        self._compiled = torch.compile(function, fullgraph=True, dynamic=False)
        self._kinds: set[tuple] = set()
        self.works = True

    def takes(self, images: Tensor, *kind: object) -> bool:
        """Whether a batch runs compiled: one of a kind that is known, or one of the first few."""
        device = images.device.type
        autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        key = (images.shape, images.dtype, autocast, *kind)
        if not self.works or (key not in self._kinds and len(self._kinds) == _MOST_GRAPHS):
            return False
        self._kinds.add(key)
        return True

    def __call__(self, *inputs: object) -> Tensor | None:
        """Logits; None if compiling fails (without a C++ compiler, say), with a line in the log."""
        from torch._dynamo.exc import TorchDynamoException  # half of the time of `import wfnet`

        try:
            return self._compiled(*inputs)
        except TorchDynamoException as error:
            reason = " ".join(str(error).strip().split("\n\n")[0].split())
            logger.warning("the fused network runs uncompiled: compiling failed (%s)", reason)
            self.works = False
            return None


def state_of(t: Tensor) -> tuple[object, ...]:
    """What changes with a tensor's values, dtype or place, without reading a value."""
    return (t.data_ptr(), 0 if t.is_inference() else t._version, t.dtype, t.device)


def write_sums(
    tables: StepTables, of_scales: Sequence[Tensor | None], of_shifts: Sequence[Tensor | None]
) -> None:
    """The column sums of ``tables`` from gradients of its scales and shifts ``[B, O]``.

    ``t1`` is the derivative by the log of the scale. Tables that took no part (None) keep their 0.
    """
    for sums, scale, gradient in zip(tables.t1, tables.scales, of_scales, strict=True):
        if gradient is not None:
            torch.mul(gradient, scale, out=sums)
    for sums, gradient in zip(tables.t0, of_shifts, strict=True):
        if sums is not None and gradient is not None:
            sums.copy_(gradient)
