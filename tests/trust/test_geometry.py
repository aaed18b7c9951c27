import torch

from wfnet.trust import geometry


def test_geometry_beside_retrained_models(make_subject, make_network):
    retrained = [make_network(seed) for seed in (5, 6, 7)]
    subject = make_subject(retrained=retrained)
    values, details = geometry.measure(subject.forgetful, subject)
    assert set(values) == set(geometry.CHECK.measures)
    assert sum(details["nearest"].values()) == 1.0
    assert "1" not in details["nearest"]
    shares = [geometry._places(network, subject)[0] for network in (subject.forgetful, *retrained)]
    expected = torch.stack([(shares[0] - other).abs().sum() / 2 for other in shares[1:]]).mean()
    torch.testing.assert_close(values["tv_nearest"], expected.item())
    same = make_subject(forgetful=retrained[0], retrained=[make_network(5), make_network(6)])
    assert geometry.measure(same.forgetful, same)[0]["auc_geometry"] <= 0.5
    alone = make_subject()
    assert set(geometry.measure(alone.forgetful, alone)[0]) == {"compact_forget"}
