"""benchmarks/experiments.py: its commands, in their order, once; their results as JSON."""

import json
from pathlib import Path

import experiments
import pytest


@pytest.fixture
def commands(monkeypatch):
    """Commands that are asked for, in place of wfnet; they write what the real ones do."""
    asked = []
    row = {"acc_r": 0.9, "acc_f": 0.1, "zrf": 0.5}
    result = {"steps": 5, "best_step": 4, "stopped_early": False, "seconds": 1.0}
    files = {
        "config.json": {"result": result},
        "evaluation.json": {"original": row, "mean": {**row, "acc_r": 0.8}, "classes": [row]},
        "tables.json": {"table": 1},
        "trust.json": {},
    }

    def run(words):
        asked.append(words)
        folder = Path(words[words.index("--output") + 1] if "--output" in words else words[1])
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content))

    monkeypatch.setattr(experiments, "wfnet", run)
    return asked


def test_quality(tmp_path, commands):
    output, folder = str(tmp_path / "quality.json"), str(tmp_path / "runs")
    call = ["quality", "--networks", "vit", "--seeds", "3", "4", "--folder", folder]
    call += ["--output", output, "--untrain", "--recipe", "paper"]
    experiments.main(call)
    assert [words[0] for words in commands] == ["train", "untrain", "evaluate"] * 2
    train, untrain, _ = commands[:3]
    assert train[1:7] == ["--data", "digits", "--model", "small/vit", "--seed", "3"]
    assert untrain[-2:] == ["--recipe", "paper"]
    record = json.loads((tmp_path / "quality.json").read_text())
    (row,) = record["summary"]
    assert (row["network"], row["seeds"], row["steps"]) == ("vit", 2, 5)
    assert row["acc_r_gap"] == pytest.approx(-10)
    assert str(tmp_path) not in json.dumps(record["runs"])
    experiments.main(call)
    assert len(commands) == 6, "what has ended is not repeated"


def test_tables(tmp_path, commands):
    call = ["tables", "--recipe", "digits/vit", "--folder", str(tmp_path / "runs")]
    call += ["--output", str(tmp_path / "tables.json")]
    call += ["--evaluate", "--published", "mnist/vit_tiny"]
    record = experiments.main(call)
    assert [words[0] for words in commands] == ["train", "untrain", "baseline", "evaluate"]
    assert commands[-1][-4:] == ["--config", "digits/vit", "--published", "mnist/vit_tiny"]
    assert record["table"] == 1


def test_trust(tmp_path, commands):
    call = ["trust", "--run", "demo", "--classes", "0", "--seeds", "7", "--prune-below", "0.1"]
    call += ["--folder", str(tmp_path / "runs"), "--output", str(tmp_path / "trust.json")]
    record = experiments.main([*call, "--trust", "--cut-output"])
    assert [words[0] for words in commands] == ["baseline", "trust", "trust"]
    assert list(record["by_prune_below"]) == ["0", "0.1"]
    assert "--retrained" in commands[1]
    assert commands[2][-3:] == ["--checks", "removal", "--cut-output"]
