import torch

from wfnet.trust import over_unlearning
from wfnet.trust.subject import predict, share_correct


def test_images_are_moved_towards_the_class_and_no_farther(make_subject, oracle):
    subject = make_subject(forgetful=oracle, original=oracle)
    images, wanted = subject.test_retain.images, torch.ones(len(subject.test_retain), dtype=int)
    moved = over_unlearning._moved(subject, images, wanted, 0.05)
    assert (moved - images).abs().max() <= 0.05 + 1e-6
    before, after = (predict(oracle, x).softmax(1)[:, 1] for x in (images, moved))
    assert (after > before).all()
    values, _ = over_unlearning.measure(oracle, subject)
    assert values["ou_eps"] < 1e-6  # the logit of the class is as good as masked
    assert values["acc_moved"] == share_correct(predict(oracle, moved), subject.test_retain.labels)
