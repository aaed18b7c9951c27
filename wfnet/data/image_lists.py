"""Lists of images: which ones an evaluation looks at, drawn by seed and written down."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wfnet.data.dataset import Dataset, classes_of, labels_of, name_of
from wfnet.data.splits import limit_per_class
from wfnet.services.files import FilePath, write_json
from wfnet.services.records import check_format, read_json

FORMAT = 1


@dataclass(frozen=True)
class ImageList:
    """Some images of one part of a data set, by name.

    part:      the part of the data they belong to: "test", "validation" or "train".
    per_class: how many were drawn of each class, at most.
    seed:      of the draw.
    images:    class name and image name of each: the file relative to its folder where there is
               one, else the position in the data set.
    """

    part: str
    per_class: int
    seed: int
    images: list[tuple[str, str]]

    @classmethod
    def draw(cls, dataset: Dataset, per_class: int, seed: int, part: str) -> "ImageList":
        """At most `per_class` images of each class, drawn by `seed`."""
        chosen = limit_per_class(labels_of(dataset), per_class, seed).tolist()
        names = _names(dataset)
        return cls(part, per_class, seed, [names[index] for index in chosen])

    def positions(self, dataset: Dataset) -> Tensor:
        """Positions [n] of the images in `dataset`, in the order of the list.

        Raises ValueError if one of them is not there, or is of another class.
        """
        where = {names: index for index, names in enumerate(_names(dataset))}
        missing = next((image for image in self.images if image not in where), None)
        if missing is not None:
            raise ValueError(
                f"the list of {len(self.images)} images does not fit these data: they have no "
                f"{missing[1]!r} of class {missing[0]!r}; use the data that it was drawn from, or "
                "draw a new list"
            )
        return torch.tensor([where[image] for image in self.images], dtype=torch.int64)

    def others(self, dataset: Dataset) -> Tensor:
        """Positions [m] of all images of `dataset` that are not on the list, sorted."""
        rest = torch.ones(len(labels_of(dataset)), dtype=torch.bool)
        rest[self.positions(dataset)] = False
        return rest.nonzero().flatten()

    def save(self, path: FilePath) -> None:
        """Writes the list as JSON, atomically."""
        write_json(path, {"format": FORMAT, **asdict(self)})

    @classmethod
    def load(cls, path: FilePath) -> "ImageList":
        """Reads what `save` wrote. Raises FileNotFoundError or ValueError if it is not that."""

        def build(content: dict[str, Any]) -> ImageList:
            check_format(content, FORMAT)
            images = [(str(name), str(image)) for name, image in content["images"]]
            return cls(content["part"], content["per_class"], content["seed"], images)

        return read_json(path, build, "a list of images", "use another, or draw a new one")


def _names(dataset: Dataset) -> list[tuple[str, str]]:
    """Class and name of every image: as the log calls it, but without the folder of the data."""
    classes, root = classes_of(dataset), getattr(dataset, "root", None)
    found = []
    for index, label in enumerate(labels_of(dataset).tolist()):
        name = name_of(dataset, index)
        if root is not None and Path(name).is_relative_to(root):
            name = Path(name).relative_to(root).as_posix()
        found.append((classes[label], name))
    return found
