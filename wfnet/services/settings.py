"""Values that users set: their ranges, checked alike on the command line and in configurations.

A configuration is a dataclass whose fields are made by :func:`setting`. It calls
:func:`check_settings` in ``__post_init__``; the command line derives its options from the same
fields (``wfnet.cli.options.Group.add_fields``).
"""

import argparse
import dataclasses
import inspect
import math
import numbers
import re
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Number:
    """A range of numbers. Called with text, as argparse calls a ``type``, it returns the number.

    Attributes:
        least, most: the bounds, which belong to the range.
        whole: only integers.
        above, below: ``least``, or ``most``, does not belong to the range.
    """

    least: float
    most: float
    whole: bool = False
    above: bool = False
    below: bool = False

    def __call__(self, text: str) -> int | float:
        try:
            value = int(text) if self.whole else float(text)
        except ValueError:
            value = math.nan
        wrong = self.violation(value)
        if wrong:
            raise argparse.ArgumentTypeError(f"{text!r} is not {wrong}")
        return value

    def violation(self, value: Any) -> str | None:
        """Returns what ``value`` is not ("a number above 0"); None if it is in the range."""
        kind = "a whole number" if self.whole else "a number"
        too_low = f"{kind} {'above' if self.above else 'of at least'} {self.least:g}"
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or math.isnan(value):
            return too_low
        if self.whole and math.isfinite(value) and value != int(value):
            return too_low
        if value < self.least or (self.above and value == self.least):
            return too_low
        if value > self.most or (self.below and value == self.most):
            most = int(self.most) if self.most == int(self.most) else self.most
            return f"{kind} {'below' if self.below else 'of at most'} {most}"
        return None


# Upper bounds are far above what anybody needs: beyond them a value is a slip.
_LARGEST = 10**9
_COUNTS = 10**6


def int_from(least: int, most: int = _LARGEST) -> Number:
    """Returns the range of the integers from ``least`` to ``most``."""
    return Number(least, most, whole=True)


positive_int = int_from(1)
non_negative_int = int_from(0)
seed = int_from(0, 2**63 - 1)
batch_size = int_from(1, _COUNTS)
pair_batch_size = int_from(2, _COUNTS)
image_size = int_from(8, 2**14)
class_count = int_from(2, _COUNTS)
cpu_threads = int_from(1, 4096)
workers = int_from(0, 1024)
finite = Number(-1e30, 1e30)
filter_entry = Number(-1000.0, 1000.0)
positive_float = Number(0.0, 1e6, above=True)
non_negative_float = Number(0.0, 1e6)
fraction = Number(0.0, 1.0, above=True)
inner_fraction = Number(0.0, 1.0, above=True, below=True)
pixel_mean = Number(-1000.0, 1000.0)
pixel_std = Number(0.0, 1000.0, above=True)
below_one = Number(0.0, 1.0, below=True)


def setting(
    default: Any = dataclasses.MISSING,
    values: Number | tuple[Any, ...] | type[bool] | None = None,
    *,
    flags: str | None = None,
    metavar: str | None = None,
) -> Any:
    """Returns a dataclass field whose values are checked, and which may be an option.

    The option's help is what the docstring of the class says (:func:`attribute_texts`).

    Args:
        default: of the field. Where it is None, None is allowed beside ``values``.
        values: a range of numbers, the allowed values, or ``bool`` for a switch; None: anything.
        flags: how the command line calls it, separated by spaces (``"-b --batch-size"``); by
            default ``--`` and the field's name.
        metavar: as in argparse; by default a whole number is N and any other X.
    """
    if metavar is None and isinstance(values, Number):
        metavar = "N" if values.whole else "X"
    metadata = {"values": values, "flags": flags, "metavar": metavar}
    return dataclasses.field(default=default, metadata=metadata)


def attribute_texts(config: type) -> dict[str, str]:
    """Returns what the section "Attributes" of a class's docstring says of each, by name."""
    section = inspect.getdoc(config).partition("Attributes:\n")[2].partition("\n\n")[0]
    found = re.findall(r"^    (\w+): (.+(?:\n     .+)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}


def check_settings(config: Any) -> None:
    """Checks every field of a dataclass that was made by :func:`setting`.

    Raises:
        ValueError: for a value that is out of range, by its name.
    """
    for field in dataclasses.fields(config):
        values, value = field.metadata.get("values"), getattr(config, field.name)
        if values is not None and not (value is None and field.default is None):
            check_value(field.name, value, values)


def check_value(name: str, value: Any, values: Number | tuple[Any, ...] | type[bool]) -> None:
    """Raises ValueError for an argument that is out of range, by its name.

    Args:
        name: of the argument.
        value: its value.
        values: a range of numbers, the allowed values, or ``bool``.
    """
    if values is bool:
        values = (True, False)
    if isinstance(values, Number):
        wrong = values.violation(value)
        if wrong:
            raise ValueError(f"{name} must be {wrong}, got {value!r}")
    elif value not in values:
        listed = ", ".join(repr(allowed) for allowed in values)
        raise ValueError(f"{name}={value!r} is not one of {listed}")
