import torch

from wfnet.data import open_data


def test_digits():
    splits = open_data("digits", channels=3)
    assert splits.num_classes == 10
    assert len(splits.train) + len(splits.validation) + len(splits.test) == 1797
    assert abs(len(splits.test) / 1797 - 0.2) < 0.005
    assert splits.test.labels.bincount().min() >= 34
    image, _ = splits.train[0]
    assert image.shape == (3, 32, 32)
    every = splits.train.batch(torch.arange(len(splits.train))).images
    assert abs(float(every.mean())) < 0.1
    assert 0.7 < float(every.std()) < 1.2
    assert "seed 0" in str(splits)
    other = open_data("digits", seed=1, image_size=16)
    assert other.train.images.shape[-1] == 16
    few = open_data("digits", train_per_class=5, test_per_class=2)
    assert (len(few.train), len(few.test)) == (50, 20)


def test_digit_splits_share_no_image():
    splits = open_data("digits", image_size=8)
    parts = (splits.train, splits.validation, splits.test)
    seen = [bytes(image.numpy().tobytes()) for part in parts for image in part.images]
    whole = {bytes(image) for image in seen}
    # load_digits has no duplicates, so a shared image would make the set smaller.
    assert len(whole) == 1797
