"""the whole method on real images, in two minutes, without a download

Train a small network on scikit-learn's 1,797 handwritten digits, untrain all ten classes, evaluate,
bake one class, attack the exported file beside one of another recipe and a network retrained
without the class, and write a picture and a report: a series of commands, each of which is shown
before it runs. When it runs again with the same options, what is trained is reused.

example:
  wfnet demo
  wfnet demo --model vit --output demo-vit
  wfnet demo --recipe paper --output demo-paper     (the authors' settings, to compare)
"""

import argparse
import json
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from wfnet.cli import bake, baseline, evaluate, report, train, trust, untrain
from wfnet.cli.option_files import fill_from_files
from wfnet.cli.options import Parser, add_command, make_parser
from wfnet.cli.runs import BASE_NAME, RUN_FILE, check_writable, recorded
from wfnet.pretrained import CONFIG_NAME
from wfnet.report import figures
from wfnet.services import settings
from wfnet.services.locks import folder_lock
from wfnet.services.threads import choose_threads
from wfnet.training import SMALL_MODEL_SETTINGS
from wfnet.trust import TrustResult
from wfnet.trust.runner import RESULT
from wfnet.untraining.untrain_config import RECIPES

CLASSES = 10
PICTURE = "attacks.png"
_CHECKS = ("--samples", "300", "--checks", "removal", "relearning")
# What a recipe is shown beside, and in how many steps at most.
_BESIDE = {"durable": ("balanced", 150), "balanced": ("durable", 200), "paper": ("durable", 200)}


def add_parser(commands: argparse._SubParsersAction) -> Parser:
    text = "what is finished is kept: the same command goes on from there"
    parser = add_command(commands, run, text, "[options]")
    group = parser.group("demo")
    epochs = [f"{name} {chosen['epochs']}" for name, chosen in SMALL_MODEL_SETTINGS.items()]
    group.add_all(
        f"""
        --model  network [default: resnet]
        --recipe  of `wfnet untrain`; the picture shows another beside it [default: balanced]
        --output DIR  folder for everything [default: demo]
        --forget DIGIT  class that is baked into a plain model [default: 3]
        --steps N  of untraining (default: the recipe's)
        --train-epochs N  of training the network (default: {", ".join(epochs)})
        --force  train and untrain again
        """,
        model=tuple(SMALL_MODEL_SETTINGS),
        recipe=tuple(RECIPES),
        forget=settings.int_from(0, CLASSES - 1),
    )
    group.add_seed()
    group.add_threads()
    return parser


def run(options: argparse.Namespace) -> None:
    started = time.perf_counter()
    choose_threads(options.threads)
    folder = Path(options.output)
    check_writable(folder)
    with folder_lock(folder):
        _run(options, folder)
    print(f"\ndone in {time.perf_counter() - started:.0f} s\n\n{_closing(options, folder)}")


def _run(options: argparse.Namespace, folder: Path) -> None:
    base = folder / "base"
    weights = base / BASE_NAME
    if (folder / CONFIG_NAME).is_file() and not (base / RUN_FILE).is_file():
        raise FileExistsError(
            f"{folder} holds filters of something else; choose another --output for the demo"
        )
    given = ["--data", "digits", "--model", f"small/{options.model}"]
    given += ["--seed", str(options.seed), "-j0"]
    training = ["train", *given, "--output", str(base)]
    if options.train_epochs:
        training += ["--epochs", str(options.train_epochs)]
    trained = _holds(base, training) and not options.force
    if trained:
        print(f"{weights} is trained\n", flush=True)
    else:
        _call(options, [*training, "--force"])
    other, its_steps = _BESIDE[options.recipe]
    beside = folder / f"recipe_{other}"
    asked = options.steps or its_steps
    for recipe, output, steps in (
        (options.recipe, folder, options.steps),
        (other, beside, min(asked, its_steps)),
    ):
        words = ["untrain", *given, "--checkpoint", str(weights), "--recipe", recipe]
        words += ["--output", str(output)]
        if steps:
            words += ["--steps", str(steps)]
        goes_on = trained and _holds(output, words)
        _call(options, [*words, "--resume" if goes_on else "--force"])
    _call(options, ["evaluate", str(folder), "-j0", "--no-figures"])
    _call(options, ["bake", str(folder), "--forget", str(options.forget), "--verify"])
    _attack(options, {options.recipe: folder, other: beside})
    _call(options, ["report", str(folder), "-j0"])


def _attack(options: argparse.Namespace, runs: Mapping[str, Path]) -> None:
    """Attacks the exports of these runs and baselines, and draws what comes back."""
    first = runs[options.recipe]
    classes = ["--classes", str(options.forget), "-j0"]
    _call(options, ["baseline", str(first), "--methods", "logit_masked", "retrained", *classes])
    for run in runs.values():
        _call(options, ["trust", str(run), *classes, *_CHECKS])
    means = {name: TrustResult.from_json(run / RESULT).means() for name, run in runs.items()}

    def levels(name: str, who: str) -> dict[str, float]:
        return figures.attack_levels(lambda c, m: means[name].get(c, {}).get(m, {}).get(who))

    bars = {name: levels(name, "forgetful") for name in sorted(runs)}
    if "durable" in runs:
        bars["durable, cut from the head"] = levels("durable", "also_masked")
    bars["retrained without the class"] = levels(options.recipe, "retrained")
    bars["its logit masked"] = levels(options.recipe, "logit_masked")
    before = levels(options.recipe, "original")["nothing"]
    figures.attacks(before, bars, first / PICTURE)


def _parse(words: Sequence[str]) -> argparse.Namespace:
    commands = (train, untrain, evaluate, bake, baseline, trust, report)
    return fill_from_files(make_parser(commands), words)


def _holds(folder: Path, words: Sequence[str]) -> bool:
    """Whether a folder holds what a command with these words makes, or a part of it."""
    if not (folder / RUN_FILE).is_file():
        return False
    found = json.loads((folder / RUN_FILE).read_text())["options"]
    return found == json.loads(json.dumps(recorded(_parse(words), folder)))


def _call(options: argparse.Namespace, words: Sequence[str]) -> None:
    """Shows and runs a command."""
    print(f"$ wfnet {shlex.join(words)}", flush=True)
    parsed = _parse([*words, "--quiet"] if options.quiet else words)
    parsed.run(parsed)
    print(flush=True)


def _closing(options: argparse.Namespace, folder: Path) -> str:
    """Where everything is, and how to use it."""
    return f"""Everything is in {folder}/:
  attacks.png            what an attacker gets back from exported files, in one picture
  report.html            everything on one page, for a browser
  evaluation.csv, .json  every number of the table
  wf_model.safetensors   the filters of all classes (with wf_config.json)
  base/{BASE_NAME}  the network they belong to
  forget_{options.forget}.safetensors   a plain network that has forgotten class {options.forget}

Use it in Python:
  import wfnet, wfnet.models, safetensors.torch
  base = wfnet.models.create("{options.model}", num_classes={CLASSES})
  weights = safetensors.torch.load_file("{folder.as_posix()}/base/{BASE_NAME}")
  base.load_state_dict(weights)
  net = wfnet.WFNet.from_pretrained("{folder.as_posix()}", base)
  logits = net(images, forget={options.forget})    # [N, 1, 32, 32]; one label, or one for each

Next:
  wfnet trust {folder} --classes {options.forget} && wfnet report {folder}   (all checks)
  wfnet untrain --help        (a network and images of your own)

Filters suppress a class at run time: whoever holds them and the base weights can
undo it. The baked file carries neither, but can be taught the class again."""
