"""Options from files: ``--config FILE``, and those that a run has recorded."""

import argparse
import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wfnet import recipes
from wfnet.cli.runs import OF_THIS_CALL, RUN_FILE, read_run
from wfnet.data.open import NAMES_WITH_FILES
from wfnet.services.extras import require

# Of each set, an option on the command line takes the place of the others' recorded values.
_ALTERNATIVES = ({"steps", "epochs"}, {"data", "data_dir"}, {"pretrained", "checkpoint"})
# What evaluate, bake and others take over from the run that they work on.
DESCRIPTION = frozenset(
    ("model", "pretrained", "checkpoint", "num_classes", "model_kwargs", "in_chans", "img_size")
    + ("data", "data_dir", "mean", "std", "interpolation", "crop_pct", "val_split", "seed")
    + ("class_names", "train_per_class", "val_per_class")
)


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
    command = command_parser(parser, options.command)
    for action in command._actions:
        value = getattr(options, action.dest, None)
        if "" in (value if isinstance(value, list) else [value]):  # a shell variable is not set
            name = "/".join(action.option_strings) or action.metavar
            command.error(f"{name} is empty: give it a value, or leave it out")
    recorded, origin = _recorded(options)
    if not recorded:
        return options
    given = [names for names in _ALTERNATIVES if any(getattr(options, n, None) for n in names)]
    dropped = set().union(*given)
    if recorded.get("data") in NAMES_WITH_FILES:
        dropped.discard("data")  # its --data-dir says where its files are
    # In front of the first option of the command line, which takes the place of what comes before.
    at = next((i for i, word in enumerate(arguments) if word.startswith("-")), len(arguments))
    try:
        words = option_words(command, {k: v for k, v in recorded.items() if k not in dropped})
        return parser.parse_args([*arguments[:at], *words, *arguments[at:]])
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from error


def command_parser(parser: argparse.ArgumentParser, name: str) -> argparse.ArgumentParser:
    """Returns the parser of one command."""
    return next(a for a in parser._actions if a.dest == "command").choices[name]


def _recorded(options: argparse.Namespace) -> tuple[dict[str, Any], Path | None]:
    """Returns the options that files bring for a command line, and the file to be named."""
    named = getattr(options, "folder", None) or getattr(options, "resume", None)
    config = getattr(options, "config", None)
    recorded: dict[str, Any] = {}
    origin = None
    if options.command != "untrain":
        if named and Path(named, RUN_FILE).is_file():
            origin = Path(named, RUN_FILE)
            recorded = {k: v for k, v in read_run(named)["options"].items() if k in DESCRIPTION}
    elif config is None and named not in (None, "auto"):
        origin = Path(named, RUN_FILE)
        run = read_run(named)
        if run["command"] != "untrain":
            raise ValueError(f"{named} holds a run of `wfnet {run['command']}`: run that again")
        recorded = run["options"]
    if config is not None:
        origin = Path(config)
        recorded |= read_options(origin, options.command)
    return recorded, origin


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
    load = json.loads if path.suffix == ".json" else require("yaml", "train").safe_load
    try:
        content = load(path.read_text())
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is not a readable options file: {reason}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold options by name (lr: 0.3), not {content!r:.40}")
    return content


def option_words(command: argparse.ArgumentParser, values: Mapping[str, Any]) -> list[str]:
    """Returns options by name as the words of a command line."""
    actions = {
        name.lstrip("-").replace("-", "_"): action
        for action in command._actions
        for name in (action.dest, *action.option_strings)
    }
    words = []
    for name, value in values.items():
        key = str(name).lstrip("-").replace("-", "_")
        if key in OF_THIS_CALL or value is None:
            continue
        if key not in actions:
            near = difflib.get_close_matches(key, actions, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"`{command.prog}` has no option {name!r}{hint}")
        flags, nargs = actions[key].option_strings, actions[key].nargs
        if nargs == 0:  # a switch, with or without a --no- form
            if not isinstance(value, bool):
                raise ValueError(f"{name} must be true or false, not {value!r}")
            words += flags[:1] if value else flags[1:]
        elif nargs is None:
            words.append(f"{flags[-1]}={value}")
        else:
            items = [f"{k}={v!r}" for k, v in value.items()] if isinstance(value, dict) else value
            words += [flags[-1], *map(str, items if isinstance(items, list) else [items])]
    return words
