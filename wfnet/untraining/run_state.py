"""What a run of untraining has come to: its state, its checkpoint, its mark of identity.

One file, ``untraining.safetensors`` in the run's folder, holds all that a run needs to go on:
atomic and checksummed. It appears under its name whole or not at all, so killing the process at any
moment loses at most what was done since it was last written.
"""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from wfnet.data import Dataset, classes_of, labels_of, multi_hot_of
from wfnet.gate_tables import side_by_side
from wfnet.network import WFNet
from wfnet.pretrained import assign_filters
from wfnet.services.files import (
    digest,
    fingerprint,
    read_metadata,
    read_tensors,
    sha256,
    write_tensors,
)
from wfnet.services.log import logger
from wfnet.services.ranks import Ranks
from wfnet.untraining.objectives import Objective
from wfnet.untraining.optimizers import RowAdam
from wfnet.untraining.untrain_config import FREE_TO_CHANGE, UntrainConfig
from wfnet.untraining.validation import Validation

CHECKPOINT_NAME = "untraining.safetensors"
FORMAT = 2


@dataclass
class RunState:
    """Where a run stands: all that a checkpoint holds beside tensors.

    Attributes:
        step: steps that are done.
        best: validation of the best filters so far; None before the first one.
        best_step: the step after which they were taken.
        stale: validations since then.
        history: one record per validation.
        seconds: duration, all sessions together.
        samples: expanded samples that went through the network.
        finished, stopped_early: whether the run is over, and whether patience ended it.
        sums, summed: of losses since the last record, and how many.
        spent: seconds by what they were spent on.
    """

    step: int = 0
    best: Validation | None = None
    best_step: int = 0
    stale: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    samples: int = 0
    finished: bool = False
    stopped_early: bool = False
    sums: dict[str, float] = field(default_factory=dict)
    summed: int = 0
    spent: dict[str, float] = field(default_factory=dict)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "RunState":
        """Returns the state whose ``asdict`` is part of ``content``."""
        state = cls(**{f.name: content[f.name] for f in fields(cls) if f.name in content})
        if state.best is not None:
            state.best = Validation(**state.best)
        return state


@dataclass(frozen=True)
class UntrainResult:
    """What a run of :func:`wfnet.untrain` came to. The best filters are on the network.

    Attributes:
        score: ``0.5 * ((1 - Acc_f) + Acc_r)`` of the best filters; None without validation.
        best: validation of the best filters; None without validation.
        best_step: step after which they were taken.
        steps: steps that were run, all sessions of a resumed run together.
        stopped_early: whether patience ended the run.
        history: one record per validation (per checkpoint without validation).
        seconds: duration, all sessions together.
        filters: the folder with the saved filters; None without output.
        config: the settings.
        corrupt_images: names of images left out, with reasons.
        spent: where it went, in seconds: ``start`` (until all is compiled and captured),
            ``features`` (that are kept), ``data`` (waiting for images), ``steps``, ``validation``
            and ``checkpoints``.
        samples: expanded samples that went through the network in training.
    """

    score: float | None
    best: Validation | None
    best_step: int
    steps: int
    stopped_early: bool
    history: list[dict[str, float]]
    seconds: float
    filters: Path | None
    config: UntrainConfig
    corrupt_images: dict[str, str] = field(default_factory=dict)
    spent: dict[str, float] = field(default_factory=dict)
    samples: int = 0


@dataclass
class RunStore:
    """Saves a run's state and tensors to its checkpoint, and restores them.

    Attributes:
        path: of the checkpoint.
        config: its settings.
        net, optimizer: whose tensors are saved and restored.
        identity: what a resumed run must have in common with the interrupted one
            (:func:`identity_of`).
    """

    path: Path
    config: UntrainConfig
    net: WFNet
    optimizer: torch.optim.Optimizer
    identity: dict[str, str]

    def save(self, state: RunState, best_filters: Tensor | None) -> None:
        """Writes all that the run needs to go on; ``best_filters`` are ``[K, total]`` or None."""
        filters = self.net.named_filters()
        tensors = {f"filters.{name}": p for name, p in filters.items()}
        if best_filters is not None:
            best = best_filters.split([p.shape[1] for p in filters.values()], 1)
            tensors |= {f"best.{name}": p for name, p in zip(filters, best, strict=True)}
        if isinstance(self.optimizer, RowAdam):
            tensors |= {f"optimizer.{n}": t for n, t in self.optimizer.moments().items()}
        content = {"config": asdict(self.config), "identity": self.identity, **asdict(state)}
        write_checkpoint(self.path, tensors, content)

    def load(self, ranks: Ranks) -> tuple[RunState, Tensor | None]:
        """Restores the checkpoint; returns its state and the best filters.

        Filters and the optimiser's moments are put back. Every rank gets what the first one reads.

        Raises:
            ValueError: if it is damaged, or for another configuration, data set or network.
        """
        tensors, content = ranks.first_does(lambda: read_checkpoint(self.path))
        self._check_same_run(content)

        def part(prefix: str) -> dict[str, Tensor]:
            return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}

        state = RunState.from_json(content)
        best_filters = None
        if state.best is not None:  # through the network, which checks names and shapes
            assign_filters(self.net, part("best."), self.path)
            best_filters = side_by_side(self.net.filter_parameters()).clone()
        assign_filters(self.net, part("filters."), self.path)
        if isinstance(self.optimizer, RowAdam):
            self.optimizer.load_moments(part("optimizer."))
        logger.info("resumed %s at step %d", self.path, state.step)
        return state, best_filters

    def refuse_to_overwrite(self, ranks: Ranks) -> None:
        """Raises FileExistsError if the run in the folder is unfinished."""
        try:
            _, content = ranks.first_does(lambda: read_checkpoint(self.path))
        except ValueError as error:
            raise FileExistsError(
                f"{error}; it is in the way of a new run: move it away or choose another output"
            ) from error
        if not content["finished"]:
            raise FileExistsError(
                f"{self.path.parent} holds an unfinished run (step {content['step']}): pass "
                f"resume=True to continue it, choose another output, or delete {self.path.name}"
            )

    def _check_same_run(self, content: dict[str, Any]) -> None:
        different = None
        for name, value in json.loads(json.dumps(asdict(self.config))).items():
            before = content["config"].get(name, getattr(UntrainConfig, name, None))
            if name not in FREE_TO_CHANGE and before != value:
                different = different or f"{name}={before!r}, now it is {value!r}"
        for name, value in self.identity.items():
            if content["identity"].get(name) != value:
                different = different or f"another {name}"
        if different:
            raise ValueError(
                f"{self.path} was written with {different}; resume with the same settings, data "
                "and network, or start anew in another folder"
            )


def write_checkpoint(path: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Writes ``tensors`` and ``state`` (what JSON can hold, with its ``step``).

    Raises:
        OSError: if they cannot be written, on a full disk for example; the file before stays.
    """
    text = json.dumps({"format": FORMAT, **state})
    try:
        write_tensors(path, tensors, {"state": text, "sha256": _checksum(tensors, text)})
    except OSError as error:
        raise OSError(
            error.errno,
            f"the checkpoint of step {state['step']} could not be written ({error.strerror}): "
            f"free some space in {path.parent}; what was saved before stays",
        ) from error


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns tensors and state.

    Raises:
        FileNotFoundError, ValueError: if there is no such file, or it is damaged.
    """
    try:
        metadata, tensors = read_metadata(path), read_tensors(path)
        state = json.loads(metadata["state"])
        if state["format"] != FORMAT:
            raise ValueError(f"its format is {state['format']}, this version reads {FORMAT}")
        if _checksum(tensors, metadata["state"]) != metadata.get("sha256"):
            raise ValueError("its contents do not have the checksum that was written with them")
        return tensors, state | {"step": int(state["step"])}
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is truncated, damaged or not a checkpoint of untraining ({error}); delete it "
            "to start anew, or restore it from a copy"
        ) from error


def _checksum(tensors: dict[str, Tensor], text: str) -> str:
    """SHA-256 over ``text`` and name, dtype, shape and bytes of every tensor."""
    return digest({f"\n{name}": tensor for name, tensor in tensors.items()}, text)


def identity_of(
    net: WFNet, train: Dataset, validation: Dataset | None, objective: Objective
) -> dict[str, str]:
    """Returns what a resumed run must have in common with the interrupted one, as digests."""
    filters = {name: [list(p.shape), str(p.dtype)] for name, p in net.named_filters().items()}
    gate = [net.alpha_init, net.normalize_gate]
    gate += [net.soft_init] if net.gate == "durable" else []
    return {
        "base network": fingerprint(net.model),
        "filters": sha256(json.dumps([filters, gate])),
        "training data": _data_digest(train),
        "validation data": "none" if validation is None else _data_digest(validation),
        "objective": repr(objective),
    }


def _data_digest(dataset: Dataset) -> str:
    """Returns a digest of labels and class names, and of three images that are in memory.

    Images in files may be transformed at random, so their content is no mark of the data set.
    """
    labels, multi_hot = labels_of(dataset), multi_hot_of(dataset)
    parts = [json.dumps(classes_of(dataset)), labels.numpy().tobytes()]
    if hasattr(dataset, "batch"):
        images = dataset.batch(torch.tensor([0, len(labels) // 2, len(labels) - 1])).images
        parts.append(images.float().contiguous().numpy().tobytes())
    if multi_hot is not None:
        parts.append(multi_hot.contiguous().numpy().tobytes())
    return sha256(*parts)
