import torch

from wfnet.trust import prototypes


def test_a_class_that_is_voted_down_comes_back_from_one_image(make_subject, oracle, quick):
    subject = make_subject(forgetful=oracle, original=oracle)
    values, details = prototypes.measure(oracle, subject)
    assert details == {}
    ends = ["", *(f"_{count}" for count in quick.relearn_images)]
    assert set(values) == {
        f"acc_{x}_{kind}{e}" for x in "fr" for kind in ("head", "mean") for e in ends
    }
    assert values["acc_f_head_1"] == values["acc_f_mean_1"] == 1.0
    assert values["acc_r_mean"] == 1.0
    assert subject.accuracy(oracle, "test_forget") == 0.0
    features = subject.train_retain.images
    means = prototypes.class_means(features.flatten(1), subject.train_retain.labels, subject)
    own = features[subject.train_retain.labels == 2].flatten(1).mean(0)
    torch.testing.assert_close(means[2], own)
    assert (means[1] == 1e30).all()
