"""Tables and pictures of the documents are those of the committed results."""

import json

import pytest
import render


def test_documents_are_up_to_date_and_a_changed_number_is_not(tmp_path, monkeypatch, capsys):
    status = render.main(["--check"])
    assert status == 0, capsys.readouterr().out
    changed = tmp_path / "README.md"
    changed.write_text(render.DOCUMENTS[0].read_text().replace("| 99.", "| 98.", 1))
    monkeypatch.setattr(render, "DOCUMENTS", (changed, *render.DOCUMENTS[1:]))
    pictures = {tmp_path / path.name: how for path, how in render.PICTURES.items()}
    monkeypatch.setattr(render, "PICTURES", pictures)
    assert render.main(["--check"]) == 1
    assert "README.md is out of date" in capsys.readouterr().out
    assert render.main([]) == 0
    assert "written: README.md attacks.png time_to_quality.png" in capsys.readouterr().out
    assert render.main(["--check"]) == 0
    with pytest.raises(ValueError, match=r"README.md mark the tables \['step'\]"):
        render.rendered({changed: "<!-- results:step -->\n<!-- end -->\n"})


def test_networks_of_one_device_and_commit_share_a_table(tmp_path, monkeypatch):
    """A network has a run of its own where minutes are short; columns of one run stay together."""
    path = next(render.RESULTS.glob("step_*.json"))
    content = json.loads(path.read_text())
    (name, network), *_ = content["networks"].items()
    content["networks"] = {name: network}
    for number in range(2):
        written = {**content, "networks": {f"{name}{number}": network}}
        (tmp_path / f"step_{number}.json").write_text(json.dumps(written))
    monkeypatch.setattr(render, "RESULTS", tmp_path)
    assert [list(found["networks"]) for found in render.step_files()] == [[f"{name}0", f"{name}1"]]
    assert render.step().count("| --- | --- | --- |\n") == 1
    (tmp_path / "step_2.json").write_text(json.dumps({**content, "commit": "other"}))
    assert len(render.step_files()) == 2
    (tmp_path / "step_3.json").write_text(json.dumps({**content, "commit": "other"}))
    with pytest.raises(ValueError, match="a second time"):
        render.step_files()


def test_the_readme_has_the_numbers_of_the_pictures():
    values = render.picture_values()
    balanced, durable, cut, retrained = list(values.values())[:4]
    text = " ".join(render.DOCUMENTS[0].read_text().split())
    statistics, one = "BatchNorm\nre-estimated", "fine-tuned with\none image of it"
    assert f"then on {balanced[statistics]:.1f}%" in text
    assert (durable["nothing"], durable[statistics]) == (0, 0)
    ten = "fine-tuned\nwith ten"
    assert f"back {cut[one]:.0f}%, ten {cut[ten]:.0f}%: less than in" in text
    assert f"retrained without it ({retrained[one]:.0f}%, {retrained[ten]:.0f}%)" in text
    seconds = [way["digits"][0] for way in list(render.time_values().values())[-2:]]
    assert "ten digits in {1:.1f} CPU s, `balanced` in {0:.1f} (".format(*seconds) in text
