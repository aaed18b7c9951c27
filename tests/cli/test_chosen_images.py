import json
import shutil

from wfnet.cli import main
from wfnet.data.image_lists import ImageList


def test_untraining_without_the_training_set(image_folder, base, tmp_path, capsys, fails):
    shutil.rmtree(image_folder / "train")
    run = tmp_path / "run"
    options = ["--data-dir", str(image_folder), "--checkpoint", str(base), "--model",
               "small/resnet", "--model-kwargs", "width=8", "--img-size", "32", "--workers", "0",
               "--val-split", "0.5"]  # fmt: skip
    untrain = ["untrain", *options, "--steps", "2", "-b", "2", "-M", "1", "--output", str(run)]
    fails(untrain, "no training images", "--untrain-split val")
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
    fails([*evaluate, "--tables"], "--no-relearn")
    fails([*evaluate, "--eval-per-class", "2"], "1 images per class drawn with seed 4")
    fails([*evaluate, "--split", "validation"], "images of the test part")
    fails(["baseline", run, "--workers", "0", "--train-epochs", "1"], "training images")


def test_a_list_for_another_output_leaves_the_run_alone(finished, tmp_path):
    call = ["evaluate", str(finished), "--no-figures", "--workers", "0", "--quiet"]

    def images(folder):
        return json.loads((folder / "evaluation.json").read_text())["settings"]["images"]

    other, before = tmp_path / "other", sorted(path.name for path in finished.iterdir())
    assert main([*call, "--eval-per-class", "1", "--output", str(other)]) == 0
    assert images(other) == 3
    assert sorted(path.name for path in finished.iterdir()) == before
    assert main(call) == 0
    assert images(finished) == 6
    assert main([*call, "--output", str(other)]) == 0  # there the list is taken up
    assert images(other) == 3
    assert main([*call, "--eval-per-class", "1"]) == 0
    assert main([*call, "--output", str(tmp_path / "third")]) == 0  # the run's own list
    assert images(tmp_path / "third") == 3
