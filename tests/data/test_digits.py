import torch

from wfnet.data import open_data


def test_digits():
    splits = open_data("digits", channels=3)
    assert splits.num_classes == 10
    parts = (splits.train, splits.validation, splits.test)
    images = torch.cat([part.images for part in parts])
    assert len(images.unique(dim=0)) == 1797  # all of them, none in two parts
    assert abs(len(splits.test) / 1797 - 0.2) < 0.005
    assert splits.train[0][0].shape == (3, 32, 32)
    every = splits.train.batch(torch.arange(len(splits.train))).images
    assert abs(float(every.mean())) < 0.1
    assert 0.7 < float(every.std()) < 1.2
    assert "seed 0" in str(splits)
    few = open_data("digits", seed=1, image_size=16, train_per_class=5, test_per_class=2)
    assert (len(few.train), len(few.test)) == (50, 20)
    assert few.train.images.shape[-1] == 16
