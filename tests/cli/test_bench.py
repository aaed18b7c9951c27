import csv
import json

import pytest

from wfnet.benchmarking import steps
from wfnet.cli import main


def test_a_table_with_the_columns_of_timm(call, tmp_path, capsys):
    file = tmp_path / "steps.csv"
    columns = ["eager", "unmasked", "wfnet/eager/fused", "wfnet/eager/captured"]
    call(
        "bench --img-size 32 -b 4 -M 2 --num-classes 5 --repeats 2 --device cpu --quiet",
        *("--model", "small/resnet", "--model-kwargs", "width=8", "--output", file),
        *("--columns", *columns),
    )
    assert "6 expanded samples" in capsys.readouterr().out
    rows = list(csv.DictReader(file.open()))
    assert {"infer_step_time", "param_count", "commit"} <= rows[0].keys()
    assert [row["column"] for row in rows] == columns
    for row in rows[:3]:
        rate = 6e3 / float(row["train_step_time"])
        assert float(row["train_samples_per_sec"]) == pytest.approx(rate, rel=1e-2)
        assert (row["train_batch_size"], row["images"], row["remark"]) == ("6", "2", "")
    assert float(rows[2]["infer_samples_per_sec"]) > 0
    assert 0 < float(rows[2]["share_of_floor"]) < 1.5
    assert "CUDA" in rows[3]["remark"]
    assert rows[3]["train_step_time"] == ""


def test_everything_as_json_and_a_wrong_column_named_at_the_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(steps, "_LEAST_ERROR", -1.0)
    file = tmp_path / "steps.json"
    words = "bench --img-size 16 -b 4 -M 1 --num-classes 5 --repeats 1 --device cpu --quiet"
    words += " --model small/resnet --model-kwargs width=8 --columns unmasked wfnet/eager/fused"
    assert main([*words.split(), "--output", str(file)]) == 2
    wrong = "columns that compute something else: small/resnet: wfnet/eager/fused"
    assert wrong in capsys.readouterr().err
    record = json.loads(file.read_text())
    assert (record["settings"]["classes"], record["settings"]["dtype"]) == (5, "float32")
    columns = record["networks"]["small/resnet"]["columns"]
    assert columns["unmasked"]["milliseconds"]
    assert columns["wfnet/eager/fused"]["wrong"]
