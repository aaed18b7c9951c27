"""benchmarks/evidence.py: its commands, in their order, once; their results as JSON."""

import json

import evidence
import pytest


def test_a_study_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    asked, stops = [], [4]

    def wfnet(words):
        asked.append(words)
        return len(asked) in stops

    def collect(records):
        group = evidence.run_tables.Group("digits", {}, list(records))
        group.values["quality", "wfnet", "acc_r"] = [98.0, 99.0]
        return [group], []

    monkeypatch.setattr(evidence, "wfnet", wfnet)
    monkeypatch.setattr(evidence, "read_run", lambda folder: {})
    monkeypatch.setattr(evidence.run_tables, "collect", collect)
    call = ["digits", "--networks", "vit", "--seeds", "3", "4", "--recipes", "balanced", "durable"]
    call += ["--folder", str(tmp_path / "runs"), "--output", str(tmp_path)]
    with pytest.raises(SystemExit, match=r"wfnet untrain .*FOLDER/vit-3/durable --force failed"):
        evidence.main(call)
    attacks = ["baseline", "baseline", "trust", "trust", "baseline", "shadows"]
    names = ["train", *("untrain", "evaluate") * 2, *attacks]
    evidence.main(call)
    assert [words[0] for words in asked] == names[:4] + names[3:] + names
    assert asked[0][1:] == ["--data", "digits", "--model", "small/vit", "--seed", "3", "--output",
                            str(tmp_path / "runs/digits/vit-3/base"), "--force"]  # fmt: skip
    count = len(asked)
    evidence.main(call)
    assert len(asked) == count, "what has ended is not repeated"
    text = (tmp_path / "study_digits.json").read_text()
    record = json.loads(text)
    (group,) = record["groups"]
    assert (group["runs"], group["values"][0]["mean"], group["values"][0]["runs"]) == (4, 98.5, 2)
    assert len(record["commands"]) == 2 * len(names)
    assert str(tmp_path) not in text
    evidence.main(["--list", *call[:1], "--folder", str(tmp_path / "runs")])
    assert f"{2 * len(names)} commands ended" in capsys.readouterr().out


def test_a_study_that_is_not_there_is_named(capsys):
    with pytest.raises(SystemExit):
        evidence.main(["cifar"])
    assert "there is no study 'cifar'; studies are digits" in capsys.readouterr().err
