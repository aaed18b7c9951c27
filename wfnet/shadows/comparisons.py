"""Compares models that unlearned an image with models that never saw it, over shadow rounds.

Against two references, each half of the rounds, whose models have not seen the image:

- ``image``: models of the same method that unlearned the class without this image: is it noticed
  that this one was there? Needs no retrained network.
- ``class``: networks retrained without the class: is it noticed that the class was there?

Of every pair of rounds (:mod:`wfnet.shadows.rounds`) one model is on each side, so that all columns
of a table are means over equally many models. The column ``retrained`` is what chance gives.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wfnet.data import batches
from wfnet.services.extras import require
from wfnet.services.files import FilePath, write_json
from wfnet.services.progress import Progress
from wfnet.services.records import write_csv
from wfnet.services.tables import aligned
from wfnet.shadows.measures import MEASURES, Pair
from wfnet.shadows.rounds import RETRAINED, ShadowRounds
from wfnet.trust.membership import confidence
from wfnet.trust.subject import BATCH, predict

FORMAT = 1
ALL = "all"
REFERENCES = {
    "image": "the same method, trained without the image",
    "class": "retrained without the class",
}


@dataclass(frozen=True)
class ShadowResult:
    """What the measures found.

    Attributes:
        rows: one for each ``against`` (of ``REFERENCES``), measure, value, class (``index`` and
            ``name``; "all": all images together) and method, with ``value``, its interval ``low``
            to ``high``, and what it ``needs`` where there is none.
        settings: of the rounds.
        missing: sentences on what could not be measured, and how to have it.
    """

    rows: list[dict[str, Any]]
    settings: dict[str, Any]
    missing: list[str]

    def write(self, folder: FilePath) -> None:
        """Writes ``shadows.json`` and ``shadows.csv``, atomically."""
        write_json(Path(folder) / "shadows.json", {"format": FORMAT, **asdict(self)})
        write_csv(Path(folder) / "shadows.csv", self.rows, list(self.rows[0]))

    def table(self) -> str:
        """Returns the values of all classes together, methods side by side, for the terminal."""
        shown = [row for row in self.rows if row["index"] == ALL]
        methods = list(dict.fromkeys(row["method"] for row in shown))
        parts: list[list[str] | str] = [["", *methods]]
        for against, text in REFERENCES.items():
            found: dict[str, dict[str, str]] = {}
            for row in (row for row in shown if row["against"] == against):
                cell = "-" if row["needs"] else "{value:.3f} [{low:.3f}, {high:.3f}]".format(**row)
                found.setdefault(f"{row['measure']} {row['what']}", {})[row["method"]] = cell
            parts += [f"told from {text}:"] * bool(found)
            parts += [[f"  {n}", *(c.get(m, "-") for m in methods)] for n, c in found.items()]
        needs = dict.fromkeys(f"{r['what']} needs {r['needs']}" for r in shown if r["needs"])
        return aligned([*parts, *needs, "in brackets: 95% intervals"])


def compare(
    rounds: ShadowRounds,
    count: int,
    classes: Sequence[int],
    methods: Sequence[str],
    samples: int = 1000,
    missing: Sequence[str] = (),
    progress: bool = True,
) -> ShadowResult:
    """Makes what is missing of ``count`` rounds, and measures every method.

    Args:
        count: rounds, an even number from 6 on.
        classes: for which models of single classes are made.
        methods: ``FORGETFUL``, ``ORIGINAL`` or baselines; with ``RETRAINED`` among them they are
            compared against it, too.
        samples: the most training images of a class.
        missing: what was left out, for the result.
        progress: show a bar.

    Raises:
        ValueError: before work starts, for another number of rounds.
        ImportError: without scipy, which gives intervals.
    """
    require("scipy.stats", "eval")
    if count < 6 or count % 2:
        raise ValueError(
            f"shadow rounds come in pairs, 3 at least: give 6, 8, 10, ...; got {count}"
        )
    names = rounds.data.classes
    pairs: dict[tuple[str, str], list[Pair]] = {}
    seen = torch.stack([rounds.seen(number) for number in range(count)])
    with Progress(count * (1 + len(classes) * len(methods)), "shadows", progress) as bar:
        for number in range(count):  # the long work, and what serves all classes, comes first
            bar.set_postfix(round=number)
            rounds.net(number)
            bar.update()
        for label in classes:
            positions = (rounds.labels == label).nonzero().squeeze(1)[:samples]
            parts = list(batches(rounds.data.train, positions.split(BATCH), rounds.workers))
            images = torch.cat([part.images for part in parts])
            has = seen[:, torch.cat([part.indices for part in parts])]
            scores = {}
            for method in methods:
                found = []
                for number in range(count):
                    bar.set_postfix(last=f"{method} without {names[label]}")
                    logits = predict(rounds.model(number, method, label), images)
                    found.append(confidence(logits, label))
                    bar.update()
                scores[method] = torch.stack(found)
            for method, own in scores.items():
                pairs.setdefault(("image", method), []).append(split(own, own, has))
                if RETRAINED in scores:
                    pair = split(own, scores[RETRAINED], has)
                    pairs.setdefault(("class", method), []).append(pair)
    rows = []
    for (against, method), each in pairs.items():
        own = [(str(label), names[label], [p]) for label, p in zip(classes, each, strict=True)]
        for index, name, chosen in (*own, (ALL, ALL, each)):
            for measure in MEASURES.values():
                rows += [
                    {"against": against, "measure": measure.name, "what": what, "index": index}
                    | {"name": name, "method": method, **asdict(value)}
                    for what, value in measure.function(chosen).items()
                ]
    settings = {"rounds": count, "seed": rounds.first_seed, "samples": samples, **rounds.identity}
    return ShadowResult(rows, settings, list(missing))


def split(own: Tensor, reference: Tensor, seen: Tensor) -> Pair:
    """Returns of every pair of rounds the model that saw an image, and one that did not.

    Args:
        own, reference: confidences ``[N, n]`` of a method and of the reference, round by round.
        seen: ``[N, n]`` bool, true in exactly one of rounds ``2 j`` and ``2 j + 1``.
    """
    first = seen[0::2]
    return Pair(
        torch.where(first, own[0::2], own[1::2]),
        torch.where(first, reference[1::2], reference[0::2]),
    )
