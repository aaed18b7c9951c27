import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from wfnet.cli import main
from wfnet.untraining.optimizers import RowAdam

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

OPTIONS = ("--recipe", "balanced", "--steps", "20", "--train-epochs", "1", "--threads", "1")
FILES = ("wf_config.json", "wf_model.safetensors", "evaluation.json", "evaluation.csv") + (
    *("history.json", "history.csv", "config.json", "forget_3.safetensors", "overview.png"),
    *("gates.png", "training_curves.png", "confusion.json", "report.html", "attacks.png"),
    *("base/base.safetensors", "base/config.json"),
)


def interrupt_at(monkeypatch, step):
    """Ctrl-C at a step of untraining; returns what counts the steps."""
    take, taken = RowAdam.step, []

    def counted(self, *args, **kwargs):
        taken.append(None)
        if len(taken) == step:
            raise KeyboardInterrupt
        return take(self, *args, **kwargs)

    monkeypatch.setattr(RowAdam, "step", counted)
    return taken


def test_the_demo_is_made_goes_on_and_is_reused(tmp_path, monkeypatch, capsys, fails):
    monkeypatch.setattr("wfnet.report.figures.style.DPI", 30)
    checks = ("--samples", "20", "--checks", "removal")  # seconds otherwise
    monkeypatch.setattr("wfnet.cli.demo._CHECKS", checks)
    monkeypatch.setattr("wfnet.cli.demo._BESIDE", {"balanced": ("paper", 1)})
    folder = tmp_path / "demo"

    def demo(*more, status=0):
        assert main(["demo", "--output", str(folder), *OPTIONS, *more]) == status
        return capsys.readouterr()

    with monkeypatch.context() as patch:
        interrupt_at(patch, 18)  # after the checkpoint of step 16
        assert "the same command goes on from there" in demo(status=130).err
    with monkeypatch.context() as patch:
        taken = interrupt_at(patch, 99)
        shown = demo().out
        assert len(taken) == 4
    assert all((folder / name).is_file() for name in FILES)
    assert json.loads((folder / "evaluation.json").read_text())["settings"]["images"] == 359
    assert "of 256 predictions equal" in shown

    # The printed Python works.
    code = shown.split("Use it in Python:\n")[1].split("\n\n")[0]
    scope = {"images": torch.randn(5, 1, 32, 32)}
    exec("\n".join(line.strip() for line in code.splitlines()), scope)
    assert scope["logits"].shape == (5, 10)

    resumed = load_file(folder / "wf_model.safetensors")
    for name in ("report._draw", "demo._attack"):  # seconds each
        monkeypatch.setattr(f"wfnet.cli.{name}", lambda *args: None)
    with monkeypatch.context() as patch:
        taken = interrupt_at(patch, 99)
        demo("--forget", "7")
        assert (folder / "forget_7.safetensors").is_file()
        assert not taken  # both networks are reused
        demo("--force")
        assert len(taken) == 20
    made = load_file(folder / "wf_model.safetensors")
    assert all(torch.equal(made[name], value) for name, value in resumed.items())
    demo("--steps", "3")  # other filters replace these
    assert json.loads((folder / "config.json").read_text())["options"]["steps"] == 3

    shutil.rmtree(folder / "base")
    fails(["demo", "--output", folder], "something else")
