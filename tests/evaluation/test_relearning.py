import pytest

from wfnet.evaluation.pair_engine import RunOptions
from wfnet.evaluation.relearning import RelearnConfig, relearn_times

CLASSES = 3
QUIET = RunOptions(progress=False)


@pytest.fixture
def times(patches, linear):
    """Relearns every class of linear networks that have forgotten it."""

    def run(models=linear, **config):
        train, test, config = patches(), patches(10, seed=1), RelearnConfig(**config)
        return relearn_times(models, train, test, linear(), config=config, options=QUIET)

    return run


def test_a_class_is_relearned_and_the_epochs_counted(times, linear):
    config = {"samples": 60, "batch_size": 20, "max_epochs": 40}
    result = times(**config, lr=0.1)
    for record in result.records:
        assert (record.original, record.accuracy[0]) == (1.0, 0.0)
        # Stopped as soon as it was regained.
        assert [value == 1.0 for value in record.accuracy] == [False] * record.epochs + [True]
        assert 1 <= record.epochs_tolerant <= record.epochs
    mean = sum(r.epochs for r in result.records) / CLASSES
    assert result.mean == {"epochs": mean, "never": 0}
    # A smaller learning rate takes longer; what was never lost takes no epoch, and what never
    # comes back counts the cap.
    assert times(**config, lr=0.03).mean["epochs"] > mean
    kept = times(lambda label: linear(), **config)
    assert [record.epochs for record in kept.records] == [0] * CLASSES
    lost = times(**{**config, "max_epochs": 2}, lr=1e-6)
    assert lost.mean == {"epochs": 2, "never": CLASSES}
    assert [record.epochs for record in lost.records] == [None] * CLASSES


def test_the_tolerance_is_counted_in_points(patches, linear):
    train, test = patches(), patches(10, seed=1)
    test.images[0] *= 0.3  # of class 0, less sure than the nine others
    unsure = linear()
    unsure[1].bias.data[0] = -4.0

    def relearned(**tolerance):
        config = RelearnConfig(lr=1e-7, max_epochs=1, **tolerance)
        return relearn_times(lambda _: unsure, train, test, linear(), [0], config, QUIET).records[0]

    exact = relearned()
    assert (exact.original, exact.accuracy) == (1.0, [0.9, 0.9])
    assert (exact.epochs, exact.epochs_tolerant) == (None, None)
    assert relearned(tolerance=0.1).epochs_tolerant == 0
