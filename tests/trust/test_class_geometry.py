import pytest
import torch

from wfnet.trust import class_geometry, membership


def test_geometry_beside_retrained_models(make_subject, make_network):
    retrained = [make_network(seed) for seed in (5, 6, 7)]
    subject = make_subject(retrained=retrained)
    values, details = class_geometry.measure(subject.forgetful, subject)
    assert set(values) == set(class_geometry.CHECK.measures)
    assert sum(details["nearest"].values()) == 1.0
    assert "1" not in details["nearest"]
    shares = [
        class_geometry._places(network, subject)[0] for network in (subject.forgetful, *retrained)
    ]
    expected = torch.stack([(shares[0] - other).abs().sum() / 2 for other in shares[1:]]).mean()
    torch.testing.assert_close(values["tv_nearest"], expected.item())
    rest = [(1, 2), (0, 2), (0, 1)]  # whose mean each of the three is told from
    own, *seen = (class_geometry._among_others(x, subject) for x in (subject.forgetful, *retrained))
    mean = [(seen[i] + seen[j]) / 2 for i, j in rest]
    kl = [
        [(p * (p / q).log()).sum(1) for p, q in zip(mean, x, strict=True)]
        for x in ([own] * 3, seen)
    ]
    expected = membership.roc_auc(*(torch.cat(side) for side in kl))
    assert values["auc_geometry"] == pytest.approx(expected)
    alone = make_subject()
    assert set(class_geometry.measure(alone.forgetful, alone)[0]) == {"compact_forget"}
