"""Options that several commands share, and options that come from files.

Names are those of timm's train.py and validate.py where timm has the option.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import importlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wfnet import backends, recipes
from wfnet.cli.runs import RUN_FILE, read_run
from wfnet.data.cache import PLACES
from wfnet.data.open import NAMES as DATA_NAMES
from wfnet.data.transforms import INTERPOLATIONS
from wfnet.services import settings

# Of each set, an option on the command line takes the place of the others' recorded values.
_ALTERNATIVES = (
    {"steps", "epochs"},
    {"data", "data_dir"},
    {"pretrained", "checkpoint"},
)
# Named data sets whose files lie in --data-dir.
DATA_WITH_FILES = ("mnist", "cifar10")
# Say what the command does this time; never taken from a file.
_CALLS = {"command", "run", "saved", "config", "resume", "folder", "force", "dry_run", "help"}
_OF_THIS_CALL = _CALLS | {"debug", "quiet"}
# What evaluate and bake take over from the run that they work on.
DESCRIPTION = frozenset(
    ("model", "pretrained", "checkpoint", "num_classes", "model_kwargs", "in_chans", "img_size")
    + ("data", "data_dir", "mean", "std", "interpolation", "crop_pct", "val_split", "seed")
    + ("class_names", "train_per_class", "val_per_class")
)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of examples, fills descriptions, shows defaults that say something."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32, width=100)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if "\n" in text:
            return super()._fill_text(text, width, indent)
        return argparse.HelpFormatter._fill_text(self, text, width, indent)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default is None or action.default is False or action.nargs == 0
        text = action.help
        if text is None or silent or "default" in text or not action.option_strings:
            return text
        return f"{text} (default: %(default)s)"


# -- groups ---------------------------------------------------------------------------------------


def add_help_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("messages")
    group.add_argument("--quiet", action="store_true", help="only warnings and results")
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The classifier, before any filters."""
    group = parser.add_argument_group("classifier")
    group.add_argument(
        "--model",
        metavar="NAME",
        help="a name of timm (resnet50), of torchvision (torchvision/resnet50), or one of the "
        "small networks small/resnet, small/vgg, small/vit",
    )
    group.add_argument(
        "--pretrained", action="store_true", help="weights of timm or torchvision (may download)"
    )
    group.add_argument(
        "--checkpoint",
        metavar="FILE",
        help="weights of your own: safetensors, or .pth with tensors only (nothing is unpickled)",
    )
    group.add_argument(
        "--num-classes",
        type=settings.class_count,
        metavar="N",
        help="classes of the classifier; known from the data and from pretrained weights",
    )
    group.add_argument(
        "--in-chans",
        type=int,
        choices=(1, 3),
        help="image channels; known from the model, and from the data for small networks",
    )
    group.add_argument(
        "--model-kwargs",
        nargs="*",
        type=key_value,
        metavar="KEY=VALUE",
        help="arguments of the model's constructor, for example width=16",
    )


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Images, and how they become the network's input."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data-dir",
        metavar="DIR",
        help="image folder with train/<class>/*.jpg and val/<class>/*.jpg, or with WebDataset "
        "shards (train/*.tar, val/*.tar); with --data mnist or cifar10 the folder of their files",
    )
    group.add_argument("--data", choices=DATA_NAMES, help="a data set by name")
    group.add_argument(
        "--img-size",
        type=settings.image_size,
        metavar="PIXELS",
        help="image size; known from the model",
    )
    group.add_argument(
        "--mean",
        nargs="+",
        type=settings.pixel_mean,
        metavar="X",
        help="normalisation; known from the model",
    )
    group.add_argument("--std", nargs="+", type=settings.pixel_std, metavar="X")
    group.add_argument("--interpolation", choices=INTERPOLATIONS, help="of resized images")
    group.add_argument(
        "--crop-pct", type=settings.fraction, metavar="X", help="part kept by the centre crop"
    )
    group.add_argument(
        "--val-split",
        type=settings.inner_fraction,
        default=0.1,
        metavar="X",
        help="part of the training images on which settings are judged (a folder with test/ has "
        "its own: val/)",
    )
    group.add_argument(
        "--class-names",
        nargs="+",
        metavar="NAME",
        help="names of classes that are only numbered, in that order (files in MNIST's format)",
    )
    for part, images in (("train", "training"), ("val", "validation")):
        group.add_argument(
            f"--{part}-per-class",
            type=settings.positive_int,
            metavar="N",
            help=f"at most so many {images} images of each class, drawn by the seed",
        )


def add_compute_options(parser: argparse.ArgumentParser, workers: int | None = None) -> None:
    """Where and how it runs; none of them changes what is computed."""
    workers = min(4, os.cpu_count() or 1) if workers is None else workers
    group = parser.add_argument_group("computing")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    group.add_argument("--amp", action="store_true", help="compute in bfloat16 where it is safe")
    group.add_argument(
        "--channels-last",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="memory layout in which convolutions are faster (default: yes)",
    )
    group.add_argument(
        "--fuse",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="fold BatchNorm, residual and ReLU into the convolutions (default: yes)",
    )
    group.add_argument(
        "--torchcompile",
        action="store_true",
        help="fuse, and let torch.compile fuse what lies between the convolutions",
    )
    group.add_argument(
        "--backend",
        choices=backends.NAMES,
        default="auto",
        help="who computes masked layers; auto picks what measured fastest",
    )
    group.add_argument(
        "-j",
        "--workers",
        type=settings.workers,
        default=workers,
        metavar="N",
        help="processes that decode images",
    )
    group.add_argument(
        "--cache",
        choices=PLACES,
        help="keep decoded images, so that none is decoded twice: on the device, on the host or "
        "on disk (there later runs find them again)",
    )
    group.add_argument(
        "--cache-dir", metavar="DIR", help="folder of --cache disk (default: ~/.cache/wfnet)"
    )
    group.add_argument("--decoder", choices=("pil",), default="pil", help="who decodes image files")
    add_threads_option(group)


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


def add_threads_option(group: argparse._ActionsContainer, default: str = "PyTorch's") -> None:
    text = f"CPU threads (default: {default})"
    group.add_argument("--threads", type=settings.cpu_threads, metavar="N", help=text)


# -- options of configurations --------------------------------------------------------------------


def add_config_options(
    group: argparse._ActionsContainer,
    config: type,
    *names: str,
    prefix: str = "",
    defaults: Any = None,
) -> None:
    """Adds an option for each field of a configuration that has a help text.

    Args:
        group: where they go.
        config: a dataclass with fields made by :func:`wfnet.services.settings.setting`.
        names: the fields, in the order of the help; by default all.
        prefix: before the name of each option, which then has no short form: ``"relearn-"``.
        defaults: a configuration with the defaults. None: an option that is not given is None, as
            where a recipe decides.
    """
    for field in _option_fields(config, names):
        about = field.metadata
        default = None if defaults is None else getattr(defaults, field.name)
        arguments: dict[str, Any] = {"default": default, "help": about["help"]}
        if isinstance(about["values"], tuple):
            arguments["choices"] = about["values"]
        elif about["values"] is bool:
            arguments["action"] = argparse.BooleanOptionalAction
        else:
            arguments |= {"type": about["values"], "metavar": about["metavar"]}
        group.add_argument(*_flags(field, prefix), **arguments)


def config_changes(
    options: argparse.Namespace, config: type, *names: str, prefix: str = ""
) -> dict[str, Any]:
    """Returns the fields of a configuration that the command line gives; see
    :func:`add_config_options`."""
    values = {
        field.name: getattr(options, _flags(field, prefix)[-1].lstrip("-").replace("-", "_"))
        for field in _option_fields(config, names)
    }
    return {name: value for name, value in values.items() if value is not None}


def _option_fields(config: type, names: Sequence[str]) -> list[dataclasses.Field]:
    fields = {field.name: field for field in dataclasses.fields(config)}
    if names:
        return [fields[name] for name in names]
    return [field for field in fields.values() if field.metadata.get("help")]


def _flags(field: dataclasses.Field, prefix: str) -> list[str]:
    flags = (field.metadata["flags"] or f"--{field.name.replace('_', '-')}").split()
    return [f"--{prefix}{flags[-1].lstrip('-')}"] if prefix else flags


# -- types ----------------------------------------------------------------------------------------


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
    if not key.isidentifier() or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form key=value")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


# -- options from files ---------------------------------------------------------------------------


def fill_from_files(
    parser: argparse.ArgumentParser, arguments: Sequence[str]
) -> argparse.Namespace:
    """Parses the command line over the options of ``--config FILE`` or of a recorded run.

    ``untrain --resume RUN`` and ``--config FILE`` take all recorded options; ``evaluate RUN``,
    ``baseline RUN`` and ``bake RUN`` those that describe classifier and data, and ``--config``
    replaces these. What stands on the command line wins.

    Raises:
        FileNotFoundError, ValueError: for a file that is missing, damaged, or has an option that
            the command does not know or a value that does not fit.
    """
    options = parser.parse_args(arguments)
    _refuse_empty_values(_command_parser(parser, options.command), options)
    recorded: dict[str, Any] = {}
    origin: Path | None = None
    named = _named_run(options) if options.command != "untrain" else None
    if named and Path(named, RUN_FILE).is_file():
        _, origin, run = _run(named)
        recorded = {k: v for k, v in run["options"].items() if k in DESCRIPTION}
    if getattr(options, "config", None):
        origin = Path(options.config)
        recorded |= read_options(origin, options.command)
    elif options.command == "untrain" and options.resume in (None, "auto"):
        return options
    elif options.command == "untrain":
        folder, origin, run = _run(options.resume)
        if run.get("command") != "untrain":
            raise ValueError(
                f"{folder} holds a run of `wfnet {run.get('command')}`, not of `wfnet untrain`; "
                "run that command again to continue it"
            )
        recorded = run["options"]
    if not recorded:
        return options
    chosen = _command_parser(parser, options.command)
    given = _given(parser, chosen, arguments)
    dropped = {name for names in _ALTERNATIVES if names & given for name in names}
    if "data" not in given and recorded.get("data") in DATA_WITH_FILES:
        dropped.discard("data")  # its --data-dir says where its files are
    defaults = _checked(chosen, recorded, origin)
    chosen.set_defaults(**{k: v for k, v in defaults.items() if k not in dropped})
    return parser.parse_args(arguments)


def _refuse_empty_values(chosen: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends the program if an option is an empty string, as of a shell variable that is not set."""
    for action in chosen._actions:
        value = getattr(options, action.dest, None)
        if "" in (value if isinstance(value, list) else [value]):
            chosen.error(f"{_shown_name(action)} is empty: give it a value, or leave it out")


def _shown_name(action: argparse.Action) -> str:
    return "/".join(action.option_strings) or action.metavar or action.dest


def _named_run(options: argparse.Namespace) -> str | None:
    """The run that evaluate or bake works on."""
    return getattr(options, "folder", None) or getattr(options, "resume", None)


def _run(folder: str) -> tuple[Path, Path, dict[str, Any]]:
    path = Path(folder)
    return path, path / RUN_FILE, read_run(path)


def read_options(path: Path, command: str) -> dict[str, Any]:
    """Options from a JSON or YAML file, a run's ``config.json``, or a recipe for ``command``."""
    if not path.is_file():
        if path.as_posix() in recipes.names():
            return recipes.read(path.as_posix(), command)
        raise FileNotFoundError(
            f"{path} does not exist; --config takes a JSON or YAML file, or a recipe by name: "
            f"{', '.join(recipes.names())}"
        )
    if path.name == RUN_FILE:
        return read_run(path.parent)["options"]
    text = path.read_text()
    try:
        content = json.loads(text) if path.suffix == ".json" else _yaml(path).safe_load(text)
    except ImportError:
        raise
    except Exception as error:
        raise ValueError(f"{path} is not a readable options file: {_one_line(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold options by name (lr: 0.3), not a {_kind(content)}")
    return content


def _yaml(path: Path) -> Any:
    try:
        return importlib.import_module("yaml")
    except ImportError as error:
        raise ImportError(
            f"{path} is read as YAML, which needs pyyaml (`pip install pyyaml`); or write it as "
            "JSON in a file that ends in .json"
        ) from error


def _kind(content: object) -> str:
    return "nothing" if content is None else type(content).__name__


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _command_parser(parser: argparse.ArgumentParser, command: str) -> argparse.ArgumentParser:
    subparsers = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return subparsers.choices[command]


def _given(
    parser: argparse.ArgumentParser, chosen: argparse.ArgumentParser, arguments: Sequence[str]
) -> set[str]:
    """Names of the options that stand on the command line."""
    defaults = {action: action.default for action in chosen._actions}
    for action in chosen._actions:
        action.default = argparse.SUPPRESS
    try:
        return set(vars(parser.parse_args(arguments)))
    finally:
        for action, default in defaults.items():
            action.default = default


def _checked(
    parser: argparse.ArgumentParser, values: Mapping[str, Any], origin: Path
) -> dict[str, Any]:
    """``values`` by the names of the parsed options, converted and checked as on the line."""
    actions = {
        name.lstrip("-").replace("-", "_"): action
        for action in parser._actions
        for name in (*action.option_strings, action.dest)
        if not name.startswith("--no-")
    }
    checked: dict[str, Any] = {}
    for name, value in values.items():
        key = str(name).lstrip("-").replace("-", "_")
        if key in _OF_THIS_CALL or value is None:
            continue
        action = actions.get(key)
        if action is None:
            near = difflib.get_close_matches(key, actions, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{origin}: `{parser.prog}` has no option {name!r}{hint}")
        checked[action.dest] = _value(action, value, f"{origin}: {name}")
    return checked


def _value(action: argparse.Action, value: Any, where: str) -> Any:
    if action.nargs == 0:  # a switch
        if not isinstance(value, bool):
            raise ValueError(f"{where} must be true or false, not {value!r}")
        return value
    if action.nargs in ("*", "+"):
        if not isinstance(value, list | tuple | dict):
            value = [value]
        if isinstance(value, dict):
            value = [f"{k}={v!r}" for k, v in value.items()]
        return [_scalar(action, item, where) for item in value]
    if isinstance(value, list | dict):
        raise ValueError(f"{where} must be a single value, not {value!r}")
    return _scalar(action, value, where)


def _scalar(action: argparse.Action, value: Any, where: str) -> Any:
    if action.type is key_value and isinstance(value, list | tuple):
        return tuple(value)
    if isinstance(value, bool):
        raise ValueError(f"{where} must be a value, not {value!r}")
    try:
        converted = str(value) if action.type is None else action.type(str(value))
    except (argparse.ArgumentTypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
    if action.choices is not None and converted not in action.choices:
        raise ValueError(
            f"{where}: {value!r} is not one of {', '.join(str(c) for c in action.choices)}"
        )
    return converted


def recorded(options: argparse.Namespace) -> dict[str, Any]:
    """The options as they go into ``config.json``."""
    values = {k: v for k, v in vars(options).items() if k not in _OF_THIS_CALL}
    if values.get("model_kwargs"):
        values["model_kwargs"] = dict(values["model_kwargs"])
    return values
