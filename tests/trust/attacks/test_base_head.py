import torch
from torch import nn

from wfnet.trust.attacks.base_head import ATTACK, with_base_head_row


def test_a_class_that_was_cut_from_the_head_comes_back(make_network, make_subject):
    base, cut = make_network(0, norm=False), make_network(0, norm=False)
    with torch.no_grad():
        cut.fc.weight[1] = 0
        cut.fc.bias[1] = -30
    subject = make_subject(forgetful=cut, original=base)
    found = ATTACK.apply(cut, subject).logits(subject, "test_forget")
    torch.testing.assert_close(found, subject.logits(base, "test_forget"))
    assert cut.fc.bias[1] == -30
    assert ATTACK.apply(base, subject) is None
    assert ATTACK.needs_base


def test_statistics_are_estimated_anew_behind_the_row(make_network, make_subject):
    subject = make_subject(forgetful=make_network(1), original=make_network(0))
    model = ATTACK.apply(subject.forgetful, subject).model
    assert torch.equal(model.fc.weight[1], subject.original.fc.weight[1])
    assert torch.equal(model.fc.weight[0], subject.forgetful.fc.weight[0])
    features = subject.forgetful.conv1(subject.unlabelled.images)
    torch.testing.assert_close(model.bn1.running_mean, features.mean((0, 2, 3)))


def test_heads_that_do_not_fit(make_network):
    compact = make_network(0)
    compact.fc = nn.Linear(5, 4)
    assert with_base_head_row(compact, make_network(0), 1, 4) is None
    assert with_base_head_row(nn.ReLU(), make_network(0), 1, 4) is None
