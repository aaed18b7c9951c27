"""WebDataset shards: what is read, what is refused, and that nothing but images is decoded."""

import io
import logging
import pickle
import tarfile

import numpy as np
import pytest
import torch
from image_files import write_image, write_shard
from PIL import Image

from wfnet.data import CorruptImage, ImageShards, batches, evaluation_transform, open_data
from wfnet.data import shards as shards_module

SIZE = 16


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def jpeg(seed):
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((36, 40)).save(file, "JPEG", quality=95)
    return file.getvalue()


def samples(first, labels):
    members = {}
    for position, label in enumerate(labels, first):
        members[f"n{position:04d}.jpg"] = jpeg(position)
        members[f"n{position:04d}.cls"] = str(label).encode()
    return members


@pytest.fixture
def shards(tmp_path):
    return [
        write_shard(tmp_path / "train" / "a-000.tar", samples(0, [0, 1, 2])),
        write_shard(tmp_path / "train" / "a-001.tar", samples(3, [2, 1, 0, 0])),
    ]


def read(paths, **kwargs):
    return ImageShards(paths, evaluation_transform(SIZE, crop_pct=1.0), **kwargs)


def test_order_labels_and_pixels(shards, tmp_path):
    data = read(shards)
    assert data.labels.tolist() == [0, 1, 2, 2, 1, 0, 0]
    assert data.classes == ["0", "1", "2"]
    for index in range(len(data)):
        file = tmp_path / f"{index}.jpg"
        file.write_bytes(jpeg(index))
        image, label = data[index]
        expected = evaluation_transform(SIZE, crop_pct=1.0)(Image.open(file).convert("RGB"))
        assert torch.equal(image, expected)
        assert label == data.labels[index]
    assert data.name_of(4) == f"{shards[1]}:n0004"
    part = data.select(torch.tensor([6, 0]))
    assert torch.equal(part[0][0], data[6][0])
    assert part.name_of(1).endswith("a-000.tar:n0000")
    grey = ImageShards(shards, evaluation_transform(SIZE, [0.5], [0.5]), channels=1)
    assert grey[0][0].shape == (1, SIZE, SIZE)


@pytest.mark.parametrize("workers", [0, 2])
def test_random_access_in_batches(shards, workers, monkeypatch):
    monkeypatch.setattr(shards_module, "_OPEN_SHARDS", 1)  # opens and closes at every turn
    data = read(shards)
    order = torch.tensor([6, 0, 3, 2, 5, 1])
    found = torch.cat([b.images for b in batches(data, order.split(2), workers)])
    assert torch.equal(found, torch.stack([data[i][0] for i in order.tolist()]))


def test_the_index_is_kept_until_a_shard_changes(shards, monkeypatch):
    first = read(shards)
    with monkeypatch.context() as patch:
        patch.setattr(shards_module, "_scan", lambda *_: pytest.fail("headers were read again"))
        again = read(shards)
    assert torch.equal(again.labels, first.labels)
    assert torch.equal(again[3][0], first[3][0])
    write_shard(shards[1], samples(3, [1, 1]))
    assert read(shards).labels.tolist() == [0, 1, 2, 1, 1]


def test_other_members_are_never_looked_into(tmp_path):
    class Boom:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was loaded",))

    members = {
        "x/0.json": b"{not json",
        "x/0.jpg": jpeg(0),
        "x/0.pyd": pickle.dumps(Boom()),
        "x/0.cls": b" 1\n",
        "y/0.txt": b"another folder, another key",
    }
    data = read([write_shard(tmp_path / "s.tar", members)])
    assert data.labels.tolist() == [1]
    assert data[0][0].shape == (3, SIZE, SIZE)


def test_class_names_stand_beside_the_shards_or_above(shards):
    (shards[0].parent.parent / "classes.txt").write_text("ant\nbee\ncat\n")
    assert read(shards).classes == ["ant", "bee", "cat"]
    (shards[0].parent / "classnames.txt").write_text("ant\nbee\n")
    with pytest.raises(ValueError, match="have class 2, but only 2 classes are named"):
        read(shards)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"0.jpg": b""}, r"image '0' has no class index: a member 0\.cls"),
        ({"0.jpg": b"", "0.cls": b"cat"}, "0.cls holds b'cat', not the number of a class"),
        ({"0.jpg": b"", "0.cls": b"-1"}, "0.cls holds b'-1'"),
        ({"0.jpg": b"", "0.cls": b"1" * 99}, "not the number of a class"),
        ({"0.cls": b"1"}, "hold no images"),
    ],
)
def test_bad_shards_are_refused(tmp_path, members, message):
    with pytest.raises(ValueError, match=message):
        read([write_shard(tmp_path / "s.tar", members)])


def test_keys_may_have_dots_and_accompanying_images_are_passed_over(tmp_path, caplog):
    members = {}
    for number in range(5):
        members[f"a/img.{number}.v2.jpg"] = jpeg(number)
        members[f"a/img.{number}.v2.cls"] = str(number % 2).encode()
        members[f"a/img.{number}.v2.json"] = b"{}"
    members |= {"7.jpg": jpeg(7), "7.cls": b"1", "7.seg.png": b"a mask"}
    data = read([write_shard(tmp_path / "s.tar", members)])
    assert data.labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert data.name_of(1).endswith("a/img.1.v2")
    assert caplog.text.count("passed over") == 1
    assert "passed over 1 images that belong to a sample's image (7.seg.png)\n" in caplog.text


def test_members_that_are_not_read_are_named(tmp_path, caplog):
    members = samples(0, [0, 1])
    members |= {"8.heic": b"x", "8.cls": b"1", "README": b"x", "._n0001.jpg": b"of a Mac"}
    assert read([write_shard(tmp_path / "s.tar", members)]).labels.tolist() == [0, 1]
    assert "1 samples without an image that is read (8.cls, 8.heic)" in caplog.text
    assert "1 members that belong to no image (README)" in caplog.text
    assert "1 hidden members (._n0001.jpg)" in caplog.text


def test_a_key_that_comes_twice_is_two_samples(tmp_path):
    first, second = samples(0, [0, 1]), {"n0000.jpg": jpeg(9), "n0000.cls": b"2"}
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w:") as tar:
        for name, content in [*first.items(), *second.items()]:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    data = read([path])
    assert sorted(data.labels.tolist()) == [0, 1, 2]
    assert not torch.equal(data[0][0], data[1][0])


def test_two_images_with_one_class_index_are_refused(tmp_path):
    members = {"0.jpg": jpeg(0), "0.png": jpeg(1), "0.cls": b"1"}
    with pytest.raises(ValueError, match=r"key '0' has 2 images \(0\.jpg, 0\.png\) and 1 class"):
        read([write_shard(tmp_path / "s.tar", members)])


@pytest.mark.parametrize(
    "text",
    ["ant\nbee\ncat", "\ufeffant\r\nbee\r\ncat\r\n\r\n", "ant \nbee\ncat\n\n"],
)
def test_files_of_class_names(shards, text):
    (shards[0].parent / "classes.txt").write_bytes(text.encode())
    assert read(shards).classes == ["ant", "bee", "cat"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"ant\n\nbee\n", "line 2 is blank"),
        (b"ant\nbee\nant\n", "the class 'ant' twice"),
        ("ant\nbee\ncat".encode("utf-16"), r"classes\.txt is not UTF-8"),
    ],
)
def test_bad_files_of_class_names(shards, text, message):
    (shards[0].parent / "classes.txt").write_bytes(text)
    with pytest.raises(ValueError, match=message):
        read(shards)


def test_missing_and_compressed_shards(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.tar does not exist"):
        read([tmp_path / "none.tar"])
    packed = write_shard(tmp_path / "s.tar.gz", samples(0, [0]), "gz")
    with pytest.raises(ValueError, match=r"is compressed.*unpack it"):
        read([packed])


def test_unreadable_shards_are_named_and_counted(shards, caplog):
    content = shards[0].read_bytes()
    shards[0].write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"1 of 2 shards cannot be read.*a-000\.tar.*fetch it"):
        read(shards)
    with caplog.at_level(logging.WARNING, "wfnet"):
        data = read(shards, max_unreadable=1)
    assert "unreadable shard left out" in caplog.text
    assert data.labels.tolist() == [2, 1, 0, 0]
    assert data.name_of(0) == f"{shards[1]}:n0003"
    assert data[0][0].shape == (3, SIZE, SIZE)
    shards[0].write_bytes(b"no tar file at all")
    with pytest.raises(ValueError, match="cannot be read"):
        read(shards)


def test_corrupt_images_are_left_out(tmp_path, caplog):
    members = samples(0, [0, 1, 0])
    members["n0001.jpg"] = members["n0001.jpg"][:200]
    data = read([write_shard(tmp_path / "s.tar", members)])
    with pytest.raises(CorruptImage, match=r"s\.tar:n0001"):
        data[1]
    (batch,) = batches(data, [torch.arange(3)], max_corrupt=1)
    assert batch.indices.tolist() == [0, 2]


@pytest.mark.parametrize("layout", ["folders", "names"])
def test_open_data(tmp_path, layout):
    root = tmp_path / "set"
    for part, name, labels in (("train", "train", [0, 1] * 4), ("val", "validation", [1, 0])):
        path = root / part / "0.tar" if layout == "folders" else root / f"set-{name}-0.tar"
        write_shard(path, samples(0, labels))
    splits = open_data(root, image_size=SIZE, validation_fraction=0.25)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (6, 2, 2)
    assert splits.test.labels.tolist() == [1, 0]
    write_shard(root / "set-test-0.tar", samples(0, [0, 1, 1]))
    splits = open_data(root, image_size=SIZE)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (8, 2, 3)


def test_a_folder_of_neither_kind(tmp_path):
    write_image(tmp_path / "train" / "ant" / "0.png", 0)
    with pytest.raises(FileNotFoundError, match=r"val does not exist: .*shards"):
        open_data(tmp_path)
