import pytest

from wfnet.data.class_names import numbers_by_name, read_names


def test_names_give_numbers():
    for found, message in (("abd", "unknown 'd', missing 'c'"), ("abcc", "4 for 3, of which")):
        with pytest.raises(ValueError, match=f"birds has other classes than the run: .*{message}"):
            numbers_by_name(list(found), ["a", "b", "c"], "birds", "the run")
    assert numbers_by_name(["c", "a", "b"], ["a", "b", "c"], "x", "y").tolist() == [2, 0, 1]
    assert numbers_by_name(["a", "a"], ["a", "a"], "x", "y").tolist() == [0, 1]


def test_files_of_names(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_bytes("\ufeffant \r\nbee\r\n\r\n".encode())
    assert read_names(path) == ["ant", "bee"]
    path.write_text("ant\nbee\nant\n")
    with pytest.raises(ValueError, match="the class 'ant' twice"):
        read_names(path)
    path.write_bytes("ant\nbee\ncat".encode("utf-16"))
    with pytest.raises(ValueError, match="is not UTF-8"):
        read_names(path)
