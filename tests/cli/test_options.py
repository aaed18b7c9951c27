import argparse
import json
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file

from wfnet.cli import build_parser, main
from wfnet.cli.options import add_config_options, config_changes, key_value, log_base
from wfnet.services import settings
from wfnet.services.settings import Number, setting


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


@pytest.mark.parametrize("kind", ["yaml", "json"])
def test_options_from_a_file(kind, arguments, tmp_path, capsys):
    content = {"lr": 0.25, "epochs": 1, "label-expansion": 3, "amp": False, "targets": ["conv1"]}
    content["model_kwargs"] = {"width": 8}
    path = tmp_path / f"run.{kind}"
    if kind == "json":
        path.write_text(json.dumps(content))
    else:
        path.write_text(pytest.importorskip("yaml").safe_dump(content))
    folder = tmp_path / "run"
    call = ["untrain", *arguments, "--config", str(path), "--steps", "2", "--output", str(folder)]
    assert main(call) == 0
    options = json.loads((folder / "config.json").read_text())["options"]
    assert options["lr"] == 0.25
    assert options["label_expansion"] == 2  # the command line wins
    assert (options["steps"], options["epochs"]) == (2, None)  # one of the two, the given one
    assert options["targets"] == ["conv1"]
    again = ["untrain", "--config", str(folder / "config.json"), "--output", str(tmp_path / "b")]
    assert main(again) == 0
    first, second = (load_file(f / "wf_model.safetensors") for f in (folder, tmp_path / "b"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ({"learning_rate": 1}, ["no option 'learning_rate'"]),
        ({"label_expansoin": 1}, ["did you mean 'label_expansion'?"]),
        ({"lr": "fast"}, ["lr: 'fast' is not a number"]),
        ({"amp": "yes"}, ["amp must be true or false"]),
        ({"recipe": "secret"}, ["'secret' is not one of balanced, paper"]),
        ({"lr": [1, 2]}, ["lr must be a single value"]),
        ([1, 2], ["must hold options by name"]),
    ],
)
def test_bad_options_in_a_file(content, parts, tmp_path, fails):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(content))
    fails(["untrain", "--config", path], str(path), *parts)


def test_unreadable_option_files(tmp_path, fails):
    fails(["untrain", "--config", tmp_path / "no.yaml"], "no.yaml does not exist")
    (tmp_path / "bad.json").write_text("{")
    fails(["untrain", "--config", tmp_path / "bad.json"], "not a readable options file")
    (tmp_path / "config.json").write_text("{}")
    fails(["evaluate", tmp_path], "config.json is damaged or no record of a run")
    fails(["untrain", "--resume", tmp_path / "nowhere"], "is no run of wfnet")


def test_an_unknown_recipe_is_refused_with_the_known_ones(capsys, fails):
    fails(["untrain", "--config", "mnist/alexnet"], "mnist/alexnet", "cifar10/vgg16")


# Converters of options that are no plain range: a logarithm's base, key=value; so is --set.
OTHER_TYPES = {log_base, key_value}


def numeric_options():
    commands = next(a for a in build_parser()._actions if a.dest == "command")
    return [
        pytest.param(command, action, id=f"{command} {action.option_strings[-1]}")
        for command, parser in commands.choices.items()
        for action in parser._actions
        if action.option_strings and action.dest != "set"
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
        with pytest.raises(SystemExit) as end:
            main([command, f"{action.option_strings[-1]}={text}"])
        assert end.value.code == 2
        (message,) = capsys.readouterr().err.splitlines()[-1:]
        assert "is not a" in message


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--in-chans", "2"),
        ("--interpolation", "cubic"),
        ("--val-split", "1"),
        ("--smoothing", "1"),
        ("--std", "0"),
        ("--seed", str(2**70)),
        ("--threads", "1e9"),
        ("-b", "1"),
    ],
)
def test_values_that_were_accepted_once(option, value, capsys):
    with pytest.raises(SystemExit):
        main(["train", option, value])
    assert f"argument {option}" in capsys.readouterr().err.replace("-b/--batch-size", "-b")


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["train", "--checkpoint", ""], "--checkpoint"),
        (["bake", "run", "--forget", "1", "--data-dir="], "--data-dir"),
        (["untrain", "--classes", "1", ""], "--classes"),
        (["evaluate", ""], "RUN"),
    ],
)
def test_empty_values_are_refused(arguments, option, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert f"{option} is empty: give it a value" in capsys.readouterr().err
