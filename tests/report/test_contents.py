import json

import pytest

from wfnet.report.contents import PICTURES, read_contents


def test_trust_of_other_filters_is_left_out(run):
    content = json.loads((run / "trust.json").read_text())
    content["settings"]["filters"] = "0" * 64
    (run / "trust.json").write_text(json.dumps(content))
    assert read_contents(run).trust is not None  # no filters to compare with
    (run / "wf_model.safetensors").write_bytes(b"other")
    found = read_contents(run)
    assert found.trust is None
    assert "is of other filters" in found.remarks[0]


@pytest.mark.parametrize(
    ("filters", "run_config", "remark"),
    [
        ({"filters_digest": "a"}, {}, ""),
        ({"filters_digest": "b"}, {}, "another network (its filters)"),
        ({"num_classes": 9}, {}, "another network (num_classes 12, here 9)"),
        ({}, {"classes": [f"class {k}" for k in range(11, -1, -1)]}, "class 0 is 'class 0'"),
    ],
)
def test_an_evaluation_of_another_run_is_left_out(run, filters, run_config, remark):
    content = json.loads((run / "evaluation.json").read_text())
    content["settings"]["filters_digest"] = "a"
    (run / "evaluation.json").write_text(json.dumps(content))
    (run / "wf_config.json").write_text(json.dumps(filters))
    (run / "config.json").write_text(json.dumps(run_config))
    found = read_contents(run)
    assert (found.evaluation is None) == bool(remark)
    assert remark in "".join(found.remarks)


def test_exports_that_were_baked_with_other_filters_are_left_out(run):
    (run / "wf_config.json").write_text(json.dumps({"filters_digest": "a"}))
    for name, digest in (("ours", "a"), ("theirs", "b")):
        (run / f"{name}.trust.json").write_text(json.dumps({"filters_digest": digest}))
    (run / "earlier.trust.json").write_text("{}")
    found = read_contents(run)
    assert list(found.exports) == ["earlier.trust.json", "ours.trust.json"]
    assert "theirs.trust.json is of a file that was baked with other filters" in str(found.remarks)


def test_results_of_another_run_alone_are_nothing_to_report(run):
    (run / "trust.json").unlink()
    content = json.loads((run / "evaluation.json").read_text())
    content["settings"]["filters_digest"] = "b"
    (run / "evaluation.json").write_text(json.dumps(content))
    (run / "wf_config.json").write_text(json.dumps({"filters_digest": "a"}))
    with pytest.raises(FileNotFoundError, match=r"evaluation\.json is of another network"):
        read_contents(run)


def test_results_that_do_not_say_what_they_are_of_are_shown_with_a_remark(run):
    (run / "wf_config.json").write_text(json.dumps({"filters_digest": "a"}))
    content = json.loads((run / "trust.json").read_text())
    del content["settings"]["attackers_images"]
    (run / "trust.json").write_text(json.dumps(content))
    found = read_contents(run)
    assert found.evaluation is not None
    assert found.trust is not None
    first, second = found.remarks
    assert "does not say of which filters it is" in first
    assert "attackers had too many images" in second


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


def test_every_picture_of_the_figures_has_a_caption():
    assert all(len(text) > 20 and name.endswith(".png") for name, text in PICTURES.items())
