"""benchmarks/quality.py: its commands, in their order, once; their results as JSON."""

import json
from pathlib import Path

import pytest
import quality


def test_every_network_and_seed_once(tmp_path, monkeypatch):
    asked = []
    row = {"acc_r": 0.9, "acc_f": 0.1, "zrf": 0.5}
    result = {"steps": 5, "best_step": 4, "stopped_early": False, "seconds": 1.0}

    def wfnet(words):
        """Writes what the command does."""
        asked.append(words)
        if words[0] == "untrain":
            folder = Path(words[words.index("--output") + 1])
            folder.mkdir(parents=True)
            (folder / "config.json").write_text(json.dumps({"result": result}))
        if words[0] == "evaluate":
            content = {"original": row, "mean": {**row, "acc_r": 0.8}, "classes": [row]}
            (Path(words[1]) / "evaluation.json").write_text(json.dumps(content))

    monkeypatch.setattr(quality, "wfnet", wfnet)
    output, folder = str(tmp_path / "quality.json"), str(tmp_path / "runs")
    call = ["--networks", "vit", "--seeds", "3", "4", "--folder", folder, "--output", output]
    call += ["--untrain", "--recipe", "paper"]
    quality.main(call)
    assert [words[0] for words in asked] == ["train", "untrain", "evaluate"] * 2
    train, untrain, _ = asked[:3]
    assert train[1:7] == ["--data", "digits", "--model", "small/vit", "--seed", "3"]
    assert untrain[-2:] == ["--recipe", "paper"]
    record = json.loads((tmp_path / "quality.json").read_text())
    (summary,) = record["summary"]
    assert (summary["network"], summary["seeds"], summary["steps"]) == ("vit", 2, 5)
    assert summary["acc_r_gap"] == pytest.approx(-10)
    assert str(tmp_path) not in json.dumps(record["runs"])
    quality.main(call)
    assert len(asked) == 6, "what has ended is not repeated"
