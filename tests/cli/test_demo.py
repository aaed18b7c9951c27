import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from wfnet.cli import main
from wfnet.untraining.optimizers import RowAdam

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

OPTIONS = ("--steps", "4", "--train-epochs", "1", "--threads", "1")
FILES = {
    "base.safetensors",
    "wf_config.json",
    "wf_model.safetensors",
    "evaluation.json",
    "evaluation.csv",
    "history.json",
    "history.csv",
    "config.json",
    "forget_3.safetensors",
    "overview.png",
    "accuracy_per_class.png",
    "gates.png",
    "training_curves.png",
    "associations.png",
    "confusion.png",
    "confusion.json",
    "report.html",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished demo and what it printed, made once."""
    folder = tmp_path_factory.mktemp("demo") / "demo"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("wfnet.report.figures.style.DPI", 30)
        assert main(["demo", "--output", str(folder), *OPTIONS]) == 0
    return folder


@pytest.fixture
def demo(made, tmp_path, monkeypatch, capsys):
    """Runs the demo on a copy of the finished one; returns its folder and a function."""
    monkeypatch.setattr("wfnet.cli.demo.draw_report", lambda *args: [])  # seconds each
    monkeypatch.setattr("wfnet.cli.demo.draw_training", lambda *args: [])
    folder = tmp_path / "demo"
    shutil.copytree(made, folder)

    def again(*arguments, status=0):
        capsys.readouterr()
        assert main(["demo", "--output", str(folder), *OPTIONS, *arguments]) == status
        return capsys.readouterr()

    return folder, again


def assert_equal(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


def stage_lines(text, word):
    return [line for line in text.splitlines() if word in line]


def test_everything_is_there(made):
    assert {path.name for path in made.iterdir()} >= FILES
    run = json.loads((made / "config.json").read_text())
    assert set(run["seconds"]) == {"train", "untrain", "evaluate", "bake", "draw"}
    assert all(stage["finished"] for stage in run["stages"].values())
    assert run["options"]["checkpoint"] == "base.safetensors"
    assert run["versions"]["wfnet"]
    evaluated = json.loads((made / "evaluation.json").read_text())
    assert evaluated["settings"]["images"] == 359
    assert len(evaluated["classes"]) == 10


def test_a_second_run_reuses_every_stage(demo):
    folder, again = demo
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    shown = again().out
    assert len(stage_lines(shown, "(reused, took")) == 5
    assert before == {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def test_another_class_to_bake_redoes_only_what_depends_on_it(demo):
    folder, again = demo
    shown = again("--forget", "7").out
    assert len(stage_lines(shown, "(reused, took")) == 3
    assert "forget 3 before, forget 7 now" in shown
    assert (folder / "forget_7.safetensors").is_file()
    assert not (folder / "forget_3.safetensors").exists()


def test_other_filters_leave_nothing_of_the_old_ones(demo, monkeypatch):
    folder, again = demo
    monkeypatch.setattr("wfnet.cli.demo.untrain", interrupt)
    shown = again("--steps", "3", status=130)
    assert "steps 4 before, steps 3 now" in shown.out
    assert "the same command goes on from there" in shown.err
    left = {path.name for path in folder.iterdir() if path.is_file()}
    assert left == {"base.safetensors", "config.json"}


def test_a_changed_file_is_made_again(demo):
    folder, again = demo
    (folder / "evaluation.json").write_text("{}")
    shown = again().out
    assert len(stage_lines(shown, "(reused, took")) == 2
    assert json.loads((folder / "evaluation.json").read_text())["mean"]


def test_force_does_everything_again(demo):
    folder, again = demo
    before = load_file(folder / "wf_model.safetensors")
    shown = again("--force").out
    assert not stage_lines(shown, "(reused, took")
    assert not stage_lines(shown, "replaces")
    assert_equal(load_file(folder / "wf_model.safetensors"), before)  # the same options and seed


def test_an_interrupted_demo_goes_on(demo, monkeypatch):
    folder, again = demo
    step, taken = RowAdam.step, []

    def interrupted_step(self, *args, **kwargs):
        taken.append(None)
        if len(taken) == 18:  # after the validation, and checkpoint, of step 16
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(RowAdam, "step", interrupted_step)
        again("--steps", "20", status=130)
    taken.clear()

    def counted_step(self, *args, **kwargs):
        taken.append(None)
        return step(self, *args, **kwargs)

    monkeypatch.setattr("wfnet.cli.demo.evaluate", interrupt)  # what follows is of no interest
    with monkeypatch.context() as patch:
        patch.setattr(RowAdam, "step", counted_step)
        again("--steps", "20", status=130)
    assert len(taken) == 4
    resumed = load_file(folder / "wf_model.safetensors")
    again("--steps", "20", "--force", status=130)
    assert_equal(load_file(folder / "wf_model.safetensors"), resumed)


def test_the_printed_python_works(demo):
    _, again = demo
    shown = again().out
    code = shown.split("Use it in Python:\n")[1].split("\n\n")[0]
    code = "\n".join(line.strip() for line in code.splitlines())
    scope = {"images": torch.randn(5, 1, 32, 32)}
    exec(code, scope)
    assert scope["logits"].shape == (5, 10)


def test_other_commands_work_on_the_demo(demo, capsys):
    folder, _ = demo
    before = json.loads((folder / "evaluation.json").read_text())
    assert main(["evaluate", str(folder), "--no-figures", "-b", "128", "--no-fuse"]) == 0
    after = json.loads((folder / "evaluation.json").read_text())
    assert after["settings"]["images"] == before["settings"]["images"]
    for name, value in before["mean"].items():
        assert after["mean"][name] == pytest.approx(value, abs=1e-3)
    assert main(["bake", str(folder), "--forget", "7", "--verify", "--images", "9"]) == 0
    assert "verified on 9 test images: equal" in capsys.readouterr().out


def test_a_folder_with_something_else_is_left_alone(demo, capsys):
    folder, again = demo
    run = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**run, "command": "untrain"}))
    assert "a run of `wfnet untrain`" in again(status=2).err
    (folder / "config.json").unlink()
    assert "filters of something else" in again(status=2).err
    assert (folder / "wf_model.safetensors").is_file()
