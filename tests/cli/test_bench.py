import csv

import pytest

from wfnet.cli import main
from wfnet.cli.bench import FIELDS

OPTIONS = "--img-size 32 -b 4 -M 2 --num-classes 5 --repeats 2 --device cpu --quiet"
CALL = ["bench", *OPTIONS.split()]


def test_a_table_with_the_columns_of_timm(tmp_path, capsys):
    file = tmp_path / "steps.csv"
    call = [*CALL, "--model", "small/resnet", "--model-kwargs", "width=8", "--output", str(file)]
    columns = ["eager", "unmasked", "wfnet/eager/fused", "wfnet/eager/captured"]
    assert main([*call, "--columns", *columns]) == 0
    shown = capsys.readouterr().out
    assert "6 expanded samples" in shown
    rows = list(csv.DictReader(file.open()))
    assert tuple(rows[0]) == FIELDS
    assert [row["column"] for row in rows] == columns
    for row in rows[:3]:
        rate = 6e3 / float(row["train_step_time"])
        assert float(row["train_samples_per_sec"]) == pytest.approx(rate, rel=1e-2)
        assert (row["train_batch_size"], row["images"], row["remark"]) == ("6", "2", "")
    assert float(rows[2]["infer_samples_per_sec"]) > 0
    assert 0 < float(rows[2]["share_of_floor"]) < 1.5
    assert "CUDA" in rows[3]["remark"]
    assert rows[3]["train_step_time"] == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is no network: give --model NAME"),
        (["--model", "small/nothing"], "no small model 'nothing'"),
        (["--model", "small/resnet", "-b", "3"], "-b must be an even number of at least 2, got 3"),
        (["--model", "small/resnet", "--device", "tpu9"], "--device tpu9 cannot be used"),
    ],
)
def test_bad_input(arguments, message, capsys):
    assert main([*CALL, *arguments]) == 2
    assert message in capsys.readouterr().err
