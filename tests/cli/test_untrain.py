"""`wfnet untrain`: runs, resumed runs, the plan with its memory, logs, checkpoints."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

from wfnet.cli import main
from wfnet.untraining.optimizers import RowAdam
from wfnet.untraining.run_state import CHECKPOINT_NAME, read_checkpoint


@pytest.fixture
def words(arguments):
    return ["untrain", *arguments, "--quiet"]


def test_recipe_paper_on_a_transformer(image_folder, tmp_path, quick_options, call, capsys):
    pytest.importorskip("timm")
    folder = tmp_path / "vit"
    network = ["--model", "small/vit", "--model-kwargs", "width=32", "depth=1"]
    words = [*network, "--recipe", "paper", "--output", folder, *quick_options]
    call("untrain --steps 2 --data-dir", image_folder, *words)
    assert "small/vit has random weights" in capsys.readouterr().err
    config = json.loads((folder / "wf_config.json").read_text())
    assert (config["normalize_gate"], config["alpha_init"]) == (False, 3)
    call("evaluate --no-figures -j0", folder)  # random weights come from the seed


def test_recipe_quick_from_a_chosen_stage(words, tmp_path, call, capsys):
    call(*words, "--recipe", "quick", "--mask-from", "auto", "--output", tmp_path / "run")
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    first, *_ = record["mask_depths"]
    assert (first["mask_from"], first["stages"]) == ("layer3", 1)
    assert f"layer3 on (1 of the last stages, {first['steps']} steps)" in capsys.readouterr().out
    chosen = record["options"]["mask_from"]
    assert chosen == next((t["mask_from"] for t in record["mask_depths"] if t["enough"]), "all")
    layers = {name.split(".")[0] for name in load_file(tmp_path / "run" / "wf_model.safetensors")}
    assert ("conv1" in layers) == (chosen == "all")
    assert record["result"]["spent"]["features"] > 0 or chosen == "all"


def test_a_resumed_run_ends_as_an_uninterrupted_one(words, tmp_path, monkeypatch, capsys, fails):
    words += ["--steps", "7", "--checkpoint-every", "2", "--output"]
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    assert main([*words, whole]) == 0
    step, taken, stop = RowAdam.step, [], 1

    def interrupted_step(self, *args, **kwargs):
        taken.append(None)
        if len(taken) == stop:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(RowAdam, "step", interrupted_step)
        assert main([*words, parts]) == 130
        assert "interrupted; no checkpoint was written yet" in capsys.readouterr().err
        stop = 6 + len(taken)
        assert main([*words, parts]) == 130  # what has saved nothing is in nobody's way
    assert f"wfnet untrain --resume {parts}" in capsys.readouterr().err
    fails([*words, parts], "--resume goes on with it")
    fails([*words, parts, "--resume", "--lr", "0.17"], "was written with lr")
    assert main(["untrain", "--resume", parts]) == 0  # every option is remembered
    first, second = (load_file(f"{folder}/wf_model.safetensors") for folder in (whole, parts))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert json.loads((tmp_path / "parts" / "config.json").read_text())["result"]["steps"] == 7


def test_resume_and_force_in_the_output_folder(words, tmp_path):
    folder = tmp_path / "run"
    words += ["--checkpoint-every", "1", "--output", str(folder)]
    assert main([*words, "--steps", "3", "--resume", "auto"]) == 0  # nothing is there yet
    before = (folder / "wf_model.safetensors").read_bytes()
    assert main([*words, "--steps", "3", "--resume"]) == 0  # finished: only loaded
    assert (folder / "wf_model.safetensors").read_bytes() == before
    (folder / "evaluation.json").write_text("of the old filters")
    assert main([*words, "--steps", "1", "--force"]) == 0
    assert not (folder / "evaluation.json").exists()
    assert read_checkpoint(folder / CHECKPOINT_NAME)[1]["step"] == 1


def test_a_dry_run_says_what_memory_the_run_takes(words, tmp_path, capfd):
    folder = tmp_path / "run"
    words += ["--dry-run", "--filter-dtype", "bfloat16", "--grad-accum-steps", "3"]
    assert main([*words, "--output", str(folder)]) == 0
    shown = capfd.readouterr()
    assert not folder.exists()
    assert "168 gates for each of 3 classes" in shown.out
    gates = r"([\d.]+ K?i?B)"
    held = re.search(rf"{gates} in bfloat16, with the optimiser's state {gates}", shown.out)
    assert (held[1], held[2]) == ("1008 B", "3 KiB")  # 168 x 3 entries
    assert "2 images x 3 minibatches, 9 samples each" in shown.out
    weights = re.search(
        r"memory +about \d+ KiB on each device: (\d+) KiB of frozen weights", shown.out
    )
    assert 4 * 19_723 / 1024 <= int(weights[1]) < 90  # and the statistics of BatchNorm
    assert "of a step over 2 images" in shown.out
    assert "profiler" not in shown.err
