import csv

import pytest


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
