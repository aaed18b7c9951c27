from dataclasses import replace

import pytest

from wfnet.baselines import METHODS, BaselineModels, Origin, run_baseline, unlearn
from wfnet.evaluation.pair_engine import RunOptions
from wfnet.evaluation.relearning import RelearnConfig

QUIET = RunOptions(progress=False)
QUICK = replace(METHODS["random_labels"].defaults, epochs=30, lr=0.05, batch_size=20)


def test_models_are_made_once_and_kept(tmp_path, monkeypatch, patches, linear):
    origin, test = Origin(linear(), patches()), patches(10, seed=1)
    made = []

    def count(method, origin, label, config):
        made.append(label)
        return unlearn(method, origin, label, config)

    monkeypatch.setattr("wfnet.baselines.per_class.unlearn", count)
    models = BaselineModels("random_labels", tmp_path, origin, QUICK)
    first, again = (
        run_baseline(models, test, relearn=RelearnConfig(max_epochs=2), options=QUIET)
        for _ in range(2)
    )
    assert made == [0, 1, 2]
    assert [record.index for record in first.evaluation.records] == [0, 1, 2]
    assert again.evaluation.records == first.evaluation.records
    assert again.relearning.records == first.relearning.records
    assert first.settings["lr"] == QUICK.lr
    with pytest.raises(ValueError, match="records of other settings"):
        BaselineModels("random_labels", tmp_path, origin, replace(QUICK, lr=0.01))(0)
    monkeypatch.setattr(type(METHODS["random_labels"]), "code", lambda self: "of another formula")
    with pytest.raises(ValueError, match="records of other code"):
        BaselineModels("random_labels", tmp_path, origin, QUICK)(0)
    path = models.path(0)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match="truncated"):
        models(0)
    models.remove()
    assert not path.exists()
