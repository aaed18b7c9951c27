import csv
import json
import math

import pytest

from wfnet import models
from wfnet.baselines import read_baselines
from wfnet.evaluation import ClassRecord, EvaluationResult, GroupRecord, GroupResult
from wfnet.evaluation.attribution import AttributionRecord, AttributionResult
from wfnet.evaluation.paper_tables import (
    make_tables,
    published,
    published_cell,
)
from wfnet.evaluation.relearning import RelearnConfig, RelearnRecord, RelearnResult


def evaluation(acc_r=0.9, acc_f=0.05, base=math.e):
    record = ClassRecord(
        acc_r=acc_r, acc_f=acc_f, acc_r_top5=1.0, acc_f_top5=0.5, zrf=0.6, index=0, name="0",
        n_forget=3, n_retain=9, original_acc_r=0.95, original_acc_f=0.96, original_acc_r_top5=1.0,
        original_acc_f_top5=1.0, original_zrf=0.48,
    )  # fmt: skip
    settings = {"num_classes": 10, "classes": "all"}
    return EvaluationResult.from_records([record], base, settings, 1.0)


def relearning(*epochs):
    records = [RelearnRecord(i, str(i), 1.0, e, e, [0.0]) for i, e in enumerate(epochs)]
    return RelearnResult(records, RelearnConfig(), 1.0)


def attribution():
    record = AttributionRecord(0, "0", 3, 0.8, 0.05, 0.4, 0.2, {})
    return AttributionResult([0, 1], [record], {"steps": 1, "seed": 0}, 1.0)


def baseline(method, base=math.e):
    return {
        "method": method, "settings": {"lr": 0.1}, "relearning": relearning(7, None).as_dict(),
        "evaluation": evaluation(0.8, 0.0, base).as_dict(),
    }  # fmt: skip


def groups():
    record = GroupRecord([0, 1], ["0", "1"], 4, 8, 0.01, 0.02, 0.9, 0.97, 0.95)
    return [GroupResult([record], 1.0)]


def tables(**options):
    return make_tables(
        "cifar10 x small/resnet18", evaluation(), relearning(3, 5), attribution(),
        [baseline("retrained")], groups(), **{"cell": "cifar10/resnet18", **options},
    )  # fmt: skip


def test_our_rows_stand_beside_the_published_ones():
    result = tables()
    rows = {row.method: row for row in result.rows}
    assert list(rows) == [
        "original", "retrained", "random_labels", "negative_gradient", "wfnet",
    ]  # fmt: skip
    assert (rows["wfnet"].acc_r, rows["wfnet"].acc_f) == (90.0, 5.0)
    assert (rows["wfnet"].rt, rows["wfnet"].rt_never) == (4, 0)
    assert (rows["retrained"].rt, rows["retrained"].rt_never) == (53.5, 1)
    assert rows["original"].acc_r == 95.0
    assert rows["wfnet"].published["insertion"] == 0.69
    assert rows["retrained"].published == {
        "acc_r": 90.5, "acc_f": 0.0, "zrf": 51.4, "rt": 100.0, "rt_never": 10,
    }  # fmt: skip
    assert rows["random_labels"].acc_r is None  # published, but not run here
    text = result.markdown()
    assert "| WF-Net            | 90.00 |  5.00 | 60.00 |  4.0 (0) |" in text
    assert "79.7 / 9.25 / 63.9 / 94.3 (9)" in text
    assert "| WF-Net  |     0.800 |    0.050 |" in text
    assert "| pairs " in text
    assert "arXiv 2304.02049" in text


def test_without_published_numbers_there_is_no_such_column():
    text = tables(cell=None).markdown()
    assert "published" not in text.lower()
    plain = make_tables("digits", evaluation()).markdown()
    assert "RT" not in plain
    assert "Table 2" not in plain


def test_files(tmp_path):
    result = tables()
    result.to_json(tmp_path / "tables.json")
    result.to_csv(tmp_path / "tables.csv")
    result.to_markdown(tmp_path / "tables.md")
    content = json.loads((tmp_path / "tables.json").read_text())
    assert content["rows"][-1]["published"]["acc_r"] == 79.7
    assert content["published_source"] == published()["source"]
    assert content["settings"]["relearning"]["optimizer"] == "sgd"
    assert content["settings"]["retrained"]["lr"] == 0.1
    assert content["groups"][0]["records"][0]["classes"] == [0, 1]
    lines = list(csv.DictReader((tmp_path / "tables.csv").open()))
    assert lines[-1]["acc_r"] == "90.0"
    assert lines[-1]["published_deletion"] == "0.06"
    assert lines[2]["acc_r"] == ""
    assert (tmp_path / "tables.md").read_text() == result.markdown()


def test_every_published_cell_is_complete():
    cells = published()["cells"]
    assert len(cells) == 14
    for data in ("mnist", "cifar10", "imagenet"):
        for backbone in ("vgg16", "resnet18", "vit_tiny", "vit_small"):
            cell = cells[f"{data}/{backbone}"]
            assert {"insertion", "deletion", "acc_r", "acc_f", "zrf"} <= set(cell["wfnet"])
            assert 30 < cell["original"]["zrf"] < 55
            if data != "imagenet":
                assert len(cell) == 5
                assert all("rt" in row for method, row in cell.items() if method != "original")
    assert cells["mnist/vgg16"]["wfnet"] == {
        "acc_r": 73.2, "acc_f": 0.0, "zrf": 79.2, "rt": 27.6, "rt_never": 1, "insertion": 0.78,
        "deletion": 0.09,
    }  # fmt: skip
    assert cells["imagenet/resnet50"]["wfnet"]["acc_r"] == 72.6


@pytest.mark.parametrize(
    ("data", "model", "millions", "cell"),
    [
        ("mnist", "small/vgg16", 14.73, "mnist/vgg16"),
        ("mnist", "small/resnet18", 11.17, "mnist/resnet18"),
        ("mnist", "small/resnet18", 0.7, None),  # a quarter of the width
        ("cifar10", "small/vit_tiny", 5.36, "cifar10/vit_tiny"),
        ("imagenet", "vit_small_patch16_224.augreg_in21k", 22.05, "imagenet/vit_small"),
        ("imagenet", "torchvision/vgg16_bn", 138.37, "imagenet/vgg16"),
        ("imagenet", "resnet50.a1_in1k", 25.56, "imagenet/resnet50"),
        ("imagenet", "wide_resnet50_2", 68.9, None),
        (None, "resnet50", 25.56, None),
        ("mnist", "small/resnet", 0.3, None),
        ("mnist", "resnet50", 25.56, None),
    ],
)
def test_a_cell_is_found_by_data_and_architecture(data, model, millions, cell):
    assert published_cell(data, model, round(1e6 * millions)) == cell


@pytest.mark.parametrize("name", ["resnet18", "vgg16", "vit_tiny", "vit_small"])
def test_the_small_networks_have_the_sizes_of_the_paper(name):
    model = models.create(name, 10, 1)
    assert published_cell("mnist", name, sum(p.numel() for p in model.parameters()))


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nothing was published for 'mnist/alexnet'"):
        make_tables("x", evaluation(), cell="mnist/alexnet")
    with pytest.raises(ValueError, match="base 2"):
        make_tables("x", evaluation(), baselines=[baseline("retrained", 2)])
    slower = RelearnResult(relearning(3).records, RelearnConfig(lr=1e-5), 1.0)
    with pytest.raises(ValueError, match="relearn all alike"):
        make_tables("x", evaluation(), slower, baselines=[baseline("retrained")])
    other = evaluation()
    other.settings["zrf_mode"] = "swapped"
    with pytest.raises(ValueError, match="mode 'swapped'"):
        make_tables("x", other, baselines=[baseline("retrained")])
    (tmp_path / "retrained.json").write_text(json.dumps(baseline("retrained")))
    assert [b["method"] for b in read_baselines(tmp_path)] == ["retrained"]
    (tmp_path / "retrained.json").write_text("{}")
    with pytest.raises(ValueError, match="damaged or not a result"):
        read_baselines(tmp_path)
    assert read_baselines(tmp_path / "none") == []
