import csv
import json
import math
from dataclasses import replace

import pytest

from wfnet.evaluation import EvaluationResult, evaluate

K = 7


@pytest.fixture(scope="module")
def result(make_net, make_dataset):
    labels = [c for c in range(K) for _ in range(c + 1)]
    return evaluate(make_net(), make_dataset(labels), progress=False)


def test_json(result, tmp_path):
    path = tmp_path / "out" / "result.json"
    with pytest.raises(FileNotFoundError, match="does not exist"):
        EvaluationResult.from_json(path)
    result.to_json(path)
    read = EvaluationResult.from_json(path)
    assert read == result
    assert read.counts is None
    whole = path.read_text()
    assert json.loads(whole)["zrf_base"] == math.e
    path.write_text("{}")
    with pytest.raises(ValueError, match="damaged or not a result"):
        EvaluationResult.from_json(path)


def test_csv(result, tmp_path):
    replace(result, zrf_base=2).to_csv(tmp_path / "result.csv")
    with open(tmp_path / "result.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["kind"] for row in rows] == ["class"] * K + ["mean", "original"]
    assert all(float(row["zrf_base"]) == 2 for row in rows)
    for row, values in zip(rows, (*result.records, result.mean, result.original), strict=True):
        for name, value in vars(values).items():
            assert row[name] == str(value)


def test_table(result):
    lines = result.table().splitlines()
    assert len(lines) == 1 + 1 + K + 1 + 2 + 1
    assert lines[2].startswith("0 name0")
    assert f"{100 * result.records[0].acc_r:.2f}" in lines[2]
    assert f"{100 * result.mean.acc_f:.2f}" in lines[-3]
    assert "log base e" in lines[-1]
    # Of many classes those that were forgotten worst.
    first, *_ = result.records
    many = [replace(first, index=i, name=f"a very long name, {i}" * 2, acc_f=i) for i in range(99)]
    lines = replace(result, records=many, zrf_base=2).table().splitlines()
    assert max(map(len, lines)) <= 110
    assert lines[2].startswith("98 a very long name")
    assert "59 more classes" in lines[42]
    assert "log base 2" in lines[-1]
