import pytest
import torch

from wfnet.data import CachedImages, MultiLabelTensors, TensorImages, batches, open_data, select
from wfnet.data.class_names import in_known_order, numbers_by_name


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (["a", "b", "d"], "'d' is not known there; 'c' is not known here"),
        (["a", "b"], "'c' is not known here"),
        (["a", "b", "c", "c"], "4 names, not 3"),
        (["w", "x", "y", "z"], "'w', 'x', 'y' and 1 more is not known there"),
    ],
)
def test_other_names_are_refused(found, message):
    with pytest.raises(ValueError, match=f"birds has other classes than the run: .*{message}"):
        numbers_by_name(found, ["a", "b", "c"], "birds", "the run")


def test_names_give_numbers():
    assert numbers_by_name(["c", "a", "b"], ["a", "b", "c"], "x", "y").tolist() == [2, 0, 1]
    assert numbers_by_name(["a", "a"], ["a", "a"], "x", "y").tolist() == [0, 1]


def test_labels_follow_their_names(make_dataset):
    plain = make_dataset(list(range(4)) * 3, classes=4)
    known = ["name2", "name0", "name3", "name1"]
    found = in_known_order(plain, known, "data", "run")
    assert in_known_order(plain, plain.classes, "data", "run") is plain
    assert found.classes == known
    assert [known[label] for label in found.labels] == [plain.classes[k] for k in plain.labels]
    part = select(found, torch.tensor([7, 2, 4]))
    read = next(iter(batches(part, [torch.tensor([0, 2])])))
    assert [known[label] for label in read.labels] == ["name3", "name0"]
    assert torch.equal(read.images, plain.batch(torch.tensor([7, 4])).images)
    assert part[1][1] == known.index("name2")


def test_several_labels_follow_their_names():
    multi_hot = torch.tensor([[1, 0, 1], [0, 1, 0]]).bool()
    plain = MultiLabelTensors(torch.rand(2, 1, 4, 4), multi_hot, ["a", "b", "c"])
    found = in_known_order(plain, ["c", "a", "b"], "data", "run")
    assert found.multi_hot.tolist() == [[True, True, False], [False, False, True]]
    assert found.multi_hot.gather(1, found.labels.unsqueeze(1)).all()


@pytest.mark.parametrize("cache", [None, "host"])
def test_files_and_caches_are_renumbered(image_folder, cache):
    data = open_data(image_folder, image_size=16, cache=cache)
    known = ["cat", "ant", "bee"]
    found = data.in_known_order(known, "the run")
    assert found.classes == known
    assert isinstance(data.test, CachedImages) == (cache is not None)
    for part, plain in ((found.test, data.test), (found.train, data.train)):
        order = torch.arange(len(plain)).split(4)
        for a, b in zip(batches(part, order), batches(plain, order), strict=True):
            assert torch.equal(a.images, b.images)
            assert [known[k] for k in a.labels] == [data.classes[k] for k in b.labels]
    assert found.test.name_of(0) == data.test.name_of(0)
    assert not isinstance(found.test, TensorImages)
