"""Index arithmetic and the choice of tiles, on the host."""

import itertools

import pytest
import torch

pytest.importorskip("triton")

from wfnet.kernels.config import (
    TARGETS,
    ConvShape,
    GemmConfig,
    LinearShape,
    best_box,
    conv_choice,
    full_precision,
    linear_choice,
    span,
)
from wfnet.kernels.conv_dgrad import tiles_per_sample

H100 = TARGETS[90]


def conv_shape(batch=512, size=56, c=64, o=64, k=3, stride=1, pad=1, dil=1):
    return ConvShape(batch, size, size, c, o, (k, k), (stride,) * 2, (pad,) * 2, (dil,) * 2)


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


@pytest.mark.parametrize("tokens", [16, 31, 49, 50, 197])
def test_flat_tiles_give_every_sample_its_own_slots(tokens):
    """The slots that a tile writes are those that the reduction reads, and no other's."""
    batch, block_m = 9, 32
    touched = span(block_m, tokens)
    written = {}
    for tile in range(-(-batch * tokens // block_m)):
        rows = range(tile * block_m, min((tile + 1) * block_m, batch * tokens))
        for row in rows:
            slot = tile * touched + row // tokens - tile * block_m // tokens
            assert slot < (tile + 1) * touched
            written.setdefault(slot, []).append(row)
    for sample in range(batch):
        first = sample * tokens // block_m
        last = ((sample + 1) * tokens - 1) // block_m
        slots = [t * touched + sample - t * block_m // tokens for t in range(first, last + 1)]
        rows = list(itertools.chain.from_iterable(written[slot] for slot in slots))
        assert rows == list(range(sample * tokens, (sample + 1) * tokens))


@pytest.mark.parametrize("pad", [0, 1, 3])
@pytest.mark.parametrize("k", [1, 2, 3, 5, 7])
def test_parity_classes_visit_every_tap_once(k, pad):
    """Stride 2: taps of a class, and the output row each reads, as the kernel enumerates them."""
    step, height = 2, 8
    for h in range(height):
        odd, half = h % step, h // step
        first = (odd + pad) % step
        count = (k - first + step - 1) // step
        mine = {(first + i * step, half + (odd + pad) // step - i) for i in range(count)}
        truth = {(r, (h + pad - r) // step) for r in range(k) if (h + pad - r) % step == 0}
        assert mine == truth


@pytest.mark.parametrize("pad", [0, 1, 3])
@pytest.mark.parametrize("dil", [1, 2, 3])
def test_strided_taps_lie_in_one_parity_class(pad, dil):
    """Stride 2: input row 2p + r*dilation - pad as (row of the class, class), negative or not."""
    step = 2
    for p, r in itertools.product(range(6), range(7)):
        shifted = r * dil - pad + pad * step
        row, odd = p + shifted // step - pad, shifted % step
        assert step * row + odd == step * p + r * dil - pad
        assert odd in (0, 1)


@pytest.mark.parametrize(
    ("size", "least", "cover"), [(56, 16, 1.0), (28, 16, 1.0), (14, 16, 0.87), (7, 16, 0.76)]
)
def test_boxes_cover_resnet_sizes(size, least, cover):
    """Packing samples beats (1, 8, 16), which covers 77% of 28 x 28 and 14 x 14."""
    box, found = best_box(512, size, size, 128, 8, least)
    assert box[0] * box[1] * box[2] == 128
    assert found >= cover
    tiles = -(-512 // box[0]) * -(-size // box[1]) * -(-size // box[2])
    assert found == pytest.approx(512 * size * size / (tiles * 128))


def test_box_respects_its_limits():
    box, _ = best_box(512, 28, 28, 128, 1, 16)
    assert box[0] == 1
    box, _ = best_box(512, 7, 7, 128, 8, 64)
    assert box[1] * box[2] >= 64
    assert best_box(1, 28, 28, 128, 8, 16)[0][0] == 1


@pytest.mark.parametrize("direction", ["fprop", "dgrad"])
def test_choice_of_path(direction):
    def choose(shape, device=H100, aligned=True):
        return conv_choice(direction, shape, torch.bfloat16, device, describable=aligned)

    assert choose(conv_shape()).config.path == "box"
    assert choose(conv_shape(stride=2)).config.path == "box"
    for shape, reason in (
        (conv_shape(size=15, stride=2), "uneven phases"),
        (conv_shape(stride=3), "neither 1 nor 2"),
        (conv_shape(c=24, stride=2), "multiples of 16"),
    ):
        choice = choose(shape)
        assert choice.config.path == "gather"
        assert reason in choice.reason
    assert "no tensor memory accelerator" in choose(conv_shape(), TARGETS[80]).reason
    assert "16 bytes" in choose(conv_shape(c=3), aligned=False).reason


def test_strided_boxes_stay_inside_a_parity_class():
    """Channel tiles must divide the channels: their neighbours are the next column's."""
    for channels in (16, 48, 64, 80, 96, 192):
        shape = conv_shape(c=channels, o=channels, stride=2)
        forward = conv_choice("fprop", shape, torch.bfloat16, H100, describable=True).config
        backward = conv_choice("dgrad", shape, torch.bfloat16, H100, describable=True).config
        assert channels % forward.block_k == 0
        assert channels % backward.block_n == 0
        assert tiles_per_sample(shape, backward) * backward.box[0] >= 1


def test_small_batches_take_smaller_tiles():
    small = conv_choice("fprop", conv_shape(1, 14), torch.bfloat16, H100, describable=True)
    large = conv_choice("fprop", conv_shape(512, 14), torch.bfloat16, H100, describable=True)
    assert small.config.block_m < large.config.block_m


def test_linear_choice():
    shape = LinearShape(512, 197, 192, 576)
    choice = linear_choice(shape, torch.bfloat16, H100, columns=576, describable=True)
    assert choice.config.path == "flat"
    assert "at most 2 samples" in choice.reason
    few = LinearShape(512, 1, 192, 576)
    choice = linear_choice(few, torch.bfloat16, H100, columns=576, describable=True)
    assert "gathered table rows" in choice.reason
    old = linear_choice(shape, torch.bfloat16, TARGETS[80], columns=576, describable=True)
    assert old.config.path == "gather"


def test_default_operands_fit_into_shared_memory():
    for device in TARGETS.values():
        for dtype in (torch.bfloat16, torch.float32):
            for direction in ("fprop", "dgrad"):
                config = conv_choice(
                    direction, conv_shape(), dtype, device, describable=True
                ).config
                assert config.operand_memory(dtype.itemsize) <= device.shared_memory


def test_full_precision_follows_pytorch(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert full_precision(torch.float32, "conv")
    assert not full_precision(torch.bfloat16, "conv")
    config = conv_choice("fprop", conv_shape(), torch.float32, H100, describable=True).config
    assert config.block_m * config.block_n <= 64 * 64
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert not full_precision(torch.float32, "conv")


def test_full_precision_is_read_however_it_was_set():
    """PyTorch refuses to read its older flag once the newer setting was used."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    try:
        matmul.allow_tf32 = False
        assert full_precision(torch.float32, "linear")
        matmul.fp32_precision = "tf32"
        with pytest.raises(RuntimeError):
            _ = matmul.allow_tf32
        assert not full_precision(torch.float32, "linear")
    finally:
        matmul.allow_tf32 = before


def test_config_is_checked():
    with pytest.raises(ValueError, match="does not hold block_m"):
        GemmConfig("box", 128, 64, 64, 8, 3, box=(1, 8, 8))
    with pytest.raises(ValueError, match="do not go together"):
        GemmConfig("gather", 128, 64, 64, 8, 3, box=(1, 8, 16))
    with pytest.raises(ValueError, match="not 'im2col'"):
        GemmConfig("im2col", 128, 64, 64, 8, 3)
