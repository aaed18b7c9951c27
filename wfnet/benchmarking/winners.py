"""Writes the table of measured winners that ``auto`` reads (:mod:`wfnet.backends.winners`)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from wfnet.backends import winners
from wfnet.backends.winners import Entry
from wfnet.services.files import write_atomically


def add_winners(path: Path, measurements: Iterable[Entry]) -> None:
    """Merges measurements into a table, which is made if it is not there.

    Args:
        measurements: entries without ``winner``, which is the least of ``ms``. Those of fewer than
            two backends say nothing and are left out.
    """

    def key(entry: Entry) -> tuple[str, str, str, str]:
        return entry["op"], entry["shape"], entry["dtype"], entry["device"]

    known = {key(entry): entry for entry in (winners.read(path) if path.exists() else ())}
    for entry in measurements:
        ms = entry["ms"]
        if len(ms) > 1:
            complete = {**entry, "winner": min(ms, key=ms.__getitem__)}
            kept = known[key(entry)] = {name: complete[name] for name in winners.FIELDS}
            if "alone_ms" in entry:
                kept["alone_ms"] = entry["alone_ms"]
    text = json.dumps([known[name] for name in sorted(known)], indent=1) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text))


def refuse_winners(device: str | None, commit: str) -> str | None:
    """Why a run's winners may not be recorded; None if they may.

    Args:
        device: type of the device that was measured.
        commit: of the checkout, as :func:`wfnet.benchmarking.timing.commit` has it.
    """
    if device != "cuda":
        return "--winners records measurements of a CUDA device; this run has none"
    if commit == "unknown" or commit.endswith("+changes"):
        return (
            f"--winners needs a committed checkout, so that its commit can be named, not {commit}"
        )
    return None
