"""Running a plan with durable gates: rows with statistics of their own, or moments of groups.

With rows nothing but the tables is another than in :class:`wfnet.fusion.execution.PlanRun`. With
moments of groups (untraining) a convolution's tables are known after its product, and the gradient
runs through the moments: one pass more each way, both by PyTorch's operations.
"""

from __future__ import annotations

from torch import Tensor

from wfnet import backends
from wfnet.backends.contract import Backend, Epilogue, LayerBelow, LayerGradient
from wfnet.fusion.durable_tables import DurableStep, GroupTables, RowTables
from wfnet.fusion.execution import PlanNetwork, PlanRun
from wfnet.fusion.plan import ConvStep, Plan
from wfnet.fusion.run import Run


class DurableNetwork(PlanNetwork):
    """Executes a plan whose convolutions have durable gates behind them."""

    def __init__(self, plan: Plan, backend: Backend):
        super().__init__(plan, backend)
        self.durable = [DurableStep(step.layer, step.masked) for step in self.convs]

    def start(self, images: Tensor, rows: Tensor, source: Tensor | None, save: bool = True) -> Run:
        grouped = self.durable[0].masked.mode.groups is not None
        kind = GroupRun if grouped else PlanRun
        return kind(self, images, rows, source, save)

    def tables(self, rows: Tensor, save: bool) -> RowTables:
        return RowTables(self.durable, rows, save)


class GroupRun(PlanRun):
    """A run whose tables come from the moments of groups of samples, layer by layer."""

    network: DurableNetwork

    def _make_tables(self) -> GroupTables:
        self.backend = backends.get("eager")  # whose branch is the product itself
        return GroupTables(self.network.durable, self.save)

    def _convolve(self, step: ConvStep) -> None:
        x = self._cast(self.values[step.input])
        residual = None if step.residual is None else self._expanded(step.residual)
        weight = self.network.weight(step.layer, self.dtype)
        u = self.backend.product(x, weight, step.geometry)
        source = self.source if step.at_source else None
        self.tables.measure(step.index, u, source)
        epilogue = Epilogue(
            scale=self.tables.scales[step.index],
            shift=self.tables.shifts[step.index],
            residual=self._cast(residual),
            relu=step.relu,
            source=source,
            save=self.save,
        )
        self._keep(step, x, self.backend.epilogue(u, epilogue))

    def _layer_below(self, step: ConvStep) -> LayerBelow:
        """The layer with its column sums alone: its gradient is scaled once these are known."""
        kept, tables, shortcut = self.kept[step], self.tables, step.shortcut
        on_product = not step.at_source or (shortcut is not None and not shortcut.at_source)
        return LayerBelow(
            branch=kept.branch,
            mask=kept.mask,
            scale=tables.scales[step.index],
            shift=tables.shifts[step.index],
            relu=step.relu,
            t1=tables.t1[step.index],
            t0=tables.t0[step.index],
            source=self.source if step.at_source else None,
            need_grad=on_product or (step.residual_learns and shortcut is None),
            need_scaled_grad=False,
            shortcut=None if shortcut is None else self._layer_below(shortcut),
        )

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
