"""Running a plan with durable gates: rows with statistics of their own, or moments of groups.

With rows nothing but the tables is another than in :class:`wfnet.fusion.execution.PlanRun`. With
moments of groups (untraining) a convolution's tables are known after its product, and the gradient
runs through the moments: one pass more each way, both by PyTorch's operations.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from wfnet import backends
from wfnet.backends.contract import LayerBelow, LayerGradient
from wfnet.fusion.durable_tables import GroupTables, RowTables
from wfnet.fusion.execution import PlanNetwork, PlanRun
from wfnet.fusion.plan import ConvStep
from wfnet.fusion.run import Run


class DurableNetwork(PlanNetwork):
    """Executes a plan whose convolutions have durable gates behind them."""

    @property
    def grouped(self) -> bool:
        """Whether moments are those of groups."""
        return self.convs[0].masked.mode.groups is not None

    def start(self, images: Tensor, rows: Tensor, source: Tensor | None, save: bool = True) -> Run:
        return (GroupRun if self.grouped else PlanRun)(self, images, rows, source, save)

    def tables(self, rows: Tensor, save: bool) -> RowTables | GroupTables:
        if self.grouped:
            return GroupTables(self.convs, save)
        return RowTables(self.convs, rows, save)


class GroupRun(PlanRun):
    """A run whose tables come from the moments of groups of samples, layer by layer."""

    network: DurableNetwork

    def __init__(self, network: DurableNetwork, *batch: object):
        super().__init__(network, *batch)
        self.backend = backends.get("eager")  # whose branch is the product itself

    def _convolve(self, step: ConvStep) -> None:
        x = self._cast(self.values[step.input])
        weight = self.network.weight(step.layer, self.dtype)
        u = self.backend.product(x, weight, step.geometry)
        self.tables.measure(step.index, u, self.source if step.at_source else None)
        self._keep(step, x, self.backend.epilogue(u, self._epilogue(step)))

    def _layer_below(self, step: ConvStep) -> LayerBelow:
        """The layer with its column sums alone: its gradient is scaled once these are known."""
        shortcut = step.shortcut
        on_product = not step.at_source or (shortcut is not None and not shortcut.at_source)
        below = super()._layer_below(step)
        return replace(below, need_grad=below.need_grad or on_product, need_scaled_grad=False)

    def _take(self, step: ConvStep, found: LayerGradient, own: bool) -> None:
        g = found.grad
        mine = [done for done in (step, step.shortcut) if done is not None]
        if step.shortcut is None and step.residual_learns:
            self._add(step.residual, g, own=False)
            own = False
        for number, done in enumerate(mine):
            on_u, constant = self.tables.backward(done.index)
            if done.at_source:
                self.scaled[done] = None
            else:
                last = own and number == len(mine) - 1
                scale = self.tables.scales[done.index]
                branch = self.kept[done].branch
                self.scaled[done] = self.backend.moments_backward(
                    g, scale, branch, on_u, constant, may_overwrite=last
                )
            self.kept[done].branch = self.kept[done].mask = None
