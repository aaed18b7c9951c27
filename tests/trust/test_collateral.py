import numpy as np
import pytest
import torch

from wfnet.trust import collateral, probing


def test_nearest_classes_by_confusion():
    logits = torch.tensor([[5.0, 9.0, 4.0, 1.0, 3.0]]).repeat(6, 1)
    assert collateral.nearest_by_confusion(logits, 1, 2) == [0, 2]
    assert collateral.nearest_by_confusion(logits[:, :2], 1, 3) == [0]


def test_nearest_classes_by_features_are_those_of_near_means(make_subject):
    subject = make_subject(label=0)
    found = collateral.nearest_by_features(subject, 3)
    features, own = (
        probing.layer_features(subject.original, (), part.images)[probing.HEAD]
        for part in (subject.train_retain, subject.train_forget)
    )
    labels = subject.train_retain.labels.numpy()
    distance = {k: np.linalg.norm(features[labels == k].mean(0) - own.mean(0)) for k in (1, 2, 3)}
    assert found == sorted(distance, key=distance.get)


def test_collateral_accuracies_are_of_the_right_images(data, make_subject):
    subject = make_subject()
    found = collateral.measure(subject.forgetful, subject, [])
    by_class = found["details"]["accuracy_by_class"]["confusion"]
    assert set(by_class) == {"0", "2", "3"}
    logits = subject.forgetful(data.test.images)
    for k, value in by_class.items():
        own = data.test.labels == int(k)
        assert value == (logits[own].argmax(1) == int(k)).double().mean().item()
    assert found["values"]["acc_worst"] == min(by_class.values())
    assert found["values"]["acc_nearest_confusion"] == pytest.approx(sum(by_class.values()) / 3)
