import torch

from wfnet.data import open_data


def test_digits():
    splits = open_data("digits", channels=3)
    assert splits.train[0][0].shape == (3, 32, 32)
    images = torch.cat([part.images for part in (splits.train, splits.validation, splits.test)])
    assert len(images.unique(dim=0)) == 1797  # all of them, none in two parts
    assert abs(len(splits.test) / 1797 - 0.2) < 0.005
    every = splits.train.batch(torch.arange(len(splits.train))).images
    assert abs(float(every.mean())) < 0.1
    assert 0.7 < float(every.std()) < 1.2
