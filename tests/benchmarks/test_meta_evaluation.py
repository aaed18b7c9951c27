"""benchmarks/meta_evaluation.py: separations of good and bad networks."""

import json
import math

import meta_evaluation
import pytest


def test_separation_by_hand():
    good, bad = [0.1, 0.2, 0.3], [0.2, 0.4, 0.6]
    found = meta_evaluation.separation(good, bad)
    assert found["auc"] == pytest.approx((3 * 2 + 1 + 0.5) / 9)
    assert found["gap"] == pytest.approx(0.2 / math.sqrt((0.1**2 + 0.2**2) / 2))
    assert meta_evaluation.separation(bad, good)["auc"] == found["auc"]
    assert meta_evaluation.separation([0.5, 0.5], [0.5, 0.5]) == {"auc": 0.5, "gap": 0}
    assert meta_evaluation.separation([0.0, 0.0], [1.0, 1.0])["gap"] == meta_evaluation.MOST


def test_rows_have_what_applies_to_good_networks(tmp_path):
    row = {"against": "image", "measure": "u_lira", "what": "auc", "value": 0.5}
    rows = [
        {**row, "index": index, "method": method, "value": value}
        for index, value in (("3", 0.5), ("8", 0.6), ("all", 0.9))
        for method in ("retrained", "original")
    ]
    (tmp_path / "shadows.json").write_text(json.dumps({"rows": rows}))
    values = meta_evaluation.of_ensembles(tmp_path / "shadows.json", [3, 8])
    values |= {("removal: base", "original"): [1.0, 1.0]}
    (made,) = meta_evaluation.table(values)
    assert (made["measure"], made["values"]) == ("shadows, image: u_lira auc", 2)
    assert made["good"] == pytest.approx(0.55)
    assert made["original"]["auc"] == 0.5
    assert "logit_masked" not in made
