"""Index arithmetic and the choice of tiles, on the host."""

import pytest
import torch

pytest.importorskip("triton")

from wfnet.kernels.config import TARGETS, ConvShape, best_box, choose, full_precision, span

from wfnet.backends.contract import ConvGeometry

H100 = TARGETS[90]


def conv_shape(batch=512, size=56, c=64, o=64, stride=1):
    geometry = ConvGeometry((stride,) * 2, (1, 1))
    return ConvShape(batch, (size, size), c, o, (3, 3), geometry)


def chosen(direction, shape, device=H100, dtype=torch.bfloat16, describable=True):
    return choose(direction, shape, dtype, device, describable=describable)


@pytest.mark.parametrize("block_m", [16, 32, 64, 128])
def test_span_counts_samples_of_a_flat_tile(block_m):
    for tokens in range(1, 300):
        most = max(
            (start + block_m - 1) // tokens - start // tokens + 1
            for start in range(0, block_m * tokens, block_m)
        )
        promised = span(block_m, tokens)
        assert promised == 0 or most <= promised <= 4, (tokens, most, promised)
        if most <= 2:
            assert promised > 0


@pytest.mark.parametrize(
    ("size", "least", "cover"), [(56, 16, 1.0), (28, 16, 1.0), (14, 16, 0.87), (7, 64, 0.38)]
)
def test_boxes_cover_resnet_sizes(size, least, cover):
    """Packing samples beats (1, 8, 16), which covers 77% of 28 x 28 and 14 x 14."""
    box, found = best_box(512, size, size, 128, 8, least)
    assert box[0] * box[1] * box[2] == 128
    assert box[1] * box[2] >= least
    assert found >= cover


@pytest.mark.parametrize("direction", ["fprop", "dgrad"])
@pytest.mark.parametrize(
    ("shape", "options", "path", "reason"),
    [
        (conv_shape(), {}, "box", "cover 100%"),
        (conv_shape(stride=2), {}, "box", "parity"),
        (conv_shape(size=15, stride=2), {}, "gather", "uneven phases"),
        (conv_shape(stride=3), {}, "gather", "neither 1 nor 2"),
        (conv_shape(c=24, stride=2), {}, "gather", "multiples of 16"),
        (conv_shape(), {"device": TARGETS[80]}, "gather", "no tensor memory accelerator"),
        (conv_shape(c=3), {"describable": False}, "gather", "16 bytes"),
        (ConvShape(512, (197, 1), 192, 576), {}, "flat", "at most 2 samples"),
        (ConvShape(512, (1, 1), 192, 576), {}, "flat", "gathered table rows"),
        (ConvShape(512, (197, 1), 192, 576), {"device": TARGETS[80]}, "gather", "accelerator"),
    ],
)
def test_choice_of_path(direction, shape, options, path, reason):
    choice = chosen(direction, shape, **options)
    assert choice.config.path == path
    assert reason in choice.reason


@pytest.mark.parametrize("channels", [16, 48, 64, 80, 96, 192])
def test_strided_boxes_stay_inside_a_parity_class(channels):
    """Channel tiles must divide the channels: their neighbours are the next column's."""
    shape = conv_shape(c=channels, o=channels, stride=2)
    assert channels % chosen("fprop", shape).config.block_k == 0
    assert channels % chosen("dgrad", shape).config.block_n == 0


def test_full_precision_follows_pytorch_however_it_was_set():
    """PyTorch refuses to read its older flag once the newer setting was used."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    try:
        matmul.allow_tf32 = False
        assert full_precision(torch.float32, linear=True)
        assert not full_precision(torch.bfloat16, linear=True)
        matmul.fp32_precision = "tf32"
        with pytest.raises(RuntimeError):
            _ = matmul.allow_tf32
        assert not full_precision(torch.float32, linear=True)
    finally:
        matmul.allow_tf32 = before
