"""Label expansion and samplers: distributions, halves, determinism."""

import pytest
import torch

from wfnet.services.seeds import generator_for
from wfnet.untraining.expansion import (
    HalvesSampler,
    RoundRobinSampler,
    ShuffledSampler,
    expand,
    random_other_rows,
)


def test_halves_of_a_minibatch():
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    batch = expand(labels, 5, 3, generator_for(0))
    assert len(batch) == 3 + 3 * 3
    assert batch.forget_size == 3
    assert batch.forget[batch.forget_half].tolist() == [0, 1, 2]
    assert batch.source[batch.forget_half].tolist() == [0, 1, 2]
    assert batch.source[batch.retain_half].tolist() == [3, 3, 3, 4, 4, 4, 5, 5, 5]
    assert torch.equal(batch.target, labels[batch.source])
    assert (batch.forget[batch.retain_half] != batch.target[batch.retain_half]).all()


def test_shared_images_serve_both_halves():
    labels = torch.tensor([3, 1])
    batch = expand(labels, 4, 2, generator_for(0), share_images=True)
    assert batch.source.tolist() == [0, 1, 0, 0, 1, 1]
    assert batch.forget[:2].tolist() == [3, 1]
    assert (batch.forget[2:] != batch.target[2:]).all()


def test_odd_and_given_halves():
    labels = torch.arange(5)
    assert expand(labels, 5, 1, generator_for(0)).forget_size == 2
    assert expand(labels, 5, 1, generator_for(0), forget_size=4).forget_size == 4


def test_rows_are_uniform_over_the_other_classes_and_independent():
    labels = torch.full((30_000,), 2)
    rows = random_other_rows(labels, 5, generator_for(1))
    counts = rows.bincount(minlength=5)
    assert counts[2] == 0
    assert (counts[[0, 1, 3, 4]] - 7500).abs().max() < 350
    pairs = rows.view(-1, 2)
    repeated = (pairs[:, 0] == pairs[:, 1]).double().mean()
    assert 0.23 < repeated < 0.27  # with replacement


@pytest.mark.parametrize("share", [True, False])
def test_compound_rows_come_beside_the_single_ones(share):
    labels = torch.tensor([2, 0, 1, 3] * 25)
    single = expand(labels, 4, 3, generator_for(2), share)
    batch = expand(labels, 4, 3, generator_for(2), share, compound=0.5)
    twos = batch.forget[:, 1] >= 0
    ones = ~twos
    assert torch.equal(batch.forget[ones][:, 0], single.forget)
    assert torch.equal(batch.source[ones], single.source)
    forgotten, retained = batch.forget_half, batch.retain_half
    size = len(labels) if share else len(labels) // 2
    own, other = batch.forget[forgotten][twos[forgotten]].T
    assert torch.equal(batch.source[forgotten][twos[forgotten]], torch.arange(size // 2))
    assert torch.equal(own, labels[: size // 2])
    assert (other != own).all()
    rows, target = batch.forget[retained][twos[retained]], batch.target[retained][twos[retained]]
    assert len(rows) == size
    assert (rows != target[:, None]).all()
    assert (rows[:, 0] != rows[:, 1]).all()
    for label in range(4):  # three pairs of the other rows, in either order
        found = rows[target == label].sort(1).values.unique(dim=0)
        assert len(found) == 3
    for half in (forgotten, retained):
        weight, pairs = batch.weight[half], twos[half]
        torch.testing.assert_close(weight[pairs].sum(), 0.5 * weight[~pairs].sum())
    assert batch.rows.tolist() == [0, 1, 2, 3]


def test_compound_rows_are_of_the_classes_that_are_untrained():
    """Single rows where there are no two: the second is then -1."""
    labels = torch.tensor([0, 1, 3, 3] * 5)
    batch = expand(labels, 4, 1, generator_for(0), True, rows=torch.tensor([1, 3]), compound=1.0)
    retained = batch.forget[batch.retain_half][len(labels) :]
    expected = {0: {(1, 3), (3, 1)}, 1: {(3, -1)}, 3: {(1, -1)}}
    for label, rows in expected.items():
        assert {tuple(pair.tolist()) for pair in retained[labels == label]} == rows
    pairs = batch.forget[len(labels) : batch.forget_size].tolist()
    assert {tuple(pair) for pair in pairs} >= {(1, 3), (3, 1)}
    two = expand(torch.tensor([0, 1]), 2, 1, generator_for(0), True, compound=0.5)
    assert two.forget[5:].tolist() == [[1, -1], [0, -1]]


def test_two_classes_have_one_other_row():
    labels = torch.tensor([0, 1, 1, 0])
    assert random_other_rows(labels, 2, generator_for(0)).tolist() == [1, 0, 0, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(4, dtype=torch.long), 1, 5), "at least 2 classes"),
        ((torch.zeros(4, dtype=torch.long), 3, 0), "label_expansion must be 1 or more, got 0"),
        ((torch.zeros(2, 2, dtype=torch.long), 3, 1), r"labels must be \[n\], got \[2, 2\]"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        expand(*arguments, generator_for(0))


def test_expansion_depends_on_its_generator_alone():
    labels = torch.arange(8) % 4
    first = expand(labels, 4, 3, generator_for(7, 1))
    torch.manual_seed(123)
    again = expand(labels, 4, 3, generator_for(7, 1))
    other = expand(labels, 4, 3, generator_for(7, 2))
    assert torch.equal(first.forget, again.forget)
    assert not torch.equal(first.forget, other.forget)


def test_generators_of_different_keys_differ():
    draws = {
        torch.randint(2**40, (), generator=generator_for(*key)).item()
        for key in [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 1), (2**63,), (-1,)]
    }
    assert len(draws) == 8


@pytest.mark.parametrize("batch_size", [3, 7, 16])
def test_round_robin_trains_every_row_equally_often(batch_size):
    labels = torch.tensor([0] * 20 + [1] * 3 + [2] + [3] * 9 + [5] * 2)  # uneven, class 4 absent
    sampler = RoundRobinSampler(labels, batch_size, seed=0)
    seen = torch.cat([sampler.batch(step) for step in range(11)])
    counts = labels[seen].bincount(minlength=6)[[0, 1, 2, 3, 5]]
    assert counts.max() - counts.min() <= 1


def test_round_robin_goes_through_all_images_of_a_class():
    labels = torch.tensor([0, 1, 0, 1, 0, 1, 1])
    sampler = RoundRobinSampler(labels, 2, seed=3)
    zeros = [i for step in range(3) for i in sampler.batch(step).tolist() if labels[i] == 0]
    assert sorted(zeros) == [0, 2, 4]


def test_round_robin_shuffles_classes_every_round():
    labels = torch.arange(10)
    sampler = RoundRobinSampler(labels, 10, seed=0)
    rounds = [tuple(sampler.batch(step).tolist()) for step in range(4)]
    assert len(set(rounds)) == 4
    assert all(sorted(order) == list(range(10)) for order in rounds)


def test_shuffled_passes_over_all_images():
    sampler = ShuffledSampler(10, 4, seed=0)
    seen = torch.cat([sampler.batch(step) for step in range(5)])
    assert sorted(seen[:10].tolist()) == list(range(10))
    assert sorted(seen[10:].tolist()) == list(range(10))
    assert not torch.equal(seen[:10], seen[10:])


def make_samplers():
    labels = torch.arange(30) % 7
    return {
        "shuffled": ShuffledSampler(30, 8, seed=5),
        "round_robin": RoundRobinSampler(labels, 8, seed=5),
        "halves": HalvesSampler(
            RoundRobinSampler(labels, 4, seed=5), RoundRobinSampler(labels, 4, seed=5, stream=1)
        ),
    }


@pytest.mark.parametrize("name", ["shuffled", "round_robin", "halves"])
def test_batches_are_a_function_of_seed_and_step(name):
    forwards = [batch.tolist() for batch in make_samplers()[name].batches(0, 12)]
    backwards = make_samplers()[name]
    assert [backwards.batch(step).tolist() for step in reversed(range(12))] == forwards[::-1]
    resumed = make_samplers()[name].batches(7, 12)
    assert [batch.tolist() for batch in resumed] == forwards[7:]


def test_halves_are_independent_streams():
    batch = make_samplers()["halves"].batch(0)
    assert batch[:4].tolist() != batch[4:].tolist()


@pytest.mark.parametrize(
    "make", [lambda: ShuffledSampler(0, 4, 0), lambda: ShuffledSampler(4, 0, 0)]
)
def test_samplers_refuse_nothing(make):
    with pytest.raises(ValueError, match="must be 1 or more"):
        make()
