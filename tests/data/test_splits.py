import pytest
import torch

from wfnet.data import limit_per_class, stratified_split


def test_stratified_split_is_seeded_and_complete():
    labels = torch.tensor([0] * 50 + [1] * 20 + [2] * 3)[torch.randperm(73)]
    rest, held = stratified_split(labels, 0.2, seed=1)
    assert sorted(rest.tolist() + held.tolist()) == list(range(73))
    assert labels[held].bincount().tolist() == [10, 4, 1]
    again = stratified_split(labels, 0.2, seed=1)
    assert torch.equal(again[1], held)
    assert not torch.equal(stratified_split(labels, 0.2, seed=2)[1], held)
    assert stratified_split(torch.tensor([0, 0]), 0.99, seed=0)[0].shape == (1,)


def test_stratified_split_names_the_single_image():
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
