import pytest
import torch

from wfnet.data import (
    MultiLabelTensors,
    Splits,
    batches,
    limit_per_class,
    open_data,
    select,
    stratified_split,
)


def test_stratified_split_is_seeded_and_complete():
    labels = torch.tensor([0] * 50 + [1] * 20 + [2] * 3)[torch.randperm(73)]
    rest, held = stratified_split(labels, 0.2, seed=1)
    assert sorted(rest.tolist() + held.tolist()) == list(range(73))
    assert labels[held].bincount().tolist() == [10, 4, 1]
    assert torch.equal(stratified_split(labels, 0.2, seed=1)[1], held)
    assert not torch.equal(stratified_split(labels, 0.2, seed=2)[1], held)
    with pytest.raises(ValueError, match=r"class 'b' has a single image .* add images"):
        stratified_split(torch.tensor([0, 0, 1]), 0.5, 0, ["a", "b"])
    with pytest.raises(ValueError, match=r"between 0 and 1, got 1\.5"):
        stratified_split(torch.tensor([0, 0]), 1.5, 0)


def test_limit_per_class():
    labels = torch.tensor([0] * 10 + [1] * 2)
    chosen = limit_per_class(labels, 3, seed=0)
    assert labels[chosen].bincount().tolist() == [3, 2]
    assert torch.equal(chosen, limit_per_class(labels, 3, seed=0))
    with pytest.raises(ValueError, match="1 or more, got 0"):
        limit_per_class(labels, 0, seed=0)


@pytest.mark.parametrize("kind", ["memory", "several labels", "files", "cache"])
def test_labels_follow_their_names(kind, make_dataset, image_folder):
    if kind in ("files", "cache"):
        data = open_data(image_folder, image_size=16, cache="host" if kind == "cache" else None)
    else:
        part = make_dataset([0, 1, 2] * 2, classes=3)
        if kind == "several labels":
            multi_hot = torch.tensor([[1, 0, 0], [0, 1, 1], [0, 0, 1]] * 2).bool()
            part = MultiLabelTensors(part.images, multi_hot, part.classes)
        data = Splits(part, part, part, part.classes, "data", 0)
    known = [data.classes[k] for k in (2, 0, 1)]
    found = data.renumbered(torch.tensor([1, 2, 0]), known)
    assert found.classes == found.test.classes == known
    chosen = torch.tensor([4, 1, 0])
    mine = next(batches(select(found.test, chosen), [torch.arange(3)]))
    theirs = next(batches(data.test, [chosen]))
    assert torch.equal(mine.images, theirs.images)
    assert [known[k] for k in mine.labels] == [data.classes[k] for k in theirs.labels]
    if kind == "several labels":
        assert torch.equal(found.test.multi_hot[:, [1, 2, 0]], data.test.multi_hot)
