"""Untraining: learning filter matrices for all classes in one round, every weight frozen.

Paper, "Multi-class unlearning". A run is a function of its configuration, its data and the base
network alone: every random choice comes from ``(seed, step)``, so runs repeat bit by bit and an
interrupted run ends where an uninterrupted one does.
"""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from wfnet.data import CorruptImages, Dataset, as_dataset, corrupt_counter
from wfnet.evaluation.forward import Forward
from wfnet.gate_tables import flatten_filters
from wfnet.network import WFNet
from wfnet.services.files import FilePath, clear_temporary_files, digest
from wfnet.services.locks import folder_lock
from wfnet.services.log import logger
from wfnet.services.progress import Progress
from wfnet.services.ranks import Ranks
from wfnet.untraining.distributed import SharedStep
from wfnet.untraining.durable import DurableObjective, RowStatistics, durable_step
from wfnet.untraining.expansion import ExpandedBatch
from wfnet.untraining.first_rows import start_rows
from wfnet.untraining.history import LossWatch, Record, record_log, write_history
from wfnet.untraining.kept_features import first_products, keep_features, original_logits
from wfnet.untraining.minibatches import (
    TrainingData,
    checked_labels,
    drawn_images,
    read_minibatches,
)
from wfnet.untraining.objectives import (
    BalancedObjective,
    MultiLabelObjective,
    Objective,
    PaperObjective,
)
from wfnet.untraining.optimizers import RowAdam
from wfnet.untraining.run_clock import RunClock
from wfnet.untraining.run_state import (
    CHECKPOINT_NAME,
    RunState,
    RunStore,
    UntrainResult,
    identity_of,
)
from wfnet.untraining.signals import Stopped, StopSignals, lost_workers_wait
from wfnet.untraining.step import Minibatch, UntrainingStep, refuse_capture
from wfnet.untraining.untrain_config import OTHER_OBJECTIVES, UntrainConfig
from wfnet.untraining.validation import AccuracyValidator, MultiLabelValidator, Validation

_SECONDS_BETWEEN_CHECKPOINTS = 180.0  # at most, as far as steps and validations are shorter

# Until this part of the steps durable gates still open and close: a low loss may be that of a row
# not learnt.
_DURABLE_FROM = 0.8


def untrain(
    net: WFNet,
    train: Dataset,
    validation: Dataset | None = None,
    config: UntrainConfig | None = None,
    output: FilePath | None = None,
    resume: bool = False,
    progress: bool = True,
    objective: Objective | None = None,
    log: Callable[[Record], None] | None = None,
    log_interval: float = 30.0,
) -> UntrainResult:
    """Learns the filters of all classes in one round; the best ones end up on ``net``.

    Called on every rank of an initialised ``torch.distributed`` group, all ranks share the run
    (:mod:`wfnet.untraining.distributed`); the first one writes and shows progress.

    Args:
        net: a wrapped classifier on any device; training starts from its present filters.
        train, validation: data sets: anything torchvision-like, a ``datasets.Dataset``, a
            DataLoader or a stream (:func:`wfnet.data.as_dataset`). Without ``validation`` there is
            no early stopping, and the last filters are kept.
        config: settings; ``UntrainConfig.recipe("balanced", net.num_classes)`` by default.
        output: folder for filters (``net.save_pretrained``), ``history.csv`` and ``history.json``,
            a checkpoint, and TensorBoard events where it is installed.
        resume: continue the interrupted run in ``output``; the result is bitwise that of an
            uninterrupted run. Starts anew if there is none; a finished run is only loaded.
        progress: show losses, Acc_r, Acc_f and samples/s on stderr.
        objective: an objective of your own instead of the configured one.
        log: called with every record of the history as it is made.
        log_interval: seconds between lines of progress where stderr is no terminal.

    Raises:
        ValueError: before work starts, for data that do not fit the network; for a resumed run
            with other settings, data or base network; for a damaged checkpoint.
        FileExistsError: if ``output`` holds an unfinished run and ``resume`` is False, or another
            process is writing there.
        FloatingPointError: if the loss is NaN or infinite; the last good filters are on ``net``
            and saved.
        Stopped: with ``output``, after SIGTERM or SIGINT: a checkpoint of the last whole step is
            written (:mod:`wfnet.untraining.signals`).
        OSError: if a checkpoint cannot be written; the one before stays.
        RuntimeError: for more corrupt images than ``config.max_corrupt``.
    """
    if config is None:
        config = UntrainConfig.recipe("balanced", net.num_classes)
    train = as_dataset(train, net.num_classes)
    if validation is not None:
        validation = as_dataset(validation, net.num_classes)
    run = _Untraining(net, train, validation, config, output, objective)
    first = run.ranks.first
    with contextlib.ExitStack() as inside:
        if output is not None:
            run.ranks.first_does(lambda: inside.enter_context(folder_lock(output)))
            run.find(resume)
        bar = Progress(
            run.steps,
            "untraining",
            progress and first,
            done=run.state.step,
            unit="step",
            leave=True,
            log_seconds=log_interval,
        )
        return run.run(inside.enter_context(bar), log if first else None)


class _Untraining:
    """One run: everything that :func:`untrain` holds between steps."""

    def __init__(
        self,
        net: WFNet,
        train: Dataset,
        validation: Dataset | None,
        config: UntrainConfig,
        output: FilePath | None,
        objective: Objective | None,
    ):
        self.ranks = Ranks()
        self.net, self.train, self.validation = net, train, validation
        self.part = net  # what steps and validations run: the rest of it where features are kept
        self.output = None if output is None else Path(output)
        self.params = net.filter_parameters()
        self.device = self.params[0].device
        self.data = TrainingData.of(train, net.num_classes, config)
        self.train = train = self.data.dataset
        self.config = config = self.data.fitting(config)
        self.other_rows = None
        if self.data.rows is not None:
            every = torch.arange(net.num_classes)
            self.other_rows = every[~torch.isin(every, self.data.rows)].to(self.device)
        self.durable = net.gate == "durable"
        multi_label = self.data.multi_hot is not None
        self._check_network(multi_label)
        self.objective = objective or configured_objective(config, multi_label)
        if config.objective == "paper" and objective is None and net.normalize_gate:
            logger.warning(
                "recipe 'paper' is defined for plain sigmoid gates; wrap the network with "
                "WFNet(..., normalize_gate=False) to reproduce it"
            )
        if config.channels_last:
            net.to(memory_format=torch.channels_last)
        self.corrupt: CorruptImages = corrupt_counter(train, config.max_corrupt)
        about = self.data.labels, config.statistics_images, config.seed, self.data.rows
        self.statistics = RowStatistics(net, train, *about)
        self.validator = None
        if validation is not None:
            checked_labels(validation, net.num_classes, "validation")
            about = config, self.data.rows, self.corrupt, self.ranks
            kind = MultiLabelValidator if multi_label else AccuracyValidator
            self.validator = kind(validation, net.num_classes, self.objective, *about)
        self.optimizer = configured_optimizer(config, net)
        self.captures = self._can_capture()

        images = len(self.data.labels)
        self.steps = config.total_steps(images)
        self.steps_per_epoch = config.steps_per_epoch(images)
        self.validate_every = config.steps_between_validations(images)
        if self.durable:  # each one measures the statistics of all rows first
            self.validate_every = max(self.validate_every, math.ceil(self.steps / 10))
        self.state = RunState()
        # ``[K, total]``: the best filters, and the last that gave a finite loss.
        self.best_filters: Tensor | None = None
        self.good_filters: Tensor | None = None
        self.original: Tensor | None = None  # logits of the original network, where they are kept
        self.store = None
        if output is not None:
            path = self.output / CHECKPOINT_NAME
            self.store = RunStore(path, config, net, self.optimizer, self.identity)
        self.signals = StopSignals(output is not None)

    def _check_network(self, multi_label: bool) -> None:
        """Raises ValueError where network, data, settings and processes do not go together."""
        wanted = "durable" if self.config.objective == "durable" else "sigmoid"
        if self.net.gate != wanted:
            raise ValueError(
                f"objective {self.config.objective!r} trains {wanted} gates, but the network has "
                f"{self.net.gate} ones; wrap it with WFNet(..., gate={wanted!r})"
            )
        for alone, what in (
            (multi_label, "images with several labels are"),
            (self.durable, "recipe durable takes moments over whole groups of images, and is"),
            (
                self.config.features not in ("auto", "off") or self.config.views is not None,
                "with features that are kept a network is",
            ),
        ):
            if alone and not self.ranks.alone:
                raise ValueError(f"{what} untrained by one process: start it without torchrun")
        if self.ranks.size > self.config.images:
            raise ValueError(
                f"{self.ranks.size} processes cannot share minibatches of {self.config.images} "
                "images: take a larger batch_size"
            )

    def _can_capture(self) -> bool:
        """Returns whether steps are captured as a CUDA graph; raises if that was asked in vain."""
        refusal = refuse_capture(self.net, self.optimizer)
        if refusal is None and not self.ranks.alone:
            refusal = "the shares of several ranks differ in shape"
        if self.config.capture and refusal is not None:
            raise ValueError(f"capture=True is not possible: {refusal}; leave capture out")
        return self.config.capture is not False and refusal is None

    @cached_property
    def identity(self) -> dict[str, str]:
        """What a resumed run, and every rank, must have in common with this one."""
        return identity_of(self.net, self.train, self.validation, self.objective)

    def find(self, resume: bool) -> None:
        """Continues the run of the checkpoint, or sees that none is lost."""
        if not self.ranks.first_does(self.store.path.is_file):
            if resume:
                logger.warning(
                    f"{self.output} holds no checkpoint: the run starts from the beginning"
                )
        elif resume:
            self.state, self.best_filters = self.store.load(self.ranks)
        else:
            self.store.refuse_to_overwrite(self.ranks)

    # -- the loop ---------------------------------------------------------------------------------

    def run(self, bar: Progress, log: Callable[[Record], None] | None) -> UntrainResult:
        """Runs all steps that are left, and returns the result."""
        state, net = self.state, self.net
        training, fuse = net.training, net.fuse
        net.train()
        net.fuse = self.config.fuse
        self.bar = bar
        self.losses = LossWatch(self.device, state)
        self.clock = RunClock(self.device, state.seconds, state.spent)
        self.saved_at = self.clock.seconds  # when the last checkpoint was written
        try:
            if self.durable and self.data.rows is not None:
                self.statistics.measure_base()
            if state.finished:
                self.statistics.measure(last=True)
            else:
                folder = self.output if self.ranks.first else None
                if folder is not None:
                    clear_temporary_files(folder)
                with (
                    self.signals,
                    flatten_filters(self.params) as self.filters,
                    record_log(folder, state.step + 1, log) as self.log,
                ):
                    self.good_filters = self.filters.detach().clone()
                    self._keep_features()
                    if state.step == 0 and self.config.saliency:
                        self._start_rows()
                    self.work = self._make_step()
                    # Every sample of a durable step is another image: the original network would
                    # cost as much as the filtered one.
                    if self.durable or (self.part is not net and self.objective.needs_original):
                        about = self.data.dataset, self.steps * self.config.images, self.config
                        self.original = original_logits(self.part, *about)
                    if self.durable and self.original is not None:
                        self.work.products = first_products(
                            self.part, self.data.dataset, self.config
                        )
                    self._go_through_steps()
                self.ranks.wait()  # until the first one has written the filters
                self._note_time()
        finally:
            net.train(training)
            net.fuse = fuse
            net.gate_mode.from_base.clear()
        named = {f.name: getattr(state, f.name, None) for f in fields(UntrainResult)}
        named |= {"score": state.best and state.best.score, "steps": state.step}
        named |= {"config": self.config, "filters": self.output}
        return UntrainResult(**named | {"corrupt_images": dict(self.corrupt.found)})

    def _keep_features(self) -> None:
        """Goes on with features and the rest of the network, where that is asked for or possible.

        The statistics of durable rows are measured from images all the same: a finished run that
        is loaded does so, too.
        """
        if self.config.features == "off" or not self.ranks.alone:
            return
        validator = self.validator
        drawn = partial(drawn_images, self.data, self.config, self._positions())
        looked_at = (None, None) if validator is None else (self.validation, validator.images)
        config = self.config
        with self.clock.timed("features"):
            kept = keep_features(self.net, self.train, drawn, *looked_at, config)
            if kept is None:
                return
            split, parts = kept
            forward = Forward.of(split.net, config.amp_dtype, config.channels_last)

            def front(images: Tensor) -> Tensor:
                with torch.no_grad(), forward.autocast():
                    return split.front(forward.images(images))

            reading = {"workers": config.workers, "max_corrupt": self.corrupt}
            reading["pin_memory"] = forward.device.type == "cuda"
            entries = sum(len(part.entries) for part in parts)
            with Progress(entries, "features", not self.bar.disable, unit="images") as bar:
                for part in parts:
                    for images in part.fill(front, config.seed, part is parts[0], **reading):
                        bar.update(images)
                        self._stop_if_asked()
        self.part = split.net
        config = replace(config, images_per_class=None)  # there are no others
        self.data = TrainingData.of(parts[0], self.net.num_classes, config)
        if validator is not None:
            validator.dataset = parts[1]

    def _start_rows(self) -> None:
        """Sets the rows to what one pass over training images says."""
        rows, config = self.data.rows, self.config
        rows = torch.arange(self.net.num_classes) if rows is None else rows
        forward = Forward.of(self.part, config.amp_dtype, config.channels_last)
        about = self.data.dataset, self.data.labels, rows, config.saliency, forward, self.corrupt
        start_rows(self.part, *about)

    def _make_step(self) -> UntrainingStep:
        net, config = self.part, self.config
        layout = config.channels_last
        settings = net, self.objective, self.optimizer, config.amp_dtype, layout, config.clip
        if self.ranks.alone:
            return UntrainingStep(*settings, self.captures, self._gates if self.durable else None)
        self.ranks.check_same("configuration, network or data", [asdict(config), self.identity])
        self.ranks.check_same("starting point", [self.state.step, digest(net.named_filters())])
        return SharedStep(self.ranks, *settings)

    def _gates(self, batch: ExpandedBatch) -> AbstractContextManager:
        return durable_step(self.net, batch, self.config.seed, self.state.step)

    def _go_through_steps(self) -> None:
        with contextlib.ExitStack() as inside:
            stream = self.clock.waits(inside.enter_context(contextlib.closing(self._read())))
            accumulated = self.config.grad_accum_steps
            groups = iter(lambda: list(itertools.islice(stream, accumulated)), [])
            for number, group in enumerate(groups):
                if number == 0:
                    inside.enter_context(lost_workers_wait())
                self._stop_if_asked()
                self._one_step(group)
                if number + 1 == self.work.first_steps:
                    self._read_losses()  # waits for the device
                    self.clock.started()
                self._after_step()
                if self.state.finished:
                    return
        self._stop_if_asked()  # a data worker was lost, because the signal reached it

    def _read(self) -> Iterator[tuple[Minibatch, Tensor]]:
        """Yields the minibatches that are left; if reading fails, what was done is saved first."""
        state = self.state
        pin = self.device.type == "cuda"
        about = self.data, self.config, self.ranks, self.corrupt
        try:
            yield from read_minibatches(*about, self._positions(), pin, self.original)
        except Exception:
            if self.signals.received:  # the signal reached the data workers, too
                return
            if self.store is not None and state.step:
                self._read_losses()
                with contextlib.suppress(OSError):
                    self._save_checkpoint()
            raise

    def _positions(self) -> range:
        """Numbers of the minibatches that are left."""
        each = self.config.grad_accum_steps
        return range(self.state.step * each, self.steps * each)

    def _stop_if_asked(self) -> None:
        """Saves and raises Stopped if some rank has received a signal."""
        self.signals.received = max(self.ranks.gather(self.signals.received))
        if not self.signals.received:
            return
        self._read_losses()
        self._save_checkpoint()
        raise Stopped(
            self.signals.received,
            f"stopped after step {self.state.step} of {self.steps}; resume goes on from "
            f"{self.store.path}",
        )

    def _one_step(self, group: list[tuple[Minibatch, Tensor]]) -> None:
        state, config, step = self.state, self.config, self.state.step
        minibatches, rows = zip(*group, strict=True)
        rows = None if self.captures else torch.cat(rows).unique()
        losses = self.work.differentiate(minibatches, rows)
        if self.other_rows is not None:  # a term of the loss may see all rows
            self.work.gradient.index_fill_(0, self.other_rows, 0)
        if self.losses.add(losses, step + 1):
            self._read_losses()
            self.good_filters = self.filters.detach().clone()
        self.work.move(config.lr_at(step, self.steps), config.shrink_at(step, self.steps))
        state.samples += len(group) * config.samples
        state.step += 1

    # -- between steps ----------------------------------------------------------------------------

    def _after_step(self) -> None:
        """Validates and saves where that is due, and decides whether the run is over."""
        state = self.state
        last = state.step == self.steps
        if self._validation_is_due():
            self._read_losses()
            with self.clock.timed("validation"):
                self._validate()
            state.stopped_early = not last and state.stale >= self.config.patience
        state.finished = last or state.stopped_early
        if state.finished:
            if self.best_filters is None:
                state.best_step = state.step
            self._put_back(self.best_filters)
        if self.store is not None and (state.finished or self._checkpoint_is_due()):
            self._read_losses()
            self._save_checkpoint()
        self._show_progress()

    def _validation_is_due(self) -> bool:
        step, history = self.state.step, self.state.history
        every = self.validate_every
        if self.durable and step < _DURABLE_FROM * self.steps:  # for the history alone
            every *= 2
        due = step > 0 and (step % every == 0 or step == self.steps)
        return due and not (history and history[-1]["step"] == step)

    def _checkpoint_is_due(self) -> bool:
        every = self.config.checkpoint_every or self.validate_every
        late = self.clock.seconds - self.saved_at >= _SECONDS_BETWEEN_CHECKPOINTS
        return self.state.step % every == 0 or late

    def _validate(self) -> None:
        """Appends a record to the history."""
        state = self.state
        scores = None
        if self.validator is not None:
            self.statistics.measure()
            try:
                scores = self.validator(self.part)
            except FloatingPointError as error:
                self._give_up(str(error))
        self.corrupt.merge(self.ranks)
        record: Record = {
            "step": state.step,
            "epoch": state.step / self.steps_per_epoch,
            "lr": self.config.lr_at(state.step - 1, self.steps),
            **self.losses.means(),
        }
        if scores is not None:
            record |= {"acc_r": scores.acc_r, "acc_f": scores.acc_f}
            record |= {"score": scores.score, "validation_loss": scores.loss}
            self._compare_with_best(scores)
        self._note_time()
        record |= {"samples_per_second": state.samples / state.seconds, "seconds": state.seconds}
        state.history.append(record)
        self.log(state.history[-1])

    def _compare_with_best(self, scores: Validation) -> None:
        state, stop_on = self.state, self.config.stop_on
        if self.durable and state.step < _DURABLE_FROM * self.steps:
            return
        if state.best is None or scores.rank(stop_on) > state.best.rank(stop_on):
            state.best, state.best_step, state.stale = scores, state.step, 0
            self.best_filters = self.filters.detach().clone()
        else:
            state.stale += 1

    @torch.no_grad()
    def _put_back(self, filters: Tensor | None) -> None:
        """Ends with these filters, or the present ones, and the statistics of their rows."""
        if filters is not None:
            self.filters.copy_(filters)
        self.statistics.measure(last=True)

    def _save_checkpoint(self) -> None:
        if not self.ranks.first:
            return
        with self.clock.timed("checkpoints"):
            self._note_time()
            if self.state.finished:
                self.net.save_pretrained(self.output)
            write_history(self.output, self.config, self.state.history)
            self.store.save(self.state, self.best_filters)
        self.saved_at = self.clock.seconds

    def _note_time(self) -> None:
        state = self.state
        state.seconds = self.clock.seconds
        state.spent = self.clock.spent(state.seconds)

    def _read_losses(self) -> None:
        """Looks at the losses so far; ends the run if one of them is not finite."""
        broken = self.losses.read()
        if broken is not None:
            self._give_up(broken)

    def _give_up(self, reason: str) -> NoReturn:
        """Keeps the last good filters, and ends the run."""
        self._put_back(self.good_filters if self.best_filters is None else self.best_filters)
        kept = "on the network"
        if self.output is not None:
            if self.ranks.first:
                self.net.save_pretrained(self.output)
            kept = f"saved in {self.output}"
        raise FloatingPointError(
            f"{reason}; the last good filters are {kept}; lower lr (now {self.config.lr:g}), check "
            "the images for NaN, or leave out amp"
        )

    def _show_progress(self) -> None:
        shown = {name: f"{value:.3f}" for name, value in self.losses.latest.items()}
        history = self.state.history
        if history and "acc_r" in history[-1]:
            shown["Acc_r"] = f"{100 * history[-1]['acc_r']:.1f}"
            shown["Acc_f"] = f"{100 * history[-1]['acc_f']:.1f}"
        shown["samples/s"] = f"{self.state.samples / self.clock.seconds:,.0f}"
        self.bar.set_postfix(**shown)
        self.bar.update()


def configured_objective(config: UntrainConfig, multi_label: bool) -> Objective:
    """Returns the objective of the settings, for images with one label or several."""
    if config.objective == "durable":
        if multi_label:
            raise ValueError(
                "recipe durable is for images with one label; take recipe balanced for these"
            )
        return DurableObjective(config.lambda1, config.match, config.tolerance, config.margin)
    if config.objective in OTHER_OBJECTIVES:
        objective = OTHER_OBJECTIVES[config.objective].load()(config)
    elif config.objective == "paper":
        objective = PaperObjective(config.lambda0, config.lambda1, config.lambda2)
    else:
        objective = BalancedObjective(config.lambda1, config.distil)
    return MultiLabelObjective(objective) if multi_label else objective


def configured_optimizer(config: UntrainConfig, net: WFNet) -> torch.optim.Optimizer:
    """Returns the optimiser of the settings over the network's filter matrices."""
    params = net.filter_parameters()
    if config.optimizer == "sgd":
        return torch.optim.SGD(params, lr=config.lr)
    starts = [start for m in net.masked_layers.values() for start in m.filter_starts().values()]
    return RowAdam(params, lr=config.lr, shrink=config.shrink, starts=starts)
