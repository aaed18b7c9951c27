"""Trust checks of a demo run: what forgetting withstands, beside retrained networks.

    wfnet demo --output demo
    python benchmarks/trust.py demo --output benchmarks/results/trust_digits_resnet.json
    python benchmarks/trust.py demo --cut-output --classes 0 3 --prune-below \\
        --output benchmarks/results/trust_digits_resnet_cut.json

Trains networks without each class (several seeds, the demo's settings; kept in ``RUN/retrained``,
where a second call finds them), runs all checks, and the removability of exports that are pruned at
several thresholds. With ``--cut-output`` the class is also cut from the head of every export.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wfnet import models, training, trust
from wfnet.baselines import BaselineConfig, BaselineModels
from wfnet.benchmarking.timing import about
from wfnet.cli.classifier import load_weights
from wfnet.data import open_data
from wfnet.fusion.trace import execution_order
from wfnet.network import WFNet
from wfnet.services.files import write_json

PRUNED = ("acc_f", "acc_r", "acc_f_batchnorm_all", "acc_f_batchnorm_retain", "acc_f_equalised",
          "acc_f_base_norms", "acc_f_offset", "acc_f_recovered", "auc_logit")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path, help="folder of `wfnet demo`")
    parser.add_argument("--classes", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--seeds", type=int, default=3, help="retrained networks of each class")
    parser.add_argument("--prune-below", type=float, nargs="*", default=[0.1, 0.3, 0.6])
    parser.add_argument("--cut-output", action="store_true", help="as of `wfnet bake`")
    parser.add_argument("--relearn-steps", type=int, default=50)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    options = json.loads((arguments.run / "config.json").read_text())["options"]
    kind = options["model"].removeprefix("small/")
    data = open_data("digits", seed=options["seed"])
    base = models.create(kind, data.num_classes)
    load_weights(base, arguments.run / "base.safetensors")
    net = WFNet.from_pretrained(arguments.run, base.eval())
    original = net.bake(None)
    layers = execution_order(net.model, list(net.masked_layers))
    levels = retrained(kind, original, data.train, arguments.run, arguments.seeds)
    cut = {"cut_output": True} if arguments.cut_output else {}
    settings = trust.TrustSettings(relearn_steps=arguments.relearn_steps)

    def check(checks: list[str] | None, below: float) -> trust.TrustResult:
        return trust.run_checks(
            lambda label: net.bake(label, below, **cut), original, data, layers,
            arguments.classes, checks, levels, settings,
            arguments.run / f"trust_{below:g}{'_cut' if cut else ''}",
            identity={"prune_below": below, **cut},
        )  # fmt: skip

    result = check(None, 0.0)
    print(result.table())
    pruned = {"0": _removal(result)}
    for below in arguments.prune_below:
        found = check(["removal"], below)
        pruned[f"{below:g}"] = _removal(found)
        print(f"gates below {below:g} at 0: {pruned[f'{below:g}']}")
    write_json(
        arguments.output,
        {
            **about("cpu", ["benchmarks/trust.py", *sys.argv[1:]]),
            "units": "fractions in [0, 1], means over classes; kl and js in nats; seconds on a "
            "shared machine",
            "data": data.name,
            "network": kind,
            "classes": arguments.classes,
            "retrained_per_class": arguments.seeds,
            "settings": asdict(settings),
            **cut,
            "seconds": round(sum(record.seconds for record in result.records), 1),
            "means": _rounded(result.means()),
            "removal_by_prune_below": _rounded(pruned),
            "by_class": [
                {"class": r.index, "check": r.check, "forgetful": _rounded(r.forgetful)}
                for r in result.records
            ],
        },
    )


def retrained(
    kind: str, original: nn.Module, train: Any, folder: Path, seeds: int
) -> Callable[[int], list[nn.Module]]:
    """Class -> networks trained without it, as the demo trains, from other first weights."""
    made = [
        BaselineModels(
            "retrained",
            folder / "retrained" / f"seed_{seed}",
            original,
            train,
            BaselineConfig(seed=seed),
            training.SMALL_MODEL_SETTINGS[kind],
            lambda seed=seed: models.create(kind, 10, seed=seed),
        )
        for seed in range(1, seeds + 1)
    ]
    return lambda label: [one(label) for one in made]


def _removal(result: trust.TrustResult) -> dict[str, float]:
    """Means over classes, with the share of rows that are exactly 0."""
    rows = result.means()["removal"]
    details = [r.details["rows"] for r in result.records if r.check == "removal"]
    found = {name: rows[name]["forgetful"] for name in PRUNED if name in rows}
    return found | {"zero_rows": sum(d["zero_rows"] / d["rows"] for d in details) / len(details)}


def _rounded(value: Any) -> Any:
    """Numbers to four decimals, in whatever they stand."""
    if isinstance(value, dict):
        return {name: _rounded(inner) for name, inner in value.items()}
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
