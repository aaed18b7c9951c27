"""Index arithmetic of the CUDA kernels on the host, against definitions written as loops."""

import itertools
import random

import cuda_modules
import pytest
import torch


@pytest.fixture(scope="module")
def geometry():
    return cuda_modules.emulated("geometry", "tests/cuda/geometry.cpp")


def axis(size, kernel, stride=1, padding=0, dilation=1):
    output = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    return (size, output, kernel, stride, padding, dilation)


AXES = [
    axis(size, kernel, stride, padding, dilation)
    for size, kernel, stride, padding, dilation in itertools.product(
        (1, 2, 5, 8, 9), (1, 2, 3, 5, 7), (1, 2, 3, 4), (0, 1, 2, 3), (1, 2, 3)
    )
    if size + 2 * padding - dilation * (kernel - 1) - 1 >= 0
]


def test_division_by_multiplication(geometry):
    generator = random.Random(0)
    divisors = [*range(1, 70), 196, 3136, 50176, 2**20 - 1, 2**20, 2**30 + 1, 2**31 - 1]
    for divisor in divisors + [generator.randrange(1, 2**31) for _ in range(200)]:
        numbers = [generator.randrange(2**31) for _ in range(40)]
        for multiple in (1, 2, 3, (2**31 - 1) // divisor):
            numbers += [n for n in (divisor * multiple + d for d in (-1, 0, 1)) if n < 2**31]
        numbers += [0, 2**31 - 1]
        assert geometry.divide(divisor, numbers) == [n // divisor for n in numbers], divisor


def test_output_size(geometry):
    for a in AXES:
        assert geometry.expected_output(a) == a[1]
    assert geometry.expected_output((3, 0, 5, 1, 0, 1)) == 0  # the filter does not fit


def test_forward_taps_reach_the_pixels_of_the_definition(geometry):
    for a in AXES:
        _, output, kernel, stride, padding, dilation = a
        first, step, count, offset, offset_step = geometry.forward_taps(a)
        for p in range(output):
            found = {first + n * step: p * stride + offset + n * offset_step for n in range(count)}
            assert found == {r: p * stride - padding + r * dilation for r in range(kernel)}


def test_gradient_phases_hold_every_contribution_once(geometry):
    """Pixel h receives through tap r from output p: p * stride = h + padding - r * dilation."""
    for a in AXES:
        size, output, kernel, stride, padding, dilation = a
        expected = {
            (p * stride - padding + r * dilation, r, p)
            for p in range(output)
            for r in range(kernel)
            if 0 <= p * stride - padding + r * dilation < size
        }
        found, pixels = [], 0
        for phase in range(stride):
            first, step, count, offset, offset_step = geometry.gradient_taps(a, phase)
            rows = geometry.phase_pixels(a, phase)
            pixels += rows
            for i, n in itertools.product(range(rows), range(count)):
                p = i + offset + n * offset_step
                if 0 <= p < output:
                    found.append((i * stride + phase, first + n * step, p))
            assert all(first + n * step < kernel for n in range(count))
        assert pixels == size
        assert len(found) == len(set(found)), a
        assert set(found) == expected, a


def test_phases_waste_no_multiplications(geometry):
    """Taps over all phases: each tap once per stride class, not once per pixel and tap."""
    for a in AXES:
        size, _, kernel, stride, _, _ = a
        work = sum(
            geometry.phase_pixels(a, phase) * geometry.gradient_taps(a, phase)[2]
            for phase in range(stride)
        )
        assert work <= (size + stride - 1) // stride * kernel, a


@pytest.mark.parametrize("batch", [1, 3])
def test_tiles_cover_every_pixel_once(geometry, batch):
    for h, w in ((axis(7, 3, 2, 1), axis(6, 3, 3, 1)), (axis(5, 3, 1, 1), axis(1, 1))):
        seen, tiles = [], 0
        for ph, pw, rows_h, rows_w, first, count in geometry.phases(h, w, batch, 4):
            assert first == tiles
            tiles += count
            rows = batch * rows_h * rows_w
            assert (count - 1) * 4 < rows <= count * 4
            for b, i, j in itertools.product(range(batch), range(rows_h), range(rows_w)):
                seen.append((b, i * h[3] + ph, j * w[3] + pw))
        assert sorted(seen) == sorted(itertools.product(range(batch), range(h[0]), range(w[0])))
        assert geometry.row_tiles(h, w, batch, 4) == tiles


@pytest.mark.parametrize("strip_rows", [32, 64])
@pytest.mark.parametrize("pixels", [1, 2, 7, 31, 32, 49, 64, 65, 200])
@pytest.mark.parametrize("batch", [1, 3, 70])
def test_column_sum_slots(geometry, strip_rows, pixels, batch):
    """Every (strip, sample) that share a row has a slot of its own, found from both sides."""
    span = geometry.span(strip_rows, pixels, batch)
    written = {}
    for row in range(batch * pixels):
        strip, sample = row // strip_rows, row // pixels
        slot = geometry.slot(strip, strip_rows, pixels, span, sample)
        assert strip * span <= slot < (strip + 1) * span
        assert written.setdefault(slot, (strip, sample)) == (strip, sample)
    read = {}
    for sample in range(batch):
        first, last = geometry.strips(strip_rows, pixels, sample)
        for strip in range(first, last + 1):
            read[geometry.slot(strip, strip_rows, pixels, span, sample)] = (strip, sample)
    assert read == written


def test_swizzles_are_permutations_without_bank_conflicts(geometry):
    """8 lanes that read 16 bytes at one column of 8 rows meet 8 different groups of 4 banks."""

    def groups(addresses):
        return {address // 16 % 8 for address in addresses}

    tile = {geometry.swizzle_64(row, chunk) for row in range(128) for chunk in range(4)}
    assert tile == set(range(0, 128 * 64, 16))
    for row, chunk in itertools.product(range(0, 128, 8), range(4)):
        assert len(groups(geometry.swizzle_64(row + i, chunk) for i in range(8))) == 8
    for columns in (64, 128):
        wide = {
            geometry.swizzle_wide(row, chunk, columns * 2)
            for row in range(32)
            for chunk in range(columns // 8)
        }
        assert wide == set(range(0, 32 * columns * 2, 16))
        for row, chunk in itertools.product(range(0, 32, 8), range(columns // 8)):
            assert (
                len(groups(geometry.swizzle_wide(row + i, chunk, columns * 2) for i in range(8)))
                == 8
            )
    staging = {geometry.swizzle_staging(row, piece) for row in range(64) for piece in range(16)}
    assert staging == set(range(0, 64 * 256, 16))


@pytest.mark.parametrize("bf16", [True, False], ids=["bf16", "fp16"])
def test_rounding_equals_pytorch(geometry, bf16):
    """To 16 bits and back: halfway cases, subnormals, overflow, infinities, NaN."""
    special = [0, 0x80000000, 0x7F800000, 0xFF800000, 0x7FC00000, 0x00000001, 0x477FEFFF]
    special += [0x477FF000, 0x387FC000, 0x387FE000, 0x33000000, 0x33000001, 0x32FFFFFF, 0x7F7FFFFF]
    generator = random.Random(0)
    bits = special + [generator.randrange(2**32) for _ in range(2000)]
    bits += [
        generator.randrange(2**16) << 16 | half for half in (0x8000, 0x1000) for _ in range(99)
    ]
    values = torch.tensor([b - 2**32 if b >= 2**31 else b for b in bits], dtype=torch.int32)
    floats = values.view(torch.float32)
    expected = floats.to(torch.bfloat16 if bf16 else torch.float16).float()
    found = [geometry.round_trip(b, bf16) for b in bits]
    found = torch.tensor([b - 2**32 if b >= 2**31 else b for b in found], dtype=torch.int32)
    torch.testing.assert_close(found.view(torch.float32), expected, rtol=0, atol=0, equal_nan=True)


def test_narrow_tiles_waste_less(geometry):
    for columns in range(8, 1032, 8):
        waste = {width: -columns % width for width in (64, 128)}
        if geometry.narrow_tiles(columns):
            assert waste[64] < waste[128]
        elif waste[64] < waste[128]:
            assert columns >= 384  # a seventh of the work at most, for twice the reuse
