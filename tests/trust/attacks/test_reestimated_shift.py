import torch

from wfnet.trust.attacks.batchnorm_statistics import reestimated
from wfnet.trust.attacks.reestimated_shift import ATTACK
from wfnet.trust.attacks.shifted_logit import class_offset


def test_the_shift_is_that_of_the_reestimated_model(make_network, make_subject):
    model, subject = make_network(1), make_subject()
    images = subject.unlabelled.images
    with torch.no_grad():
        expected = reestimated(model, images)(images).double()
    expected[:, 1] += class_offset(expected, 1, 0.25)
    found = ATTACK.apply(model, subject).logits(subject, "unlabelled")
    torch.testing.assert_close(found, expected)
    assert (found.argmax(1) == 1).sum() == 8  # as often as the class occurs
    assert ATTACK.apply(make_network(0, norm=False), subject) is None
