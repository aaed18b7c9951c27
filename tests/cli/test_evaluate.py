import json
import shutil

import pytest
import torch
from image_files import write_image
from safetensors.torch import load_file

from wfnet import baselines
from wfnet.cli import main

SMALL = ["--model-kwargs", "width=8", "--workers", "0", "--quiet"]
QUICK = ["--relearn-epochs", "1", "--relearn-samples", "20"]
METHODS = ["retrained", "neggrad_plus"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A classifier and its filters, by the recipe."""
    folder = tmp_path_factory.mktemp("digits")
    config = ["--config", "digits/resnet", *SMALL]
    assert main(["train", *config, "--epochs", "1", "--output", f"{folder}/base"]) == 0
    base = f"{folder}/base/base.safetensors"
    untrain = ["untrain", *config, "--steps", "4", "--checkpoint", base]
    assert main([*untrain, "--output", f"{folder}/run"]) == 0
    return folder


def test_evaluate_takes_what_the_command_line_says_over_what_was_recorded(finished, tmp_path, call):
    output = tmp_path / "elsewhere"
    words = ["--output", output, "--classes", "cat", "0", "--retained-rows", "1", "-j0"]
    words += ["--zrf-base", "2", "--no-figures", "--no-fuse", "--split", "train"]
    call("evaluate --resume", finished, *words)
    result = json.loads((output / "evaluation.json").read_text())
    assert result["zrf_base"] == 2
    assert [record["index"] for record in result["classes"]] == [2, 0]
    assert result["settings"]["images"] == 15
    assert {path.name for path in output.iterdir()} == {"evaluation.json", "evaluation.csv"}
    assert not (finished / "evaluation.json").exists()


def test_tables_of_a_run(digits, tmp_path, capsys, monkeypatch, fails):
    run = shutil.copytree(digits / "run", tmp_path / "run")
    baseline = ["baseline", str(run), "--classes", "0", "3", "--methods", *METHODS, *QUICK, *SMALL]
    baseline += ["--set", "neggrad_plus.epochs=1", "--tune-classes", "0"]
    inner, made = baselines.unlearn, []

    def interrupt(method, origin, label, config):
        made.append((method, label))
        if len(made) == 2:
            raise KeyboardInterrupt
        return inner(method, origin, label, config)

    monkeypatch.setattr(baselines.per_class, "unlearn", interrupt)
    assert main(baseline) == 130
    assert "finished classes are kept" in capsys.readouterr().err
    assert main(baseline) == 0
    # Class by class: what was finished is not made again, the interrupted one is.
    order = [(method, label) for method in METHODS for label in (0, 3)]
    assert made == [*order[:2], *order[1:]]
    content = json.loads((run / "baselines" / "neggrad_plus.json").read_text())
    assert content["settings"]["epochs"] == 1
    assert content["settings"]["lr"] == 0.001
    assert [record["index"] for record in content["evaluation"]["classes"]] == [0, 3]
    retrained = json.loads((run / "baselines" / "retrained.json").read_text())
    assert retrained["settings"]["training"] == {"epochs": 1}  # as the classifier was trained
    assert (run / "baselines" / "retrained" / "class_3.safetensors").is_file()

    tables = ["evaluate", str(run), "--tables", "--published", "mnist/resnet18", *QUICK, *SMALL]
    tables += ["--attribution-steps", "2", "--group-sizes", "2", "3", "--groups", "3"]
    before = load_file(run / "wf_model.safetensors")
    capsys.readouterr()
    fails([*tables, "--relearn-lr", "0.5"], "measured with lr=0.01, others with 0.5")
    assert not (run / "evaluation.json").exists()  # noticed before the work

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("wfnet.cli.evaluate.attribution", stop)
        assert main([*tables, "--no-figures"]) == 130
    assert "goes on there" in capsys.readouterr().err
    with monkeypatch.context() as patch:  # what is counted is not run again
        patch.setattr("wfnet.evaluation.rows.RowScores.add", stop)
        assert main([*tables, "--no-figures"]) == 0
    shown = capsys.readouterr().out
    content = json.loads((run / "tables.json").read_text())
    rows = {row["method"]: row for row in content["rows"]}
    assert rows.keys() == {"original", *METHODS, "random_labels", "negative_gradient", "wfnet"}
    assert rows["random_labels"]["acc_r"] is None  # published, not made
    assert rows["retrained"]["rt"] is not None
    filtered = content["rows"][-1]
    assert filtered["published"]["acc_f"] == 9.68
    assert filtered["rt"] is not None
    assert 0 < filtered["insertion"] <= 1
    assert [group["size"] for group in content["groups"]] == [2, 3]
    assert content["cell"] == "mnist/resnet18"
    assert (run / "tables.md").read_text() in shown
    assert "| NegGrad+ " in shown
    curves = json.loads((run / "attribution.json").read_text())
    assert curves["shares"] == [0, 0.5, 1]
    assert not (run / "unfinished_evaluation").exists()
    after = load_file(run / "wf_model.safetensors")
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


def test_images_with_several_labels(tmp_path, network_options, call, capsys, fails):
    for part, count in (("train", 20), ("val", 12)):
        names = [f"{number}.png" for number in range(count)]
        for number, name in enumerate(names):
            write_image(tmp_path / "data" / part / name, number)
        pairs = ["a;b", "b;c", "c;a", "c"]
        lines = [f"{name},{pairs[number % 4]}" for number, name in enumerate(names)]
        (tmp_path / "data" / part / "labels.csv").write_text("\n".join(["image,labels", *lines]))
    data = ["--data-dir", tmp_path / "data", *network_options, "-j0", "--quiet", "-b", "4"]
    base, run = tmp_path / "base", tmp_path / "run"
    call("train --epochs 1", *data, "--output", base)
    weights = ["--checkpoint", base / "base.safetensors"]
    call("untrain --steps 2", *data, *weights, "--output", run)
    call("evaluate -j0 --quiet", run)
    assert "mAP_r" in capsys.readouterr().out
    content = json.loads((run / "evaluation.json").read_text())
    assert content["kind"] == "multi-label"
    assert 0 <= content["mean"]["ap_f"] <= 1
    fails(["evaluate", run, "--tables", "--published", "mnist/resnet18", "-j0"], "several labels")
    call("evaluate -j0 --quiet --tables", run)
    assert "| logit masked |" in capsys.readouterr().out
    tables = json.loads((run / "tables.json").read_text())
    rows = {row["method"]: row for row in tables["rows"]}
    assert list(rows) == ["original", "logit_masked", "wfnet"]
    assert rows["logit_masked"]["map_r"] == rows["original"]["map_r"]
    assert rows["wfnet"]["ap_f"] == 100 * content["mean"]["ap_f"]
    (pairs,) = tables["groups"]
    assert pairs["groups"] == len(pairs["records"]) == 3
    header = (run / "tables.csv").read_text().splitlines()[0]
    assert "ap_f,map_r," in header
    fails(["baseline", run, "-j0", "--methods", "salun"], "retrained, logit_masked and")
    call("baseline -j0 --quiet", run, "--train-epochs", "1", "--classes", "a", "b+a")
    assert sorted(p.name for p in run.glob("baselines/retrained/*")) == [
        "class_0+1.safetensors",
        "class_0.safetensors",
    ]
    both = json.loads((run / "baselines" / "retrained_groups.json").read_text())
    assert both["records"][0]["names"] == ["a", "b"]
    fails(["trust", run, "-j0", "--checks", "geometry"], "has several labels per image")
    few = "--relearn-steps", "1", "--relearn-images", "1"
    call("trust -j0 --quiet", run, *few, "--classes", "a", "a+b")
    capsys.readouterr()
    records = json.loads((run / "trust.json").read_text())["records"]
    found = {(r["name"], r["check"]): r for r in records}
    assert {name for name, _ in found} == {"a", "a (with b)", "b (with a)"}
    own = found["a", "removal"]
    assert own["retrained_models"] == 1
    assert own["forgetful"]["ap_f"] == pytest.approx(content["classes"][0]["ap_f"])
    pair = [found[name, "removal"]["retrained"]["ap_r"] for name in ("a (with b)", "b (with a)")]
    assert len(pair) == len(set(pair)) == 2
    call("evaluate -j0 --quiet --tables", run)
    assert "| retrained " in capsys.readouterr().out
    call("report --quiet", run)
    page = (run / "report.html").read_text()
    for text in ("3 groups of 2 classes forgotten at once", "2 forgotten together", "b (with a)"):
        assert text in page
    call("bake", run, "--forget", "a", "--verify", "--quiet")
    assert "class a: average precision of it" in capsys.readouterr().out
