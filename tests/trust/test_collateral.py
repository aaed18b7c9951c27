import pytest
import torch

from wfnet.trust import collateral, probing


def test_nearest_classes_by_confusion(make_subject, make_network):
    original = make_network(0)
    with torch.no_grad():
        original.fc.weight.zero_()
        original.fc.bias.copy_(torch.tensor([2.0, 9.0, 1.0, 3.0]))
    assert collateral.nearest_by_confusion(make_subject(original=original)) == [3, 0, 2]


def test_nearest_classes_by_features_are_those_of_near_means(make_subject):
    subject = make_subject(label=0)
    features, own = (
        probing.layer_features(subject.original, (), part.images, 4)[probing.HEAD]
        for part in (subject.train_retain, subject.train_forget)
    )
    labels = subject.train_retain.labels.numpy()
    distance = {k: ((features[labels == k].mean(0) - own.mean(0)) ** 2).sum() for k in (1, 2, 3)}
    assert collateral.nearest_by_features(subject) == sorted(distance, key=distance.get)


def test_collateral_accuracies_are_of_the_right_images(data, make_subject):
    subject = make_subject()
    values, details = collateral.measure(subject.forgetful, subject)
    by_class = details["accuracy_by_class"]["confusion"]
    assert set(by_class) == {"0", "2", "3"}
    logits = subject.forgetful(data.test.images)
    for k, value in by_class.items():
        own = data.test.labels == int(k)
        assert value == (logits[own].argmax(1) == int(k)).double().mean().item()
    assert values["acc_worst"] == min(by_class.values())
    assert values["acc_nearest_confusion"] == pytest.approx(sum(by_class.values()) / 3)
