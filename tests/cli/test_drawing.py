import pytest

from wfnet.cli.drawing import read_attribution
from wfnet.evaluation.attribution import AttributionRecord, AttributionResult
from wfnet.services.files import write_json


def test_curves_are_read_as_evaluate_writes_them(tmp_path):
    names = ("insertion", "deletion", "insertion_random", "deletion_random")
    record = AttributionRecord(0, "a", 3, 0.9, 0.1, 0.5, 0.4, {n: [0.0, 1.0] for n in names})
    result = AttributionResult([0.0, 1.0], [record], {"steps": 1}, 2.0)
    path = tmp_path / "attribution.json"
    write_json(path, result.as_dict())
    assert read_attribution(path) == result
    path.write_text("[]")
    with pytest.raises(ValueError, match="is damaged"):
        read_attribution(path)
