"""One recipe per cell of the paper's tables: data set and backbone, by name.

A recipe is a JSON file ``<data>/<backbone>.json`` with the options of each command by name, as they
stand on the command line: ``wfnet untrain --config mnist/resnet18 --data-dir files``. The section
``shared`` holds for every command.
"""

import json
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).parent


def names() -> tuple[str, ...]:
    """All recipes, sorted: ``cifar10/resnet18``, ..."""
    return tuple(sorted(f"{path.parent.name}/{path.stem}" for path in _FOLDER.glob("*/*.json")))


def read(name: str, command: str) -> dict[str, Any]:
    """Options of ``command`` in the recipe ``name``.

    Raises:
        ValueError: for an unknown recipe.
    """
    if name not in names():
        raise ValueError(f"there is no recipe {name!r}; recipes are {', '.join(names())}")
    content = json.loads((_FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return {**content["shared"], **content.get(command, {})}
