"""scikit-learn's handwritten digits: 1,797 real 8x8 images that ship with the package."""

import torch
from torch import Tensor

from wfnet.services.extras import require

MEAN, STD = (0.3053,), (0.3761,)


def read_digits() -> tuple[Tensor, Tensor]:
    """Returns images [1797, 1, 8, 8] in 0..1 and labels [1797]; needs scikit-learn,
    `pip install wfnet[eval]`."""
    bunch = require("sklearn.datasets", "eval").load_digits()
    images = torch.from_numpy(bunch.images).float().div_(16.0).unsqueeze(1)
    return images, torch.from_numpy(bunch.target).to(torch.int64)
