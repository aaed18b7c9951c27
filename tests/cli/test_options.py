import argparse
from dataclasses import dataclass

import pytest

from wfnet.cli.options import add_config_options, config_changes
from wfnet.services import settings
from wfnet.services.settings import setting


@dataclass(frozen=True)
class Config:
    steps: int | None = setting(
        None, settings.positive_int, flags="-s --steps", metavar="N", help="how many"
    )
    optimizer: str = setting("sgd", ("sgd", "adam"), flags="--opt", help="which")
    distil: bool = setting(True, bool, help="whether")
    hidden: int = setting(1, settings.positive_int)


def parse(arguments, **options):
    parser = argparse.ArgumentParser()
    add_config_options(parser, Config, **options)
    return parser.parse_args(arguments)


def test_options_are_derived_from_fields():
    given = parse(["-s", "3", "--opt", "adam", "--no-distil"])
    assert vars(given) == {"steps": 3, "opt": "adam", "distil": False}
    assert config_changes(given, Config) == {"steps": 3, "optimizer": "adam", "distil": False}
    assert config_changes(parse([]), Config) == {}


def test_a_prefix_and_defaults_of_a_configuration():
    given = parse(["--pre-steps", "3"], prefix="pre-", defaults=Config())
    assert vars(given) == {"pre_steps": 3, "pre_opt": "sgd", "pre_distil": True}
    assert config_changes(given, Config, "steps", prefix="pre-") == {"steps": 3}


def test_values_out_of_range_are_refused(capsys):
    with pytest.raises(SystemExit):
        parse(["--steps", "0"])
    assert "'0' is not a whole number of at least 1" in capsys.readouterr().err
