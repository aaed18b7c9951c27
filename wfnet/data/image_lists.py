"""Lists of images: which ones an evaluation looks at, drawn by seed and written down."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from wfnet.data.dataset import Dataset, classes_of, labels_of, name_of
from wfnet.data.splits import limit_per_class
from wfnet.services.files import write_json

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
        labels, classes = labels_of(dataset), classes_of(dataset)
        chosen = limit_per_class(labels, per_class, seed).tolist()
        images = [(classes[int(labels[i])], _name(dataset, i)) for i in chosen]
        return cls(part, per_class, seed, images)

    def positions(self, dataset: Dataset) -> Tensor:
        """Positions [n] of the images in `dataset`, in the order of the list.

        Raises ValueError if one of them is not there, or is of another class.
        """
        labels, classes = labels_of(dataset), classes_of(dataset)
        where = {_name(dataset, index): index for index in range(len(labels))}
        found = []
        for class_name, image in self.images:
            index = where.get(image)
            if index is None or classes[int(labels[index])] != class_name:
                what = "is not there" if index is None else f"is no image of class {class_name!r}"
                raise ValueError(
                    f"the list of {len(self.images)} images does not fit these data: {image!r} "
                    f"{what}; use the data that it was drawn from, or draw a new list"
                )
            found.append(index)
        return torch.tensor(found, dtype=torch.int64)

    def others(self, dataset: Dataset) -> Tensor:
        """Positions [m] of all images of `dataset` that are not on the list, sorted."""
        rest = torch.ones(len(labels_of(dataset)), dtype=torch.bool)
        rest[self.positions(dataset)] = False
        return rest.nonzero().flatten()

    def save(self, path: str | os.PathLike) -> None:
        """Writes the list as JSON, atomically."""
        write_json(path, {"format": FORMAT, **asdict(self)})

    @classmethod
    def load(cls, path: str | os.PathLike) -> "ImageList":
        """Reads what `save` wrote. Raises FileNotFoundError or ValueError if it is not that."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"the list of images {path} does not exist")
        try:
            content = json.loads(path.read_text())
            if content.pop("format") != FORMAT:
                raise ValueError("another format")
            images = [(str(name), str(image)) for name, image in content.pop("images")]
            return cls(**content, images=images)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} is damaged or no list of images ({error})") from error


def _name(dataset: Dataset, index: int) -> str:
    """As the log calls it, but without the folder that the data set happens to lie in."""
    name = name_of(dataset, index)
    root = getattr(dataset, "root", None)
    if root is not None and Path(name).is_relative_to(root):
        return Path(name).relative_to(root).as_posix()
    return name
