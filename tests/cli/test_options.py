from dataclasses import dataclass

import pytest

from wfnet.cli import build_parser, main
from wfnet.cli.options import Parser, config_changes, key_value, log_base
from wfnet.services import settings
from wfnet.services.settings import Number, setting

OPTIONS = ("steps", "optimizer", "distil")


@dataclass(frozen=True)
class Config:
    """
    Attributes:
        steps: how many
        optimizer: which
        distil: whether
    """

    steps: int | None = setting(None, settings.positive_int, flags="-s --steps")
    optimizer: str = setting("sgd", ("sgd", "adam"), flags="--opt")
    distil: bool = setting(True, bool)
    hidden: int = setting(1, settings.positive_int)


def parse(arguments, **options):
    parser = Parser()
    parser.group("title").add_fields(Config, *OPTIONS, **options)
    return parser.parse_args(arguments)


def test_options_are_derived_from_fields():
    given = parse(["-s", "3", "--opt", "adam", "--no-distil"])
    assert vars(given) == {"steps": 3, "opt": "adam", "distil": False}
    assert config_changes(given, Config, *OPTIONS) == {
        "steps": 3,
        "optimizer": "adam",
        "distil": False,
    }
    assert config_changes(parse([]), Config, *OPTIONS) == {}


def test_a_prefix_and_defaults_of_a_configuration():
    given = parse(["--pre-steps", "3"], prefix="pre-", defaults=Config())
    assert vars(given) == {"pre_steps": 3, "pre_opt": "sgd", "pre_distil": True}
    assert config_changes(given, Config, "steps", prefix="pre-") == {"steps": 3}


# Converters of options that are no plain range: a logarithm's base, key=value.
OTHER_TYPES = {log_base, key_value}


def numeric_options():
    commands = next(a for a in build_parser()._actions if a.dest == "command")
    return [
        pytest.param(command, action, id=f"{command} {action.option_strings[-1]}")
        for command, parser in commands.choices.items()
        for action in parser._actions
        if action.option_strings
        if action.type is not None and action.type not in OTHER_TYPES
    ]


@pytest.mark.parametrize(("command", "action"), numeric_options())
def test_every_number_has_a_range(command, action, capsys):
    """No option takes a number that makes no sense: whatever reads it relies on its range."""
    if action.choices is not None:
        assert len(action.choices) < 20
        return
    assert isinstance(action.type, Number), f"wfnet {command}: {action.option_strings}"
    number = action.type
    wrong = ["x", "nan", "inf", "1e30", str(10**40), "-1e30"]
    if number.whole:
        wrong += [f"{number.least:.0f}.5", "1e9"]
    if number.above:
        wrong.append(str(number.least))
    for text in wrong:
        assert main([command, f"{action.option_strings[-1]}={text}"]) == 2
        assert "is not a" in capsys.readouterr().err
