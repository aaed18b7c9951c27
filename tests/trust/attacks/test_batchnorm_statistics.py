import torch

from wfnet.trust.attacks.batchnorm_statistics import OF_ALL, OF_OTHERS, reestimated


def test_estimated_anew_undoes_any_gate_but_zero(data, make_network, closed):
    base = make_network(0)
    images = data.train.images
    wanted = reestimated(base, images)(data.test.images)
    # Small variances meet eps: the scale must stay well above sqrt(eps).
    found = reestimated(closed(base, 0.2), images)(data.test.images)
    torch.testing.assert_close(found, wanted, atol=2e-3, rtol=2e-3)
    zero = reestimated(closed(base, 0.0), images)(data.test.images)
    assert (zero - wanted).abs().max() > 0.05
    assert reestimated(make_network(0, norm=False), images) is None


def test_statistics_are_those_of_the_images(make_network, make_subject):
    model = make_network(0)
    subject = make_subject(forgetful=model)
    images = {OF_ALL: subject.unlabelled.images, OF_OTHERS: subject.train_retain.images}
    for attack, own in images.items():
        found = attack.apply(model, subject).model
        features = model.conv1(own)
        torch.testing.assert_close(found.bn1.running_mean, features.mean((0, 2, 3)))
        torch.testing.assert_close(found.bn1.running_var, features.var((0, 2, 3)))
        assert not found.training
