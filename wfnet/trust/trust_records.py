"""Records of the trust checks: what each found for one class, as JSON, CSV and a table."""

from dataclasses import asdict, dataclass, field
from typing import Any

from wfnet.services.files import FilePath, write_json
from wfnet.services.records import check_format, read_json, write_csv
from wfnet.trust.checks import CHECKS
from wfnet.trust.subject import TRIVIAL

FORMAT = 1
UNITS = (
    "accuracies, average precisions, AUC, tv and agreement are fractions in [0, 1]; cka at most 1; "
    "kl and js in nats; seconds"
)
# Models whose values stand side by side, and the first less the second.
MODELS = ("forgetful", "also_masked", "retrained", *TRIVIAL, "original")
COLUMNS = (*MODELS, "distance")

Row = dict[str, float | None]
Key = tuple[int, tuple[int, ...], int, int]  # of a record, in the order in which they are shown


@dataclass(frozen=True)
class TrustRecord:
    """What one check found for one class.

    Attributes:
        index, name: the class.
        check: a name of ``CHECKS``.
        forgetful, also_masked, original, retrained, logit_masked, bias_shifted: values by measure;
            ``also_masked`` is the model under test with the class cut from its head, as ``bake``
            exports it with ``cut_output=True``; ``retrained`` are means over models, and empty
            without one, as is what a check does not ask of that model.
        retrained_spread: standard deviation over retrained models; empty with fewer than two.
        retrained_models: how many there were.
        missing: what could not be measured for want of retrained models, as a sentence; or None.
        details: more, for the model under test.
        seconds: duration.
        key: hash of all that the numbers depend on.
        forgotten: other classes that were forgotten together with this one.
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
    also_masked: dict[str, float] = field(default_factory=dict)
    logit_masked: dict[str, float] = field(default_factory=dict)
    bias_shifted: dict[str, float] = field(default_factory=dict)
    forgotten: list[int] = field(default_factory=list)

    @property
    def together(self) -> int:
        """How many classes were forgotten together."""
        return 1 + len(self.forgotten)

    @property
    def place(self) -> Key:
        """Class and check, single classes first: no two records share it."""
        group = tuple(sorted((self.index, *self.forgotten))) if self.forgotten else ()
        return self.together, group, self.index, list(CHECKS).index(self.check)

    def row(self, measure: str) -> Row:
        """Returns the values of a measure by model, and ``distance``: forgetful less retrained."""
        row = {who: getattr(self, who).get(measure) for who in MODELS}
        known = row["forgetful"] is not None and row["retrained"] is not None
        return row | {"distance": row["forgetful"] - row["retrained"] if known else None}


@dataclass(frozen=True)
class TrustResult:
    """All records of a run, in the order of classes and checks.

    Attributes:
        records: one per class and check.
        settings: of the checks, with data, versions and what was under test.
    """

    records: list[TrustRecord]
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def sizes(self) -> list[int]:
        """How many classes were forgotten together: every such number, ascending."""
        return sorted({record.together for record in self.records})

    def means(self, size: int | None = None) -> dict[str, dict[str, Row]]:
        """Returns means over classes: check -> measure -> a number for each of COLUMNS, and classes
        (how many had the measure). None where no class has a value.

        Of those of which ``size`` were forgotten together; of the first of :attr:`sizes` if None.
        """
        found: dict[str, dict[str, Row]] = {}
        size = min(self.sizes, default=1) if size is None else size
        for check in CHECKS.values():
            records = [r for r in self.records if (r.check, r.together) == (check.name, size)]
            for name in dict.fromkeys(
                (*check.measures, *(n for r in records for n in r.forgetful))
            ):
                rows = [record.row(name) for record in records if name in record.forgetful]
                if rows:
                    means = {who: _mean([row[who] for row in rows]) for who in COLUMNS}
                    found.setdefault(check.name, {})[name] = means | {"classes": len(rows)}
        return found

    def missing(self) -> list[str]:
        """Returns sentences about what could not be measured, each once."""
        return list(dict.fromkeys(r.missing for r in self.records if r.missing))

    def left_out(self) -> list[str]:
        """Returns sentences about attacks for which a class has too few images, each once."""
        found = [(r.name, r.details["left_out"]) for r in self.records if "left_out" in r.details]
        return [f"Left out for class {name}: {text}." for name, text in dict.fromkeys(found)]

    def to_json(self, path: FilePath) -> None:
        """Writes everything, atomically; :meth:`from_json` reads it again."""
        content = {"format": FORMAT, "units": UNITS, "settings": self.settings}
        content["means"] = self.means()
        if len(self.sizes) > 1:
            content["means_together"] = {str(size): self.means(size) for size in self.sizes[1:]}
        content["records"] = [asdict(record) for record in self.records]
        write_json(path, content)

    @classmethod
    def from_json(cls, path: FilePath) -> "TrustResult":
        """Reads what :meth:`to_json` wrote.

        Raises:
            FileNotFoundError, ValueError: if the file is missing, damaged or something else.
        """

        def build(content: dict[str, Any]) -> TrustResult:
            check_format(content, FORMAT)
            records = [TrustRecord(**record) for record in content["records"]]
            return cls(records, content["settings"])

        return read_json(path, build, "a result of `wfnet trust`", "run it again")

    def to_csv(self, path: FilePath) -> None:
        """Writes one line per class, check and measure, atomically."""
        rows = [
            {
                "index": record.index,
                "name": record.name,
                "check": record.check,
                "measure": measure,
                **record.row(measure),
                "retrained_spread": record.retrained_spread.get(measure),
                "retrained_models": record.retrained_models,
            }
            for record in self.records
            for measure in record.forgetful
        ]
        columns = ["index", "name", "check", "measure", *MODELS]
        write_csv(path, rows, [*columns, "retrained_spread", "retrained_models", COLUMNS[-1]])

    def table(self) -> str:
        """Returns an aligned table of means over classes for the terminal."""
        lines = []
        for size in self.sizes:
            head = "" if size == 1 else f"{size} classes forgotten together"
            lines.append(f"{head:32}" + "".join(f"{who.replace('_', ' '):>13}" for who in COLUMNS))
            for check, rows in self.means(size).items():
                lines.append(f"{CHECKS[check].title}: {CHECKS[check].question}")
                for name, row in rows.items():
                    cells = (_cell(row[who], "+" if who == "distance" else "") for who in COLUMNS)
                    lines.append(f"  {name:<30}" + "".join(f"{cell:>13}" for cell in cells))
        return "\n".join(lines)


def _cell(value: float | None, sign: str) -> str:
    return "-" if value is None else f"{value:{sign}.3f}"


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
