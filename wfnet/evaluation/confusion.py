"""Confusion before and after: where images of a forgotten class go, and who else pays.

Two tables over classes, from the same mixed batches of (image, row) pairs:

- ``destinations[c, k]``: of the images of class c, how many the network that has forgotten c takes
  for k; ``original_destinations`` is the original network's confusion matrix.
- ``collateral[c, k]``: accuracy on images of class k under row c less the original's.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wfnet.data import Batch, Dataset, labels_of
from wfnet.evaluation.pair_engine import Chunk, Measure, PairEngine, RunOptions
from wfnet.evaluation.pairs import Pairing, check_classes, names_of
from wfnet.network import WFNet
from wfnet.services.files import write_json
from wfnet.services.records import check_format, read_json

FORMAT = 1


@dataclass(frozen=True)
class ConfusionChange:
    """Counts of predictions, before and after forgetting. K classes, R rows.

    Attributes:
        names: of all K classes.
        classes: the class that each row forgets, ``[R]`` int64.
        destinations: ``[R, K]`` int64, predictions for images of each row's class under it.
        original_destinations: ``[K, K]`` int64, the original network's: true class, prediction.
        seen, correct: ``[R, K]`` int64, images of class k that were run under row r, and hits.
    """

    names: list[str]
    classes: Tensor
    destinations: Tensor
    original_destinations: Tensor
    seen: Tensor
    correct: Tensor

    def shares(self) -> Tensor:
        """``destinations`` as fractions of the images of each row's class, ``[R, K]`` fp64."""
        return self.destinations.double() / self.destinations.sum(1, keepdim=True).clamp_min(1)

    def collateral(self) -> Tensor:
        """Accuracy on class k under row r less the original's, ``[R, K]`` fp64.

        NaN on the row's own class, and where no image was run.
        """
        own = self.original_destinations.diagonal().double()
        before = own / self.original_destinations.sum(1).double()
        change = self.correct.double() / self.seen.double() - before
        change.scatter_(1, self.classes.unsqueeze(1), torch.nan)
        return change

    def to_json(self, path: str | os.PathLike) -> None:
        """Writes it, atomically; :meth:`from_json` reads it again. Zeros are left out."""
        tables = _heights(len(self.classes), len(self.names))
        content = {"format": FORMAT, "names": self.names, "classes": self.classes.tolist()}
        write_json(path, content | {name: _sparse(getattr(self, name)) for name in tables})

    @classmethod
    def from_json(cls, path: str | os.PathLike) -> ConfusionChange:
        """Reads what :meth:`to_json` wrote.

        Raises:
            FileNotFoundError, ValueError: if the file is missing, damaged or something else.
        """
        what = "a confusion table of `wfnet report`"
        return read_json(path, cls._from_dict, what, "delete it and write the report again")

    @classmethod
    def _from_dict(cls, content: Mapping[str, Any]) -> ConfusionChange:
        check_format(content, FORMAT)
        total = len(content["names"])
        heights = _heights(len(content["classes"]), total)
        tables = {name: _dense(content[name], height, total) for name, height in heights.items()}
        return cls(content["names"], torch.tensor(content["classes"]), **tables)


def _sparse(table: Tensor) -> list[list[int]]:
    """``[n, 3]``: row, column and value of what is not 0."""
    places = table.nonzero()
    return torch.cat((places, table[table != 0].unsqueeze(1)), 1).tolist()


def _dense(entries: list[list[int]], rows: int, columns: int) -> Tensor:
    table = torch.zeros(rows, columns, dtype=torch.int64)
    if entries:
        row, column, value = torch.tensor(entries, dtype=torch.int64).T
        table[row, column] = value
    return table


def confusion_change(
    net: WFNet,
    dataset: Dataset,
    classes: Sequence[int] | None = None,
    other_rows: int | None = None,
    seed: int = 0,
    options: RunOptions | None = None,
) -> ConfusionChange:
    """Runs every image through the original network, its own row, and other rows.

    Args:
        net: the filtered network; not changed.
        dataset: normally a test set.
        classes: rows; all by default.
        other_rows: run each image under so many random other rows instead of all.
        seed: of the draw of ``other_rows``.
        options: how images are run.

    Raises:
        ValueError: before work starts, for classes or labels that do not fit.
        FloatingPointError: if logits are NaN or infinite.
    """
    labels = labels_of(dataset)
    rows = check_classes(classes, labels, net.num_classes)
    predictions = Predictions(Pairing(rows, labels, other_rows, seed), net.num_classes)
    engine = PairEngine(net, dataset, options or RunOptions())
    with engine.show(predictions.pairing.pairs, "evaluating"):
        engine.run(predictions, engine.chunks(len(rows)))
    return ConfusionChange(names_of(dataset, net.num_classes), rows, **predictions.tables)


class Predictions(Measure):
    """Counts of predictions; ``tables`` are those of :class:`ConfusionChange`."""

    def __init__(self, pairing: Pairing, num_classes: int):
        self.pairing, self.rows = pairing, pairing.classes
        self.tables = {
            name: torch.zeros(height, num_classes, dtype=torch.int64)
            for name, height in _heights(len(self.rows), num_classes).items()
        }

    def pairs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.pairing.of(batch.indices)

    def add(self, chunk: Chunk) -> None:
        self._count("original_destinations", chunk.labels, chunk.original.argmax(1).cpu())
        found, truth, row = chunk.logits.argmax(1).cpu(), chunk.labels[chunk.image], chunk.row
        is_own, right = self.rows[row] == truth, found == truth
        self._count("destinations", row[is_own], found[is_own])
        self._count("seen", row, truth)
        self._count("correct", row[right], truth[right])

    def _count(self, name: str, row: Tensor, column: Tensor) -> None:
        self.tables[name].index_put_((row, column), torch.ones_like(row), accumulate=True)


def _heights(rows: int, classes: int) -> dict[str, int]:
    """Rows of every table, by name."""
    others = {"original_destinations": classes, "seen": rows, "correct": rows}
    return {"destinations": rows, **others}
