"""scikit-learn's handwritten digits: 1,797 real 8x8 images that ship with the package."""

import torch

from wfnet.data.dataset import Dataset
from wfnet.data.splits import split_dataset
from wfnet.data.tensor_images import TensorImages
from wfnet.services.extras import require

MEAN, STD = (0.3053,), (0.3761,)
TEST_FRACTION = 0.2


def read_digits(
    image_size: int = 32,
    channels: int = 1,
    mean: tuple[float, ...] = MEAN,
    std: tuple[float, ...] = STD,
    seed: int = 0,
) -> tuple[Dataset, Dataset]:
    """(training part, test part): a stratified 80/20 split, images upscaled (bilinear).

    Needs scikit-learn, `pip install wfnet[eval]`.
    """
    bunch = require("sklearn.datasets", "eval").load_digits()
    images = torch.from_numpy(bunch.images).float().div_(16.0).unsqueeze(1)
    labels = torch.from_numpy(bunch.target).to(torch.int64)
    classes = [str(digit) for digit in range(10)]
    whole = TensorImages(images, labels, classes, mean, std, size=image_size, channels=channels)
    return split_dataset(whole, TEST_FRACTION, seed)
