"""Records of the trust checks: what each found for one class, as JSON, CSV and a table."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from wfnet.services.files import write_json
from wfnet.services.records import check_format, read_json, write_csv
from wfnet.trust.checks import CHECKS

FORMAT = 1
MODELS = ("forgetful", "original", "retrained")


@dataclass(frozen=True)
class TrustRecord:
    """What one check found for one class.

    Attributes:
        index, name: the class.
        check: a name of ``CHECKS``.
        forgetful, original, retrained: values by measure; ``retrained`` are means over models, and
            empty without one, as is what a check does not ask of that model.
        retrained_spread: standard deviation over retrained models; empty with fewer than two.
        retrained_models: how many there were.
        missing: what could not be measured for want of retrained models, as a sentence; or None.
        details: more, for the model under test.
        seconds: duration.
        key: hash of all that the numbers depend on.
    """

    index: int
    name: str
    check: str
    forgetful: dict[str, float]
    original: dict[str, float]
    retrained: dict[str, float]
    retrained_spread: dict[str, float]
    retrained_models: int
    missing: str | None
    details: dict[str, Any]
    seconds: float
    key: str

    def distance(self, measure: str) -> float | None:
        """``forgetful - retrained`` of a measure; None without retrained models."""
        if measure not in self.forgetful or measure not in self.retrained:
            return None
        return self.forgetful[measure] - self.retrained[measure]


@dataclass(frozen=True)
class TrustResult:
    """All records of a run, in the order of classes and checks.

    Attributes:
        records: one per class and check.
        settings: of the checks, with data, versions and what was under test.
    """

    records: list[TrustRecord]
    settings: dict[str, Any] = field(default_factory=dict)

    def means(self) -> dict[str, dict[str, dict[str, float | None]]]:
        """Means over classes: check -> measure -> forgetful, original, retrained, distance,
        classes (how many had the measure). None where no class has a value."""
        found: dict[str, dict[str, dict[str, float | None]]] = {}
        for check in CHECKS.values():
            records = [record for record in self.records if record.check == check.name]
            names = dict.fromkeys((*check.measures, *(n for r in records for n in r.forgetful)))
            rows: dict[str, dict[str, float | None]] = {}
            for name in names:
                have = [record for record in records if name in record.forgetful]
                if have:
                    rows[name] = {
                        who: _mean([getattr(record, who).get(name) for record in have])
                        for who in MODELS
                    }
                    rows[name]["distance"] = _mean([record.distance(name) for record in have])
                    rows[name]["classes"] = len(have)
            if rows:
                found[check.name] = rows
        return found

    def missing(self) -> list[str]:
        """Sentences about what could not be measured, each once."""
        return list(dict.fromkeys(r.missing for r in self.records if r.missing))

    def left_out(self) -> list[str]:
        """Sentences about attacks for which a class has too few images, each once."""
        found = [(r.name, r.details["left_out"]) for r in self.records if "left_out" in r.details]
        return [f"Left out for class {name}: {text}." for name, text in dict.fromkeys(found)]

    def to_json(self, path: str | os.PathLike) -> None:
        """Writes everything, atomically; :meth:`from_json` reads it again."""
        write_json(
            path,
            {
                "format": FORMAT,
                "units": "accuracies, AUC, tv and agreement are fractions in [0, 1]; kl and js in "
                "nats; seconds",
                "settings": self.settings,
                "means": self.means(),
                "records": [asdict(record) for record in self.records],
            },
        )

    @classmethod
    def from_json(cls, path: str | os.PathLike) -> TrustResult:
        """Reads what :meth:`to_json` wrote.

        Raises:
            FileNotFoundError, ValueError: if the file is missing, damaged or something else.
        """
        return read_json(path, cls._from_dict, "a result of `wfnet trust`", "run it again")

    @classmethod
    def _from_dict(cls, content: dict[str, Any]) -> TrustResult:
        check_format(content, FORMAT)
        return cls([TrustRecord(**record) for record in content["records"]], content["settings"])

    def to_csv(self, path: str | os.PathLike) -> None:
        """Writes one line per class, check and measure, atomically."""
        lists = (*MODELS, "retrained_spread")
        columns = ["index", "name", "check", "measure", *lists, "retrained_models", "distance"]
        rows = [
            {
                **{column: getattr(record, column) for column in ("index", "name", "check")},
                **{column: getattr(record, column).get(measure) for column in lists},
                "measure": measure,
                "retrained_models": record.retrained_models,
                "distance": record.distance(measure),
            }
            for record in self.records
            for measure in record.forgetful
        ]
        write_csv(path, rows, columns)

    def table(self) -> str:
        """An aligned table of means over classes for the terminal."""
        columns = (*MODELS, "distance")
        lines = [f"{'':32}" + "".join(f"{column:>10}" for column in columns)]
        for check, rows in self.means().items():
            lines.append(f"{CHECKS[check].title}: {CHECKS[check].question}")
            for name, row in rows.items():
                signs = ("", "", "", "+")
                cells = [
                    "-" if row[column] is None else f"{row[column]:{sign}.3f}"
                    for column, sign in zip(columns, signs, strict=True)
                ]
                lines.append(f"  {name:<30}" + "".join(f"{cell:>10}" for cell in cells))
        return "\n".join(lines)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
