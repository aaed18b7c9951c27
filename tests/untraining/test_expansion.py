"""Label expansion and samplers: distributions, halves, determinism."""

import pytest
import torch

from wfnet.services.seeds import generator_for
from wfnet.untraining.expansion import (
    expand,
    in_batches,
    random_other_rows,
    round_robin,
    shuffled_passes,
)


@pytest.mark.parametrize("share", [True, False])
def test_halves_of_a_minibatch(share):
    labels = torch.tensor([0, 1, 2, 3, 4])
    batch = expand(labels, 5, 2, generator_for(7, 1), share)
    forgotten, retained = ([0, 1, 2, 3, 4],) * 2 if share else ([0, 1], [2, 3, 4])
    assert batch.forget_size == len(forgotten)
    assert batch.source[batch.forget_half].tolist() == forgotten
    assert batch.forget[batch.forget_half].tolist() == labels[forgotten].tolist()
    assert batch.source[batch.retain_half].tolist() == [i for i in retained for _ in range(2)]
    assert torch.equal(batch.target, labels[batch.source])
    assert (batch.forget[batch.retain_half] != batch.target[batch.retain_half]).all()
    torch.manual_seed(123)
    assert torch.equal(batch.forget, expand(labels, 5, 2, generator_for(7, 1), share).forget)
    assert not torch.equal(batch.forget, expand(labels, 5, 2, generator_for(7, 2), share).forget)


def test_rows_are_uniform_over_the_other_classes_and_independent():
    labels = torch.full((30_000,), 2)
    rows = random_other_rows(labels, 5, generator_for(1))
    counts = rows.bincount(minlength=5)
    assert counts[2] == 0
    assert (counts[[0, 1, 3, 4]] - 7500).abs().max() < 350
    pairs = rows.view(-1, 2)
    repeated = (pairs[:, 0] == pairs[:, 1]).double().mean()
    assert 0.23 < repeated < 0.27  # with replacement
    labels = torch.tensor([0, 1, 1, 0])
    assert random_other_rows(labels, 2, generator_for(0)).tolist() == [1, 0, 0, 1]
    with pytest.raises(ValueError, match="at least 2 classes"):
        random_other_rows(labels, 1, generator_for(0))


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
        assert len(rows[target == label].sort(1).values.unique(dim=0)) == 3
    for half in (forgotten, retained):
        pairs, weight = twos[half], batch.weight[half]
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


@pytest.mark.parametrize("share", [True, False])
def test_of_several_labels_true_ones_are_forgotten_under_lacking_ones_is_retained(share, runs):
    multi_hot, k = runs.several_labels(10).multi_hot, runs.CLASSES
    batch = expand(multi_hot, k, 3, torch.Generator().manual_seed(0), share)
    assert batch.forget_size == (10 if share else 5)
    assert len(batch) == batch.forget_size * 4
    truth = multi_hot[batch.source]
    assert torch.equal(batch.target, truth.float())
    own = truth.gather(1, batch.forget.unsqueeze(1)).squeeze(1)
    assert own[batch.forget_half].all()
    assert not own[batch.retain_half].any()
    many = expand(multi_hot[:1].expand(600, k), k, 1, torch.Generator().manual_seed(0), True)
    for half, rows in ((many.forget_half, multi_hot[0]), (many.retain_half, ~multi_hot[0])):
        drawn = many.forget[half].bincount(minlength=k)[rows]
        assert (drawn > 600 / len(drawn) / 1.5).all()  # all about equally often


# -- samplers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [3, 16])
def test_round_robin_trains_every_row_equally_often(batch_size):
    labels = torch.tensor([0] * 20 + [1] * 3 + [2] + [3] * 9 + [5] * 2)  # uneven, class 4 absent
    images = round_robin(labels, torch.arange(len(labels)), batch_size, seed=0)
    sampler = in_batches(batch_size, images)
    seen = torch.cat([sampler(step) for step in range(11)])
    counts = labels[seen].bincount(minlength=6)[[0, 1, 2, 3, 5]]
    assert counts.max() - counts.min() <= 1
    assert len(seen[labels[seen] == 1][:3].unique()) == 3  # all images of a class
    rounds = seen[: len(seen) // 5 * 5].view(-1, 5)
    assert len({tuple(order) for order in labels[rounds].tolist()}) > 1
    assert all(sorted(order) == [0, 1, 2, 3, 5] for order in labels[rounds].tolist())


def test_shuffled_passes_over_all_images():
    sampler = in_batches(4, shuffled_passes(torch.arange(10), 2, 0))
    seen = torch.cat([sampler(step) for step in range(5)])
    assert sorted(seen[:10].tolist()) == list(range(10))
    assert sorted(seen[10:].tolist()) == list(range(10))
    assert not torch.equal(seen[:10], seen[10:])


def test_batches_are_a_function_of_seed_and_step():
    def make():
        images = torch.arange(30)
        return in_batches(4, round_robin(images % 7, images, 4, 5), shuffled_passes(images, 2, 5))

    forwards, backwards = make(), make()
    found = [forwards(step).tolist() for step in range(12)]
    assert [backwards(step).tolist() for step in reversed(range(12))] == found[::-1]
    assert found[0][:4] != found[0][4:]
