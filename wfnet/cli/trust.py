"""attacks on what was forgotten: membership, relearning, probes, removability

Attack the plain model of each class (as `wfnet bake` exports it), and measure the same on the
original and on models retrained without the class. Finished classes and checks are kept, and the
same command goes on after an interruption.

example:
  wfnet trust runs/r50 --classes 3 281
  wfnet trust runs/r50 --classes tabby --checks removal relearning --prune-below 0.1

Numbers mean most beside those of models that never saw the class: `wfnet baseline` trains them, and
those that are in RUN are found.
"""

import argparse
import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from wfnet import trust
from wfnet.baselines import Forget, classes_in, written
from wfnet.cli.inputs import Run
from wfnet.cli.options import Parser, add_command, config_changes
from wfnet.cli.runs import check_writable
from wfnet.cli.weights import load_weights
from wfnet.evaluation.partial import data_identity
from wfnet.fusion.trace import execution_order
from wfnet.pretrained import FILTERS_NAME
from wfnet.services import settings
from wfnet.services.files import fingerprint, read_metadata, read_tensors, sha256
from wfnet.trust.subject import ImageReader

_SETTINGS = ("samples", "seed", "relearn_steps")  # that are options of these names


def add_parser(commands: argparse._SubParsersAction) -> Parser:
    parser = add_command(
        commands,
        run,
        "finished checks are kept: the same command goes on there",
        "RUN [--classes CLASS ...] [options]",
    )
    group = parser.group("checks")
    defaults = trust.TrustSettings()
    questions = "; ".join(f"{c.name}: {c.question[:-1].lower()}" for c in trust.CHECKS.values())
    group.add_all(
        f"""
        --classes CLASS...  classes, by number or name, 3+8 for classes that are forgotten together
            (default: all)
        --checks CHECK...  {questions} (default: all)
        --prune-below T  check exports in which gates below T are exactly 0, as of `wfnet bake
            --prune-below` [default: 0]
        --relearn-images N...  images of the class that relearning attacks have [default:
            {" ".join(map(str, defaults.relearn_images))}]
        --retrained PATH...  more retrained models (those in RUN are found): folders of `wfnet
            baseline`, of other seeds for example, and CLASS=FILE, weights of the same architecture
            that any program has trained without the class
        --output DIR  folder for the results (default: RUN)
        """,
        checks=tuple(trust.CHECKS),
        prune_below=settings.Number(0.0, 1.0),
    )
    group.add_fields(trust.TrustSettings, *_SETTINGS, defaults=defaults)
    parser.add_inputs()
    return parser


def run(options: argparse.Namespace) -> None:
    work_on = Run(options)
    folder = work_on.folder
    output = Path(options.output or folder)
    given = options.retrained or ()
    files = [entry.rpartition("=") for entry in given if "=" in entry and not Path(entry).is_dir()]
    places = [folder, *(Path(e) for e in given if Path(e).is_dir() or "=" not in e)]
    for place in places:
        if not place.is_dir():
            raise FileNotFoundError(
                f"the folder {place} of retrained models does not exist (a file: CLASS=FILE)"
            )
    check_writable(output)
    work_on.check_data()
    net, classifier = work_on.network()
    data = work_on.images(classifier)
    classes = work_on.class_groups(options.classes, data.classes)
    external: dict[Forget, list[nn.Module]] = {}
    for label, _, path in files:
        model = copy.deepcopy(classifier).cpu().eval()
        load_weights(model, path)
        (forget,) = work_on.class_groups([label], data.classes)
        external.setdefault(forget, []).append(model)
    made_for = {
        "method": "retrained",
        "original": fingerprint(classifier),
        **data_identity(data.train, "training data"),
    }
    device = next(net.parameters()).device
    filters = sha256((folder / FILTERS_NAME).read_bytes())
    identity = {"filters": filters, "prune_below": options.prune_below}
    chosen = trust.TrustSettings(
        **config_changes(options, trust.TrustSettings, *_SETTINGS),
        relearn_images=tuple(options.relearn_images),
    )
    reader = ImageReader(data.train, chosen.samples, chosen.seed, options.workers)

    def baked(forget: Forget) -> nn.Module:
        labels, others = list(classes_in(forget)), None
        if work_on.measures_statistics(net, labels):  # as `wfnet bake`
            others = reader.without(*labels).images
        return net.bake(labels, options.prune_below, images=others)

    result = trust.run_checks(
        baked,
        net.bake(None),
        data,
        execution_order(net.model, list(net.masked_layers)),
        list(range(net.num_classes)) if classes is None else classes,
        options.checks,
        lambda label: [
            model.to(device)
            for model in (
                *retrained_models(label, places, classifier, made_for),
                *external.get(label, ()),
            )
        ],
        chosen,
        output,
        identity=identity,
        advice=lambda label: (
            f"`wfnet baseline {folder} --methods retrained --classes {written(label)}` makes one, "
            f"and with `--set retrained.seed=1 --output {folder}/baselines_1` another"
        ),
        workers=options.workers,
        progress=not options.quiet,
    )
    print(result.table())
    for sentence in result.missing()[:1]:
        print(f"\nnot everything could be measured. {sentence}")
    for sentence in result.left_out():
        print(sentence)
    print(f"\nin {output}: trust.json, trust.csv")


def retrained_models(
    label: Forget, folders: Sequence[Path], classifier: nn.Module, identity: Mapping[str, Any]
) -> list[nn.Module]:
    """Models that ``wfnet baseline`` has retrained without a class, in evaluation mode on the CPU.

    Args:
        label: the class or classes.
        folders: searched with all their sub-folders for ``class_<number>.safetensors``.
        classifier: the original.
        identity: what the files say of the original and its training images. Models of another
            one (of images which may be test images here) are passed over.
    """
    found: dict[str, nn.Module] = {}
    name = f"class_{written(label)}.safetensors"
    for path in sorted(p for folder in folders for p in folder.rglob(name)):
        theirs = json.loads(read_metadata(path).get("identity", "{}"))
        if any(theirs.get(name) != value for name, value in identity.items()):
            continue
        model = copy.deepcopy(classifier).cpu()
        model.load_state_dict(read_tensors(path))
        found.setdefault(fingerprint(model), model.eval())  # a copied file is no second model
    return list(found.values())
