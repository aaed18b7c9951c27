import pytest
import torch

from wfnet import models
from wfnet.data import Splits, TensorImages
from wfnet.shadows import Recipe, ShadowRounds
from wfnet.untraining import UntrainConfig
from wfnet.wrapping import wrap


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(3).repeat_interleave(torch.tensor([9, 8, 7]))
    images = torch.rand(24, 1, 8, 8, generator=generator) + labels[:, None, None, None]
    part = TensorImages(images, labels, ["a", "b", "c"])
    return Splits(part, part, part, part.classes, "stripes", 0)


def make_recipe(steps=1):
    return Recipe(
        lambda seed: models.create("resnet", 3, 1, seed=seed, width=4),
        {"epochs": 1, "batch_size": 8},
        lambda model: wrap(model, 3),
        UntrainConfig(steps=steps, batch_size=4),
        {},
    )


@pytest.fixture
def make_rounds(data, tmp_path):
    def make(steps=1):
        return ShadowRounds(tmp_path, data, make_recipe(steps), torch.device("cpu"))

    return make


def test_rounds_of_a_pair_share_every_class_between_them(make_rounds, data):
    rounds = make_rounds()
    first, second, third = (rounds.seen(number) for number in (0, 1, 2))
    assert torch.equal(first, ~second)
    assert not torch.equal(first, third)
    for part in (first, second):
        assert (data.train.labels[part].bincount() >= torch.tensor([4, 4, 3])).all()


def test_a_round_is_made_once_and_belongs_to_its_recipe(make_rounds, monkeypatch):
    made = make_rounds()
    filters = made.model(1, "forgetful", 2).state_dict()
    retrained = made.model(1, "retrained", 2).state_dict()
    plain = made.model(1, "original", 2)
    masked = made.model(1, "logit_masked", 2)
    images = made.data.train.batch(torch.arange(4)).images
    torch.testing.assert_close(plain(images)[:, :2], masked(images)[:, :2])
    assert all(not torch.equal(retrained[n], w) for n, w in plain.named_parameters() if w.dim() > 1)

    def trained(*arguments, **settings):
        raise AssertionError("it was trained again")

    monkeypatch.setattr("wfnet.shadows.rounds.fit_classifier", trained)
    monkeypatch.setattr("wfnet.baselines.retrained.fit_classifier", trained)
    again = make_rounds()
    for method, state in (("forgetful", filters), ("retrained", retrained)):
        found = again.model(1, method, 2).state_dict()
        assert all(torch.equal(state[name], found[name]) for name in state)
    with pytest.raises(ValueError, match="records of other untraining"):
        make_rounds(steps=2).net(1)
