"""Runs the trust checks class by class and check by check; an interrupted run goes on."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wfnet.baselines import Forget, Origin, classes_in, unlearn
from wfnet.data import Splits, multi_hot_of
from wfnet.evaluation import metrics, relearning
from wfnet.evaluation.partial import PartialResults
from wfnet.services.files import FilePath, code_digest, fingerprint, sha256
from wfnet.services.log import logger
from wfnet.services.progress import Progress
from wfnet.trust.attacks import ATTACKS
from wfnet.trust.check import Check
from wfnet.trust.checks import CHECKS
from wfnet.trust.subject import TRIVIAL, Subject, TrustSettings, image_readers
from wfnet.trust.trust_records import MODELS, Key, TrustRecord, TrustResult
from wfnet.version import __version__

# What is stated of the attackers' images; results of another mix are not reused.
NATURAL = "classes in the proportion of the training part"
# Finished pieces of work by their key, until the result is written.
JOURNAL = "trust.partial.json"
RESULT = "trust.json"


def _measuring() -> list[str]:
    """Modules that decide the values of a record: one of older code is measured again."""
    changes = [check.measure for check in CHECKS.values()]
    # Attacks of other packages are imported here, not with this module: they import it, too.
    changes += [attack.change for attack in ATTACKS.values()]
    own = [metrics.__name__, relearning.__name__, Subject.__module__]
    return own + [change.__module__ for change in changes]


def run_checks(
    make_forgetful: Callable[[Forget], nn.Module],
    original: nn.Module,
    data: Splits,
    layers: Sequence[str],
    classes: Sequence[Forget],
    checks: Sequence[str] | None = None,
    retrained: Callable[[Forget], Sequence[nn.Module]] = lambda label: (),
    settings: TrustSettings | None = None,
    folder: FilePath | None = None,
    identity: Mapping[str, Any] | None = None,
    advice: Callable[[Forget], str] = "train one without class {} as retrained=".format,
    workers: int = 0,
    progress: bool = True,
) -> TrustResult:
    """Runs ``checks`` for ``classes`` on plain models that are said to have forgotten them.

    Everything is measured on the trivial baselines, too, which are made here of the original and
    the drawn training images. No model is changed, nor the caller's random state. With a folder,
    every finished (class, check) is kept there at once, and a second call with the same models and
    settings goes on after them.

    Args:
        make_forgetful: class -> the plain model under test, for example ``net.bake``.
        original: the plain model that knows all classes.
        data: training part (that the original learned from) and test part.
        layers: masked layers by name, in the order in which they run.
        classes: the classes to check; of several that are forgotten together, a tuple, each is.
        checks: names of ``CHECKS``; by default all that have a meaning for the data.
        retrained: class -> models trained without it; none by default, and then each record says
            what is missing.
        settings: see :class:`TrustSettings`.
        folder: where the journal of a run is kept, and ``trust.json``.
        identity: what else the numbers depend on (a baked file's threshold, say).
        advice: class -> how to make the retrained models that are missing.
        workers: processes that read images.
        progress: show a bar on a terminal.

    Raises:
        ValueError: before work starts for checks that are unknown or have no meaning for the data,
            or classes out of range.
    """
    settings = settings or TrustSettings()
    one_label = multi_hot_of(data.test) is None
    known = [name for name, check in CHECKS.items() if one_label or check.several_labels]
    names = known if checks is None else list(checks)
    chosen = list(dict.fromkeys(classes))
    labels = [label for forget in chosen for label in classes_in(forget)]
    if not names or not labels or not set(names) <= set(known):
        data_are = "" if one_label else f" ({data.name} has several labels per image)"
        raise ValueError(
            f"name at least one class, and checks of {', '.join(known)}{data_are}; got {names}"
        )
    if not 0 <= min(labels) <= max(labels) < data.num_classes:
        raise ValueError(f"a class of {chosen} is out of range: they run to {data.num_classes - 1}")
    readers = image_readers(data, settings, workers)
    same = (data.num_classes, *readers, layers, settings)
    common = {
        "settings": json.loads(json.dumps(asdict(settings))),
        "data": data.name,
        "data_seed": data.seed,
        "images": [len(data.train), len(data.test)],
        "version": __version__,
        "original": fingerprint(original),
        "attackers_images": NATURAL,
        "columns": MODELS,
        "code": code_digest(_measuring()),
        **(identity or {}),
    }
    earlier, journal, done = _known(folder)
    records: dict[Key, TrustRecord] = {}
    without: dict[str, str] = {}
    with Progress(len(labels) * len(names), "trust", progress, unit="check") as bar:
        for forget in chosen:
            forgetful, others = make_forgetful(forget), list(retrained(forget))
            digests = [fingerprint(model) for model in (forgetful, *others)]
            for label in classes_in(forget):
                rest = [other for other in classes_in(forget) if other != label]
                shown = data.classes[label]
                if rest:
                    shown += f" (with {', '.join(data.classes[other] for other in rest)})"
                subject = None
                for name in names:
                    about = {"class": label, "check": name, "models": digests}
                    about |= {"forgotten": rest} if rest else {}
                    key = sha256(json.dumps({**common, **about}, sort_keys=True))
                    if key not in done:
                        if subject is None:
                            models = forgetful, original, others
                            subject = Subject(label, *same, *models, forgotten=rest)
                            without |= _make_trivial(subject, data.classes)
                        done[key] = _run_check(CHECKS[name], subject, shown, advice(forget), key)
                        journal.add(key, asdict(done[key]))
                    records[done[key].place] = done[key]
                    bar.set_postfix(last=f"{name} of {shown}")
                    bar.update(1)
    for name, reason in without.items():
        logger.warning("trust checks have no column %s: %s", name.replace("_", " "), reason)
    run_key = sha256(json.dumps(common, sort_keys=True))
    if earlier.settings.get("run_key") == run_key:
        records = {record.place: record for record in earlier.records} | records
    every = [record for _, record in sorted(records.items())]
    device = str(next(original.parameters()).device)
    result = TrustResult(every, {**common, "run_key": run_key, "device": device})
    if folder is not None:
        result.to_json(Path(folder) / RESULT)
        result.to_csv((Path(folder) / RESULT).with_suffix(".csv"))
        journal.path.unlink(missing_ok=True)
    return result


def _known(folder: FilePath | None) -> tuple[TrustResult, PartialResults, dict[str, TrustRecord]]:
    """Returns the earlier result of a folder, its journal, and the records of both by key."""
    if folder is None:
        return TrustResult([]), PartialResults(None, dict), {}
    path = Path(folder) / RESULT
    earlier = TrustResult.from_json(path) if path.is_file() else TrustResult([])
    journal = PartialResults(path.with_name(JOURNAL), dict)
    known = {record.key: record for record in earlier.records}
    return earlier, journal, known | {k: TrustRecord(**r) for k, r in journal.records.items()}


def _run_check(check: Check, subject: Subject, name: str, advice: str, key: str) -> TrustRecord:
    """Measures the model under test and all that stand beside it, for one class."""
    start = time.perf_counter()
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(subject.settings.seed)
        values, details = check.measure(subject.forgetful, subject)
        original = check.measure(subject.original, subject)[0] if check.original else {}
        levels = [check.measure(model, subject)[0] for model in subject.retrained]
        trivial = {name: check.measure(m, subject)[0] for name, m in subject.trivial.items()}
    found: dict[str, Tensor] = {
        measure: torch.tensor([lv[measure] for lv in levels if measure in lv], dtype=torch.float64)
        for measure in dict.fromkeys(measure for level in levels for measure in level)
    }
    missing = None
    incomplete = any(m not in values or m not in found for m in check.measures)
    if incomplete and len(levels) < check.retrained:
        missing = f"{check.title}: {check.needs} ({len(levels)} at hand); {advice}"
    return TrustRecord(
        index=subject.label,
        name=name,
        check=check.name,
        forgetful=values,
        original=original,
        retrained={measure: numbers.mean().item() for measure, numbers in found.items()},
        retrained_spread={m: n.std().item() for m, n in found.items() if len(n) > 1},
        retrained_models=len(levels),
        missing=missing,
        details=details,
        seconds=round(time.perf_counter() - start, 3),
        key=key,
        forgotten=list(subject.forgotten),
        **trivial,
    )


def _make_trivial(subject: Subject, names: Sequence[str]) -> dict[str, str]:
    """Makes the trivial baselines of a subject, and of the model under test what a masked logit
    adds to it; returns by name why one cannot be made."""
    train = subject.train_forget.with_others(subject.train_retain).dataset(names)
    forget = (subject.label, *subject.forgotten)
    reasons = {}
    made_of = {name: (name, subject.original) for name in TRIVIAL}
    made_of["also_masked"] = "logit_masked", subject.forgetful
    for name, (method, model) in made_of.items():
        try:
            subject.trivial[name] = unlearn(method, Origin(model, train), forget)
        except ValueError as error:
            reasons[name] = str(error)
    return reasons
