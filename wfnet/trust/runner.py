"""Runs the trust checks class by class and check by check; an interrupted run goes on."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wfnet.data import Splits
from wfnet.services.files import fingerprint
from wfnet.services.progress import Progress
from wfnet.trust.check import Check
from wfnet.trust.checks import CHECKS
from wfnet.trust.subject import ImageReader, Subject, TrustSettings
from wfnet.trust.trust_records import TrustRecord, TrustResult
from wfnet.version import __version__

# What is stated of the attackers' images; results of another mix are not reused.
NATURAL = "classes in the proportion of the training part"
# Finished pieces of work, one JSON object a line, until the result is written.
JOURNAL = "trust.partial.jsonl"
RESULT = "trust.json"


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
        progress: show a bar on a terminal.

    Raises:
        ValueError: before work starts for unknown checks or classes out of range.
    """
    settings = settings or TrustSettings()
    names = list(CHECKS) if checks is None else list(checks)
    _check_request(names, classes, data.num_classes)
    chosen = list(dict.fromkeys(int(label) for label in classes))
    journal = _Journal(folder)
    train, test = (
        ImageReader(part, settings.samples, settings.seed, workers)
        for part in (data.train, data.test)
    )
    common = {
        "settings": json.loads(json.dumps(asdict(settings))),
        "data": data.name,
        "data_seed": data.seed,
        "images": [len(data.train), len(data.test)],
        "version": __version__,
        "original": fingerprint(original),
        "attackers_images": NATURAL,
        **(identity or {}),
    }
    records: list[TrustRecord] = []
    bar = Progress(len(chosen) * len(names), "trust", progress, unit="check")
    with bar:
        for label in chosen:
            forgetful, others = make_forgetful(label), list(retrained(label))
            digests = [fingerprint(model) for model in (forgetful, *others)]
            subject = None
            for name in names:
                key = _digest({**common, "class": label, "check": name, "models": digests})
                record = journal.known.get(key)
                if record is None:
                    if subject is None:
                        subject = _subject(
                            label, data, forgetful, original, others, train, test, layers, settings
                        )
                    text = advice(label) if advice else missing_retrained(label)
                    record = _run_check(CHECKS[name], subject, data.classes[label], text, key)
                    journal.add(record)
                records.append(record)
                bar.set_postfix(last=f"{name} of {record.name}")
                bar.update(1)
    run_key = _digest(common)
    keep = journal.others(records, run_key)
    every = sorted((*records, *keep), key=lambda r: (r.index, list(CHECKS).index(r.check)))
    device = str(next(original.parameters()).device)
    result = TrustResult(every, {**common, "run_key": run_key, "device": device})
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
        unlabelled=train.mixed(label),
        test_forget=test.of(label),
        test_retain=test.without(label),
        layers=layers,
        reader=test,
        settings=settings,
    )


def _run_check(check: Check, subject: Subject, name: str, advice: str, key: str) -> TrustRecord:
    """Measures the model under test, the original and the retrained models of one class."""
    start = time.perf_counter()
    retrained = list(subject.retrained)
    with _random_state_kept(subject.settings.seed):
        found = check.measure(subject.forgetful, subject, retrained)
        original: dict[str, float] = {}
        if check.original:
            original = check.measure(subject.original, subject, retrained)["values"]
        levels = [
            check.measure(model, subject, retrained[:i] + retrained[i + 1 :])["values"]
            for i, model in enumerate(retrained)
        ]
    means, spread = {}, {}
    for measure in dict.fromkeys(measure for level in levels for measure in level):
        values = torch.tensor([lv[measure] for lv in levels if measure in lv], dtype=torch.float64)
        means[measure] = values.mean().item()
        if len(values) > 1:
            spread[measure] = values.std().item()
    wanted = [m for m in check.measures if m not in found["values"] or m not in means]
    missing = None
    if wanted and len(retrained) < check.retrained:
        missing = f"{check.title}: {check.needs} ({len(retrained)} at hand); {advice}"
    return TrustRecord(
        index=subject.label,
        name=name,
        check=check.name,
        forgetful=found["values"],
        original=original,
        retrained=means,
        retrained_spread=spread,
        retrained_models=len(retrained),
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
