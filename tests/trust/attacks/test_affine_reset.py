import torch

from wfnet.trust.attacks import affine_reset, batchnorm_statistics


def test_gates_behind_batchnorm_are_undone_unless_they_are_0(make_network, make_subject):
    """gamma = g * gamma, beta = g * beta is where a gate behind BatchNorm is baked to."""
    base = make_network(0)  # its gammas are 1, its betas 0
    images = make_subject().unlabelled.images
    wanted = batchnorm_statistics.reestimated(base, images)

    def gated(factor):
        model = make_network(0)
        with torch.no_grad():
            model.bn1.weight[[0, 3]] *= factor
            model.bn1.bias[[0, 3]] = 0.5 * factor
        return model

    found = affine_reset.ATTACK.apply(gated(0.01), make_subject()).model
    for name, value in wanted.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value)
    closed = affine_reset.ATTACK.apply(gated(0.0), make_subject()).model
    assert closed.bn1.weight.tolist() == [0, 1, 1, 0, 1, 1]
    assert affine_reset.ATTACK.apply(make_network(0, norm=False), make_subject()) is None
