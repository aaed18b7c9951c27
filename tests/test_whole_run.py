"""benchmarks/whole_run.py and its folders of images, at a size that takes seconds."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import image_folders
import whole_run
from image_folders import ImageFolder

from wfnet.cli import main as wfnet
from wfnet.cli.classifier import create_classifier
from wfnet.data import open_data
from wfnet.services.files import read_tensors

TINY = ["--networks", "small/resnet", "--image-size", "16", "--epochs", "1", "--samples", "48",
        "-b", "8", "-M", "2", "--loop-steps", "2", "--workers", "0", "--device", "cpu"]  # fmt: skip


def contents(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*.jpg")}


# -- images ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [3, 101])
def test_a_folder_holds_what_was_wanted_and_is_made_once(tmp_path, classes, capsys):
    wanted = ImageFolder(classes, 2, 1, 1, 16, 16)
    root, seconds = image_folders.make(wanted, tmp_path / "one", 2)
    assert seconds > 0
    found = contents(root)
    assert len(found) == wanted.files == 4 * classes
    assert len(set(found.values())) == len(found), "two files are equal"
    assert sum(map(len, found.values())) < wanted.most_bytes
    data = open_data(root, image_size=16, crop_pct=1.0)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [
        2 * classes, classes, classes,
    ]  # fmt: skip
    assert data.num_classes == classes
    assert torch.equal(data.train.labels.bincount(), torch.full((classes,), 2))
    with Image.open(next(root.rglob("*.jpg"))) as image:
        assert (image.size, image.mode) == ((16, 16), "RGB")
    # The same files, whoever writes them; and they are not written again.
    other, _ = image_folders.make(wanted, tmp_path / "other", 1)
    assert contents(other) == found
    assert image_folders.make(wanted, tmp_path / "one", 2) == (root, None)
    assert "from an earlier run" in capsys.readouterr().out


def test_a_folder_that_was_interrupted_is_made_anew(tmp_path, monkeypatch):
    wanted = ImageFolder(2, 1, 1, 1, 16, 16)
    root, _ = image_folders.make(wanted, tmp_path, 1)
    expected = contents(root)
    (root / "complete.json").unlink()
    Path(root, "train", "0000", "00000.jpg").unlink()
    Path(root, "train", "0001", "99999.jpg").touch()
    assert image_folders.make(wanted, tmp_path, 1)[1] is not None
    assert contents(root) == expected


def test_what_cannot_be_made_is_said_before_anything_is_written(tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(ValueError, match="choose another --scratch, or fewer images"):
        image_folders.make(ImageFolder(2, 1, 1, 1), tmp_path, 1)
    assert list(tmp_path.iterdir()) == []
    for bad, message in (
        ({"classes": 1}, "2 classes"), ({"val": 0}, "an image of each"), ({"width": 4}, "8 pixels"),
        ({"width": 32, "height": 16}, "characters are square"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            ImageFolder(**{"classes": 2, "train": 1, "val": 1, "test": 1, **bad})


def test_characters_look_like_their_classes(tmp_path):
    """Rows and columns that hold strokes differ between classes, and hardly within one."""
    root, _ = image_folders.make(ImageFolder(2, 20, 1, 1, 32, 32, noise=0.0), tmp_path, 1)
    data = open_data(root, image_size=32, crop_pct=1.0, mean=(0, 0, 0), std=(1, 1, 1))
    images = torch.stack([data.train[i][0].mean(0) for i in range(len(data.train))])
    contrast = (images - images[:, :1, :1]).abs()  # strokes are light or dark
    middle = contrast[:, 14:18, 15:17].mean((1, 2)) / contrast.flatten(1).amax(1)
    zeros, ones = (middle[data.train.labels == label] for label in (0, 1))
    assert ones.median() > zeros.median() + 0.3


# -- settings --------------------------------------------------------------------------------------


def test_a_thousand_classes_read_every_image_once():
    args = whole_run.parse(["--classes", "1000", "--networks", "resnet50"])
    config, wanted = args.config, args.wanted
    assert (config.batch_size, config.label_expansion) == (256, 5)
    samples = config.steps * config.batch_size // 2 * (1 + config.label_expansion)
    assert 0 <= samples - whole_run.SAMPLES < 768
    assert wanted.train * wanted.classes >= config.steps * config.batch_size // 2
    assert not wanted.shows_characters
    assert whole_run.cache_of(args) == []
    assert whole_run.reading(args, Path("there"))[-2:] == ["--crop-pct", "1"]
    larger = whole_run.parse(["--classes", "1000", "--file-size", "500", "375"])
    assert "--crop-pct" not in whole_run.reading(larger, Path("there"))


def test_characters_have_the_settings_of_the_recipe():
    args = whole_run.parse(["--device", "cpu"])
    assert (args.config.steps, args.config.batch_size) == (3000, 32)
    assert (args.wanted.train, args.wanted.val, args.wanted.test) == (144, 16, 40)
    assert whole_run.cache_of(args) == ["--cache", "host"]
    assert not args.amp


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--columns", "eager"], "is not wfnet/BACKEND/HOW"),
        (["--columns", "wfnet/magic/captured"], "is not wfnet/BACKEND/HOW"),
        (["--classes", "1"], "--classes must be at least 2"),
        (["--workers", "-1"], "--workers must be at least 0"),
        (["-b", "7"], "batch_size must be even"),
        (["--file-size", "300", "200"], "characters are square"),
        (["--scratch", "there", "--output", "there/in.json"], "no place for results"),
    ],
)
def test_bad_arguments_are_one_sentence(words, message, capsys):
    with pytest.raises(SystemExit):
        whole_run.parse(words)
    error = capsys.readouterr().err.splitlines()[-1]
    assert "error: " in error
    assert message in error


def test_workers_leave_room_in_shared_memory(monkeypatch, capsys):
    batch = 128 * 3 * 224**2
    for free, expected in ((100 * batch, 15), (10 * batch, 4), (0, 0)):
        usage = shutil.disk_usage("/")._replace(free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda path, usage=usage: usage)
        assert whole_run.fitting_workers(15, 128, 224) == expected
    assert "4 of 15 workers" in capsys.readouterr().out


# -- runs ------------------------------------------------------------------------------------------


@pytest.fixture
def in_process(monkeypatch):
    """Commands without a Python of their own; a list of those that are to fail."""
    failing = []

    def command(report, record, name, words):
        record.setdefault("commands", {})[name] = {"command": report.shown(words)}
        if name in failing:
            raise whole_run.Failed(f"wfnet {name} ended with status 1")
        assert wfnet([*map(str, words), "--threads", "1"]) == 0
        return 30.0

    monkeypatch.setattr(whole_run, "command", command)
    return failing


@pytest.mark.parametrize("classes", [4, 102])
def test_a_whole_run(tmp_path, in_process, classes, capsys):
    output = tmp_path / "results" / "whole.json"
    returned = whole_run.main([
        *TINY, "--classes", f"{classes}", "--per-class", "10", "--scratch",
        str(tmp_path / "scratch"), "--output", str(output),
    ])  # fmt: skip
    written = json.loads(output.read_text())
    assert written == json.loads(json.dumps(returned))
    assert {"commit", "device", "torch", "command"} <= written.keys()
    assert str(tmp_path) not in json.dumps([run["commands"] for run in written["runs"]])
    assert output.with_suffix(".png").stat().st_size > 5000
    (run,) = written["runs"]
    assert run["status"] == "passed"
    ours = run["untraining"]
    assert (ours["steps"], ours["samples"]) == (4, 48)
    assert list(ours["spent"]) == list(whole_run.PURPOSES)
    assert sum(ours["spent"].values()) == pytest.approx(30, abs=0.1)
    further = run["loop"]["extrapolated"]
    assert len(run["loop"]["milliseconds"]) == run["loop"]["measured_steps"] == 2
    assert further["samples_in_the_same_time"] == pytest.approx(
        30 * run["loop"]["samples_per_second"]
    )
    assert further["share_of_the_run"] == pytest.approx(further["samples_in_the_same_time"] / 48)
    assert ("quality" in run) == ("base_accuracy" in run) == (classes == 4)
    if classes == 4:
        assert run["quality"]["test_images"] == 8
        assert set(run["commands"]) == {"train", "untrain", "evaluate"}
    printed = capsys.readouterr().out
    assert "48 expanded samples in 30.0 s" in printed
    assert "extrapolated" in printed
    left = [path.name for path in (tmp_path / "scratch").iterdir()]
    assert len(left) == 1
    assert left[0].startswith("images-")


def test_a_command_that_fails_costs_no_other_network_and_nothing_that_was_measured(
    tmp_path, in_process
):
    in_process.append("evaluate")
    output = tmp_path / "whole.json"
    with pytest.raises(SystemExit, match="small/resnet: wfnet evaluate ended with status 1"):
        whole_run.main([
            *TINY, "--networks", "small/resnet", "small/vgg", "--classes", "3", "--per-class", "10",
            "--scratch", str(tmp_path / "scratch"), "--output", str(output),
        ])  # fmt: skip
    runs = json.loads(output.read_text())["runs"]
    assert [run["network"] for run in runs] == ["small/resnet", "small/vgg"]
    assert all(run["untraining"]["samples"] == 48 for run in runs)
    assert output.with_suffix(".png").exists()


def test_a_command_is_a_process_and_its_end_is_recorded(tmp_path):
    args = whole_run.parse([*TINY, "--classes", "3", "--output", str(tmp_path / "whole.json"),
                            "--scratch", str(tmp_path / "scratch")])  # fmt: skip
    report = whole_run.Report(args, args.wanted, args.config)
    report.content["runs"].append(record := {"network": "none"})
    words = ["untrain", "--data-dir", args.scratch / "nothing", "--model", "small/resnet"]
    with pytest.raises(whole_run.Failed, match="wfnet untrain ended with status"):
        whole_run.command(report, record, "untrain", words)
    (run,) = json.loads((tmp_path / "whole.json").read_text())["runs"]
    entry = run["commands"]["untrain"]
    assert entry["command"] == "wfnet untrain --data-dir SCRATCH/nothing --model small/resnet"
    assert entry["status"].startswith("failed with status")
    assert entry["seconds"] > 0


def test_copies_that_do_not_fit_are_made_of_fewer_images_or_not_at_all(monkeypatch):
    args = whole_run.parse([*TINY, "--classes", "4"])
    args.network = "small/resnet"
    record = {"untraining": {"seconds": 10.0, "samples": 480}}
    whole = whole_run.loop(args, record)
    assert whole["samples_of_a_step"] == 12
    monkeypatch.setattr(whole_run.peers, "copied_bytes", lambda net, samples: samples * 2**28)
    assert whole_run.loop(args, record)["samples_of_a_step"] == 6
    monkeypatch.setattr(whole_run.peers, "copied_bytes", lambda net, samples: samples * 2**30)
    with pytest.raises(ValueError, match="need more than 2 GiB"):
        whole_run.loop(args, record)


def test_a_random_network_keeps_its_activations_in_bounds_and_every_branch(tmp_path):
    pytest.importorskip("timm")
    wanted = ImageFolder(101, 1, 1, 1, 32, 32)
    images, _ = image_folders.make(wanted, tmp_path, 1)
    args = whole_run.parse(["--classes", "101", "--image-size", "32"])
    args.network = "resnet18"
    whole_run.random_base(args, images, tmp_path / "base")
    tensors = read_tensors(tmp_path / "base" / "base.safetensors")
    model = create_classifier("resnet18", 101, in_channels=3)
    model.load_state_dict(tensors)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert all(norm.weight.all() for norm in norms)
    assert all((norm.running_var != 1).any() for norm in norms)
    data = open_data(images, image_size=32, crop_pct=1.0)
    batch = torch.stack([data.train[index][0] for index in range(16)])
    with torch.no_grad():
        assert 0.01 < model.eval()(batch).std() < 10
