import json
import shutil

from image_files import write_image

from wfnet.data.image_lists import ImageList


def test_untraining_without_the_training_set(
    image_folder, base, tmp_path, network_options, call, fails
):
    shutil.rmtree(image_folder / "train")
    for number, folder in enumerate((image_folder / "val").iterdir()):
        write_image(folder / "more.jpg", number)
    run = tmp_path / "run"
    data = ["--data-dir", image_folder, "--checkpoint", base, *network_options, "-j0"]
    words = [*data, "--val-split", "0.5", "--steps", "2", "-b", "2", "-M", "1", "--output", run]
    fails(["untrain", *words], "no training images", "--untrain-split val")
    call("untrain --untrain-split val --eval-per-class 1 --eval-seed 4 --quiet", *words)
    images = ImageList.load(run / "evaluation_images.json")
    assert (images.per_class, images.seed, len(images.images)) == (1, 4, 3)
    assert {name for name, _ in images.images} == {"ant", "bee", "cat"}
    evaluate = ["evaluate", run, "--no-figures", "-j0", "--quiet"]
    call("", *evaluate)
    content = json.loads((run / "evaluation.json").read_text())
    assert content["settings"]["images"] == 3  # those of the list alone
    fails([*evaluate, "--tables"], "--no-relearn")
    fails([*evaluate, "--eval-per-class", "2"], "1 images per class drawn with seed 4")
    fails([*evaluate, "--split", "validation"], "images of the test part")
    fails(["baseline", run, "-j0", "--train-epochs", "1"], "training images")


def test_a_list_for_another_output_leaves_the_run_alone(finished, tmp_path, call):
    def evaluated(output, *options):
        call("evaluate --no-figures -j0 --quiet", finished, "--output", output, *options)
        return json.loads((output / "evaluation.json").read_text())["settings"]["images"]

    other, before = tmp_path / "other", sorted(path.name for path in finished.iterdir())
    assert evaluated(other, "--eval-per-class", "1") == 3
    assert sorted(path.name for path in finished.iterdir()) == before
    assert evaluated(finished) == 6
    assert evaluated(other) == 3  # there the list is taken up
    assert evaluated(finished, "--eval-per-class", "1") == 3
    assert evaluated(tmp_path / "third") == 3  # the run's own list
