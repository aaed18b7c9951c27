"""benchmarks/whole_run.py at a size that takes seconds."""

import json

import pytest
import whole_run

from wfnet.cli import main as wfnet


def test_a_thousand_classes_read_every_image_once():
    args = whole_run.parse(["--classes", "1000", "--network", "resnet50"])
    config = args.config
    assert (config.batch_size, config.label_expansion) == (256, 5)
    samples = config.steps * config.batch_size // 2 * (1 + config.label_expansion)
    assert 0 <= samples - whole_run.SAMPLES < 768
    assert args.images_per_class * 1000 >= config.steps * config.batch_size // 2


def test_a_whole_run(tmp_path, monkeypatch):
    # Without a Python of its own.
    monkeypatch.setattr(whole_run, "run_wfnet", lambda words: wfnet([*words, "--threads", "1"]))
    words = "--network small/resnet --image-size 16 --steps 4 -b 8 -M 2 --workers 0 --classes 4"
    words = [*words.split(), "--device", "cpu", "--scratch", str(tmp_path / "scratch")]
    returned = whole_run.main([*words, "--output", str(tmp_path / "whole.json")])
    written = json.loads((tmp_path / "whole.json").read_text())
    assert written == json.loads(json.dumps(returned))
    ours = written["untraining"]
    assert (ours["steps"], ours["samples"]) == (4, 72)  # 18 a step: compound rows are 6
    assert list(ours["spent"]) == list(whole_run.PURPOSES)
    assert sum(ours["spent"].values()) == pytest.approx(ours["seconds"], abs=0.1)
    (images,) = (tmp_path / "scratch").iterdir()  # the run itself is gone
    files = [path.read_bytes() for path in images.glob("*/*/*.jpg")]
    assert len(files) == len(set(files)) == 4 * (4 + 2 + 1)


def test_a_command_that_fails_ends_the_run(tmp_path):
    with pytest.raises(SystemExit, match="wfnet evaluate ended with status 2"):
        whole_run.run_wfnet(["evaluate", str(tmp_path / "nothing")])
