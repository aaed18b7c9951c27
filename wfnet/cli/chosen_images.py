"""Which images a command evaluates or untrains on, where that is not a whole part of the data."""

import argparse
from dataclasses import replace
from pathlib import Path

from wfnet.cli.options import Group
from wfnet.data import Dataset, Splits, select, split_dataset
from wfnet.data.image_lists import ImageList
from wfnet.services import settings
from wfnet.services.log import logger

LIST_NAME = "evaluation_images.json"
PER_CLASS = 5  # the paper's number for ImageNet


def add_list_options(group: Group) -> None:
    """Options of all commands that evaluate."""
    group.add_all(
        f"""
        --eval-per-class N  evaluate on N images of each class, drawn with --eval-seed and saved as
            a list in the output folder ({LIST_NAME}), which later commands there take up (default:
            all images)
        --eval-seed N  of the drawn images [default: 0]
        """,
        eval_seed=settings.seed,
    )


def evaluated_images(
    options: argparse.Namespace, data: Splits, folder: Path, output: Path
) -> Dataset:
    """The images that a command evaluates on: of ``--split``, or those of a list.

    ``--eval-list FILE`` names the list; else it is the one in ``output``, or in the folder of the
    run, if there is one, and the log says so. ``--eval-per-class`` draws a list and saves it in
    ``output``: with an ``--output`` elsewhere the run is left as it was.

    Raises:
        FileNotFoundError, ValueError: for a list that is missing, damaged or of other data.
    """
    part = getattr(data, options.split)
    drawn = options.eval_per_class
    if options.eval_list:
        path = Path(options.eval_list)
    else:
        lists = (output / LIST_NAME, folder / LIST_NAME)
        path = next((path for path in lists if path.is_file()), None)
    if path is None:
        if drawn is None:
            return part
        images = ImageList.draw(part, drawn, options.eval_seed, options.split)
        images.save(output / LIST_NAME)
        return select(part, images.positions(part))
    images = ImageList.load(path)
    if drawn is not None and (drawn, options.eval_seed) != (images.per_class, images.seed):
        raise ValueError(
            f"{path} has {images.per_class} images per class drawn with seed {images.seed}, not "
            f"{drawn} with seed {options.eval_seed}; leave out --eval-per-class and --eval-seed to "
            "take it up, or delete it"
        )
    if images.part != options.split:
        raise ValueError(
            f"{path} lists images of the {images.part} part: give --split {images.part}, or "
            "another --eval-list"
        )
    logger.info("only the %d images of %s", len(images.images), path)
    return select(part, images.positions(part))


def untraining_images(options: argparse.Namespace, data: Splits, folder: Path) -> Splits:
    """With ``--untrain-split val``: training and validation images from the test part.

    The images to be evaluated are drawn and saved as a list in ``folder`` (taken up if it is
    there); the others are split by ``--val-split`` into images that are untrained on and images
    that settings are judged on. The training set is not used.
    """
    if options.untrain_split != "val":
        if not len(data.train):
            raise ValueError(
                f"{data.name} has no training images: add train/, or give --untrain-split val to "
                "untrain on validation images that are not evaluated"
            )
        return data
    path = folder / LIST_NAME
    if path.is_file():
        images = ImageList.load(path)
    else:
        count = PER_CLASS if options.eval_per_class is None else options.eval_per_class
        images = ImageList.draw(data.test, count, options.eval_seed, "test")
        if not options.dry_run:
            images.save(path)
    rest = select(data.test, images.others(data.test))
    if len(rest.labels.unique()) < len(data.classes):
        raise ValueError(
            f"with {images.per_class} images per class for evaluation, some class has none left to "
            "untrain on; lower --eval-per-class"
        )
    train, validation = split_dataset(rest, options.val_split, options.seed)
    return replace(data, train=train, validation=validation)
