import pytest
import torch

from wfnet.evaluation import choose_groups, evaluate_groups
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
