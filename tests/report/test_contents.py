import json

import pytest

from wfnet.report.contents import read_contents


@pytest.fixture
def with_digests(run):
    """Writes the digest of the filters that a result is of, and that of the folder's."""

    def write(name, theirs, ours="a"):
        content = json.loads((run / name).read_text())
        content["settings"]["filters_digest"] = content["filters_digest"] = theirs
        (run / name).write_text(json.dumps(content))
        (run / "wf_config.json").write_text(json.dumps({"filters_digest": ours}))
        return run

    return write


def test_trust_of_other_filters_is_left_out(run):
    content = json.loads((run / "trust.json").read_text())
    content["settings"]["filters"] = "0" * 64
    (run / "trust.json").write_text(json.dumps(content))
    assert read_contents(run).trust is not None  # no filters to compare with
    (run / "wf_model.safetensors").write_bytes(b"other")
    found = read_contents(run)
    assert found.trust is None
    assert "is of other filters" in found.remarks[0]


@pytest.mark.parametrize(("theirs", "known"), [("a", True), (None, True), ("b", False)])
def test_an_evaluation_of_other_filters_is_left_out(with_digests, theirs, known):
    found = read_contents(with_digests("evaluation.json", theirs))
    assert (found.evaluation is not None) == known
    assert known == (found.remarks == [])


def test_results_of_other_filters_alone_are_nothing_to_report(with_digests):
    run = with_digests("evaluation.json", "b")
    (run / "trust.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"evaluation\.json is of other filters"):
        read_contents(run)


def test_exports_that_were_baked_with_other_filters_are_left_out(with_digests, run):
    for name, digest in (("ours", "a"), ("theirs", "b")):
        (run / f"{name}.trust.json").write_text(json.dumps({"settings": {}}))
        with_digests(f"{name}.trust.json", digest)
    found = read_contents(run)
    assert list(found.exports) == ["ours.trust.json"]
    assert "theirs.trust.json is of other filters" in str(found.remarks)


def test_bad_folders(tmp_path, make_run):
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        read_contents(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="holds nothing to report yet: `wfnet evaluate"):
        read_contents(tmp_path)
    make_run(tmp_path, 2)
    for text in ("{", "[]"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"config.json is damaged"):
            read_contents(tmp_path)
