"""`wfnet demo`: the whole method on real digits, from training to figures, in about a minute."""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wfnet import models
from wfnet.cli.bake import baked_name, save_baked, verify
from wfnet.cli.drawing import draw_report, draw_training
from wfnet.cli.options import HelpFormatter, add_threads_option
from wfnet.cli.runs import (
    CONFUSION,
    CURVES,
    FIGURES,
    RUN_FILE,
    check_writable,
    read_run,
    versions,
    write_run,
)
from wfnet.cli.weights import load_weights
from wfnet.data import Splits, open_data
from wfnet.evaluation import EvaluationResult, evaluate
from wfnet.evaluation.confusion import confusion_change
from wfnet.evaluation.pair_engine import RunOptions
from wfnet.network import WFNet
from wfnet.pretrained import CONFIG_NAME, FILTERS_NAME
from wfnet.report.page import REPORT, write_report
from wfnet.services import settings
from wfnet.services.files import write_tensors
from wfnet.services.locks import folder_lock
from wfnet.training import SMALL_MODEL_SETTINGS, accuracy, fit_classifier
from wfnet.untraining import UntrainConfig, untrain
from wfnet.untraining.checkpoints import CHECKPOINT_NAME, Checkpoints
from wfnet.untraining.untrain_config import RECIPES
from wfnet.wrapping import masks_linear_maps, wrap

logger = logging.getLogger("wfnet")

EXAMPLE = """example:
  wfnet demo
  wfnet demo --model vit --output demo-vit
  wfnet demo --recipe paper --output demo-paper     (the authors' settings, to compare)"""
BASE_NAME = "base.safetensors"
DATA, CLASSES = "digits", 10
_MAX_THREADS = 4


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "demo",
        help="the whole method on real images, in about a minute, without a download",
        description="Train a small network on scikit-learn's 1,797 handwritten digits, untrain all "
        "ten classes, evaluate, bake one class and draw figures. Finished stages are reused when "
        "it runs again with the same options.",
        epilog=EXAMPLE,
        formatter_class=HelpFormatter,
    )
    parser.set_defaults(run=run, saved=saved)
    group = parser.add_argument_group("demo")
    group.add_argument(
        "--model", choices=tuple(SMALL_MODEL_SETTINGS), default="resnet", help="network"
    )
    group.add_argument(
        "--recipe",
        choices=RECIPES,
        default="balanced",
        help="balanced forgets evenly; paper has the authors' settings",
    )
    group.add_argument("--output", metavar="DIR", default="demo", help="folder for everything")
    group.add_argument(
        "--seed", type=settings.seed, default=0, metavar="N", help="of everything random"
    )
    group.add_argument(
        "--forget",
        type=int,
        choices=range(CLASSES),
        default=3,
        metavar="DIGIT",
        help="class that is baked into a plain model",
    )
    group.add_argument(
        "--steps",
        type=settings.positive_int,
        metavar="N",
        help="of untraining (default: the recipe's)",
    )
    group.add_argument(
        "--train-epochs",
        type=settings.positive_int,
        metavar="N",
        help="of training the network (default: "
        + ", ".join(f"{name} {given['epochs']}" for name, given in SMALL_MODEL_SETTINGS.items())
        + ")",
    )
    group.add_argument("--force", action="store_true", help="do every stage again")
    add_threads_option(group, "one for each idle core, up to 4")
    return parser


def saved(options: argparse.Namespace) -> str:
    """What is on disk when the demo was interrupted."""
    return f"finished stages are in {options.output}: the same command goes on from there"


def run(options: argparse.Namespace) -> int:
    torch.set_num_threads(options.threads or _idle_cores())
    if not options.debug:
        logger.setLevel(logging.WARNING)  # the demo tells its own story
    with folder_lock(options.output):
        _run(options)
    return 0


def _run(options: argparse.Namespace) -> None:
    started = time.perf_counter()
    demo = _Demo(options)
    print(
        f"wfnet demo: small {options.model} on scikit-learn's handwritten digits, recipe "
        f"{options.recipe}, seed {options.seed}\n",
        flush=True,
    )
    data = open_data(DATA, seed=options.seed)
    base = demo.train(data)
    net = demo.untrain(base, data)
    result = demo.evaluate(net, data)
    demo.bake(net, base, data)
    demo.draw(net, result, data)
    _say(f"done in {time.perf_counter() - started:.0f} s\n")
    print(demo.closing(data))


def _idle_cores() -> int:
    """Threads for networks this small: one for each idle core, up to a few.

    Threads that share a core spin at their barriers: on a busy machine two are many times slower
    than one.
    """
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return max(1, min(_MAX_THREADS, torch.get_num_threads() - round(busy)))


def _say(text: str) -> None:
    print(text, flush=True)


# -- stages ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stage:
    """What the folder's record says of a stage.

    Attributes:
        key: the options that its files depend on, those of earlier stages included.
        finished: whether it came to its end.
        seconds: its duration.
        result: what it reports.
        files: SHA-256 of its files by name.
    """

    key: dict[str, Any]
    finished: bool
    seconds: float
    result: dict[str, Any]
    files: dict[str, str]


class _Demo:
    """The stages in order; each is reused from the folder if it was finished with these options."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.folder = Path(options.output)
        check_writable(self.folder)
        self.training = dict(SMALL_MODEL_SETTINGS[options.model])
        if options.train_epochs:
            self.training["epochs"] = options.train_epochs
        self.recorded = self._read()  # emptied by the first stage that is done again
        self.stages: dict[str, _Stage] = {}
        self.key: dict[str, Any] = {
            name: value for name, value in versions().items() if name in ("wfnet", "torch")
        }
        self.progress = not options.quiet

    def _read(self) -> dict[str, _Stage]:
        if not (self.folder / RUN_FILE).is_file():
            if (self.folder / CONFIG_NAME).is_file():
                raise FileExistsError(self._in_the_way("filters of something else"))
            return {}
        run = read_run(self.folder)
        if run["command"] != "demo":
            raise FileExistsError(self._in_the_way(f"a run of `wfnet {run['command']}`"))
        try:
            return {name: _Stage(**stage) for name, stage in run["stages"].items()}
        except (KeyError, TypeError, AttributeError):
            return {}  # of another version: every stage is done again

    def _in_the_way(self, what: str) -> str:
        return f"{self.folder} holds {what}; choose another --output for the demo"

    def stage(
        self,
        number: int,
        title: str,
        name: str,
        options: dict[str, Any],
        files: tuple[str, ...],
        work: Callable[[bool], dict[str, Any]],
    ) -> dict[str, Any] | None:
        """Runs ``work(resume)`` and records what it reports, unless that was done before.

        Returns:
            The report of work that was done now; None if the stage is reused.
        """
        self.key = json.loads(json.dumps({**self.key, **options}))
        _say(f"[{number}/5] {title}")
        before = self.recorded.get(name)
        same = before is not None and before.key == self.key and not self.options.force
        if same and before.finished and self._unchanged(before):
            self.stages[name] = before
            return None
        if before is not None and before.key != self.key:
            old, new = _first_difference(before.key, self.key)
            _say(f"      replaces what {self.folder} holds: {old} before, {new} now")
        interrupted = same and not before.finished
        self._remove_what_changes(() if interrupted else files)
        self.stages[name] = _Stage(self.key, False, 0.0, {}, {})
        self._write()
        started = time.perf_counter()
        report = work(interrupted)
        seconds = time.perf_counter() - started
        digests = {file: _digest(self.folder / file) for file in files}
        self.stages[name] = _Stage(self.key, True, round(seconds, 2), report, digests)
        self._write()
        return report

    def _unchanged(self, stage: _Stage) -> bool:
        return all(
            (self.folder / name).is_file() and _digest(self.folder / name) == digest
            for name, digest in stage.files.items()
        )

    def _remove_what_changes(self, files: tuple[str, ...]) -> None:
        """Removes ``files``, and all that was made from them: what later stages recorded."""
        later = [stage for name, stage in self.recorded.items() if name not in self.stages]
        for name in {*files, *(name for stage in later for name in stage.files)}:
            (self.folder / name).unlink(missing_ok=True)
        self.recorded = {}

    def _write(self) -> None:
        options = self.options
        stages = {**self.recorded, **self.stages}
        write_run(
            self.folder,
            "demo",
            {
                "model": f"small/{options.model}",
                "checkpoint": str(self.folder / BASE_NAME),
                "data": DATA,
                "num_classes": CLASSES,
                "seed": options.seed,
                "recipe": options.recipe,
                "steps": options.steps,
                "train_epochs": options.train_epochs,
                "forget": options.forget,
                "threads": torch.get_num_threads(),
            },
            classes=[str(digit) for digit in range(CLASSES)],
            seconds={name: stage.seconds for name, stage in stages.items()},
            stages={
                name: asdict(stage) for name, stage in {**self.recorded, **self.stages}.items()
            },
        )

    def _tell(self, name: str, text: str, reused: bool) -> None:
        seconds = self.stages[name].seconds
        how = f"reused, took {seconds:.1f} s then" if reused else f"{seconds:.1f} s"
        _say(f"      {text}  ({how})\n")

    def train(self, data: Splits) -> nn.Module:
        model = models.create(self.options.model, CLASSES, seed=self.options.seed)
        path = self.folder / BASE_NAME

        def work(resume: bool) -> dict[str, Any]:
            fit_classifier(
                model, data.train, seed=self.options.seed, progress=self.progress, **self.training
            )
            write_tensors(path, model.state_dict(), {"format": "pt"})
            return {"test_accuracy": accuracy(model, data.test)}

        chosen = {"model": self.options.model, "seed": self.options.seed, "training": self.training}
        epochs = self.training["epochs"]
        title = f"training the network on {len(data.train):,} images, {epochs} epochs"
        done = self.stage(1, title, "train", chosen, (BASE_NAME,), work)
        # A new one: what is read from the file is what every later command has.
        base = models.create(self.options.model, CLASSES)
        load_weights(base, path)
        base.to(memory_format=torch.channels_last)
        share = self.stages["train"].result["test_accuracy"]
        text = f"it reads {share:.1%} of {len(data.test)} test images correctly"
        self._tell("train", text, done is None)
        return base.eval()

    def untrain(self, base: nn.Module, data: Splits) -> WFNet:
        options = self.options
        changes: dict[str, Any] = {"seed": options.seed}
        if options.steps is not None:
            changes["steps"] = options.steps
        net = wrap(base, CLASSES, options.recipe, fuse=True)
        config = UntrainConfig.recipe(options.recipe, CLASSES, masks_linear_maps(net), **changes)

        def work(resume: bool) -> dict[str, Any]:
            if not resume:
                shutil.rmtree(self.folder / "tensorboard", ignore_errors=True)
                Checkpoints(self.folder).remove()
            result = untrain(
                net,
                data.train,
                data.validation,
                config,
                self.folder,
                resume=resume,
                progress=self.progress,
            )
            return {
                "steps": result.steps,
                "best_step": result.best_step,
                "acc_r": result.best.acc_r,
                "acc_f": result.best.acc_f,
            }

        files = (CONFIG_NAME, FILTERS_NAME, "history.json", "history.csv", CHECKPOINT_NAME)
        gates = sum(p.shape[1] for p in net.filter_parameters())
        title = (
            f"untraining all {CLASSES} classes: {gates:,} gates for each, in "
            f"{len(net.masked_layers)} layers"
        )
        chosen = {
            "recipe": options.recipe,
            "alpha_init": net.alpha_init,
            "untraining": asdict(config),
        }
        done = self.stage(2, title, "untrain", chosen, files, work)
        if done is None:
            net = WFNet.from_pretrained(self.folder, base)
            net.fuse = True
        report = self.stages["untrain"].result
        text = (
            f"{report['steps']} steps; on {len(data.validation)} validation images Acc_r "
            f"{report['acc_r']:.1%}, Acc_f {report['acc_f']:.1%}"
        )
        self._tell("untrain", text, done is None)
        return net

    def evaluate(self, net: WFNet, data: Splits) -> EvaluationResult:
        path = self.folder / "evaluation.json"

        def work(resume: bool) -> dict[str, Any]:
            result = evaluate(
                net, data.test, seed=self.options.seed, progress=self.progress, channels_last=True
            )
            result.settings["split"] = "test"
            result.to_json(path)
            result.to_csv(path.with_suffix(".csv"))
            return asdict(result.mean)

        title = f"evaluating: {len(data.test)} test images under all {CLASSES} rows"
        done = self.stage(3, title, "evaluate", {}, (path.name, "evaluation.csv"), work)
        result = EvaluationResult.from_json(path)
        _say("\n" + "\n".join(f"      {line}" for line in result.table().splitlines()))
        _say(
            "      Acc_f: accuracy on the forgotten class (low is good); Acc_r: on all others "
            "(high is good)\n"
        )
        text = (
            f"accuracy on the forgotten class {result.original.acc_f:.1%} -> "
            f"{result.mean.acc_f:.1%}, on all others {result.original.acc_r:.1%} -> "
            f"{result.mean.acc_r:.1%}"
        )
        self._tell("evaluate", text, done is None)
        return result

    def bake(self, net: WFNet, base: nn.Module, data: Splits) -> None:
        forget = self.options.forget
        path = self.folder / baked_name([forget])

        def work(resume: bool) -> dict[str, Any]:
            save_baked(net, [forget], path)
            images = data.test.batch(torch.arange(len(data.test))).images
            agreement = verify(net, base, [forget], path, images)
            return {"text": str(agreement), **asdict(agreement)}

        title = f"baking class {forget} into a plain {type(net.model).__name__} without filters"
        done = self.stage(4, title, "bake", {"forget": forget}, (path.name,), work)
        self._tell("bake", self.stages["bake"].result["text"], done is None)

    def draw(self, net: WFNet, result: EvaluationResult, data: Splits) -> None:
        def work(resume: bool) -> dict[str, Any]:
            history = json.loads((self.folder / "history.json").read_text())["history"]
            change = confusion_change(net, data.test, options=RunOptions(progress=self.progress))
            change.to_json(self.folder / CONFUSION)
            drawn = draw_report(self.folder, net, data.classes, result, change)
            drawn += draw_training(history, self.folder)
            return {"drawn": [*drawn, write_report(self.folder).name]}

        files = (*FIGURES, CURVES, "associations.png", "confusion.png", CONFUSION, REPORT)
        done = self.stage(5, "drawing figures, writing the report", "draw", {}, files, work)
        self._tell("draw", f"{self.folder / REPORT} shows it all", done is None)

    def closing(self, data: Splits) -> str:
        """Where everything is, and how to use it."""
        folder, forget = self.folder, self.options.forget
        places = {
            REPORT: "everything on one page, for a browser",
            "overview.png": "the result in one picture; more figures beside it",
            "evaluation.csv, .json": "every number of the table",
            "wf_model.safetensors": "the filters of all classes (with wf_config.json)",
            BASE_NAME: "the network they belong to",
            baked_name([forget]): f"a plain network that has forgotten class {forget}",
            "history.csv": "the course of untraining",
            RUN_FILE: "all options, versions, seconds of each stage",
        }
        width = max(map(len, places))
        lines = [f"Everything is in {folder}/:"]
        lines += [f"  {name:<{width}}  {what}" for name, what in places.items()]
        lines += ["", "Use it in Python:"]
        lines += [f"  {line}" for line in self.snippet().splitlines()]
        lines += [
            "",
            "Next:",
            f"  wfnet bake {folder} --forget 7 --verify",
            f"  wfnet trust {folder} --classes 7 && wfnet report {folder}",
            "  wfnet untrain --help        (a network and images of your own)",
            "",
            "Filters suppress a class at run time: whoever holds them and the base weights can",
            "undo it. The baked file carries neither, but can be taught the class again.",
        ]
        return "\n".join(lines)

    def snippet(self) -> str:
        """Python that uses the filters; ``images`` are ``[N, 1, 32, 32]``."""
        folder = self.folder.as_posix()
        return (
            "import wfnet, wfnet.models, safetensors.torch\n"
            f'base = wfnet.models.create("{self.options.model}", num_classes={CLASSES})\n'
            f'base.load_state_dict(safetensors.torch.load_file("{folder}/{BASE_NAME}"))\n'
            f'net = wfnet.WFNet.from_pretrained("{folder}", base)\n'
            f"logits = net(images, forget={self.options.forget})"
            "    # images [N, 1, 32, 32]; one label, or one for each"
        )


def _first_difference(before: dict[str, Any], now: dict[str, Any]) -> tuple[str, str]:
    for name in (*now, *before):
        old, new = before.get(name), now.get(name)
        if old != new:
            if isinstance(old, dict) and isinstance(new, dict):
                return _first_difference(old, new)
            return f"{name} {old}", f"{name} {new}"
    return "other options", "these"


def _digest(path: Path) -> str:
    if not path.is_file():
        return ""
    return hashlib.sha256(path.read_bytes()).hexdigest()
