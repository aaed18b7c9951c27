import pytest

from wfnet.evaluation import EvaluationResult
from wfnet.report.figures import overview


@pytest.mark.parametrize("classes", [12, 300])
def test_heights_are_those_of_the_records(tmp_path, drawn, make_evaluation, make_net, classes):
    result = make_evaluation(classes, [f"airplane no. {k}" for k in range(classes)])
    overview(result, make_net(classes), tmp_path / "accuracy.png")
    axis = drawn[0].subfigs[0].axes[0]
    if classes <= 40:
        bars = [[bar.get_height() for bar in container] for container in axis.containers]
    else:
        bars = [points.get_offsets()[:, 1].tolist() for points in axis.collections]
    ordered = sorted(result.records, key=lambda r: 0 if classes <= 40 else -r.original_acc_f)
    for heights, name in zip(bars, ("original_acc_f", "acc_f", "acc_r"), strict=True):
        assert heights == pytest.approx([100 * getattr(r, name) for r in ordered])
        low, high = axis.get_ylim()
        assert low <= min(heights) <= max(heights) <= high


def test_overview_of_some_classes(tmp_path, drawn, make_evaluation, make_net):
    result = make_evaluation(100)
    overview(result, make_net(100), tmp_path / "overview.png")
    assert "any of 100 classes" in drawn[0].subfigs[0].get_suptitle()
    chosen = [result.records[7], result.records[2]]
    some = EvaluationResult(chosen, result.mean, result.original, 2, {}, 0.0)
    overview(some, make_net(100), tmp_path / "overview.png")
    rows = drawn[1].subfigs[1].axes[0].get_yticklabels()
    assert [text.get_text() for text in rows] == ["class 2", "class 7"]
