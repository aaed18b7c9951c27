"""What is installed beside this package: optional dependencies, and packages that extend it."""

import importlib
from collections import UserDict
from collections.abc import Callable, Collection, Sequence
from functools import cached_property
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any, TypeVar

from wfnet.services.log import logger

Item = TypeVar("Item")


def require(module: str, extra: str) -> ModuleType:
    """Import `module`, or say which extra of this package brings it.

    Raises ImportError when the package is not installed. An error inside an installed package is
    passed on as it is.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise ImportError(
            f"{package} is not installed: install it with `pip install wfnet[{extra}]`"
        ) from error


class Lazy(UserDict[str, Item]):
    """The dictionary that ``make`` returns, made when something is first asked of it."""

    def __init__(self, make: Callable[[], dict[str, Item]]):
        self._make = make

    @cached_property
    def data(self) -> dict[str, Item]:
        """What :class:`collections.UserDict` reads."""
        return self._make()


def registry(
    group: str, kind: type[Item], own: Sequence[Item], key: Callable[[Item], Any] | None = None
) -> Lazy[Item]:
    """Returns ``own`` and what other packages add as entry points of ``group``, by their ``name``.

    The latter are of type ``kind``; a class is called without arguments. One that cannot be loaded,
    or has a name that is taken, is left out, and the log says why. With a ``key`` all are sorted.
    Other packages import this one, so they are imported when something is first asked for.
    """

    def make() -> dict[str, Item]:
        found = {item.name: item for item in own}
        every = list((found | _extensions(group, kind, found)).values())
        return {item.name: item for item in (every if key is None else sorted(every, key=key))}

    return Lazy(make)


def _extensions(group: str, kind: type, taken: Collection[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for entry in entry_points(group=group):
        try:
            loaded = entry.load()
            loaded = loaded() if isinstance(loaded, type) else loaded
            if not isinstance(loaded, kind) or loaded.name in (*found, *taken):
                raise TypeError(f"it must be of type {kind.__name__}, with a name of its own")
            found[loaded.name] = loaded
        except Exception as error:  # of another package: nothing else may fail for it
            logger.warning(
                "the entry point %s (%s) of group %s is left out: %s; correct or uninstall it",
                entry.name,
                entry.value,
                group,
                error,
            )
    return found
