"""Confusion before and after: where images of a forgotten class go, and who else pays.

Two tables over classes, from the same mixed batches of (image, row) pairs:

- ``destinations[c, k]``: of the images of class c, how many the network that has forgotten c takes
  for k; ``original_destinations`` is the original network's confusion matrix.
- ``collateral[c, k]``: accuracy on images of class k under row c less the original's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wfnet.data import Batch, Dataset, labels_of
from wfnet.evaluation.pair_engine import Chunk, Measure, PairEngine, RunOptions
from wfnet.evaluation.pairs import Pairing, check_classes, names_of
from wfnet.network import WFNet
from wfnet.services.files import FilePath, write_json
from wfnet.services.records import check_format, read_json

FORMAT = 1
TABLES = ("destinations", "original_destinations", "seen", "correct")


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

    def to_json(self, path: FilePath) -> None:
        """Writes it, atomically; :meth:`from_json` reads it again. Zeros are left out."""
        content = {"format": FORMAT, "names": self.names, "classes": self.classes.tolist()}
        for name in TABLES:
            table = getattr(self, name)
            entries = torch.cat((table.nonzero(), table[table != 0].unsqueeze(1)), 1)
            content[name] = entries.tolist()  # row, column, value
        write_json(path, content)

    @classmethod
    def from_json(cls, path: FilePath) -> "ConfusionChange":
        """Reads what :meth:`to_json` wrote.

        Raises:
            FileNotFoundError, ValueError: if the file is missing, damaged or something else.
        """
        what = "a confusion table of `wfnet report`"
        return read_json(path, cls._from_dict, what, "delete it and write the report again")

    @classmethod
    def _from_dict(cls, content: Mapping[str, Any]) -> "ConfusionChange":
        check_format(content, FORMAT)
        found = cls.empty(content["names"], torch.tensor(content["classes"]))
        for name in TABLES:
            row, column, value = torch.tensor(content[name], dtype=torch.int64).view(-1, 3).T
            getattr(found, name)[row, column] = value
        return found

    @classmethod
    def empty(cls, names: list[str], classes: Tensor) -> "ConfusionChange":
        """All counts are 0."""
        heights = (
            len(names) if table == "original_destinations" else len(classes) for table in TABLES
        )
        tables = [torch.zeros(height, len(names), dtype=torch.int64) for height in heights]
        return cls(names, classes, *tables)


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
    change = ConfusionChange.empty(names_of(dataset, net.num_classes), rows)
    predictions = Predictions(Pairing(rows, labels, other_rows, seed), change)
    engine = PairEngine(net, dataset, options or RunOptions())
    with engine.show(predictions.pairing.pairs, "evaluating"):
        engine.run(predictions, engine.chunks(len(rows)))
    return change


class Predictions(Measure):
    """Counts predictions into a :class:`ConfusionChange`."""

    def __init__(self, pairing: Pairing, change: ConfusionChange):
        self.pairing, self.rows, self.change = pairing, pairing.classes, change

    def pairs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.pairing.of(batch.indices)

    def add(self, chunk: Chunk) -> None:
        change, row = self.change, chunk.row
        found, truth = chunk.logits.argmax(1).cpu(), chunk.labels[chunk.image]
        is_own, right = self.rows[row] == truth, found == truth
        for table, place in (
            (change.original_destinations, (chunk.labels, chunk.original.argmax(1).cpu())),
            (change.destinations, (row[is_own], found[is_own])),
            (change.seen, (row, truth)),
            (change.correct, (row[right], truth[right])),
        ):
            table.index_put_(place, torch.ones_like(place[0]), accumulate=True)
