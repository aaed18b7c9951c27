import pytest

from wfnet.evaluation import evaluate, evaluate_models
from wfnet.evaluation.pair_engine import RunOptions


def test_baked_models_one_by_one_equal_the_filtered_network(dataset, make_net):
    net, options = make_net(), RunOptions(batch_size=8, progress=False)
    expected = evaluate(net, dataset, progress=False)
    result = evaluate_models(net.bake, net.bake(None), dataset, options=options)
    for found, record in zip(result.records, expected.records, strict=True):
        assert vars(found) == pytest.approx(vars(record), abs=1e-6)
    assert vars(result.original) == pytest.approx(vars(expected.original), abs=1e-6)
