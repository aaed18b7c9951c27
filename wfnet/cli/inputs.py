"""What a command works on: classifier, images and filtered network, made from its options."""

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from wfnet import hugging_face
from wfnet.baselines import Forget
from wfnet.cli.chosen_classes import choose_classes, class_number, with_network_labels
from wfnet.cli.classifier import check_head, create_classifier, data_settings, is_small
from wfnet.cli.options import fuse_of
from wfnet.cli.runs import RUN_FILE, read_run
from wfnet.data import Splits, folder_classes, open_data
from wfnet.data.class_names import numbers_by_name
from wfnet.data.open import NAMES_WITH_FILES
from wfnet.data.open import count_classes as count_classes_by_name
from wfnet.data.transforms import chosen_preprocessing
from wfnet.network import WFNet
from wfnet.pretrained import read_config
from wfnet.services.files import readable
from wfnet.services.log import logger
from wfnet.services.ranks import Ranks, joined, local_device

# Below as many images, starting data workers takes longer than they save.
_FEW_IMAGES = 2000
_MAX_WORKERS = 4


class Run:
    """A folder with filters, and what its ``config.json`` says, if it has one.

    Attributes:
        folder: of the options; ``--resume`` names it too, as in timm.
        num_classes: of the filters.
        names: of the classes, if they are recorded.
        untrained: the classes that it has untrained; None for all.
        seed: by which its images were split, if it is recorded.

    Raises:
        FileNotFoundError, ValueError: if there are no filters.
    """

    def __init__(self, options: argparse.Namespace):
        self.options = options
        named = options.folder or getattr(options, "resume", None)
        if not named:
            raise ValueError(f"name the folder of a run: wfnet {options.command} RUN")
        self.folder = Path(named)
        if not self.folder.is_dir():
            raise FileNotFoundError(
                f"{self.folder} is not a folder: give that of a run, for example demo"
            )
        self.num_classes: int = read_config(self.folder)["num_classes"]
        record = read_run(self.folder) if (self.folder / RUN_FILE).is_file() else {}
        self.names: list[str] | None = record.get("classes")
        self.untrained: list[int] | None = (record.get("untraining") or {}).get("classes")
        self.seed: int | None = record.get("options", {}).get("seed")

    def check_data(self) -> None:
        """Raises ValueError if the data have another number of classes than the filters."""
        found = count_classes(self.options)
        if found != self.num_classes and self.untrained is None:
            raise ValueError(
                f"{data_name(self.options)} has {found} classes, the filters in {self.folder} "
                f"{self.num_classes}; use the data that they were made for"
            )

    def classifier(self, trained: bool = True, seed: int | None = None) -> nn.Module:
        """The classifier that the filters belong to, on the CPU; see :func:`make_classifier`.

        ``seed`` takes the place of the run's where it is not ``trained``.
        """
        if not self.options.model:
            raise ValueError(
                f"{self.folder} does not say which network its filters belong to: give --model "
                "NAME and --pretrained or --checkpoint FILE"
            )
        seeded = {} if seed is None else {"seed": seed}
        options = argparse.Namespace(**{**vars(self.options), **seeded})
        return make_classifier(options, self.num_classes, str(self.folder), trained)

    def network(self) -> tuple[WFNet, nn.Module]:
        """The filtered network on its device, and its classifier on the CPU.

        Raises:
            FileNotFoundError, ValueError: for missing, damaged or foreign files.
        """
        device = choose_device(self.options.device)
        classifier = self.classifier()
        net = WFNet.from_pretrained(self.folder, classifier, backend=self.options.backend)
        net.fuse, net.tune = fuse_of(self.options), self.options.tune
        net.to(device)
        if self.options.channels_last:
            net.to(memory_format=torch.channels_last)
        return net, classifier

    def measures_statistics(self, net: WFNet, forget: Sequence[int]) -> bool:
        """Whether a bake has the statistics of several durable rows measured on images.

        Images of some of the base's classes have other moments than those it was trained on.
        """
        return net.gate == "durable" and self.untrained is None and len(forget) > 1

    def images(self, classifier: nn.Module) -> Splits:
        """The images, split as in the run, with the labels that their classes have in it by name.

        Another ``--seed`` would put images that the network was trained on into the test part.
        """
        data = open_images(self.options, classifier, seed=self.seed)
        if self.untrained is None:
            return with_known_names(data, self.options, self.folder)
        count = len(self.names)
        numbers, _ = choose_classes([], data.classes, count, self.names)
        return with_network_labels(data, numbers, count, self.names)

    def class_numbers(
        self, chosen: Sequence[str] | None, names: Sequence[str] | None
    ) -> list[int] | None:
        """The classes of an option, by number or name; without it those that were untrained."""
        if not chosen:
            return self.untrained
        return class_indices(chosen, names, self.num_classes)

    def class_groups(
        self, chosen: Sequence[str] | None, names: Sequence[str] | None
    ) -> list[Forget] | None:
        """:meth:`class_numbers` where ``3+8`` are classes that are forgotten together."""
        found: list[Forget] = []
        for entry in chosen or ():
            whole = class_number(readable(entry), names, self.num_classes) is not None
            together = [entry] if whole else entry.split("+")
            numbers = sorted(class_indices(together, names, self.num_classes))
            found.append(tuple(numbers) if len(numbers) > 1 else numbers[0])
        return list(dict.fromkeys(found)) if found else self.untrained


def data_name(options: argparse.Namespace) -> str:
    """The data set by name, or the image folder.

    Raises:
        ValueError: if there is neither.
    """
    if not options.data and not options.data_dir:
        raise ValueError(
            "there are no images: give --data-dir DIR (a folder with train/<class>/ and "
            "val/<class>/), or a data set by name, --data digits"
        )
    return options.data or options.data_dir


def count_classes(options: argparse.Namespace) -> int:
    """Classes of the data, without reading an image: files that are missing are noticed now.

    Raises:
        FileNotFoundError, ValueError: if the data are not there.
    """
    name = data_name(options)
    if options.data is None:
        root = Path(name)
        if not root.is_dir():
            raise FileNotFoundError(f"the image folder {root} does not exist")
        return len(folder_classes(root))
    return count_classes_by_name(name, options.data_dir)


def make_classifier(
    options: argparse.Namespace, num_classes: int | None, origin: str, trained: bool = True
) -> nn.Module:
    """The classifier of ``--model`` for the ``num_classes`` classes of ``origin``, a data set or a
    folder with filters; with new weights if not ``trained``. None: those that it has.

    Raises:
        ValueError: if its head has another number of classes; see :func:`create_classifier`.
    """
    if not options.model:
        raise ValueError("there is no network: give --model NAME, for example --model resnet50")
    in_channels = options.in_chans
    if is_small(options.model) and in_channels is None:
        in_channels = 3 if options.data is None else NAMES_WITH_FILES.get(options.data, 1)
    pretrained = is_pretrained(options) and trained
    model = create_classifier(
        options.model,
        options.num_classes or (None if pretrained else num_classes),
        pretrained=pretrained,
        checkpoint=options.checkpoint if trained else None,
        in_channels=in_channels,
        image_size=options.img_size,
        seed=options.seed,
        options=dict(options.model_kwargs or ()),
    )
    if num_classes is not None:
        check_head(model, options.model, num_classes, origin)
    if trained and not pretrained and not options.checkpoint:
        logger.warning(
            "%s has random weights: nothing it knows can be forgotten; give --pretrained or "
            "--checkpoint FILE",
            options.model,
        )
    return model


def is_pretrained(options: argparse.Namespace) -> bool:
    """Whether the network comes with weights: those of transformers need no ``--pretrained``."""
    own = (options.model or "").startswith(hugging_face.PREFIX) and not options.checkpoint
    return options.pretrained or own


def open_images(
    options: argparse.Namespace, model: nn.Module, augment: bool = False, seed: int | None = None
) -> Splits:
    """Training, validation and test images as the classifier expects them.

    ``seed`` splits them in place of the options'.

    Sets ``options.workers`` where it was left open: starting them takes longer than reading few
    images does.

    Raises:
        FileNotFoundError, ValueError: for data that are missing or damaged.
    """
    settings = data_settings(model, options.model)
    chosen = chosen_preprocessing(vars(options))
    if chosen:
        settings.pop("transform", None)  # it was made for the settings that are replaced
    by_name = options.data is not None
    data = open_data(
        options.data if by_name else options.data_dir,
        options.data_dir if by_name else None,
        **{**settings, **chosen},
        augment=augment,
        validation_fraction=options.val_split,
        train_per_class=options.train_per_class,
        validation_per_class=options.val_per_class,
        class_names=options.class_names,
        seed=options.seed if seed is None else seed,
        cache=options.cache,
        cache_dir=options.cache_dir,
        device=choose_device(options.device),
    )
    if options.workers is None:
        few = sum(map(len, (data.train, data.validation, data.test))) < _FEW_IMAGES
        options.workers = 0 if few else min(_MAX_WORKERS, os.cpu_count() or 1)
    return data


def with_known_names(data: Splits, options: argparse.Namespace, folder: Path | None) -> Splits:
    """Returns data with the labels that their classes have, by their names, in the run in
    ``folder`` and in the one that made the weights, as far as these are recorded; without a run, in
    the network of transformers.

    Raises:
        ValueError: for data of other classes.
    """
    run = recorded_names(folder) if folder else None
    of_weights = names_of_weights(options)
    if of_weights is not None and not options.checkpoint:
        if run is None:
            return _named_by_network(data, of_weights, options.model)
        of_weights = None  # the run has settled it
    for names, origin in (
        (run, f"the run in {folder}"),
        (of_weights, "the classifier of --checkpoint"),
    ):
        numbered = names == [str(label) for label in range(len(names or ()))]
        # Classes that were numbered may be named now for the first time.
        if names and not (numbered and options.class_names):
            numbers = numbers_by_name(data.classes, names, data.name, origin)
            data = data.renumbered(numbers, names)
    return data


def _named_by_network(data: Splits, names: list[str], model: str) -> Splits:
    """Returns data with the labels of a network that names its classes.

    Other names altogether (synsets, say) are taken in order, with a warning; numbers get names.
    """
    if len(names) != len(data.classes) or set(names) & set(data.classes):
        numbers = numbers_by_name(data.classes, names, data.name, f"the network {model}")
        return data.renumbered(numbers, names)
    if data.classes == [str(label) for label in range(len(names))]:
        return data.renumbered(torch.arange(len(names)), names)
    logger.warning(
        "%s calls its classes %r, ..., the network %r, ...: they are taken in this order",
        data.name,
        data.classes[0],
        names[0],
    )
    return data


def names_of_weights(options: argparse.Namespace) -> list[str] | None:
    """Class names, in the order of the outputs, of the ``wfnet train`` that made ``--checkpoint``,
    or of a network of transformers; None if they are not recorded."""
    if options.checkpoint:
        return recorded_names(Path(options.checkpoint).parent, "train")
    if is_pretrained(options) and options.model.startswith(hugging_face.PREFIX):
        return hugging_face.class_names(options.model.removeprefix(hugging_face.PREFIX))
    return None


def check_split(options: argparse.Namespace) -> None:
    """Warns if ``--checkpoint`` was trained on images that ``--seed`` puts into other parts."""
    path = Path(options.checkpoint or "").parent
    run = read_run(path) if options.checkpoint and (path / RUN_FILE).is_file() else {}
    seed = run.get("options", {}).get("seed", options.seed)
    if run.get("command") == "train" and seed != options.seed:
        logger.warning(
            "the weights were trained on the split of seed %d: with --seed %d some of these images "
            "are judged on; give --seed %d",
            seed,
            options.seed,
            seed,
        )


def recorded_names(folder: Path, command: str | None = None) -> list[str] | None:
    """Class names of the run in a folder; None without one, or of another command."""
    run = read_run(folder) if (folder / RUN_FILE).is_file() else {}
    return run.get("classes") if command in (None, run.get("command")) else None


def choose_device(name: str) -> torch.device:
    """``auto`` is the first CUDA device, or the CPU.

    Raises:
        ValueError: for a device that PyTorch does not know or has not.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"--device {name} cannot be used ({reason}); try auto or cpu") from error
    return device


@contextlib.contextmanager
def joined_ranks(options: argparse.Namespace) -> Iterator[Ranks]:
    """The processes that share a command; only the first one prints."""
    with joined(local_device(choose_device(options.device))) as ranks:
        shown = sys.stdout if ranks.first else io.StringIO()
        with contextlib.redirect_stdout(shown):
            yield ranks


def class_indices(labels: Sequence[str], names: Sequence[str] | None, count: int) -> list[int]:
    """Class numbers from numbers or names, each once.

    Raises:
        ValueError: for one that does not exist.
    """
    found = {label: class_number(readable(label), names, count) for label in labels}
    for label, number in found.items():
        if number is None:
            known = ", ".join((names or ())[:5]) + (", ..." if len(names or ()) > 5 else "")
            raise ValueError(
                f"there is no class {label!r}: classes are numbered 0 to {count - 1}"
                f"{f', or called by their names ({known})' if known else ''}"
            )
    return list(dict.fromkeys(found.values()))
