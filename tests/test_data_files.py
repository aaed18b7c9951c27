"""Image folders, MNIST and CIFAR-10 files, and reading them in batches with damage among them."""

import gzip
import logging
import pickle
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from image_files import (
    CLASS_NAMES,
    cifar10_batch,
    cifar10_binary,
    cifar10_names,
    cifar10_pickle,
    truncate,
    write_archive,
    write_image,
)
from PIL import Image

from wfnet.data import (
    CachedImages,
    CorruptImage,
    CorruptImages,
    ImageFiles,
    batches,
    corrupt_limit,
    evaluation_transform,
    model_data_config,
    open_data,
    training_transform,
)
from wfnet.data.cifar10 import decode_pickle
from wfnet.data.transforms import IMAGENET_MEAN, IMAGENET_STD

SIZE = 16


def files(root, **kwargs):
    return ImageFiles(root, evaluation_transform(SIZE, crop_pct=1.0), **kwargs)


def index_batches(count, size=4):
    return torch.arange(count).split(size)


def test_folder_order_and_items(image_folder):
    data = files(image_folder / "train")
    assert data.classes == list(CLASS_NAMES)
    assert data.labels.bincount().tolist() == [6, 6, 6]
    image, label = data[7]
    assert image.shape == (3, SIZE, SIZE)
    assert image.dtype == torch.float32
    assert label == 1
    assert data.path(7) == image_folder / "train" / "bee" / "1.png"
    part = data.select(torch.tensor([7, 0]))
    assert torch.equal(part[0][0], image)
    assert part.labels.tolist() == [1, 0]
    assert files(image_folder / "train", channels=1, classes=CLASS_NAMES).channels == 1


def test_open_folder(image_folder):
    splits = open_data(image_folder, image_size=SIZE, validation_fraction=1 / 6)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (15, 3, 6)
    names = {
        str(part.path(i)) for part in (splits.train, splits.validation) for i in range(len(part))
    }
    assert len(names) == 18
    assert splits.name == "images"
    same = open_data("images", image_folder.parent, image_size=SIZE, validation_fraction=1 / 6)
    assert np.array_equal(same.validation._files, splits.validation._files)
    grey = open_data(image_folder, image_size=SIZE, channels=1, train_per_class=2, test_per_class=1)
    assert grey.train[0][0].shape == (1, SIZE, SIZE)
    assert (len(grey.train), len(grey.test)) == (6, 3)


def test_a_test_folder_makes_val_the_validation_part(image_folder):
    for name in CLASS_NAMES:
        write_image(image_folder / "test" / name / "x.png", 7)
    splits = open_data(image_folder, image_size=SIZE)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (18, 6, 3)


def test_augmentation_is_for_training_alone(image_folder):
    splits = open_data(image_folder, image_size=SIZE, augment=True)
    assert not torch.equal(splits.train[0][0], splits.train[0][0])
    assert torch.equal(splits.validation[0][0], splits.validation[0][0])
    with pytest.raises(ValueError, match="exclude each other"):
        open_data(image_folder, augment=True, transform=lambda image: image)


def test_empty_class_folder_is_named(image_folder):
    (image_folder / "train" / "dog").mkdir()
    (image_folder / "train" / "dog" / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match=r"class folder 'dog' in .*train has no images"):
        files(image_folder / "train")


def test_folders_must_agree(image_folder):
    (image_folder / "val" / "bee").rename(image_folder / "val" / "wasp")
    with pytest.raises(ValueError, match=r"val lacks class folder 'bee' and has .*'wasp' besides"):
        open_data(image_folder)


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("nowhere", FileNotFoundError, "neither the name of a data set"),
        ("images/train", FileNotFoundError, r"train/train does not exist: an image folder has"),
    ],
)
def test_missing_folders_are_named(image_folder, path, error, message):
    with pytest.raises(error, match=message):
        open_data(path, image_folder.parent)


def test_folder_without_classes(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()
    with pytest.raises(ValueError, match="train has no class folders"):
        open_data(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        files(tmp_path / "nothing")


def test_single_image_class_cannot_be_split(image_folder):
    for number, suffix in enumerate(("jpg", "png", "jpeg", "webp", "bmp")):
        (image_folder / "train" / "ant" / f"{number}.{suffix}").unlink()
    with pytest.raises(ValueError, match="class 'ant' has a single image"):
        open_data(image_folder)


def damage(root):
    """Three corrupt files of three kinds; returns their paths in order."""
    return [
        truncate(root / "ant" / "0.jpg"),
        truncate(root / "bee" / "1.png"),
        truncate(root / "cat" / "4.bmp", keep=0.0),
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_images_are_left_out_named_and_counted(image_folder, caplog, workers):
    root = image_folder / "train"
    damaged = damage(root)
    data = files(root)
    corrupt = CorruptImages(limit=3)
    with caplog.at_level(logging.WARNING, "wfnet"):
        read = list(batches(data, index_batches(18), workers, corrupt))
        list(batches(data, index_batches(18), workers, corrupt))  # met again: not counted again
    assert [batch.indices.tolist() for batch in read] == [
        [1, 2, 3],
        [4, 5, 6],
        [8, 9, 10, 11],
        [12, 13, 14, 15],
        [17],
    ]
    assert torch.equal(read[2].images[0], data[8][0])
    assert torch.equal(read[2].labels, data.labels[8:12])
    assert set(corrupt.found) == {str(path) for path in damaged}
    assert [sum(str(path) in text for text in caplog.messages) for path in damaged] == [1, 1, 1]


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_corrupt_images_end_the_run(image_folder, workers):
    damage(image_folder / "train")
    data = files(image_folder / "train")
    with pytest.raises(RuntimeError, match=r"3 corrupt images, more than max_corrupt=2.*4\.bmp"):
        list(batches(data, index_batches(18), workers, max_corrupt=2))
    assert corrupt_limit(data) == 10


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("place", [None, "host"])
def test_in_training_the_next_of_its_class_replaces_a_corrupt_image(image_folder, workers, place):
    damage(image_folder / "train")
    data = files(image_folder / "train")
    if place:
        data = CachedImages(data, place, SIZE, IMAGENET_MEAN, IMAGENET_STD, crop_pct=1.0)
    truncate(next((image_folder / "train" / "cat").glob("5.*")))
    corrupt = CorruptImages(limit=4)
    for _ in range(2):  # the second time from the cache, where there is one
        read = list(batches(data, index_batches(18, 6), workers, corrupt, replace_corrupt=True))
        assert [batch.indices.tolist() for batch in read] == [
            [1, 1, 2, 3, 4, 5],
            [6, 8, 8, 9, 10, 11],
            [12, 13, 14, 15, 12, 12],
        ]
        assert torch.equal(torch.cat([batch.labels for batch in read]), data.labels)
        assert torch.equal(read[1].images[1], data[8][0])
    assert len(corrupt.found) == 4


def test_a_class_without_a_readable_image_ends_training(image_folder):
    for file in (image_folder / "train" / "bee").iterdir():
        truncate(file)
    with pytest.raises(RuntimeError, match=r"no image of the class of .*bee.* can be read"):
        list(batches(files(image_folder / "train"), [[0, 6]], replace_corrupt=True))


def test_a_batch_of_corrupt_images_is_not_yielded(image_folder):
    truncate(image_folder / "train" / "ant" / "0.jpg")
    read = list(batches(files(image_folder / "train"), [[0], [1]]))
    assert [batch.indices.tolist() for batch in read] == [[1]]


def test_corrupt_images_of_foreign_data_sets(image_folder, caplog):
    from torchvision.datasets import ImageFolder

    damaged = truncate(image_folder / "train" / "ant" / "0.jpg")
    data = ImageFolder(str(image_folder / "train"), evaluation_transform(SIZE))
    read = list(batches(data, [[0, 1]]))
    assert read[0].indices.tolist() == [1]
    assert str(damaged) in caplog.text


def test_a_vanished_file_is_no_corrupt_image(image_folder):
    data = files(image_folder / "train")
    data.path(3).unlink()
    with pytest.raises(FileNotFoundError):
        list(batches(data, index_batches(18)))


def test_corrupt_image_error_survives_pickling():
    error = pickle.loads(pickle.dumps(CorruptImage("a.jpg", "short")))
    assert (error.name, error.reason, str(error)) == ("a.jpg", "short", "a.jpg: short")


@pytest.mark.parametrize("workers", [0, 2])
def test_order_is_the_order_given(image_folder, workers):
    data = files(image_folder / "train")
    order = [torch.tensor([17, 3]), torch.tensor([3]), [5, 0, 11]]
    read = list(batches(data, iter(order), workers))
    assert [batch.indices.tolist() for batch in read] == [[17, 3], [3], [5, 0, 11]]
    assert read[0].labels.tolist() == [2, 0]


def test_random_transforms_depend_on_seed_and_position_alone(image_folder):
    data = ImageFiles(image_folder / "train", training_transform(SIZE))
    order = list(index_batches(18, 6))
    alone = list(batches(data, order, 0, seed=5))
    for other in (
        list(batches(data, order, 2, seed=5)),
        [alone[0], *batches(data, order[1:], 0, seed=5, start=1)],
    ):
        assert all(torch.equal(a.images, b.images) for a, b in zip(alone, other, strict=True))
    assert not torch.equal(alone[0].images, next(batches(data, order, seed=6)).images)


def test_reading_leaves_random_states_alone(image_folder):
    data = ImageFiles(image_folder / "train", training_transform(SIZE))
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1]  # noqa: NPY002
    list(batches(data, index_batches(18)))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert np.array_equal(before[2], np.random.get_state()[1])  # noqa: NPY002


def test_an_endless_order_is_read_as_far_as_wanted(image_folder):
    def endless():
        while True:
            yield [1, 2]

    reading = batches(files(image_folder / "train"), endless(), workers=1)
    assert [next(reading).indices.tolist() for _ in range(5)] == [[1, 2]] * 5
    reading.close()


@pytest.mark.parametrize("index", [18, -1])
def test_bad_indices(image_folder, index):
    with pytest.raises(IndexError, match=f"index {index} is outside 0..17"):
        list(batches(files(image_folder / "train"), [[0, index]]))
    with pytest.raises(ValueError, match="workers must be 0 or more"):
        batches(files(image_folder / "train"), [[0]], workers=-1)
    with pytest.raises(ValueError, match="max_corrupt must be 0 or more"):
        batches(files(image_folder / "train"), [[0]], max_corrupt=-1)


def test_items_must_be_tensors_of_one_size(image_folder):
    write_image(image_folder / "train" / "ant" / "0.jpg", 0, size=(50, 20))
    raw = ImageFiles(image_folder / "train", lambda image: image)
    with pytest.raises(ValueError, match="is a Image, not a tensor: give the data set a transform"):
        list(batches(raw, [[0, 1]]))
    from torchvision.transforms import ToTensor

    with pytest.raises(ValueError, match="give the data set a transform with one size"):
        list(batches(ImageFiles(image_folder / "train", ToTensor()), [[0, 1]]))


class Dies:
    """A data set whose second item takes its worker process down."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        if index == 1:
            import os

            os._exit(1)
        return torch.zeros(1, 2, 2), 0


def test_a_dead_worker_is_reported():
    with pytest.raises(RuntimeError, match="a data worker died"):
        list(batches(Dies(), [[0], [1]], workers=1))


def test_evaluation_transform_equals_timm(image_folder):
    import timm.data

    image = Image.open(image_folder / "train" / "ant" / "1.png").convert("RGB").resize((300, 260))
    theirs = timm.data.create_transform(224, interpolation="bicubic", crop_pct=0.9)
    torch.testing.assert_close(evaluation_transform(224, crop_pct=0.9)(image), theirs(image))
    with pytest.raises(ValueError, match="interpolation 'cubic' is unknown"):
        evaluation_transform(224, interpolation="cubic")
    with pytest.raises(ValueError, match="crop_pct must lie in"):
        evaluation_transform(224, crop_pct=0.0)


def test_model_data_config(image_folder):
    import timm
    import torchvision

    config = model_data_config(timm.create_model("resnet18.a1_in1k"))
    assert config["image_size"] == 224
    assert config["interpolation"] == "bicubic"
    assert "transform" not in config
    assert open_data(image_folder, **config).train[0][0].shape == (3, 224, 224)
    assert model_data_config(torchvision.models.resnet18()) == {}


def test_mnist(mnist_folder):
    splits = open_data("mnist", mnist_folder, image_size=28, mean=0.0, std=1.0, seed=2)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (30, 10, 20)
    raw = np.frombuffer((mnist_folder / "t10k-images-idx3-ubyte").read_bytes()[16:], np.uint8)
    expected = torch.from_numpy(raw.copy()).view(20, 1, 28, 28).float() / 255
    torch.testing.assert_close(splits.test.batch(torch.arange(20)).images, expected)
    assert splits.test.labels.tolist() == [i % 10 for i in range(20)]
    upscaled = open_data("mnist", mnist_folder, channels=3)
    assert upscaled.test[0][0].shape == (3, 32, 32)


def test_mnist_in_torchvisions_folder(mnist_folder, tmp_path):
    (tmp_path / "MNIST").mkdir()
    mnist_folder.rename(tmp_path / "MNIST" / "raw")
    assert len(open_data("mnist", tmp_path).test) == 20


def test_damaged_mnist_files_are_named(mnist_folder):
    path = mnist_folder / "t10k-labels-idx1-ubyte"
    good = path.read_bytes()
    for content in (good[:-3], good[:6], good[:2], b"", b"\x00\x00\x0d" + good[3:]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"t10k-labels-idx1-ubyte is .*fetch it again"):
            open_data("mnist", mnist_folder)
    path.write_bytes(good)
    truncate(mnist_folder / "train-images-idx3-ubyte.gz")
    with pytest.raises(ValueError, match=r"train-images.*gz is truncated or damaged"):
        open_data("mnist", mnist_folder)


def test_mnist_files_must_belong_together(mnist_folder):
    content = (mnist_folder / "t10k-labels-idx1-ubyte").read_bytes()
    (mnist_folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(content))
    with pytest.raises(ValueError, match="do not belong together"):
        open_data("mnist", mnist_folder)


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_missing_named_sets(tmp_path, name):
    with pytest.raises(
        FileNotFoundError, match=f"{tmp_path}.* does not exist.*nothing is downloaded"
    ):
        open_data(name, tmp_path)
    with pytest.raises(ValueError, match="needs data_dir"):
        open_data(name)


def cifar10_members(version):
    folder = "cifar-10-batches-bin" if version.startswith("bin") else "cifar-10-batches-py"
    members = {}
    for number, name in cifar10_names().items():
        if folder.endswith("bin"):
            members[f"{folder}/{name}.bin"] = cifar10_binary(number)
        else:
            members[f"{folder}/{name}"] = cifar10_pickle(number, byte_keys="bytes" in version)
    return {f"{folder}/readme.html": b"x", **members}


def write_cifar10(root, version):
    members = cifar10_members(version)
    if "archive" in version:
        kind = "binary" if version.startswith("bin") else "python"
        return write_archive(root / f"cifar-10-{kind}.tar.gz", members)
    for name, content in members.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


VERSIONS = ["bin", "py", "py bytes", "bin archive", "py archive"]


@pytest.mark.parametrize("version", VERSIONS)
def test_cifar10_versions(tmp_path, version):
    write_cifar10(tmp_path, version)
    splits = open_data("cifar10", tmp_path, mean=0.0, std=1.0)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (90, 10, 20)
    images, labels = cifar10_batch(0)
    expected = torch.from_numpy(images).view(20, 3, 32, 32).float() / 255
    torch.testing.assert_close(splits.test.batch(torch.arange(20)).images, expected)
    assert splits.test.labels.tolist() == labels.tolist()
    assert splits.classes[0] == "airplane"


@pytest.mark.parametrize("version", ["bin", "py"])
def test_damaged_cifar10_files_are_named(tmp_path, version):
    write_cifar10(tmp_path, version)
    path = next(tmp_path.rglob("data_batch_3*"))
    truncate(path, keep=0.49)
    with pytest.raises(ValueError, match=r"data_batch_3.* fetch it again"):
        open_data("cifar10", tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"data_batch_3.* incomplete"):
        open_data("cifar10", tmp_path)


def test_damaged_cifar10_archive(tmp_path):
    path = write_cifar10(tmp_path, "py archive")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"python.tar.gz is truncated or damaged"):
        open_data("cifar10", tmp_path)
    write_archive(path, {"cifar-10-batches-py/readme.html": b""})
    with pytest.raises(ValueError, match="has no member data_batch_1"):
        open_data("cifar10", tmp_path)


class RunsCode:
    def __reduce__(self):
        return (eval, ("1 + 1",))


class AsksForCodec:
    def __reduce__(self):
        import codecs

        return (codecs.encode, ("x", "rot13"))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (RunsCode(), r"eval, which is refused"),
        (AsksForCodec(), "'rot13', which is refused"),
        (torch.Size([1]), r"torch\.Size, which is refused"),
        ({"data": np.zeros((2, 3), np.uint8), "labels": [0, 1]}, "it lacks `data`"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [0]}, "it lacks `data`"),
        ({"data": np.zeros((1, 3072), np.uint8), "labels": ["a"]}, "labels are not integers"),
        ([1, 2], "it lacks `data`"),
    ],
)
def test_pickles_build_arrays_and_nothing_else(value, message):
    with pytest.raises(ValueError, match=message):
        decode_pickle("batch", pickle.dumps(value, protocol=2))


def test_labels_outside_cifar10(tmp_path):
    write_cifar10(tmp_path, "bin")
    path = tmp_path / "cifar-10-batches-bin" / "test_batch.bin"
    path.write_bytes(bytes([10]) + path.read_bytes()[1:])
    with pytest.raises(ValueError, match="has label 10: it is not CIFAR-10"):
        open_data("cifar10", tmp_path)


def test_importing_data_needs_no_extra():
    code = (
        "import sys, wfnet.data, wfnet.models, wfnet.training; "
        "print([m for m in ('torchvision', 'timm', 'sklearn', 'PIL', 'matplotlib') "
        "if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


def test_a_missing_extra_is_named(monkeypatch, image_folder):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install wfnet\[eval\]"):
        open_data("digits")
