import pytest
import torch

from wfnet.evaluation import average_precision, evaluate_multi_label
from wfnet.evaluation.pair_engine import RunOptions

K = 7
QUIET = RunOptions(batch_size=13, progress=False)


@torch.no_grad()
def test_evaluation_equals_baked_networks(make_net, multi_label_dataset):
    net, dataset = make_net(), multi_label_dataset
    result = evaluate_multi_label(net, dataset, rows_together=3, options=QUIET)
    images = dataset.batch(torch.arange(len(dataset))).images
    plain = average_precision(net.bake(None)(images), dataset.multi_hot)
    for record in result.records:
        found = average_precision(net.bake(record.index)(images), dataset.multi_hot)
        others = torch.arange(K) != record.index
        assert record.ap_f == pytest.approx(found[record.index].item(), abs=1e-9)
        assert record.map_r == pytest.approx(found[others].mean().item(), abs=1e-9)
        assert record.original_map_r == pytest.approx(plain[others].mean().item(), abs=1e-9)
        assert record.images == int(dataset.multi_hot[:, record.index].sum())
    assert len({record.map_r for record in result.records}) > 3
    assert f"{100 * result.mean['map_r']:.1f}" in result.table()


def test_data_that_do_not_fit_are_refused(make_net, dataset, multi_label_dataset):
    with pytest.raises(ValueError, match="one label per image"):
        evaluate_multi_label(make_net(), dataset)
    with pytest.raises(ValueError, match="no image has label 9"):
        evaluate_multi_label(make_net(), multi_label_dataset, classes=[9])
