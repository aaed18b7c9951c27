import pytest

from wfnet.data.class_names import numbers_by_name, read_names


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (["a", "b", "d"], "unknown 'd', missing 'c'"),
        (["a", "b", "c", "c"], "4 for 3, of which unknown none, missing none"),
    ],
)
def test_other_names_are_refused(found, message):
    with pytest.raises(ValueError, match=f"birds has other classes than the run: .*{message}"):
        numbers_by_name(found, ["a", "b", "c"], "birds", "the run")


def test_names_give_numbers():
    assert numbers_by_name(["c", "a", "b"], ["a", "b", "c"], "x", "y").tolist() == [2, 0, 1]
    assert numbers_by_name(["a", "a"], ["a", "a"], "x", "y").tolist() == [0, 1]


@pytest.mark.parametrize("text", ["ant\nbee", "\ufeffant\r\nbee\r\n\r\n", "ant \nbee\n\n"])
def test_files_of_names(tmp_path, text):
    (tmp_path / "classes.txt").write_bytes(text.encode())
    assert read_names(tmp_path / "classes.txt") == ["ant", "bee"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"ant\nbee\nant\n", "the class 'ant' twice"),
        ("ant\nbee\ncat".encode("utf-16"), "is not UTF-8"),
    ],
)
def test_bad_files_of_names(tmp_path, text, message):
    (tmp_path / "classes.txt").write_bytes(text)
    with pytest.raises(ValueError, match=message):
        read_names(tmp_path / "classes.txt")
