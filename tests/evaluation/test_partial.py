"""Evaluations that were interrupted go on where they stopped, and refuse records of others."""

import pytest

from wfnet.evaluation import evaluate_groups, evaluate_multi_label
from wfnet.evaluation.attribution import attribution
from wfnet.evaluation.pair_engine import RunOptions
from wfnet.evaluation.partial import PartialResults, network_identity
from wfnet.evaluation.relearning import RelearnConfig, relearn_times

QUICK = RelearnConfig(samples=8, batch_size=4, max_epochs=1)


def groups(net, data, options):
    return evaluate_groups(net, data, [(0, 1), (2, 3), (4, 5)], options)


def curves(net, data, options):
    return attribution(net, data, steps=2, classes_together=2, options=options)


def times(net, data, options):
    identity, original = network_identity(net), net.bake(None)
    return relearn_times(net.bake, data, data, original, None, QUICK, options, identity)


def precisions(net, data, options):
    return evaluate_multi_label(net, data, rows_together=3, options=options)


@pytest.mark.parametrize("measure", [groups, curves, times, precisions])
def test_an_interrupted_call_goes_on_after_the_last_record(
    measure, make_net, dataset, multi_label_dataset, tmp_path, monkeypatch
):
    monkeypatch.setattr("wfnet.evaluation.groups._GROUPS_TOGETHER", 1)
    net, path = make_net(), tmp_path / "records.json"
    data = multi_label_dataset if measure is precisions else dataset
    whole = measure(net, data, RunOptions(progress=False))
    kept = RunOptions(progress=False, records=path)
    added, add = [], PartialResults.add

    def interrupt(self, key, record):
        add(self, key, record)
        added.append(str(key))
        if len(added) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(PartialResults, "add", interrupt)
    with pytest.raises(KeyboardInterrupt):
        measure(net, data, kept)
    resumed = measure(net, data, kept)
    assert len(added) == len(set(added)) == len(whole.records)  # none was made twice
    if measure is curves:  # other classes shared its batches: rounding
        assert resumed.mean == pytest.approx(whole.mean, abs=1e-6)
    else:
        assert resumed.records == whole.records
    with pytest.raises(ValueError, match="records of other filters"):
        measure(make_net(seed=9), data, kept)
    with pytest.raises(ValueError, match=r"records of other (test |training )?data"):
        measure(net, data.select(list(range(1, len(data)))), kept)
    path.write_text(path.read_text()[:40])
    with pytest.raises(ValueError, match="is damaged"):
        measure(net, data, kept)
