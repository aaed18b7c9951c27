import csv
import json

import pytest

from wfnet.trust import CHECKS, TrustRecord, TrustResult


@pytest.fixture
def result():
    def record(index, value, retrained):
        levels = {} if retrained is None else {"js_forget": retrained}
        forgetful = {"js_forget": value}
        return TrustRecord(
            index, f"class {index}", "closeness", forgetful, {}, levels, {}, 1, None, {}, 1.0, "k"
        )

    return TrustResult([record(0, 0.25, 0.5), record(3, 0.75, None)], {"samples": 10})


def test_means_distances_and_files(result, tmp_path):
    mean = result.means()["closeness"]["js_forget"]
    assert mean == {
        "forgetful": 0.5,
        "original": None,
        "retrained": 0.5,
        "distance": -0.25,
        "classes": 2,
    }
    result.to_csv(tmp_path / "trust.csv")
    first, second = csv.DictReader((tmp_path / "trust.csv").open())
    assert (first["index"], first["name"], first["check"]) == ("0", "class 0", "closeness")
    assert (first["forgetful"], first["retrained"], first["distance"]) == ("0.25", "0.5", "-0.25")
    assert (second["forgetful"], second["retrained"], second["distance"]) == ("0.75", "", "")
    result.to_json(tmp_path / "trust.json")
    assert json.loads((tmp_path / "trust.json").read_text())["means"]["closeness"] == {
        "js_forget": mean
    }
    assert TrustResult.from_json(tmp_path / "trust.json") == result
    table = result.table()
    assert CHECKS["closeness"].question in table
    assert table.splitlines()[-1].split() == ["js_forget", "0.500", "-", "0.500", "-0.250"]


def test_what_was_left_out(result):
    result.records[1].details["left_out"] = "relearning from 9 images, of which 8 are at hand"
    (sentence,) = result.left_out()
    assert sentence.startswith("Left out for class class 3: relearning from 9 images")
