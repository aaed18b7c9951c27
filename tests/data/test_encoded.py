import numpy as np
import pytest
import torch
from PIL import Image

from wfnet.data import CorruptImage, ImageFiles, evaluation_transform


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("channels", [1, 3])
def test_16_bits_a_pixel_keep_their_brightness_and_32_are_refused(tmp_path, suffix, channels):
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    (tmp_path / "ant").mkdir()
    Image.fromarray(grey).save(tmp_path / "ant" / f"8.{suffix}")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "ant" / f"16.{suffix}")
    Image.fromarray(grey.astype(np.float32)).save(tmp_path / "ant" / "float.tif")
    data = ImageFiles(tmp_path, evaluation_transform(16, [0.0], [1.0], crop_pct=1.0), channels)
    assert torch.equal(data[0][0], data[1][0])
    assert 0.4 < float(data[0][0].mean()) < 0.6
    with pytest.raises(CorruptImage, match="have 32 bits and no known range"):
        data[2]
