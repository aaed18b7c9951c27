import csv
import json

import pytest

from wfnet.services.records import check_format, read_json, write_csv

FORMULAS = ["=1+1", "-1+2|cmd", "\t=1", "＝1", "''+x"]  # noqa: RUF001
HARMLESS = ["cat", "it's", "'quoted'", "-1.5e3", "+7", "", 'a,b;"c"\nd']


def test_formulas_are_quoted(tmp_path):
    path = tmp_path / "new" / "rows.csv"
    rows = [{"name": name, "value": -0.5} for name in FORMULAS + HARMLESS]
    write_csv(path, rows, ["name", "value"])
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [f"'{name}" for name in FORMULAS] + HARMLESS
    assert {row["value"] for row in rows} == {"-0.5"}
    assert [item.name for item in path.parent.iterdir()] == ["rows.csv"]


def test_missing_values_are_empty_and_unknown_names_an_error(tmp_path):
    write_csv(tmp_path / "a.csv", [{"a": 1}, {"b": None}], ["a", "b"])
    assert (tmp_path / "a.csv").read_text() == "a,b\n1,\n,\n"
    with pytest.raises(ValueError, match="'c'"):
        write_csv(tmp_path / "a.csv", [{"c": 1}], ["a", "b"])


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "rows.csv"
    write_csv(path, [{"a": 1}], ["a"])

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_csv(path, [{"a": 2}], ["a"])
    assert path.read_text() == "a\n1\n"
    assert list(tmp_path.iterdir()) == [path]


def test_json_that_is_missing_damaged_or_something_else(tmp_path):
    path = tmp_path / "result.json"

    def build(content):
        check_format(content, 1)
        return content["value"] + 1

    def read():
        return read_json(path, build, "a result", "run it again")

    with pytest.raises(FileNotFoundError, match=r"does not exist; it should be a result"):
        read()
    whole = json.dumps({"format": 1, "value": 2})
    for text in (whole[:10], "[]", "{}", whole.replace("1", "9"), whole.replace("2", '"x"')):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"damaged or not a result .*; run it again"):
            read()
    path.write_text(whole)
    assert read() == 3
