import csv
import json
import math

import pytest

from wfnet.evaluation import ClassRecord, EvaluationResult, GroupRecord, GroupResult
from wfnet.evaluation.attribution import AttributionRecord, AttributionResult
from wfnet.evaluation.paper_tables import check_baselines, make_tables, published
from wfnet.evaluation.relearning import RelearnConfig, RelearnRecord, RelearnResult


def evaluation(acc_r=0.9, acc_f=0.05):
    values = {"acc_r": acc_r, "acc_f": acc_f, "acc_r_top5": 1.0, "acc_f_top5": 0.5, "zrf": 0.6}
    before = {"acc_r": 0.95, "acc_f": 0.96, "acc_r_top5": 1.0, "acc_f_top5": 1.0, "zrf": 0.48}
    values |= {f"original_{name}": value for name, value in before.items()}
    record = ClassRecord(index=0, name="0", n_forget=3, n_retain=9, **values)
    settings = {"num_classes": 10, "classes": "all"}
    return EvaluationResult.from_records([record], math.e, settings, 1.0)


def relearning(*epochs):
    records = [RelearnRecord(i, str(i), 1.0, e, e, [0.0]) for i, e in enumerate(epochs)]
    return RelearnResult(records, RelearnConfig(), 1.0)


def baseline(method):
    measured = {"relearning": relearning(7, None), "evaluation": evaluation(0.8, 0.0)}
    content = {name: result.as_dict() for name, result in measured.items()}
    return {"method": method, "settings": {"lr": 0.1}, **content}


def tables(cell="cifar10/resnet18"):
    curves = AttributionRecord(0, "0", 3, 0.8, 0.05, 0.4, 0.2, {})
    attribution = AttributionResult([0, 1], [curves], {"steps": 1, "seed": 0}, 1.0)
    pair = GroupRecord([0, 1], ["0", "1"], 4, 8, 0.01, 0.02, 0.9, 0.97, 0.95)
    others = [baseline("retrained")], [GroupResult([pair], 1.0)]
    return make_tables("cifar10 x y", evaluation(), relearning(3, 5), attribution, *others, cell)


def test_our_rows_stand_beside_the_published_ones(tmp_path):
    result = tables()
    result.write(tmp_path)
    content = json.loads((tmp_path / "tables.json").read_text())
    rows = {row["method"]: row for row in content["rows"]}
    assert list(rows) == ["original", "retrained", "random_labels", "negative_gradient", "wfnet"]
    assert (rows["wfnet"]["acc_r"], rows["wfnet"]["acc_f"]) == (90.0, 5.0)
    assert (rows["wfnet"]["rt"], rows["wfnet"]["rt_never"]) == (4, 0)
    assert (rows["retrained"]["rt"], rows["retrained"]["rt_never"]) == (53.5, 1)
    assert rows["original"]["acc_r"] == 95.0
    assert rows["wfnet"]["published"]["insertion"] == 0.69
    assert content["published_source"] == published()["source"]
    assert content["settings"]["retrained"]["lr"] == 0.1
    assert content["groups"][0]["records"][0]["classes"] == [0, 1]
    lines = list(csv.DictReader((tmp_path / "tables.csv").open()))
    assert lines[-1]["acc_r"] == "90.0"
    assert lines[-1]["published_deletion"] == "0.06"
    assert lines[2]["acc_r"] == ""
    text = (tmp_path / "tables.md").read_text()
    assert "| WF-Net            | 90.00 |  5.00 | 60.00 |  4.0 (0) |" in text
    assert "79.7 / 9.25 / 63.9 / 94.3 (9)" in text
    assert "| WF-Net  |     0.800 |    0.050 |" in text
    assert "| pairs " in text
    assert "arXiv 2304.02049" in text


def test_what_was_not_measured_or_published_has_no_column():
    assert "published" not in tables(cell=None).markdown().lower()
    plain = make_tables("digits", evaluation()).markdown()
    assert "RT" not in plain
    assert "Table 2" not in plain


@pytest.mark.parametrize(
    ("ours", "message"),
    [((2,), "zrf_base=2.7"), ((math.e, {"lr": 1e-5}), "lr=0.01, others with 1e-05")],
)
def test_baselines_that_were_measured_otherwise_are_refused(ours, message):
    check_baselines([baseline("retrained")], math.e)
    with pytest.raises(ValueError, match=message):
        check_baselines([baseline("retrained")], *ours)
