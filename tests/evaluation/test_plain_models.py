import pytest

from wfnet.evaluation import evaluate, evaluate_groups, evaluate_models, evaluate_multi_label
from wfnet.evaluation.pair_engine import RunOptions
from wfnet.evaluation.plain_models import evaluate_group_models


def test_baked_models_one_by_one_equal_the_filtered_network(dataset, make_net):
    net, options = make_net(), RunOptions(batch_size=8, progress=False)
    expected = evaluate(net, dataset, progress=False)
    result = evaluate_models(net.bake, net.bake(None), dataset, options=options)
    for found, record in zip(result.records, expected.records, strict=True):
        assert vars(found) == pytest.approx(vars(record), abs=1e-6)
    assert vars(result.original) == pytest.approx(vars(expected.original), abs=1e-6)


def test_several_labels_and_groups_equal_the_filtered_network(
    dataset, multi_label_dataset, make_net
):
    net, options = make_net(), RunOptions(batch_size=8, progress=False)
    models = net.bake, net.bake(None), multi_label_dataset
    found = evaluate_models(*models, [4, 2], options=options)
    expected = evaluate_multi_label(net, multi_label_dataset, [4, 2], options=options)
    assert list(map(vars, found.records)) == list(map(vars, expected.records))
    for images in (dataset, multi_label_dataset):
        groups = [(0, 3), (2, 5)]
        about = lambda group: net.bake(list(group)), net.bake(None), images, groups
        found = evaluate_group_models(*about, options)
        expected = evaluate_groups(net, images, groups, options)
        assert list(map(vars, found.records)) == list(map(vars, expected.records))
