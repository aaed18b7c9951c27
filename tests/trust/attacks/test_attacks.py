"""Each attack on a tiny network: what it restores, what it leaves, where it does not apply."""

import pytest
import torch
from torch import nn

from wfnet.trust.attacks import ATTACKS
from wfnet.trust.attacks.changed_logits import class_offset


def test_without_batchnorm_its_attacks_do_not_apply(make_network, make_subject):
    plain = make_network(0, norm=False)
    subject = make_subject(forgetful=plain)
    left_out = {name for name, work in ATTACKS.items() if work(plain, subject) is None}
    assert left_out == {"affine_reset", *(name for name in ATTACKS if "batchnorm" in name)}


@pytest.mark.parametrize(
    ("name", "part"), [("batchnorm_all", "unlabelled"), ("batchnorm_retain", "train_retain")]
)
def test_statistics_are_those_of_the_images(make_network, make_subject, name, part):
    model, subject = make_network(0), make_subject()
    found = ATTACKS[name](model, subject)
    features = model.conv1(getattr(subject, part).images)
    torch.testing.assert_close(found.bn1.running_mean, features.mean((0, 2, 3)))
    torch.testing.assert_close(found.bn1.running_var, features.var((0, 2, 3)))


def test_gates_behind_batchnorm_are_undone_unless_they_are_0(make_network, make_subject):
    """gamma = g * gamma, beta = g * beta is where a gate behind BatchNorm is baked to."""
    subject = make_subject()
    wanted = ATTACKS["batchnorm_all"](make_network(0), subject)  # its gammas are 1, its betas 0

    def attacked(factor):
        model = make_network(0)
        with torch.no_grad():
            model.bn1.weight[[0, 3]] *= factor
            model.bn1.bias[[0, 3]] = 0.5 * factor
        return ATTACKS["affine_reset"](model, subject)

    found = attacked(0.01).state_dict()
    for name, value in wanted.state_dict().items():
        torch.testing.assert_close(found[name], value)
    assert attacked(0.0).bn1.weight.tolist() == [0, 1, 1, 0, 1, 1]


def test_rows_have_the_median_norm(make_network, make_subject, closed):
    model = closed(0.0)
    found = ATTACKS["equalised"](model, make_subject())
    norms = found.conv1.weight.flatten(1).norm(dim=1)
    expected = model.conv1.weight[[1, 2, 4, 5]].flatten(1).norm(dim=1).median()
    torch.testing.assert_close(norms[[1, 2, 4, 5]], expected.expand(4))
    assert not norms[[0, 3]].any()
    scale = found.conv2.weight.flatten(1).norm(dim=1) / model.conv2.weight.flatten(1).norm(dim=1)
    torch.testing.assert_close(found.conv2.bias, model.conv2.bias * scale)


def test_base_norms_restore_everything_but_zeros(make_network, make_subject, closed):
    base = make_network(0)

    def attacked(factor):
        model = closed(factor)
        subject = make_subject(forgetful=model, original=base)
        return ATTACKS["base_norms"](model, subject)

    restored = attacked(0.05)
    torch.testing.assert_close(restored.conv1.weight, base.conv1.weight)
    torch.testing.assert_close(restored.conv2.bias, base.conv2.bias)
    assert not attacked(0.0).conv1.weight[[0, 3]].any()


def test_a_class_that_was_cut_from_the_head_comes_back(make_network, make_subject):
    base, cut = make_network(0, norm=False), make_network(0, norm=False)
    with torch.no_grad():
        cut.fc.weight[1] = 0
        cut.fc.bias[1] = -30
    subject = make_subject(forgetful=cut, original=base)
    found = ATTACKS["base_head"](cut, subject)
    assert torch.equal(subject.logits(found, "test_forget"), subject.logits(base, "test_forget"))
    assert ATTACKS["base_head"](base, subject) is None
    cut.fc = nn.Linear(5, 4)  # a compact export
    assert ATTACKS["base_head"](cut, subject) is None


def test_offset_predicts_the_class_as_often_as_asked():
    drawn = torch.randn(40, 5, generator=torch.Generator().manual_seed(0)).double()
    for share, count in ((0.1, 4), (1.0, 40)):
        logits = drawn.clone()
        logits[:, 2] += class_offset(logits, 2, share)
        assert (logits.argmax(1) == 2).sum() == count


def test_a_class_is_told_by_the_absence_of_others(make_subject):
    subject = make_subject()
    found = subject.logits(ATTACKS["absence"](subject.forgetful, subject), "unlabelled")
    others = subject.logits(subject.forgetful, "unlabelled")[:, [0, 2, 3]].amax(1)
    least = others.sort().indices[:8]  # as often as the class occurs
    assert (found.argmax(1) == 1).nonzero().flatten().tolist() == sorted(least.tolist())


def test_the_shift_is_that_of_the_reestimated_model(make_subject):
    subject = make_subject()
    model = ATTACKS["batchnorm_offset"](subject.forgetful, subject)
    found = subject.logits(model, "unlabelled")
    plain = subject.logits(ATTACKS["batchnorm_all"](subject.forgetful, subject), "unlabelled")
    torch.testing.assert_close(found[:, [0, 2, 3]], plain[:, [0, 2, 3]])
    assert (found.argmax(1) == 1).sum() == 8  # as often as the class occurs
