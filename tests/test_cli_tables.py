"""Training, baselines and tables on the command line; recipes; lists of evaluated images."""

import json
import shutil

import numpy as np
import pytest
import torch
from evaluated_networks import K, make_dataset
from image_files import cifar10_binary, cifar10_names, write_idx
from safetensors.torch import load_file
from test_cli import fails

from wfnet import baselines, models, recipes
from wfnet.cli import build_parser, main
from wfnet.cli.options import fill_from_files
from wfnet.data.image_lists import ImageList
from wfnet.services.files import write_tensors

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


def test_tables_of_a_run(digits, tmp_path, capsys, monkeypatch):
    run = shutil.copytree(digits / "run", tmp_path / "run")
    baseline = ["baseline", str(run), "--classes", "0", "3", "--methods", *METHODS, "--set",
                "neggrad_plus.epochs=1", *QUICK, *SMALL]  # fmt: skip
    inner, made = baselines.unlearn, []

    def interrupt(method, original, train, label, *rest):
        made.append((method, label))
        if len(made) == 2:
            raise KeyboardInterrupt
        return inner(method, original, train, label, *rest)

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
    weights = load_file(run / "baselines" / "retrained" / "class_3.safetensors")
    assert set(weights) == set(models.create("resnet", 10, 1, width=8).state_dict())

    tables = ["evaluate", str(run), "--tables", "--published", "mnist/resnet18", *QUICK, *SMALL,
              "--attribution-steps", "2", "--group-sizes", "2", "3", "--groups", "3",
              "--no-figures"]  # fmt: skip
    before = load_file(run / "wf_model.safetensors")
    capsys.readouterr()
    fails(capsys, [*tables, "--relearn-lr", "0.5"], "relearned with lr=0.01, others with 0.5")
    assert not (run / "evaluation.json").exists()  # noticed before the work
    assert main(tables) == 0
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
    assert all(torch.equal(t, before[n]) for n, t in
               load_file(run / "wf_model.safetensors").items())  # fmt: skip


def test_an_interrupted_evaluation_goes_on(digits, tmp_path, monkeypatch, capsys):
    run = shutil.copytree(digits / "run", tmp_path / "run")
    call = ["evaluate", str(run), "--tables", "--no-relearn", *SMALL, "--attribution-steps", "1",
            "--no-figures", "--classes", "0", "1"]  # fmt: skip

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("wfnet.cli.evaluate.attribution", interrupt)
        assert main(call) == 130
    assert "goes on there" in capsys.readouterr().err
    assert (run / "unfinished_evaluation" / "counts.safetensors").is_file()
    with monkeypatch.context() as patch:  # counted images are not run again
        patch.setattr("wfnet.evaluation.rows.RowScores.end", interrupt)
        assert main(call) == 0
    fails(capsys, ["evaluate", str(run), "--published", "mnist/alexnet", *SMALL],
          "nothing was published for 'mnist/alexnet'")  # fmt: skip


def test_bad_settings_of_baselines(digits, capsys):
    run = digits / "run"
    with pytest.raises(SystemExit):
        main(["baseline", str(run), "--set", "retrained=3"])
    assert "METHOD.NAME=VALUE" in capsys.readouterr().err
    fails(capsys, ["baseline", run, "--set", "random_labels.lr=high", *SMALL], "must be like")
    fails(capsys, ["baseline", run, "--set", "random_labels.lr=-1", *SMALL], "above 0, got -1")
    fails(capsys, ["baseline"], "name the folder of a run")
    fails(capsys, ["train", "--config", "digits/resnet"], "--output DIR")
    fails(capsys, ["train", "--config", "digits/resnet", "--output", digits / "base"], "--force")


@pytest.mark.parametrize("command", ["train", "baseline"])
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert f"example:\n  wfnet {command}" in shown
    assert "None" not in shown


def mnist_files(folder):
    rng = np.random.default_rng(0)
    for part, count in (("train", 60), ("t10k", 20)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        write_idx(folder / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte", np.arange(count) % 10)


def cifar10_files(folder):
    folder.mkdir()
    for number, name in cifar10_names().items():
        (folder / f"{name}.bin").write_bytes(cifar10_binary(number))


@pytest.mark.parametrize(
    ("cell", "write", "kwargs"),
    [
        ("mnist/vgg16", mnist_files, ["width=8"]),
        ("cifar10/resnet18", cifar10_files, ["width=8"]),
    ],
)
def test_recipes_run_on_files_in_the_real_formats(cell, write, kwargs, tmp_path):
    write(tmp_path / "files")
    config = ["--config", cell, "--data-dir", str(tmp_path / "files"), "--model-kwargs", *kwargs,
              "--workers", "0", "--quiet"]  # fmt: skip
    base, run = tmp_path / "base", tmp_path / "run"
    assert main(["train", *config, "--epochs", "1", "--output", str(base)]) == 0
    untrain = ["untrain", *config, "--steps", "2", "-b", "4", "-M", "1", "--output", str(run)]
    assert main([*untrain, "--checkpoint", str(base / "base.safetensors")]) == 0
    more = ["--no-figures", "--attribution-steps", "1", "--groups", "2", "--relearn-epochs", "1"]
    assert main(["evaluate", str(run), "--config", cell, *config[2:], *more]) == 0
    content = json.loads((run / "tables.json").read_text())
    assert content["cell"] == cell  # found by the names of data and model
    assert content["rows"][-1]["published"]["insertion"] > 0.6


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_fits_its_commands(name, tmp_path):
    parser = build_parser()
    sections = ("train", "untrain", "evaluate", "baseline")
    for command in sections:
        arguments = [command, "--config", name]
        options = fill_from_files(parser, arguments)
        for key, value in recipes.read(name, command).items():
            assert getattr(options, key) == value, (command, key)
        parser = build_parser()
    kind = options.model.removeprefix("small/")
    if options.model.startswith("small/"):
        assert kind in models.SMALL_MODELS
    else:
        timm = pytest.importorskip("timm")
        assert options.model in timm.list_pretrained()


def test_an_unknown_recipe_is_refused_with_the_known_ones(capsys):
    fails(capsys, ["untrain", "--config", "mnist/alexnet"], "mnist/alexnet", "cifar10/vgg16")
    with pytest.raises(ValueError, match="there is no recipe"):
        recipes.read("mnist/alexnet", "train")


@pytest.mark.parametrize(("data", "missing"), [("mnist", "train-images"), ("cifar10", "cifar-10")])
def test_missing_files_are_noticed_before_the_model_is_made(
    data, missing, tmp_path, capsys, monkeypatch
):
    def never(*args, **kwargs):
        raise AssertionError("the model was made")

    monkeypatch.setattr("wfnet.cli.inputs.create_classifier", never)
    config = ["--config", f"{data}/resnet18", "--data-dir", str(tmp_path)]
    fails(capsys, ["untrain", *config], missing)
    fails(capsys, ["train", *config, "--output", str(tmp_path / "base")], missing)


# -- lists of images ------------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path):
    path = tmp_path / "base.safetensors"
    write_tensors(path, models.create("resnet", 3, 3, seed=1, width=8).state_dict())
    return path


def test_untraining_without_the_training_set(image_folder, base, tmp_path, capsys):
    shutil.rmtree(image_folder / "train")
    run = tmp_path / "run"
    options = ["--data-dir", str(image_folder), "--checkpoint", str(base), "--model",
               "small/resnet", "--model-kwargs", "width=8", "--img-size", "32", "--workers", "0",
               "--val-split", "0.5"]  # fmt: skip
    untrain = ["untrain", *options, "--steps", "2", "-b", "2", "-M", "1", "--output", str(run)]
    fails(capsys, untrain, "no training images", "--untrain-split val")
    more = ["--untrain-split", "val", "--eval-per-class", "1", "--eval-seed", "4"]
    counts = sorted(len(list(p.iterdir())) for p in (image_folder / "val").iterdir())
    if counts[0] < 3:
        for folder in (image_folder / "val").iterdir():
            for copy in range(3):
                first = min(folder.iterdir())
                shutil.copy(first, folder / f"more{copy}{first.suffix}")
    assert main([*untrain, *more, "--quiet"]) == 0
    images = ImageList.load(run / "evaluation_images.json")
    assert (images.per_class, images.seed, len(images.images)) == (1, 4, 3)
    assert {name for name, _ in images.images} == {"ant", "bee", "cat"}
    capsys.readouterr()
    evaluate = ["evaluate", str(run), "--no-figures", "--workers", "0", "--quiet"]
    assert main(evaluate) == 0
    content = json.loads((run / "evaluation.json").read_text())
    assert content["settings"]["images"] == 3  # those of the list alone
    fails(capsys, [*evaluate, "--tables"], "--no-relearn")
    fails(capsys, [*evaluate, "--eval-per-class", "2"], "1 images per class drawn with seed 4")
    fails(capsys, [*evaluate, "--split", "validation"], "images of the test part")
    fails(capsys, ["baseline", run, "--workers", "0", "--train-epochs", "1"], "training images")


def test_a_list_is_drawn_by_seed_and_fits_its_data_alone(tmp_path):
    dataset = make_dataset(list(range(K)) * 4)
    images = ImageList.draw(dataset, 2, seed=1, part="test")
    assert len(images.positions(dataset)) == 2 * K
    assert dataset.labels[images.positions(dataset)].bincount().tolist() == [2] * K
    assert images != ImageList.draw(dataset, 2, seed=2, part="test")
    rest = images.others(dataset)
    assert len(rest) == 2 * K
    assert not set(rest.tolist()) & set(images.positions(dataset).tolist())
    images.save(tmp_path / "list.json")
    assert ImageList.load(tmp_path / "list.json") == images
    with pytest.raises(ValueError, match="does not fit these data"):
        images.positions(make_dataset([0] * (4 * K)))
    (tmp_path / "list.json").write_text('{"format": 1}')
    with pytest.raises(ValueError, match="no list of images"):
        ImageList.load(tmp_path / "list.json")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        ImageList.load(tmp_path / "none.json")
