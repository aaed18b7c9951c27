"""What is installed beside this package: optional dependencies, and packages that extend it."""

import importlib
import logging
from collections.abc import Collection
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any

logger = logging.getLogger("wfnet")


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


def extensions(group: str, kind: type, taken: Collection[str]) -> dict[str, Any]:
    """Returns the objects that other packages add as entry points of `group`, by their `name`.

    They are of type `kind`; a class is called without arguments. One that cannot be loaded, or has
    a name of `taken`, is left out, and the log says why.
    """
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
