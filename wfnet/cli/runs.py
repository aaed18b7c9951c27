"""The folder of a run: ``config.json`` with every option, so that no later command repeats them."""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from wfnet.benchmarking.provenance import versions
from wfnet.hugging_face import PREFIX, local_folder
from wfnet.pretrained import CONFIG_NAME, FILTERS_NAME
from wfnet.services.files import FilePath, write_json
from wfnet.untraining.run_state import CHECKPOINT_NAME

RUN_FILE = "config.json"
BASE_NAME = "base.safetensors"  # weights that `wfnet train` writes
CONFUSION = "confusion.json"
ATTRIBUTION = "attribution.json"
# What belongs to one run, in the order in which it is made; a new run replaces all of it.
RUN_FILES = (
    (RUN_FILE, CHECKPOINT_NAME, CONFIG_NAME, FILTERS_NAME, "history.json", "history.csv")
    + ("training_curves.png", "evaluation.json", "evaluation.csv", "overview.png")
    + ("gates.png", "relearning.json", ATTRIBUTION)
    + ("tables.json", "tables.csv", "tables.md", CONFUSION, "confusion.png", "associations.png")
    + ("attribution.png", "report.html", "trust.json", "trust.csv", "trust.partial.json")
    + ("shadows.json", "shadows.csv")
)
# Say what the command does this time; neither recorded nor taken from a file.
OF_THIS_CALL = frozenset(
    ("command", "run", "saved", "config", "resume", "folder", "force", "dry_run", "help")
    + ("debug", "quiet")
    + ("log_wandb",)  # of older versions
)
_PATHS = ("data_dir", "checkpoint")


def check_writable(folder: Path) -> None:
    """Makes ``folder`` and writes a file there, so that a long run does not end at its output.

    Raises:
        OSError: if it cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0")
    except OSError as error:
        raise OSError(
            error.errno,
            f"the output folder cannot be written to ({error.strerror}); choose another --output",
            str(folder),
        ) from error


def recorded(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Returns the options as they go into the ``config.json`` of a folder.

    Files inside the folder are recorded relative to it, so that it can be moved; others in full.
    """
    values = {name: value for name, value in vars(options).items() if name not in OF_THIS_CALL}
    if values.get("model_kwargs"):
        values["model_kwargs"] = dict(values["model_kwargs"])
    if (network := local_folder(values.get("model"))) is not None:
        values["model"] = f"{PREFIX}{network.absolute()}"
    for name in _PATHS:
        if values.get(name):
            path = Path(values[name]).absolute()
            inside = path.is_relative_to(folder.absolute())
            values[name] = str(path.relative_to(folder.absolute()) if inside else path)
    return values


def write_run(folder: Path, options: argparse.Namespace, **more: Any) -> None:
    """Writes ``config.json``: command, options, versions, and whatever else is known of the run."""
    content = {"command": options.command, "options": recorded(options, folder), **more}
    write_json(folder / RUN_FILE, {**content, "versions": versions()})


def read_run(folder: FilePath) -> dict[str, Any]:
    """What :func:`write_run` wrote, with paths that can be opened from here.

    Raises:
        FileNotFoundError, ValueError: if it is missing or damaged.
    """
    path = Path(folder) / RUN_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist, so {Path(folder)} is no run of wfnet; `wfnet untrain` and "
            "`wfnet demo` make such folders"
        )
    try:
        content = json.loads(path.read_text())
        options = content["options"]
        if not isinstance(options, dict) or not isinstance(content["command"], str):
            raise ValueError("its options are not a table")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged or no record of a run ({error}); restore it, or give the options "
            "on the command line for a folder without it"
        ) from error
    for name in _PATHS:
        if options.get(name):
            options[name] = str(Path(folder) / options[name])  # an absolute one stays as it is
    return content
