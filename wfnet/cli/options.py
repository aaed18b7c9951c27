"""Options that several commands share, and how a command declares its own.

Names are those of timm's train.py and validate.py where timm has the option.
"""

import argparse
import ast
import dataclasses
import inspect
import math
import re
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NoReturn

from wfnet import backends
from wfnet.data.open import NAMES as DATA_NAMES
from wfnet.data.row_store import PLACES
from wfnet.data.transforms import INTERPOLATIONS
from wfnet.services import settings
from wfnet.version import __version__


class Parser(argparse.ArgumentParser):
    """A command's options. A wrong command line raises ValueError, as every other error is told."""

    def error(self, message: str) -> NoReturn:
        if message.endswith("expected at least one argument"):
            message += "; a value that begins with - goes behind =, --forget=-x"
        raise ValueError(f"{message} (see `{self.prog} --help`)")

    def group(self, title: str, description: str | None = None) -> "Group":
        """Adds a titled group of options."""
        return Group(self.add_argument_group(title, description))

    def add_inputs(self, workers: int | None = None) -> None:
        """Adds what describes images, classifier and computing.

        Args:
            workers: default of ``--workers``; None: chosen by the number of images.
        """
        self.group("data").add_all(
            """
            --data-dir DIR  image folder with train/<class>/*.jpg and val/<class>/*.jpg, or with
                WebDataset shards (train/*.tar, val/*.tar); with --data mnist, cifar10, cifar100 or
                svhn the folder of their files
            --data  a data set by name
            --img-size PIXELS  image size; known from the model
            --mean X...  normalisation; known from the model
            --std X...  of the normalisation
            --interpolation  of resized images
            --crop-pct X  part kept by the centre crop
            --val-split X  part of the training images on which settings are judged (a folder with
                test/ has its own: val/) [default: 0.1]
            --class-names NAME...  names of classes that are only numbered, in that order (files in
                MNIST's format)
            --train-per-class N  at most so many training images of each class, drawn by the seed
            --val-per-class N  at most so many validation images of each class, drawn by the seed
            """,
            data=tuple(DATA_NAMES),
            img_size=settings.image_size,
            mean=settings.pixel_mean,
            std=settings.pixel_std,
            interpolation=tuple(INTERPOLATIONS),
            crop_pct=settings.fraction,
            val_split=settings.inner_fraction,
        )
        group = self.group("classifier")
        group.add_all(
            """
            --model NAME  a name of timm (resnet50), of torchvision (torchvision/resnet50), one of
                the small networks small/resnet, small/vgg, small/vit, or hf: and a folder or a
                repository in the local cache of transformers (hf:google/vit-base-patch16-224)
            --pretrained  weights of timm or torchvision (may download); those of hf: come with it
            --checkpoint FILE  weights of your own: safetensors, or .pth with tensors only (nothing
                is unpickled)
            --num-classes N  classes of the classifier; known from the data and from pretrained
                weights
            --in-chans  image channels; known from the model, and from the data for small networks
            """,
            num_classes=settings.class_count,
            in_chans=(1, 3),
        )
        group.add_model_kwargs()
        default = "none below 2,000 images, else one a core, at most 4"
        group = self.group("computing")
        group.add_device()
        group.add_all(
            f"""
            --fuse  fold BatchNorm, residual and ReLU into the convolutions [default: yes]
            --torchcompile  fuse, and let torch.compile fuse what lies between the convolutions
            --backend  who computes masked layers; auto: PyTorch on a CPU, and on a CUDA device who
                is fastest there at each layer of a fused network [default: auto]
            --tune SECONDS  time in which auto measures that, for each size of a batch; 0: auto is
                PyTorch [default: 20]
            -j --workers N  processes that decode images
                (default: {default if workers is None else workers})
            --cache  keep decoded images, so that none is decoded twice: on the device, on the host
                or on disk (there later runs find them again)
            --cache-dir DIR  folder of --cache disk, and of --features disk
                (default: ~/.cache/wfnet)
            --decoder  who decodes image files [default: pil]
            """,
            fuse=bool,
            backend=tuple(backends.NAMES),
            tune=settings.non_negative_float,
            workers=settings.workers,
            cache=tuple(PLACES),
            decoder=("pil",),
        )


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of texts, shows defaults that say something."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32, width=100)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default is None or action.default is False or action.nargs == 0
        text = action.help
        if text is None or silent or "default" in text or not action.option_strings:
            return text
        return f"{text} (default: %(default)s)"


class Group:
    """A titled group of options in a command's help."""

    def __init__(self, group: argparse._ArgumentGroup):
        self.group = group

    def add(
        self,
        flags: str,
        help: str,
        values: Callable[[str], Any] | tuple[Any, ...] | type[bool] | None = None,
        default: Any = None,
        **more: Any,
    ) -> None:
        """Adds an option.

        Args:
            flags: how it is called, and what its help shows for the value: ``"-b --batch-size N"``.
                Without the latter and without ``values`` it is a switch that is off.
            help: what it does.
            values: a range or another conversion of text, the allowed values, or ``bool`` for a
                switch with a ``--no-`` form. None: text.
            default: its value where it is not given.
            more: further arguments of argparse.
        """
        names = [word for word in flags.split() if word.startswith("-")]
        metavar = flags.split()[len(names) :]
        if values is bool:
            more |= {"action": argparse.BooleanOptionalAction, "default": default}
        elif values is None and not metavar:
            more |= {"action": "store_true"}
        else:
            more |= {"default": default, "metavar": metavar[0] if metavar else None}
            if isinstance(values, tuple):
                more |= {"choices": values, "type": int if isinstance(values[0], int) else None}
            else:
                more |= {"type": values}
        self.group.add_argument(*names, help=help, **more)

    def add_all(self, text: str, **values: Any) -> None:
        """Adds the options that a text describes as their help does.

        Args:
            text: for each option its flags and the name of its value (``N...`` for several,
                ``[N...]`` for any number of them), two spaces, and its help, which may name a
                ``[default: 3]``. Further lines of it are indented.
            values: as in :meth:`add`, by the names of the parsed options. A value called N is a
                whole number above 0 where nothing else is given.
        """
        for entry in re.split(r"\n(?=-)", inspect.cleandoc(text)):
            flags, help = re.split(r"\s{2,}", entry, maxsplit=1)
            help = " ".join(help.split())
            name = next(word for word in flags.split() if word.startswith("--"))
            kind = values.get(name.lstrip("-").replace("-", "_"))
            more = {}
            if flags.endswith(("...", "...]")):
                more["nargs"] = "*" if flags.endswith("]") else "+"
                flags = re.sub(r"[\[\].]", "", flags)
            if kind is None and flags.endswith(" N"):
                kind = settings.positive_int
            found = re.search(r"\[default: (.*?)\]", help)
            if found is not None:
                convert = kind if callable(kind) else str
                words = [convert(word) for word in found[1].split()]
                more["default"] = words if "nargs" in more else words[0]
                if kind is bool:
                    more["default"] = found[1] == "yes"
            self.add(flags, re.sub(r"\[(default: .*?)\]", r"(\1)", help), kind, **more)

    def add_fields(self, config: type, *names: str, prefix: str = "", defaults: Any = None) -> None:
        """Adds an option for each of some fields of a configuration.

        Args:
            config: a dataclass with fields made by :func:`wfnet.services.settings.setting`.
            names: the fields, in the order of the help.
            prefix: before the name of each option, which then has no short form: ``"relearn-"``.
            defaults: a configuration with the defaults. None: an option that is not given is None,
                as where a recipe decides.
        """
        texts = settings.attribute_texts(config)
        for field in _fields(config, names):
            flags = " ".join([*_flags(field, prefix), field.metadata["metavar"] or ""])
            default = getattr(defaults, field.name, None)
            self.add(flags, texts[field.name], field.metadata["values"], default)

    def add_seed(self, what: str = "of everything random") -> None:
        self.add("--seed N", what, settings.seed, 0)

    def add_threads(self) -> None:
        text = "CPU threads (default: OMP_NUM_THREADS, or what measures fastest at the start)"
        self.add("--threads N", text, settings.cpu_threads)

    def add_device(self) -> None:
        self.add_all(
            """
            --device NAME  auto, cpu, cuda or cuda:1 [default: auto]
            --amp  compute in bfloat16 where it is safe
            --channels-last  memory layout in which convolutions are faster [default: yes]
            """,
            channels_last=bool,
        )
        self.add_threads()

    def add_model_kwargs(self) -> None:
        text = "arguments of the model's constructor, for example width=16"
        self.add("--model-kwargs KEY=VALUE", text, key_value, nargs="*")

    def add_config(self) -> None:
        text = "options from a YAML or JSON file, a run's config.json, or a recipe by name"
        self.add("--config FILE", text)


def config_changes(
    options: argparse.Namespace, config: type, *names: str, prefix: str = ""
) -> dict[str, Any]:
    """Returns the fields of a configuration that the command line gives; see
    :meth:`Group.add_fields`."""
    values = {
        field.name: getattr(options, _flags(field, prefix)[-1].lstrip("-").replace("-", "_"))
        for field in _fields(config, names)
    }
    return {name: value for name, value in values.items() if value is not None}


def _fields(config: type, names: Sequence[str]) -> list[dataclasses.Field]:
    fields = {field.name: field for field in dataclasses.fields(config)}
    return [fields[name] for name in names]


def _flags(field: dataclasses.Field, prefix: str) -> list[str]:
    flags = (field.metadata["flags"] or f"--{field.name.replace('_', '-')}").split()
    return [f"--{prefix}{flags[-1].lstrip('-')}"] if prefix else flags


# -- commands -------------------------------------------------------------------------------------


def make_parser(commands: Sequence[ModuleType]) -> Parser:
    """Returns the parser of some commands, each a module with ``add_parser(commands)``."""
    parser = Parser(
        prog="wfnet",
        description="One checkpoint that can forget any class on demand: learn filters for all "
        "classes\nof a frozen classifier in one round, choose the class to forget at run time.",
        epilog="start here:  wfnet demo            (about a minute, no download)\n"
        "then:        wfnet COMMAND --help  (every command has an example)",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"wfnet {__version__}")
    added = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in commands:
        group = module.add_parser(added).group("messages")
        group.add("--quiet", "only warnings and results")
        group.add("--debug", "show the traceback of an error")
    return parser


def add_command(
    commands: argparse._SubParsersAction,
    run: Callable[[argparse.Namespace], None],
    saved: str | Callable[[argparse.Namespace], str],
    arguments: str,
    resume: bool = False,
) -> Parser:
    """Adds the command of a module, which has the module's name and is explained by its docstring.

    Args:
        commands: to which it is added.
        run: does its work.
        saved: what is on disk after Ctrl-C.
        arguments: what follows its name in its usage; if that is RUN first, an argument for it is
            added.
        resume: RUN may be named by ``--resume`` too, as in timm.
    """
    name = run.__module__.rpartition(".")[2]
    text, example, examples = sys.modules[run.__module__].__doc__.partition("example:\n")
    help, description = text.strip().split("\n\n")
    parser = commands.add_parser(
        name,
        help=help,
        description=description,
        usage=f"wfnet {name} {arguments}",
        epilog=example + examples,
        formatter_class=HelpFormatter,
    )
    parser.set_defaults(run=run, saved=saved)
    if arguments.startswith("RUN"):
        nargs = "?" if resume else None
        parser.add_argument("folder", nargs=nargs, metavar="RUN", help="folder of a run")
    if resume:
        parser.add_argument("--resume", metavar="RUN", help="the same, as in timm")
    return parser


def fuse_of(options: argparse.Namespace) -> bool | str:
    """What :class:`wfnet.WFNet` takes as ``fuse``.

    Raises:
        ValueError: for ``--no-fuse --torchcompile``.
    """
    if options.torchcompile and not options.fuse:
        raise ValueError(
            "--torchcompile compiles the fused network, which --no-fuse switches off; leave one "
            "of them out"
        )
    return "compile" if options.torchcompile else options.fuse


# -- conversions ----------------------------------------------------------------------------------


def log_base(text: str) -> float:
    """Base of a logarithm: a number above 1, or e."""
    try:
        value = math.e if text == "e" else float(text)
    except ValueError:
        value = math.nan
    if not 1 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not e or a number above 1")
    return value


def key_value(text: str) -> tuple[str, Any]:
    """``width=16`` -> ("width", 16); values are Python literals, else text."""
    key, equals, value = text.partition("=")
    if not key.replace(".", "").isidentifier() or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form key=value")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value
