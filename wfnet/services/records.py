"""Records in files: rows of named values as CSV, whole results as JSON, read back with checks.

A CSV file is opened in spreadsheets, which run a cell that looks like a formula: such texts get an
apostrophe in front, which spreadsheets hide.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from wfnet.services.files import FilePath, write_text

Result = TypeVar("Result")

# What spreadsheets take for the start of a formula, also in full width and behind blanks.
_FORMULA = re.compile(r"'*\s*[=+\-@\t\n＝＋－＠]")  # noqa: RUF001
_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?([eE][+-]?\d+)?")


def write_csv(path: FilePath, rows: Iterable[Any], columns: Sequence[str]) -> None:
    """Writes one line per row below a line of names, atomically.

    Args:
        path: the file.
        rows: mappings or dataclass objects; a value that is missing or None is an empty cell.
        columns: names in their order.

    Raises:
        ValueError: for a row with a name that is not among ``columns``.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        values = asdict(row) if is_dataclass(row) else row
        writer.writerow({name: _quoted(value) for name, value in values.items()})
    write_text(path, text.getvalue())


def _quoted(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    value = value.replace("\r", " ")  # it would end a line for some readers
    formula = _FORMULA.match(value) and not _NUMBER.fullmatch(value)
    return f"'{value}" if formula else value


def read_json(path: FilePath, build: Callable[[Any], Result], what: str, remedy: str) -> Result:
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
