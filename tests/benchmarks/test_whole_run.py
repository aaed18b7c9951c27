"""benchmarks/whole_run.py and its folders of images, at a size that takes seconds."""

import json
import shutil
from pathlib import Path

import image_folders
import pytest
import torch
import whole_run
from image_folders import ImageFolder
from PIL import Image

from wfnet.cli import main as wfnet
from wfnet.data import open_data

TINY = "--network small/resnet --image-size 16 --samples 48 -b 8 -M 2 --workers 0 --device cpu"
TINY = TINY.split()


def contents(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*.jpg")}


def test_a_folder_holds_what_was_wanted_and_is_made_once(tmp_path):
    classes = 3
    wanted = ImageFolder(classes, 2, 1, 1, 16)
    root = image_folders.make(wanted, tmp_path / "one", 2)
    found = contents(root)
    assert len(found) == wanted.files == 4 * classes
    assert len(set(found.values())) == len(found), "two files are equal"
    data = open_data(root, image_size=16, crop_pct=1.0)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [
        2 * classes,
        classes,
        classes,
    ]
    assert torch.equal(data.train.labels.bincount(), torch.full((classes,), 2))
    with Image.open(next(root.rglob("*.jpg"))) as image:
        assert (image.size, image.mode) == ((16, 16), "RGB")
    # The same files, whoever writes them; one that was interrupted is made anew, no other.
    assert contents(image_folders.make(wanted, tmp_path / "other", 1)) == found
    Path(root, "train", "0000", "00000.jpg").write_bytes(b"kept")
    assert contents(image_folders.make(wanted, tmp_path / "one", 2)) != found
    Path(root, "complete.json").unlink()
    assert contents(image_folders.make(wanted, tmp_path / "one", 2)) == found


def test_what_cannot_be_made_is_said_before_anything_is_written(tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(ValueError, match="choose another --scratch, or fewer images"):
        image_folders.make(ImageFolder(2, 1, 1, 1), tmp_path, 1)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="2 classes, an image of each in every part and 8"):
        ImageFolder(2, 1, 0, 1)


def test_a_thousand_classes_read_every_image_once():
    args = whole_run.parse(["--classes", "1000", "--network", "resnet50"])
    config, wanted = args.config, args.wanted
    assert (config.batch_size, config.label_expansion) == (256, 5)
    samples = config.steps * config.batch_size // 2 * (1 + config.label_expansion)
    assert 0 <= samples - whole_run.SAMPLES < 768
    assert wanted.train * wanted.classes >= config.steps * config.batch_size // 2


def test_workers_leave_room_in_shared_memory(monkeypatch):
    batch = 128 * 3 * 224**2
    for free, expected in ((100 * batch, 15), (10 * batch, 4), (0, 0)):
        usage = shutil.disk_usage("/")._replace(free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda path, usage=usage: usage)
        assert whole_run.fitting_workers(15, 128, 224) == expected


def test_a_whole_run(tmp_path, monkeypatch):
    def command(args, record, *words):
        """Without a Python of its own."""
        record["commands"][words[0]] = {"status": wfnet([*map(str, words), "--threads", "1"])}
        return 30.0

    monkeypatch.setattr(whole_run, "command", command)
    places = ["--scratch", str(tmp_path / "scratch"), "--output", str(tmp_path / "whole.json")]
    returned = whole_run.main([*TINY, "--classes", "4", *places])
    written = json.loads((tmp_path / "whole.json").read_text())
    assert written == json.loads(json.dumps(returned))
    ours = written["untraining"]
    assert (ours["steps"], ours["samples"]) == (4, 72)  # 18 a step: compound rows are 6
    assert list(ours["spent"]) == list(whole_run.PURPOSES)
    assert sum(ours["spent"].values()) == pytest.approx(30, abs=0.1)
    assert written["commands"]["untrain"]["status"] == 0
    assert [path.name[:7] for path in (tmp_path / "scratch").iterdir()] == ["images-"]


def test_a_command_is_a_process_and_its_failure_ends_the_run(tmp_path):
    output = tmp_path / "whole.json"
    args = whole_run.parse([*TINY, "--classes", "3", "--output", str(output)])
    record = {"commands": {}}
    assert whole_run.command(args, record, "--version") > 0
    with pytest.raises(SystemExit, match="wfnet evaluate ended with status 2"):
        whole_run.command(args, record, "evaluate", args.scratch / "nothing")
    written = json.loads(output.read_text())["commands"]["evaluate"]
    assert (written["command"], written["status"]) == ("wfnet evaluate SCRATCH/nothing", 2)
