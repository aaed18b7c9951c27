"""filters and a model card for the Hugging Face Hub

Write filters with a model card (base and its fingerprint, preprocessing, classes, accuracies, trust
checks), and upload them. Nothing else of the run leaves this machine.

example:
  wfnet push runs/r50 --output card               (look at it first: nothing is uploaded)
  wfnet push runs/r50 --repo user/r50-forgets --license apache-2.0 --private

Then, anywhere: wfnet.WFNet.from_pretrained("user/r50-forgets"). Log in with `hf auth login`.
"""

from __future__ import annotations

import argparse

from wfnet import hub
from wfnet.cli.classifier import pretrained_name
from wfnet.cli.inputs import Run, image_settings
from wfnet.cli.options import Parser, add_command


def add_parser(commands: argparse._SubParsersAction) -> Parser:
    parser = add_command(commands, run, "nothing was uploaded", "RUN [options]")
    group = parser.group("push")
    group.add_all(
        """
        --repo USER/NAME  repository of the Hub; made if there is none
        --output DIR  write the files there, too; without --repo nothing is uploaded
        --private  make a new repository private
        --license NAME  of the filters, as the Hub calls it, such as apache-2.0
        --base NAME  where the network is, so that nobody has to say it again: resnet50.a1_in1k
            (timm), hf-hub:user/repo (timm) or hf:user/repo (transformers); known for networks with
            --pretrained
        """
    )
    group.add_seed("of splits and draws")
    parser.add_inputs()
    return parser


def run(options: argparse.Namespace) -> None:
    if not options.repo and not options.output:
        raise ValueError("say where: --repo USER/NAME uploads, --output DIR writes the files only")
    work_on = Run(options)
    _, classifier = work_on.network()  # refuses a base that the filters do not belong to
    settings = image_settings(options, classifier)
    if settings.pop("transform", None) is not None:
        settings["transform"] = "as the base's own"
    about = {
        "base": options.base or (pretrained_name(classifier) if options.pretrained else None),
        "license": options.license,
        "preprocessing": settings,
    }
    if options.output:
        hub.save_for_hub(work_on.folder, options.output, options.repo or "user/repo", **about)
        print(f"{options.output}: what goes to the Hub; read {hub.CARD_NAME} first")
    if options.repo:
        url = hub.push_to_hub(work_on.folder, options.repo, private=options.private, **about)
        print(f"{url}: uploaded")
