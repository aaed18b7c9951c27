"""Runs the trust checks class by class and check by check, resumable, and holds their result."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from wfnet.data import Splits
from wfnet.services.files import fingerprint, write_atomically, write_json
from wfnet.trust import closeness, collateral, membership, probing, removal
from wfnet.trust import relearn as relearning
from wfnet.trust.subject import ImageReader, Subject, TrustSettings
from wfnet.version import __version__

CHECKS: dict[str, ModuleType] = {
    "membership": membership,
    "relearning": relearning,
    "probing": probing,
    "removal": removal,
    "collateral": collateral,
    "closeness": closeness,
}
FORMAT = 1
# Finished pieces of work, one JSON object a line, until the result is written.
JOURNAL = "trust.partial.jsonl"
RESULT = "trust.json"


# -- results --------------------------------------------------------------------------------------


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
        for check, module in CHECKS.items():
            records = [record for record in self.records if record.check == check]
            rows: dict[str, dict[str, float | None]] = {}
            names = dict.fromkeys(module.MEASURES)
            names |= dict.fromkeys(name for record in records for name in record.forgetful)
            for name in names:
                have = [record for record in records if name in record.forgetful]
                if have:
                    rows[name] = {
                        who: _mean([getattr(record, who).get(name) for record in have])
                        for who in ("forgetful", "original", "retrained")
                    }
                    rows[name]["distance"] = _mean([record.distance(name) for record in have])
                    rows[name]["classes"] = len(have)
            if rows:
                found[check] = rows
        return found

    def missing(self) -> list[str]:
        """Sentences about what could not be measured, each once."""
        return list(dict.fromkeys(r.missing for r in self.records if r.missing))

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
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; `wfnet trust` writes such a file")
        try:
            content = json.loads(path.read_text())
            if content["format"] != FORMAT:
                raise ValueError(f"its format is {content['format']}, this version reads {FORMAT}")
            return cls(
                [TrustRecord(**record) for record in content["records"]], content["settings"]
            )
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path} is damaged or not a result of wfnet's trust checks ({error}); remove it "
                "and run them again"
            ) from error

    def to_csv(self, path: str | os.PathLike) -> None:
        """Writes one line per class, check and measure, atomically."""
        text = io.StringIO()
        columns = ["index", "name", "check", "measure", "forgetful", "original", "retrained",
                   "retrained_spread", "retrained_models", "distance"]  # fmt: skip
        writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
        writer.writeheader()
        for record in self.records:
            for name, value in record.forgetful.items():
                line = {
                    "index": record.index, "name": record.name, "check": record.check,
                    "measure": name, "forgetful": value, "original": record.original.get(name, ""),
                    "retrained": record.retrained.get(name, ""),
                    "retrained_spread": record.retrained_spread.get(name, ""),
                    "retrained_models": record.retrained_models,
                }  # fmt: skip
                distance = record.distance(name)
                writer.writerow(line | ({} if distance is None else {"distance": distance}))
        write_atomically(path, lambda temporary: temporary.write_text(text.getvalue()))

    def table(self) -> str:
        """An aligned table of means over classes for the terminal."""
        lines = [f"{'':32}{'forgetful':>10}{'original':>10}{'retrained':>10}{'distance':>10}"]
        for check, rows in self.means().items():
            lines.append(f"{CHECKS[check].TITLE}: {CHECKS[check].QUESTION}")
            for name, row in rows.items():
                cells = [row[who] for who in ("forgetful", "original", "retrained")]
                texts = ["-" if v is None else f"{v:.3f}" for v in cells]
                distance = "-" if row["distance"] is None else f"{row['distance']:+.3f}"
                lines.append(f"  {name:<30}" + "".join(f"{t:>10}" for t in (*texts, distance)))
        return "\n".join(lines)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


# -- running --------------------------------------------------------------------------------------


def run_checks(
    make_forgetful: Callable[[int], nn.Module],
    original: nn.Module,
    data: Splits,
    layers: Sequence[str],
    classes: Sequence[int],
    checks: Sequence[str] | None = None,
    retrained: Callable[[int], Sequence[nn.Module]] = lambda label: (),
    settings: TrustSettings | None = None,
    folder: str | os.PathLike | None = None,
    identity: Mapping[str, Any] | None = None,
    advice: Callable[[int], str] | None = None,
    workers: int = 0,
    progress: bool = True,
) -> TrustResult:
    """Runs ``checks`` for ``classes`` on plain models that are said to have forgotten them.

    No model is changed, nor the caller's random state. With a folder, every finished (class, check)
    is kept there at once, and a second call with the same models and settings goes on after them.

    Args:
        make_forgetful: class -> the plain model under test, for example ``net.bake``.
        original: the plain model that knows all classes.
        data: training part (that the original learned from) and test part.
        layers: masked layers by name, in the order in which they run.
        classes: the classes to check.
        checks: names of ``CHECKS``; all by default.
        retrained: class -> models trained without it; none by default, and then each record says
            what is missing.
        settings: see :class:`TrustSettings`.
        folder: where the journal of a run is kept, and ``trust.json``.
        identity: what else the numbers depend on (a baked file's threshold, say).
        advice: class -> how to make the retrained models that are missing.
        workers: processes that read images.
        progress: a line on stderr for each finished piece.

    Raises:
        ValueError: before work starts for unknown checks or classes out of range.
    """
    settings = settings or TrustSettings()
    names = list(CHECKS) if checks is None else list(checks)
    _check_request(names, classes, data.num_classes)
    chosen = list(dict.fromkeys(int(label) for label in classes))
    journal = _Journal(folder)
    train = ImageReader(data.train, settings.samples, settings.seed, workers)
    test = ImageReader(data.test, settings.samples, settings.seed, workers)
    common = {
        "settings": json.loads(json.dumps(asdict(settings))), "data": data.name,
        "data_seed": data.seed, "images": [len(data.train), len(data.test)],
        "version": __version__, "original": fingerprint(original), **(identity or {}),
    }  # fmt: skip
    records: list[TrustRecord] = []
    left = _Progress(len(chosen) * len(names), progress)
    for label in chosen:
        forgetful, others = make_forgetful(label), list(retrained(label))
        digests = [fingerprint(model) for model in (forgetful, *others)]
        subject = None
        for name in names:
            key = _digest({**common, "class": label, "check": name, "models": digests})
            record = journal.find(key)
            reused = record is not None
            if record is None:
                if subject is None:
                    subject = _subject(
                        label, data, forgetful, original, others, train, test, layers, settings
                    )
                text = advice(label) if advice else missing_retrained(label)
                record = _run_check(name, subject, settings, data.classes[label], text, key)
                journal.add(record)
            records.append(record)
            left.advance(record, reused)
    left.close()
    run_key = _digest(common)
    keep = journal.others(records, run_key)
    every = sorted((*records, *keep), key=lambda r: (r.index, list(CHECKS).index(r.check)))
    result = TrustResult(every, {**common, "run_key": run_key, "device": str(_device(original))})
    if folder is not None:
        result.to_json(Path(folder) / RESULT)
        result.to_csv((Path(folder) / RESULT).with_suffix(".csv"))
        journal.remove()
    return result


def missing_retrained(label: int) -> str:
    """What to say where a check has no retrained model for class ``label``."""
    return (
        f"no model retrained without class {label} is at hand; train one in the same way on the "
        "images of the other classes and pass it as retrained="
    )


def _check_request(names: Sequence[str], classes: Sequence[int], num_classes: int) -> None:
    for name in names:
        if name not in CHECKS:
            raise ValueError(f"there is no check {name!r}: choose from {', '.join(CHECKS)}")
    if not names or not len(classes):
        raise ValueError("name at least one check and one class")
    for label in classes:
        if not 0 <= label < num_classes:
            raise ValueError(f"class {label} is out of range: classes run to {num_classes - 1}")


def _subject(
    label: int,
    data: Splits,
    forgetful: nn.Module,
    original: nn.Module,
    retrained: Sequence[nn.Module],
    train: ImageReader,
    test: ImageReader,
    layers: Sequence[str],
    settings: TrustSettings,
) -> Subject:
    return Subject(
        label=label,
        num_classes=data.num_classes,
        forgetful=forgetful,
        original=original,
        retrained=retrained,
        train_forget=train.of(label),
        train_retain=train.without(label),
        test_forget=test.of(label),
        test_retain=test.without(label),
        layers=layers,
        reader=test,
        settings=settings,
    )


def _run_check(
    name: str, subject: Subject, settings: TrustSettings, title: str, advice: str, key: str
) -> TrustRecord:
    module = CHECKS[name]
    start = time.perf_counter()
    with _random_state_kept(settings.seed):
        found = module.measure(subject.forgetful, subject, list(subject.retrained))
        original: dict[str, float] = {}
        if "original" in module.REFERENCES:
            original = module.measure(subject.original, subject, list(subject.retrained))["values"]
        levels = []
        for i, model in enumerate(subject.retrained):
            others = [m for j, m in enumerate(subject.retrained) if j != i]
            levels.append(module.measure(model, subject, others)["values"])
    means, spread = {}, {}
    for measure in dict.fromkeys(name for level in levels for name in level):
        values = torch.tensor([lv[measure] for lv in levels if measure in lv], dtype=torch.float64)
        means[measure] = values.mean().item()
        if len(values) > 1:
            spread[measure] = values.std().item()
    wanted = [m for m in module.MEASURES if m not in found["values"] or m not in means]
    missing = None
    if wanted and len(subject.retrained) < module.RETRAINED:
        missing = f"{module.TITLE}: {module.NEEDS} ({len(subject.retrained)} at hand); {advice}"
    return TrustRecord(
        index=subject.label,
        name=title,
        check=name,
        forgetful=found["values"],
        original=original,
        retrained=means,
        retrained_spread=spread,
        retrained_models=len(subject.retrained),
        missing=missing,
        details=found["details"],
        seconds=round(time.perf_counter() - start, 3),
        key=key,
    )


@contextmanager
def _random_state_kept(seed: int) -> Iterator[None]:
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class _Journal:
    """Records that are finished: those of an interrupted run and those of an earlier one."""

    def __init__(self, folder: str | os.PathLike | None):
        self.path = None if folder is None else Path(folder) / JOURNAL
        self.known: dict[str, TrustRecord] = {}
        self.earlier: TrustResult | None = None
        self.torn = False  # whether the last line is that at which a run was interrupted
        if self.path is None:
            return
        if self.path.with_name(RESULT).is_file():
            self.earlier = TrustResult.from_json(self.path.with_name(RESULT))
            self.known = {record.key: record for record in self.earlier.records}
        if self.path.is_file():
            text = self.path.read_text()
            self.torn = bool(text) and not text.endswith("\n")
            names = {f.name for f in fields(TrustRecord)}
            for line in text.splitlines():
                try:
                    content = json.loads(line)
                except ValueError:
                    continue
                if isinstance(content, dict) and set(content) == names:
                    self.known[content["key"]] = TrustRecord(**content)

    def find(self, key: str) -> TrustRecord | None:
        return self.known.get(key)

    def add(self, record: TrustRecord) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a") as file:
            file.write(("\n" if self.torn else "") + json.dumps(asdict(record)) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.torn = False

    def others(self, records: Sequence[TrustRecord], run_key: str) -> list[TrustRecord]:
        """Records of an earlier call on the same run that are not among ``records``."""
        if self.earlier is None or self.earlier.settings.get("run_key") != run_key:
            return []
        found = {(record.index, record.check) for record in records}
        return [r for r in self.earlier.records if (r.index, r.check) not in found]

    def remove(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)


class _Progress:
    """A line on stderr for each finished piece, with the time left."""

    def __init__(self, total: int, enabled: bool):
        self.total, self.enabled = total, enabled
        self.done = self.reused = 0
        self.start = time.perf_counter()

    def advance(self, record: TrustRecord, reused: bool) -> None:
        self.done += 1
        self.reused += reused
        worked = self.done - self.reused
        if not self.enabled or reused:
            return
        left = (time.perf_counter() - self.start) / worked * (self.total - self.done)
        print(
            f"trust {self.done}/{self.total}  class {record.name}: {record.check} "
            f"({record.seconds:.1f} s)  {round(left) // 60}:{round(left) % 60:02d} left",
            file=sys.stderr,
            flush=True,
        )

    def close(self) -> None:
        if self.enabled and self.reused:
            print(f"trust: {self.reused} of {self.total} reused", file=sys.stderr, flush=True)
