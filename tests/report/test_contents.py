import json

import pytest

from wfnet.report.contents import PICTURES, read_contents


def test_trust_of_other_filters_is_left_out(run, caplog):
    content = json.loads((run / "trust.json").read_text())
    content["settings"]["filters"] = "0" * 64
    (run / "trust.json").write_text(json.dumps(content))
    assert read_contents(run).trust is not None  # no filters to compare with
    (run / "wf_model.safetensors").write_bytes(b"other")
    assert read_contents(run).trust is None
    assert "is of other filters" in caplog.text


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
