"""One recipe per cell of the paper's tables: data set and backbone, by name.

A recipe is a JSON file ``<data>/<backbone>.json`` with the options of each command by name, as they
stand on the command line: ``wfnet untrain --config mnist/resnet18 --data-dir files``. The section
``shared`` holds for every command.
"""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from typing import Any


@cache
def names() -> tuple[str, ...]:
    """All recipes, sorted: ``cifar10/resnet18``, ..."""
    found = []
    for folder in resources.files(__name__).iterdir():
        if folder.is_dir():
            found += [
                f"{folder.name}/{file.name.removesuffix('.json')}"
                for file in folder.iterdir()
                if file.name.endswith(".json")
            ]
    return tuple(sorted(found))


def read(name: str, command: str) -> dict[str, Any]:
    """Options of ``command`` in the recipe ``name``.

    Raises:
        ValueError: for an unknown recipe.
    """
    if name not in names():
        raise ValueError(f"there is no recipe {name!r}; recipes are {', '.join(names())}")
    content = json.loads(resources.files(__name__).joinpath(f"{name}.json").read_text())
    return {**content["shared"], **content.get(command, {})}
