"""Records in files: rows of named values as CSV, whole results as JSON, read back with checks.

A CSV file is opened in spreadsheets, which run a cell that looks like a formula: such texts get an
apostrophe in front, which spreadsheets hide and :func:`read_csv` takes off again.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from wfnet.services.files import write_text

Result = TypeVar("Result")

# What spreadsheets take for the start of a formula, also in full width and behind blanks.
_FORMULA = re.compile(r"'*\s*[=+\-@\t\r\n＝＋－＠]")  # noqa: RUF001
_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?([eE][+-]?\d+)?")


def write_csv(
    path: str | os.PathLike, rows: Iterable[Any], columns: Sequence[str] | None = None
) -> None:
    """Writes one line per row below a line of names, atomically.

    Args:
        path: the file.
        rows: mappings or dataclass objects; a value that is missing or None is an empty cell.
        columns: names in their order; by default those of the first row.

    Raises:
        ValueError: for a row with a name that is not among ``columns``, or no row and no columns.
    """
    write_text(path, csv_text(rows, columns))


def csv_text(rows: Iterable[Any], columns: Sequence[str] | None = None) -> str:
    """Returns what :func:`write_csv` writes."""
    found = [asdict(row) if is_dataclass(row) else dict(row) for row in rows]
    if columns is None:
        if not found:
            raise ValueError("a CSV file without rows needs columns")
        columns = list(found[0])
    lines = _Lines()
    # The writer quotes what holds a part of its line end: "\r" too, not only "\n".
    writer = csv.DictWriter(lines, columns, restval="", lineterminator="\r\n")
    writer.writeheader()
    for row in found:
        writer.writerow({name: _quoted(value) for name, value in row.items()})
    return "".join(line.removesuffix("\r\n") + "\n" for line in lines)


class _Lines(list[str]):
    """A file for a CSV writer that keeps every record by itself."""

    write = list.append


def read_csv(path: str | os.PathLike) -> list[dict[str, str]]:
    """Reads what :func:`write_csv` wrote: the cells of every line as text, by column.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if it has no line of names, or a line with more or fewer cells.
    """
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        names, rows = reader.fieldnames, list(reader)
    if not names:
        raise ValueError(f"{path} is empty")
    for number, row in enumerate(rows, 2):
        if None in row or None in row.values():
            raise ValueError(f"{path} is damaged: record {number} has other columns than the first")
    return [{name: _unquoted(value) for name, value in row.items()} for row in rows]


def read_json(
    path: str | os.PathLike, build: Callable[[Any], Result], what: str, remedy: str
) -> Result:
    """Returns ``build`` of the content of a JSON file.

    Args:
        path: the file.
        build: makes the result; what it raises (ValueError, TypeError, KeyError, IndexError,
            AttributeError or RuntimeError) says that the file is damaged.
        what: of which kind the file should be, for the errors: "a result of `wfnet evaluate`".
        remedy: what to do, for the errors: "run it again".

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if it is damaged or something else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; it should be {what}: {remedy}")
    try:
        return build(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged or not {what} ({error}); {remedy}") from error


def check_format(content: Mapping[str, Any], known: int) -> None:
    """Raises ValueError unless ``content["format"]`` is ``known``, the version that is read."""
    if content["format"] != known:
        raise ValueError(f"its format is {content['format']}, this version reads {known}")


def _quoted(value: Any) -> Any:
    if isinstance(value, str) and _FORMULA.match(value) and not _NUMBER.fullmatch(value):
        return "'" + value
    return value


def _unquoted(text: str) -> str:
    quoted = text.startswith("'") and _FORMULA.match(text[1:])
    return text[1:] if quoted and not _NUMBER.fullmatch(text[1:]) else text
