import math

import pytest
import torch

from wfnet.evaluation.attribution import AttributionRecord, AttributionResult
from wfnet.report.figures import insertion_deletion, training_curves


def test_training_curves(tmp_path, drawn):
    history = [{"step": 10 * i, "loss": 2.0 / (i + 1), "lr": 0.1, "epoch": "a"} for i in range(50)]
    history[3]["loss"] = math.nan
    history[0] |= {"acc_r": 1.0, "acc_f": 1.0}
    history[49] |= {"acc_r": torch.tensor(0.5), "acc_f": 0.0}
    training_curves(history, tmp_path / "curves.png")
    losses, accuracies = drawn[0].axes
    assert len(losses.lines[0].get_xdata()) == 49
    assert list(losses.lines[0].get_xdata()[:4]) == [0, 10, 20, 40]
    assert [list(line.get_ydata()) for line in accuracies.lines] == [[100, 50], [100, 0]]
    assert "%" in accuracies.get_ylabel()
    with pytest.raises(ValueError, match="no losses or accuracies"):
        training_curves([{"lr": 1.0}], tmp_path / "d.png")


def test_insertion_and_deletion(drawn, tmp_path):
    names = ("insertion", "deletion", "insertion_random", "deletion_random")
    areas = (0.8, 0.1, 0.5, 0.4)
    records = [
        AttributionRecord(k, str(k), 5, *areas, {n: [0.0, k / 30, 1.0] for n in names})
        for k in range(31)
    ]
    result = AttributionResult([0.0, 0.5, 1.0], records, {}, 1.0)
    insertion_deletion(result, tmp_path / "attribution.png")
    for axis, area in zip(drawn[0].axes, ("0.80", "0.10"), strict=True):
        curve = axis.lines[0]
        assert list(curve.get_xdata()) == [0, 50, 100]
        assert curve.get_ydata()[1] == pytest.approx(50)
        assert any(area in text.get_text() for text in axis.get_legend().get_texts())
