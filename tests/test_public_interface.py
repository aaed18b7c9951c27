"""What users type stays: public names, parameters, commands, options and defaults.

``public_interface.txt`` holds the interface before the redesign; whatever is in it must be there.
New names and options may come without a line here.
"""

import argparse
import inspect
from pathlib import Path

import torch

import wfnet
import wfnet.data
from wfnet.cli import build_parser

TABLE = Path(__file__).with_name("public_interface.txt")
FUNCTIONS = ("WFConv2d", "WFLinear", "WFNet", "evaluate", "explain", "forgetting", "untrain")


def current_interface() -> dict[str, list[str]]:
    """Returns entries such as ``--seed=0`` by "wfnet untrain", "untrain()" or "wfnet.data"."""
    found = {"wfnet": sorted(wfnet.__all__), "wfnet.data": sorted(wfnet.data.__all__)}
    for name in ("WFNet", "EvaluationResult", "UntrainResult"):
        inherited = dir(torch.nn.Module)
        members = [m for m in dir(getattr(wfnet, name)) if m not in inherited and m[0] != "_"]
        found[f"{name} members"] = members
    callables = {f"{name}()": getattr(wfnet, name) for name in FUNCTIONS}
    callables["UntrainConfig()"] = wfnet.UntrainConfig
    callables["open_data()"] = wfnet.data.open_data
    for name, function in callables.items():
        found[name] = [
            parameter.name if parameter.default is parameter.empty else _entry(parameter)
            for parameter in inspect.signature(function).parameters.values()
        ]
    commands = next(
        action
        for action in build_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    for name, parser in commands.choices.items():
        found[f"wfnet {name}"] = [
            f"{option}={_default(action)}"
            for action in parser._actions
            for option in action.option_strings or [action.dest]
        ]
    return found


def _entry(parameter: inspect.Parameter) -> str:
    return f"{parameter.name}={parameter.default!r}".replace(" ", "")


def _default(action: argparse.Action) -> str:
    if action.dest == "workers":  # by default as many as this machine has cores
        return "CORES"
    return repr(action.default).replace(" ", "")


def test_everything_from_before_is_there():
    now = current_interface()
    paragraphs = TABLE.read_text().strip().split("\n\n")
    before = {
        title: entries.split()
        for title, _, entries in (paragraph.partition("\n") for paragraph in paragraphs)
    }
    missing = {
        title: sorted(set(entries) - set(now.get(title, ())))
        for title, entries in before.items()
        if set(entries) - set(now.get(title, ()))
    }
    assert missing == {}
    assert len(before) == 26
