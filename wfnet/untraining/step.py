"""One untraining step on a device: expanded batch in, gradients of all filters, filters moved.

The step works on one ``[K, total]`` matrix of filters and one of gradients
(:func:`wfnet.gate_tables.flatten_filters`). Where the network is fused, the gradients are written
there directly: autograd sees the loss as a function of logits only. Nothing in a step reads device
data on the host and no shape depends on labels, so that on a CUDA device it is captured as a CUDA
graph: images, labels, sources and targets are copied into static buffers and the graph is replayed.
New labels never capture anew; a batch of another shape runs as it is.

    with flatten_filters(net.filter_parameters()):
        step = UntrainingStep(net, objective, RowAdam(net.filter_parameters()))
        for images, batch in minibatches:
            losses = step([(images, batch)], lr=0.1)
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from wfnet.evaluation.forward import Forward
from wfnet.fusion.durable_run import KeptProducts
from wfnet.gate_tables import flat_matrix
from wfnet.network import WFNet
from wfnet.services.device_copies import pinned_for
from wfnet.services.log import logger
from wfnet.untraining.expansion import ExpandedBatch
from wfnet.untraining.objectives import Losses, Objective, full_precision
from wfnet.untraining.optimizers import RowAdam

Minibatch = tuple[Tensor, ExpandedBatch]

# Ordinary steps before the capture: kernels are compiled and chosen, caches are filled.
_WARM_UP = 3


class UntrainingStep:
    """Gradients of an expanded batch and the move of the filters; captured where that is asked for.

    Args:
        net: its filters must be columns of one matrix (inside
            :func:`wfnet.gate_tables.flatten_filters`).
        objective: what the step minimises.
        optimizer: over ``net.filter_parameters()``: a :class:`RowAdam`, or any other.
        amp: autocast dtype, or None.
        channels_last: layout that images are brought into.
        clip: bound on the absolute value of filter entries after the step; None for none.
        capture: run as a CUDA graph after a few ordinary steps; see :func:`refuse_capture`.
        around: a context for the forward pass and the loss of a minibatch, for gates that differ
            from step to step.

    Raises:
        ValueError: if the filters are not flat, or the step cannot be captured.
    """

    def __init__(
        self,
        net: WFNet,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        amp: torch.dtype | None = None,
        channels_last: bool = False,
        clip: float | None = None,
        capture: bool = False,
        around: Callable[[ExpandedBatch], AbstractContextManager] | None = None,
    ):
        self.around = around or (lambda batch: nullcontext())
        self.net = net
        self.objective = objective
        self.optimizer = optimizer
        self.params = net.filter_parameters()
        self.filters = flat_matrix(self.params)
        if self.filters is None:
            raise ValueError(
                "the filter matrices are not columns of one matrix; make the step inside "
                "`with wfnet.gate_tables.flatten_filters(net.filter_parameters()):`"
            )
        reason = refuse_capture(net, optimizer) if capture else None
        if reason is not None:
            raise ValueError(f"the step cannot be captured: {reason}; use capture=False")
        self.forward = Forward.of(net, amp, channels_last)
        self.device = self.filters.device
        self.clip = clip
        self.gradient = torch.zeros_like(self.filters)
        self.columns = self._columns_of(self.gradient)
        # One place more than there are rows: where labels of -1 go.
        self.occurred = torch.zeros(len(self.filters) + 1, dtype=torch.bool, device=self.device)
        wide = torch.promote_types(self.filters.dtype, torch.float32)
        self.lr = torch.zeros((), dtype=wide, device=self.device)
        self.shrink = torch.zeros_like(self.lr)
        self.rows: Tensor | None = None
        self.products: KeptProducts | None = None  # of minibatches that say their positions
        self.graphs = _Graphs(self) if capture else None
        # After that many steps nothing is compiled, chosen or captured any more.
        self.first_steps = _WARM_UP + 1 if capture else 1

    def __call__(
        self, minibatches: Sequence[Minibatch], lr: float, rows: Tensor | None = None
    ) -> Losses:
        """Moves the filters by one step over the mean gradient of ``minibatches``.

        Args:
            minibatches: un-expanded images ``[n, C, H, W]`` and their expanded batch, on any
                device; several accumulate their gradients.
            lr: learning rate.
            rows: distinct forget labels of all minibatches, on the host: RowAdam then reads these
                rows only. By default they are found on the device, without a synchronisation.

        Returns:
            The losses, means over minibatches, detached.
        """
        losses = self.differentiate(minibatches, rows)
        self.move(lr)
        return losses

    def differentiate(self, minibatches: Sequence[Minibatch], rows: Tensor | None = None) -> Losses:
        """Writes the mean gradient to :attr:`gradient`, and to ``grad`` of every parameter."""
        self.rows = rows
        work = self if self.graphs is None else self.graphs
        found = [
            work.accumulate(images, batch, 1 / len(minibatches), number == 0)
            for number, (images, batch) in enumerate(minibatches)
        ]
        for parameter, gradient in zip(self.params, self.columns, strict=True):
            parameter.grad = gradient
        if len(found) == 1:
            return found[0]
        mean = {
            name: torch.stack([losses.terms[name] for losses in found]).mean()
            for name in found[0].terms
        }
        return Losses(torch.stack([losses.total for losses in found]).mean(), mean)

    def move(self, lr: float, shrink: float = 0.0) -> None:
        """Moves the filters along :attr:`gradient`, and RowAdam's towards their start."""
        self.lr.fill_(lr)
        self.shrink.fill_(shrink)
        self.rate = lr
        if self.graphs is not None:
            self.graphs.move()
        else:
            self.update()

    # -- the work: nothing is read from the device on the host -------------------------------------

    def accumulate(self, images: Tensor, batch: ExpandedBatch, share: float, first: bool) -> Losses:
        """Adds ``share`` times a minibatch's gradient to :attr:`gradient` (``first``: sets it)."""
        images = self.forward.images(images.to(self.device, non_blocking=True))
        batch = batch.to(self.device)
        labels = batch.forget.flatten()
        if first:
            self.occurred.zero_()
        self.occurred.index_fill_(0, labels.where(labels >= 0, len(self.filters)), True)
        into = self.gradient if first else torch.empty_like(self.gradient)
        losses = self._gradient_of(images, batch, into)
        if share != 1:
            into.mul_(share)
        if not first:
            self.gradient.add_(into)
        return Losses(losses.total.detach(), losses.terms)

    def update(self) -> None:
        """One optimiser step with :attr:`gradient`, :attr:`lr` and the rows that occurred."""
        group = self.optimizer.param_groups[0]
        if isinstance(self.optimizer, RowAdam):
            group["lr"], group["shrink"] = self.lr, self.shrink
            occurred = self.occurred[:-1] if self.rows is None else None
            self.optimizer.step(self.rows, occurred)
        else:
            group["lr"] = self.rate
            self.optimizer.step()
        if self.clip is not None:
            self.filters.clamp_(-self.clip, self.clip)

    def _gradient_of(self, images: Tensor, batch: ExpandedBatch, into: Tensor) -> Losses:
        # In the dtype of the step: a backend may refuse others.
        with self.forward.autocast():
            network = self.net.fused_network(images)
        if network is not None and [*map(id, network.filters())] != [*map(id, self.params)]:
            network = None
        original = batch.original
        if self.objective.needs_original and original is None:
            with self.forward.autocast(), torch.no_grad():
                if network is None:
                    original = self.net(images, forget=None)
                else:
                    original = network(images, batch.forget.new_full((len(images), 1), -1), None)
            original = full_precision(original)
        inputs, run = list(self.params), None
        with self.around(batch):
            with self.forward.autocast():
                if network is None:
                    logits = self.net(images, forget=batch.forget, source=batch.source)
                else:
                    rows = batch.forget if batch.forget.dim() == 2 else batch.forget.unsqueeze(1)
                    with torch.no_grad():
                        run = network.start(images, rows, batch.source)
                        if self.products is not None and self.products.network is network:
                            run.take(self.products, batch.positions[batch.source])
                        logits = run.forward()
                    inputs.append(logits.requires_grad_())
            losses = self.objective(full_precision(logits), batch, original, self.net)
        found = list(torch.autograd.grad(losses.total, inputs, allow_unused=True))
        if run is None:
            into.zero_()
        else:
            run.backward(found.pop(), into)
        # Fused, these are what the loss itself says of the filters (a regulariser).
        columns = zip(self._columns_of(into), found, strict=True)
        given = [(part, gradient) for part, gradient in columns if gradient is not None]
        if given:
            torch._foreach_add_(*map(list, zip(*given, strict=True)))
        return losses

    def _columns_of(self, flat: Tensor) -> Sequence[Tensor]:
        return flat.split([parameter.shape[1] for parameter in self.params], 1)


def refuse_capture(net: WFNet, optimizer: torch.optim.Optimizer) -> str | None:
    """Why a step of ``net`` cannot be captured as a CUDA graph, in one sentence; None if it can."""
    device = net.filter_parameters()[0].device
    if device.type != "cuda":
        return f"CUDA graphs need a CUDA device, and the network is on {device}"
    for name, module in net.model.named_modules():
        if getattr(module, "grad_checkpointing", False):
            return (
                f"{name or type(module).__name__!r} checkpoints its activations, which saves the "
                "state of random generators on the host"
            )
    if net.gate == "durable":
        return "durable gates draw their noise on the host"
    if not isinstance(optimizer, RowAdam):
        return f"{type(optimizer).__name__} reads its learning rate on the host; RowAdam does not"
    return None


class _Graphs:
    """The parts of a step as CUDA graphs: gradients (setting, adding), and the move of the filters.

    They read one minibatch in buffers on the device, whatever is copied there. The first few steps
    run as they are, on the stream that is then captured. All graphs share one memory pool: they
    never run at the same time.
    """

    def __init__(self, step: UntrainingStep):
        self.step = step
        self.stream = torch.cuda.Stream(step.device)
        self.pool = torch.cuda.graph_pool_handle()
        self.static: Minibatch | None = None
        self.runs: dict[object, int] = {}
        self.graphs: dict[object, tuple[torch.cuda.CUDAGraph, Losses | None]] = {}
        self.read: list[object] = []  # fused networks whose weights and tables the graphs read

    def accumulate(self, images: Tensor, batch: ExpandedBatch, share: float, first: bool) -> Losses:
        step = self.step
        images = images.to(step.device, non_blocking=True)
        if self.static is None:
            copies = {k: t.to(step.device, copy=True) for k, t in batch.tensors().items()}
            layout = torch.channels_last if step.forward.channels_last else torch.preserve_format
            buffer = images.to(images.dtype, copy=True, memory_format=layout)
            self.static = buffer, replace(batch, **copies)
        if _kinds(*self.static) != _kinds(images, batch):
            return step.accumulate(images, batch, share, first)
        static_images, static = self.static
        static_images.copy_(images)
        for name, value in batch.tensors().items():
            buffer = getattr(static, name)
            buffer.copy_(pinned_for(value, buffer.device), non_blocking=True)
        work = partial(step.accumulate, static_images, static, share, first)
        losses = self._run(("accumulate", share, first), work)
        # The next replay overwrites them.
        return Losses(losses.total.clone(), {n: t.clone() for n, t in losses.terms.items()})

    def move(self) -> None:
        self._run(("move",), self.step.update)

    def _run(self, key: tuple, work: Callable[[], Losses | None]) -> Losses | None:
        if key in self.graphs:
            graph, result = self.graphs[key]
            graph.replay()
            return result
        self.runs[key] = self.runs.get(key, 0) + 1
        with torch.cuda.device(self.step.device):
            if self.runs[key] <= _WARM_UP:
                return self._beside(work)
            torch.cuda.empty_cache()  # the graph has memory of its own; let go of the warm-up's
            graph = torch.cuda.CUDAGraph()
            # Threads that load data may pin memory meanwhile: no concern of this capture.
            mode = {"capture_error_mode": "thread_local"}
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, **mode):
                result = work()
        self.graphs[key] = (graph, result)
        # The network may make another for other images.
        self.read.append(self.step.net._fusion.network)
        logger.info("captured %s as a CUDA graph", key[0])
        graph.replay()
        return result

    def _beside(self, work: Callable[[], Losses | None]) -> Losses | None:
        """Runs ``work`` on the stream that is captured later; capture allows no default stream."""
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = work()
        current.wait_stream(self.stream)
        return result


def _kinds(images: Tensor, batch: ExpandedBatch) -> list[object]:
    """What two minibatches must have in common to be run by one graph."""
    tensors = {"images": images, **batch.tensors()}
    return [batch.forget_size, *((k, t.shape, t.dtype) for k, t in tensors.items())]
