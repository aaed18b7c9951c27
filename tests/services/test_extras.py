import os
import subprocess
import sys
from pathlib import Path

import pytest

from wfnet.services import extras


class Fisher:
    name = "fisher"


def test_other_packages_extend_this_one(monkeypatch, caplog):
    class Entry:
        def __init__(self, name, loaded):
            self.name = self.value = name
            self.load = lambda: loaded() if name == "broken" else loaded

    entries = [
        *(Entry("fisher", Fisher), Entry("twice", Fisher()), Entry("wrong", 3)),
        Entry("broken", lambda: 1 / 0),
    ]
    monkeypatch.setattr(extras, "entry_points", lambda group: entries)
    assert isinstance(extras.registry("wfnet.baselines", Fisher, ())["fisher"], Fisher)
    assert [record.args[0] for record in caplog.records] == ["twice", "wrong", "broken"]


PLUGIN = """
import torch
from wfnet.data import TensorImages
from wfnet.trust.attacks.attack import attack
from wfnet.baselines import BaselineConfig, Method
from wfnet.untraining.objectives import BalancedObjective

class Nothing(Method):
    name = "nothing"

    def unlearn(self, origin, label, config: BaselineConfig):
        return origin.original

steady = attack("steady", "nothing")(lambda model, subject: model)
half = lambda config: BalancedObjective(0.5, True)

def spots(data_dir):
    images = TensorImages(torch.rand(40, 1, 8, 8), torch.arange(40) % 2, ["a", "b"])
    return images, images
"""
USE = """
import plugin  # first, as a user may: its packages and wfnet import each other
import torch, wfnet
from torch import nn
from wfnet.baselines import METHODS
from wfnet.data import open_data
from wfnet.trust.attacks import ATTACKS

assert "steady" in ATTACKS and "nothing" in METHODS
data = open_data("spots")
net = wfnet.WFNet(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 2)), 2)
config = wfnet.UntrainConfig(objective="half", steps=1, batch_size=4)
print(len(data.train), wfnet.untrain(net, data.train, config=config, progress=False).steps)
"""


def test_entry_points_of_an_installed_package(tmp_path: Path):
    (tmp_path / "plugin.py").write_text(PLUGIN)
    about = tmp_path / "plugin-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1\n")
    groups = {"attacks": "steady", "baselines": "Nothing", "objectives": "half", "data": "spots"}
    lines = [f"[wfnet.{group}]\n{name} = plugin:{name}\n" for group, name in groups.items()]
    (about / "entry_points.txt").write_text("".join(lines))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", USE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["36", "1"], done.stderr


def test_a_missing_package_is_named_by_its_extra():
    with pytest.raises(ImportError, match=r"pip install wfnet\[fast\]"):
        extras.require("no_such_package.part", "fast")
