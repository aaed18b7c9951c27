"""benchmarks/time_to_quality.py: it stops where it should, and says what is not reached."""

import json

import pytest
import time_to_quality as bench


@pytest.fixture
def records(monkeypatch):
    """What validations find, step by step; nothing is trained."""
    found = []

    def untrain(net, train, validation, config, progress, log):
        for number, record in enumerate(found):
            log({"step": 10 * number + 10, **record})

    accuracies = {"acc_r": 99.0, "acc_f": 0.0, "original_acc_r": 99.5, "confirmed": True}
    monkeypatch.setattr(bench.wfnet, "untrain", untrain)
    monkeypatch.setattr(bench, "fit_classifier", lambda *args, **kwargs: None)
    monkeypatch.setattr(bench, "accuracy", lambda model, images: 0.99)
    monkeypatch.setattr(bench, "test_accuracies", lambda net, data: accuracies)
    monkeypatch.setattr(
        bench, "time_baseline", lambda *args: {"acc_r": 99.0, "acc_f": 0.0, "cpu_seconds": 5.0}
    )
    return found


def test_a_run_ends_at_the_first_validation_that_is_good_enough(records, tmp_path, capsys):
    records += [{"acc_r": 0.97, "acc_f": 0.0}, {"acc_r": 0.985, "acc_f": 0.004}]
    records += [{"acc_r": 0.99, "acc_f": 0.0}]
    output = tmp_path / "found.json"
    call = ["--images", "2", "--baselines", "random_labels", "--output", str(output)]
    for seed in "010":  # runs of another seed stay in the file
        bench.main([*call, "--seeds", seed, "--ways", "quick", "last stage"])
    rows = json.loads(output.read_text())["summary"]
    ways = ["quick", "last stage", bench.TO_END, "random_labels"]
    assert [row["way"] for row in rows] == ways
    assert [row["images_a_class"] for row in rows] == [None, None, 2, None]
    assert [row["seeds"] for row in rows] == [2, 2, 2, 2]
    quick = rows[0]
    assert (quick["steps"], quick["reached"], quick["confirmed"]) == (20, 2, 2)
    assert quick["samples"] == 20 * 16 * 4
    assert (rows[2]["steps"], rows[2]["confirmed"]) == (30, 2)  # that way runs to its end
    assert "reached" not in rows[2]
    assert "random_labels: 5.00 CPU s, a network a class" in capsys.readouterr().out


def test_what_is_not_reached_is_said(records, tmp_path, capsys):
    records += [{"acc_r": 0.99, "acc_f": 0.02}]
    call = ["--seeds", "0", "--ways", "a quarter of the steps", "--output"]
    content = bench.main([*call, str(tmp_path / "found.json")])
    assert content["summary"][0]["reached"] == 0
    assert content["runs"][0]["of_steps"] == 150
    assert "NOT REACHED" in capsys.readouterr().out
