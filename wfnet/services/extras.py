"""Optional dependencies: imported where they are used, and named by their extra when missing."""

import importlib
from types import ModuleType


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
