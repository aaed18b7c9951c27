import pytest

from wfnet.baselines import BaselineConfig, BaselineModels, Origin, run_baseline, unlearn
from wfnet.evaluation.pair_engine import RunOptions
from wfnet.evaluation.relearning import RelearnConfig

CLASSES = 3
QUICK = BaselineConfig(epochs=30, lr=0.05, batch_size=20, max_norm=10.0, retain_weight=0.8)


def test_a_run_goes_on_class_by_class(tmp_path, monkeypatch, patches, linear):
    origin, test = Origin(linear(), patches()), patches(10, seed=1)
    made = []

    def count(method, origin, label, config):
        made.append(label)
        if len(made) == 2:
            raise KeyboardInterrupt
        return unlearn(method, origin, label, config)

    monkeypatch.setattr("wfnet.baselines.per_class.unlearn", count)

    def models(**changes):
        config = BaselineConfig(**{**vars(QUICK), **changes})
        return BaselineModels("random_labels", tmp_path, origin, config)

    quiet = RunOptions(progress=False)
    options = {"relearn": RelearnConfig(max_epochs=2), "options": quiet}
    with pytest.raises(KeyboardInterrupt):
        run_baseline(models(), test, **options)
    result = run_baseline(models(), test, **options)
    assert made == [0, 1, 1, 2]
    assert [record.index for record in result.evaluation.records] == [0, 1, 2]
    assert len(result.relearning.records) == CLASSES
    assert result.settings["lr"] == QUICK.lr
    again = run_baseline(models(), test, **options)
    assert made == [0, 1, 1, 2]
    assert again.evaluation.records == result.evaluation.records
    with pytest.raises(ValueError, match="records of other settings"):
        models(lr=0.01)(0)
    path = models().path(0)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match="truncated"):
        models()(0)
    models().remove()
    assert not path.exists()
