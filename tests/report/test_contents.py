import json

import pytest

from wfnet.report.contents import read_contents


def test_results_of_other_filters_are_left_out(run):
    for name, setting in (("evaluation.json", "filters_digest"), ("trust.json", "filters")):
        content = json.loads((run / name).read_text())
        content["settings"][setting] = "a"
        (run / name).write_text(json.dumps(content))
    for name, digest in (("ours", "a"), ("theirs", "b")):
        (run / f"{name}.trust.json").write_text(json.dumps({"filters_digest": digest}))
    found = read_contents(run)  # no filters to compare with
    assert None not in (found.evaluation, found.trust)
    assert (len(found.exports), found.remarks) == (2, [])
    (run / "wf_config.json").write_text('{"filters_digest": "a"}')
    (run / "wf_model.safetensors").write_bytes(b"of another digest")
    found = read_contents(run)
    assert found.evaluation is not None
    assert found.trust is None
    assert list(found.exports) == ["ours.trust.json"]
    left_out = [remark.partition(" is of other filters")[0] for remark in found.remarks]
    assert left_out == ["trust.json", "theirs.trust.json"]
    (run / "wf_config.json").write_text('{"filters_digest": "b"}')
    with pytest.raises(FileNotFoundError, match=r"evaluation\.json is of other filters"):
        read_contents(run)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_file(run, text):
    (run / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config.json is damaged"):
        read_contents(run)
