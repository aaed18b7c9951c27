import pytest
import torch

from wfnet.evaluation import average_precision, choose_groups, evaluate_groups
from wfnet.evaluation.pair_engine import RunOptions

K = 7


@torch.no_grad()
def test_equals_networks_baked_for_the_group(dataset, make_net):
    net, groups = make_net(), choose_groups(K, 3, 6, seed=1)
    result = evaluate_groups(net, dataset, groups, RunOptions(batch_size=5, progress=False))
    images, labels, _ = dataset.batch(torch.arange(len(dataset)))
    before = net.bake(None)(images).argmax(1) == labels
    for group, record in zip(groups, result.records, strict=True):
        right = net.bake(list(group))(images).argmax(1) == labels
        inside = torch.isin(labels, torch.tensor(group))
        each = [right[labels == label].double().mean().item() for label in group]
        assert record.classes == list(group)
        assert record.acc_f == pytest.approx(sum(each) / 3, abs=1e-6)
        assert record.acc_f_worst == pytest.approx(max(each), abs=1e-6)
        assert record.acc_r == pytest.approx(right[~inside].double().mean().item(), abs=1e-6)
        expected = before[~inside].double().mean().item()
        assert record.original_acc_r == pytest.approx(expected, abs=1e-6)
        assert record.n_forget == int(inside.sum())
    assert len({record.acc_r for record in result.records}) > 2
    assert result.mean["acc_f_worst"] == max(r.acc_f_worst for r in result.records)


@torch.no_grad()
def test_labels_are_forgotten_together(multi_label_dataset, make_net):
    net, dataset, groups = make_net(), multi_label_dataset, [(0, 3), (2, 5), (1, 6)]
    result = evaluate_groups(net, dataset, groups, RunOptions(batch_size=5, progress=False))
    images = dataset.batch(torch.arange(len(dataset))).images
    for group, record in zip(groups, result.records, strict=True):
        found = average_precision(net.bake(list(group))(images), dataset.multi_hot)
        own = [found[label].item() for label in group]
        others = [found[label].item() for label in range(K) if label not in group]
        assert record.ap_f == pytest.approx(sum(own) / 2)
        assert record.ap_f_worst == pytest.approx(max(own))
        assert record.map_r == pytest.approx(sum(others) / 5)
        assert record.original_ap_f != record.ap_f
    assert result.mean["ap_f_worst"] == max(r.ap_f_worst for r in result.records)
    with pytest.raises(ValueError, match="no image has label 9"):
        evaluate_groups(net, dataset, [(0, 9)])


def test_groups_are_all_or_drawn_once_each():
    assert len(choose_groups(7, 2)) == len(choose_groups(7, 2, 500)) == 21
    drawn = choose_groups(7, 3, 10, seed=4)
    assert len(set(drawn)) == 10
    assert all(len(set(group)) == 3 for group in drawn)
    assert drawn == choose_groups(7, 3, 10, seed=4) != choose_groups(7, 3, 10, seed=5)
    with pytest.raises(ValueError, match="size must be a whole number of at most 6"):
        choose_groups(7, 7)


def test_bad_groups_are_refused(dataset, make_net):
    for groups, message in (
        ([(0, 1), (2, 3, 4)], "same number of classes"),
        ([tuple(range(K))], "to retain"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_groups(make_net(), dataset, groups)
