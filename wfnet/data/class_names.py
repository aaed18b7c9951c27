"""Classes are known by their names: labels of other data are brought into the order known."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

_SHOWN = 3


def numbers_by_name(found: Sequence[str], known: Sequence[str], what: str, origin: str) -> Tensor:
    """Returns the number of each class of ``found`` among ``known``, ``[K]`` int64.

    Raises ValueError if they are not the same names, each once; it says ``what`` the found ones are
    those of, and the ``origin`` of those known.
    """
    if list(found) == list(known):  # a name that occurs twice is no reason to refuse the same list
        return torch.arange(len(known))
    number = {name: index for index, name in enumerate(known)}
    if len(number) == len(known) and sorted(found) == sorted(known):
        return torch.tensor([number[name] for name in found], dtype=torch.int64)
    unknown = ", ".join([repr(name) for name in found if name not in number][:_SHOWN]) or "none"
    missing = ", ".join([repr(name) for name in known if name not in found][:_SHOWN]) or "none"
    raise ValueError(
        f"{what} has other classes than {origin}: {len(found)} for {len(known)}, of which unknown "
        f"{unknown}, missing {missing}. Use the data that it was made for, or give its classes the "
        "same names (--class-names, where they are only numbered)"
    )


def read_names(path: Path) -> list[str]:
    """Returns the class names of a text file, one a line; blank lines at its end are none.

    Raises ValueError for a text that is not UTF-8, and for a name that comes twice.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip().split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason}): save it as UTF-8") from error
    names = [line.strip() for line in lines]
    check_names(names, str(path))
    return names


def check_names(names: Sequence[str], where: str) -> None:
    """Raises ValueError if a name comes twice."""
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{where} names the class {twice!r} twice")
