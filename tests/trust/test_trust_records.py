import csv
import dataclasses
import json

from wfnet.trust import CHECKS, TrustRecord, TrustResult


def test_means_distances_and_files(tmp_path):
    def record(index, value, levels, details):
        about = (index, f"class {index}", "closeness")
        return TrustRecord(*about, {"js_forget": value}, {}, levels, {}, 1, None, details, 1.0, "k")

    first = record(0, 0.25, {"js_forget": 0.5}, {})
    first = dataclasses.replace(first, logit_masked={"js_forget": 0.125})
    result = TrustResult([first, record(3, 0.75, {}, {"left_out": "a few"})], {"samples": 10})
    mean = {"forgetful": 0.5, "retrained": 0.5, "logit_masked": 0.125, "bias_shifted": None}
    mean |= {"also_masked": None, "original": None, "distance": -0.25, "classes": 2}
    assert result.means() == {"closeness": {"js_forget": mean}}
    assert result.left_out() == ["Left out for class class 3: a few."]
    result.to_csv(tmp_path / "trust.csv")
    first, second = csv.DictReader((tmp_path / "trust.csv").open())
    assert (first["index"], first["name"], first["check"]) == ("0", "class 0", "closeness")
    assert (first["forgetful"], first["retrained"], first["distance"]) == ("0.25", "0.5", "-0.25")
    assert (second["forgetful"], second["retrained"], second["distance"]) == ("0.75", "", "")
    result.to_json(tmp_path / "trust.json")
    assert json.loads((tmp_path / "trust.json").read_text())["means"] == result.means()
    assert TrustResult.from_json(tmp_path / "trust.json") == result
    table = result.table()
    assert CHECKS["closeness"].question in table
    assert table.splitlines()[-1].split() == [
        "js_forget",
        "0.500",
        "-",
        "0.500",
        "0.125",
        "-",
        "-",
        "-0.250",
    ]
