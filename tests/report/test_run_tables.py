import csv
import json
import statistics

import pytest

from wfnet.evaluation import MultiLabelRecord, MultiLabelResult
from wfnet.evaluation.results import ClassRecord, EvaluationResult
from wfnet.report import run_tables


def record(index, acc_r, acc_f):
    before = {f"original_{name}": 0.9 for name in ("acc_r", "acc_f", "acc_r_top5", "acc_f_top5")}
    return ClassRecord(
        acc_r=acc_r,
        acc_f=acc_f,
        acc_r_top5=1.0,
        acc_f_top5=0.5,
        zrf=0.7,
        index=index,
        name=str(index),
        n_forget=5,
        n_retain=5,
        original_zrf=0.5,
        **before,
    )


@pytest.fixture
def runs(tmp_path):
    """Three seeds of one recipe, one of another; the first has tables, a baseline and trust."""
    found = {}
    for name, seed, lambda1, acc_r in (
        ("a", 0, 0.3, 0.95),
        ("b", 1, 0.3, 0.97),
        ("c", 2, 0.3, 0.96),
        ("other", 0, 0.5, 0.5),
    ):
        folder = tmp_path / name
        result = EvaluationResult.from_records(
            [record(0, acc_r, 0.0), record(1, acc_r, 0.1)], 2.0, {}, 1.0
        )
        folder.mkdir()
        result.to_json(folder / "evaluation.json")
        options = {"data": "digits", "model": "small/resnet", "recipe": "balanced", "seed": seed}
        untraining = {"lambda1": lambda1, "seed": seed, "workers": seed}
        found[str(folder)] = {"options": options, "untraining": untraining}
        if name == "a":
            row = {"method": "wfnet", "rt": 3.0, "insertion": 0.9, "deletion": 0.1}
            pairs = [{"size": 2, "mean": {"acc_r": 0.9, "acc_f": 0.02}}]
            tables = {"rows": [row], "groups": pairs}
            (folder / "tables.json").write_text(json.dumps(tables))
            shadow = {"index": "all", "against": "image", "measure": "u_lira", "what": "auc"}
            shadow |= {"method": "forgetful", "value": 0.55}
            (folder / "shadows.json").write_text(json.dumps({"rows": [shadow]}))
    return found


def test_groups_are_runs_that_differ_in_seeds_alone(runs):
    groups, missing = run_tables.collect(runs)
    assert [len(group.runs) for group in groups] == [3, 1]
    assert groups[0].title.endswith("small/resnet, balanced, lambda1=0.3")
    values = groups[0].values["quality", "wfnet", "acc_r"]
    assert values == pytest.approx([95, 97, 96])
    assert groups[0].values["quality", "wfnet", "worst"] == pytest.approx([10] * 3)
    assert any("wfnet trust" in sentence and "/b, " in sentence for sentence in missing)
    assert any("lambda1=0.5: 1 of at least 3 seeds" in sentence for sentence in missing)
    assert not any("evaluation.json" in sentence for sentence in missing)


def test_tables_as_markdown_csv_and_latex(runs, tmp_path):
    groups, _ = run_tables.collect(runs)
    text = run_tables.markdown(groups)
    assert "| WF-Net | 96.00 ± 1.00 | 5.00 ± 0.00 | 10.00 ± 0.00 | 70.0 ± 0.0 | 3.0 (1) |" in text
    assert "| image: u_lira auc | 0.550 (1) |" in text
    run_tables.write(groups, tmp_path)
    lines = list(csv.DictReader((tmp_path / "seeds.csv").open()))
    (line,) = (
        x for x in lines if (x["method"], x["measure"], x["runs"]) == ("wfnet", "acc_r", "3")
    )
    assert float(line["spread"]) == pytest.approx(statistics.stdev([95, 97, 96]))
    made = (tmp_path / "seeds.tex").read_text()
    assert r"WF-Net & 96.00 $\pm$ 1.00 &" in made
    assert r"Acc\_r" in made


def test_images_with_several_labels_have_average_precisions(tmp_path):
    result = MultiLabelResult([MultiLabelRecord(0, "0", 5, 0.2, 0.6, 0.9, 0.95, 0.92)], {}, 1.0)
    result.to_json(tmp_path / "evaluation.json")
    groups, _ = run_tables.collect({str(tmp_path): {"options": {"data_dir": "photos"}}})
    assert "| WF-Net | 60.00 | 60.0 | 90.0 |" in run_tables.markdown(groups)
