"""WebDataset shards: what is read, what is refused, and that nothing but images is decoded."""

import io
import pickle
import tarfile

import numpy as np
import pytest
import torch
from image_files import write_tar
from PIL import Image

from wfnet.data import ImageShards, batches, evaluation_transform, open_data
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
        write_tar(tmp_path / "train" / "a-000.tar", samples(0, [0, 1, 2])),
        write_tar(tmp_path / "train" / "a-001.tar", samples(3, [2, 1, 0, 0])),
    ]


def read(paths, **kwargs):
    return ImageShards(paths, evaluation_transform(SIZE, crop_pct=1.0), **kwargs)


def test_order_labels_and_pixels(shards):
    data = read(shards)
    assert data.labels.tolist() == [0, 1, 2, 2, 1, 0, 0]
    assert data.classes == ["0", "1", "2"]
    order = torch.tensor([6, 0, 3, 2, 5, 1])
    for batch in batches(data, order.split(2), workers=2):
        for image, index in zip(batch.images, batch.indices.tolist(), strict=True):
            file = Image.open(io.BytesIO(jpeg(index))).convert("RGB")
            assert torch.equal(image, evaluation_transform(SIZE, crop_pct=1.0)(file))
    assert data.name_of(4) == f"{shards[1]}:n0004"
    part = data.select(torch.tensor([6, 0]))
    assert torch.equal(part[0][0], data[6][0])
    assert part.name_of(1).endswith("a-000.tar:n0000")


def test_the_index_is_kept_until_a_shard_changes(shards, monkeypatch):
    first = read(shards)
    with monkeypatch.context() as patch:
        patch.setattr(shards_module, "_scan", lambda *_: pytest.fail("headers were read again"))
        again = read(shards)
    assert torch.equal(again[3][0], first[3][0])
    write_tar(shards[1], samples(3, [1, 1]))
    assert read(shards).labels.tolist() == [0, 1, 2, 1, 1]


def test_other_members_are_never_looked_into(tmp_path):
    class Boom:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was loaded",))

    members = {
        "x.v2/0.json": b"{not json",
        "x.v2/0.JPG": jpeg(0),
        "x.v2/0.pyd": pickle.dumps(Boom()),
        "x.v2/0.cls": b" 1\n",
        "7.seg.png": b"a mask",
        "7.jpg": jpeg(7),
        "7.cls": b"0",
        "8.cls": b"1",
        "._n0001.jpg": b"of a Mac",
    }
    data = read([write_tar(tmp_path / "s.tar", members)])
    assert data.labels.tolist() == [1, 0]
    assert data.name_of(0).endswith("x.v2/0")


def test_class_names_stand_beside_the_shards_or_above(shards):
    (shards[0].parent.parent / "classes.txt").write_text("ant\nbee\ncat\n")
    assert read(shards).classes == ["ant", "bee", "cat"]
    (shards[0].parent / "classnames.txt").write_text("ant\nbee\n")
    with pytest.raises(ValueError, match="have class 2, but only 2 classes are named"):
        read(shards)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"0.jpg": b""}, r"0\.jpg: 1 images with 0 class indices; .* 0\.cls"),
        ({"0.jpg": b"", "0.cls": b"cat"}, "0.cls holds b'cat', not the number of a class"),
        ({"0.cls": b"1"}, "hold no images"),
    ],
)
def test_bad_samples_are_refused(tmp_path, members, message):
    with pytest.raises(ValueError, match=message):
        read([write_tar(tmp_path / "s.tar", members)])


def test_unreadable_shards_are_named(shards):
    with pytest.raises(ValueError, match=r"is compressed.*unpack it"):
        read([write_tar(shards[0].parent / "s.tar.gz", {}, "gz")])
    with tarfile.open(shards[1]) as tar:
        last = tar.getmembers()[-1]
    for content in (b"no tar file at all", shards[1].read_bytes()[: last.offset_data + 512]):
        shards[0].write_bytes(content)
        with pytest.raises(ValueError, match=r"a-000\.tar cannot be read .*: fetch it again"):
            read(shards)


@pytest.mark.parametrize("layout", ["folders", "names"])
def test_open_data(tmp_path, layout):
    root = tmp_path / "set"
    for part, name, labels in (("train", "train", [0, 1] * 4), ("val", "validation", [1, 0])):
        path = root / part / "0.tar" if layout == "folders" else root / f"set-{name}-0.tar"
        write_tar(path, samples(0, labels))
    splits = open_data(root, image_size=SIZE, validation_fraction=0.25)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (6, 2, 2)
    assert splits.test.labels.tolist() == [1, 0]
    write_tar(root / "set-test-0.tar", samples(0, [0, 1, 1]))
    splits = open_data(root, image_size=SIZE)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (8, 2, 3)
