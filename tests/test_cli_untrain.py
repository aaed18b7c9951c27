"""`wfnet untrain`: the plan with its memory, accumulation, 16-bit filters, logs, checkpoints."""

import json
import re
import sys
import types

import pytest
import torch
from safetensors.torch import load_file

from wfnet.cli import main
from wfnet.untraining.checkpoints import Checkpoints

NETWORK = ("--model", "small/resnet", "--model-kwargs", "width=8", "--img-size", "32")
QUICK = ("-b", "4", "-M", "2", "--workers", "0", "--seed", "3")


@pytest.fixture
def arguments(image_folder):
    return ["untrain", "--data-dir", str(image_folder), *NETWORK, *QUICK]


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_a_dry_run_says_what_memory_the_run_takes(arguments, tmp_path, capfd, dtype, size):
    folder = tmp_path / "run"
    call = [*arguments, "--dry-run", "--filter-dtype", dtype, "--grad-accum-steps", "3"]
    assert main([*call, "--output", str(folder)]) == 0
    shown = capfd.readouterr()
    assert not folder.exists()
    assert "168 gates for each of 3 classes" in shown.out
    gates = r"([\d.]+ K?i?B)"
    held = re.search(rf"{gates} in {dtype}, with the optimiser's state {gates}", shown.out)
    assert held[1] == ("2 KiB" if size == 4 else "1008 B")  # 168 x 3 entries
    assert held[2] == ("6 KiB" if size == 4 else "3 KiB")
    assert "2 images x 3 minibatches, 6 samples each" in shown.out
    weights = re.search(r"memory +\d+ KiB on each device: (\d+) KiB of frozen weights", shown.out)
    assert 4 * 19_723 / 1024 <= int(weights[1]) < 90  # and the statistics of BatchNorm
    assert "of a step over 2 images" in shown.out
    assert "profiler" not in shown.err


def test_a_dry_run_without_a_readable_image(arguments, image_folder, tmp_path, capsys):
    for path in (image_folder / "train").glob("*/*"):
        path.write_bytes(b"no image")
    call = [*arguments, "--dry-run", "--max-corrupt", "99", "--output", str(tmp_path / "run")]
    assert main(call) == 2
    assert "corrupt" in capsys.readouterr().err


def test_filters_in_bfloat16_with_accumulated_gradients(arguments, tmp_path):
    folder = tmp_path / "run"
    call = [*arguments, "--steps", "3", "--filter-dtype", "bfloat16", "--grad-accum-steps", "2"]
    call += ["--keep-checkpoints", "1", "--checkpoint-every", "1", "--max-nan-steps", "2"]
    assert main([*call, "--output", str(folder)]) == 0
    filters = load_file(folder / "wf_model.safetensors")
    assert {value.dtype for value in filters.values()} == {torch.bfloat16}
    run = json.loads((folder / "config.json").read_text())
    assert run["options"]["filter_dtype"] == "bfloat16"
    assert run["untraining"]["grad_accum_steps"] == 2
    assert run["untraining"]["max_nan_steps"] == 2
    tensors, _, _ = Checkpoints(folder).load()
    assert tensors["optimizer.exp_avg"].dtype == torch.bfloat16
    assert Checkpoints(folder).older() == []
    assert main(["untrain", "--resume", str(folder)]) == 0
    assert main(["evaluate", str(folder), "-j", "0", "--no-figures"]) == 0


class Wandb(types.ModuleType):
    """What of the package is used."""

    def __init__(self):
        super().__init__("wandb")
        self.started, self.logged, self.finished = [], [], 0

    def init(self, **settings):
        self.started.append(settings)
        return self

    def log(self, record, step):
        self.logged.append((step, record))

    def finish(self):
        self.finished += 1


def test_weights_and_biases(arguments, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    call = [*arguments, "--steps", "4", "--log-wandb", "--output", str(folder)]
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert main(call) == 2
    assert "pip install wfnet[wandb]" in capsys.readouterr().err
    assert not folder.exists()  # before work starts

    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    assert main(call) == 0
    history = json.loads((folder / "history.json").read_text())["history"]
    assert [step for step, _ in wandb.logged] == [record["step"] for record in history]
    assert wandb.logged[-1][1] == history[-1]
    assert wandb.finished == 1
    assert main(["untrain", "--resume", str(folder), "--log-wandb"]) == 0
    first, second = (settings["id"] for settings in wandb.started)
    assert first == second
    assert wandb.started[0]["config"]["label_expansion"] == 2


def test_force_removes_every_checkpoint(arguments, tmp_path):
    folder = tmp_path / "run"
    call = [*arguments, "--checkpoint-every", "1", "--output", str(folder)]
    assert main([*call, "--steps", "3"]) == 0
    assert Checkpoints(folder).older()
    assert main([*call, "--steps", "1", "--force"]) == 0
    assert Checkpoints(folder).load()[1]["step"] == 1
    assert Checkpoints(folder).older() == []
