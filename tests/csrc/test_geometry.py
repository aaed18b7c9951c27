"""Host arithmetic of the compiled kernels: tiles, taps, tensor maps, descriptors, column sums.

Each is compared with the plain definition of a convolution (or of its input gradient) over many
shapes; the kernels use the same functions (csrc/geometry.h, tensor_map.h).
"""

import itertools
import math
import re
from collections import Counter
from typing import NamedTuple

import pytest


class Conv(NamedTuple):
    """Sizes of a convolution; pairs are (height, width)."""

    batch: int
    height: int
    width: int
    in_channels: int
    out_channels: int
    filter: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    pad: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    @property
    def output(self):
        """Height and width of the result."""
        return tuple(axis[1] for axis in self.axes)

    @property
    def axes(self):
        """Height and width as the kernels' Python functions take them."""
        pairs = (self.filter, self.stride, self.pad, self.dilation)
        found = []
        for size, k, s, p, d in zip((self.height, self.width), *pairs, strict=True):
            found.append((size, (size + 2 * p - d * (k - 1) - 1) // s + 1, k, s, p, d))
        return found

    def sizes(self):
        """The arguments of the kernels' Python functions that say what is convolved."""
        height, width = self.axes
        channels = {"in_channels": self.in_channels, "out_channels": self.out_channels}
        return {"batch": self.batch, **channels, "height": height, "width": width}


SIZES = [(1, 1), (5, 3), (7, 7), (8, 6), (13, 4)]
FILTERS = [(1, 1), (3, 3), (2, 5), (7, 7)]


def shapes():
    """Convolutions of every kind that fit into their image."""
    for (h, w), (r, s), stride, pad, dilation in itertools.product(
        SIZES, FILTERS, [(1, 1), (2, 2), (1, 2)], [0, 1, 3], [1, 2]
    ):
        fits = all(
            size + 2 * pad - dilation * (k - 1) >= 1 for size, k in zip((h, w), (r, s), strict=True)
        )
        if fits:
            yield Conv(3, h, w, 72, 136, (r, s), stride, (pad, pad), (dilation, dilation))


SHAPES = list(shapes())
assert len(SHAPES) > 150


def geometry(conv):
    return conv.filter, conv.stride, conv.pad, conv.dilation


def test_forward_slices_are_all_taps_and_channels(inspection):
    for conv in SHAPES[::5]:
        (r, s), _, _, dilation = geometry(conv)
        expected = [
            (i * s + j, i * dilation[0], j * dilation[1], c)
            for i in range(r)
            for j in range(s)
            for c in (0, 64)
        ]
        assert inspection.slices_of(conv, False, 0) == expected


def test_backward_reads_what_the_definition_says(inspection):
    """Pixel (h, w) of dx meets pixel (p, q) of dout at tap (i, j) where p*stride = h + pad - i*dil.

    Every pair exactly once: through its phase, its filter base and the offsets of the tap.
    """
    for conv in SHAPES:
        filter_size, stride, pad, dilation = geometry(conv)
        for axis, name in enumerate("hw"):
            size = (conv.height, conv.width)[axis]
            expected = Counter()
            for x, tap in itertools.product(range(size), range(filter_size[axis])):
                distance = x + pad[axis] - tap * dilation[axis]
                if distance % stride[axis] == 0:
                    expected[x, tap, distance // stride[axis]] += 1
            found = Counter()
            phases = inspection.problem(conv, True)["phases"]
            # Phase (f_h, f_w) is number f_h * stride_w + f_w: each axis' own phases once.
            for phase in phases[:: stride[1]] if name == "h" else phases[: stride[1]]:
                a = phase[name]
                for i in range(a["size"]):
                    x = a["out"][0] + i * a["out"][1]
                    for tap, offset in zip(a["taps"], a["offsets"], strict=True):
                        assert offset >= 0
                        found[x, tap, a["base"][0] + i * a["base"][1] + offset] += 1
            assert found == expected, conv


@pytest.mark.parametrize("backward", [False, True], ids=["fprop", "dgrad"])
def test_rows_are_all_pixels_once(inspection, backward):
    for conv in SHAPES:
        sizes = (conv.height, conv.width) if backward else conv.output
        pixels = []
        for phase in range(len(inspection.problem(conv, backward)["phases"])):
            rows = inspection.rows_of(conv, backward, phase)
            assert all(pixel // math.prod(sizes) == sample for sample, pixel in rows)
            assert rows == sorted(rows)
            pixels += [pixel for _, pixel in rows]
        assert sorted(pixels) == list(range(3 * math.prod(sizes)))


@pytest.mark.parametrize("backward", [False, True], ids=["fprop", "dgrad"])
def test_im2col_traversal_meets_every_row(inspection, backward):
    """The driver's rules: filter bases run from the lower corner to the last pixel plus the upper
    corner, step by step; then the row, then the sample is advanced."""
    for conv in SHAPES[::3]:
        problem = inspection.problem(conv, backward)
        for index, phase in enumerate(problem["phases"]):
            if phase["slices"] == 0 or phase["rows"] == 0:
                continue
            tensor = inspection.tensor_map(conv, backward, index)
            _, width, height, samples = tensor["size"]
            spans = [
                range(low, extent - 1 + up + 1, step)
                for low, up, extent, step in zip(
                    tensor["lower"],
                    tensor["upper"],
                    (width, height),
                    tensor["element_step"][1:3],
                    strict=True,
                )
            ]
            bases = [(n, h, w) for n in range(samples) for h in spans[1] for w in spans[0]]
            assert len(bases) == phase["rows"]
            for row in range(0, phase["rows"], 7):
                assert inspection.base_of(conv, backward, index, row) == bases[row]


def test_tensor_map_of_a_strided_convolution(inspection):
    conv = Conv(4, 10, 12, 72, 136, (3, 5), (2, 1), (1, 2), (1, 1))
    assert inspection.tensor_map(conv, False, 0) == {
        "size": (72, 12, 10, 4),
        "stride": (0, 144, 144 * 12, 144 * 120),
        "element_step": (1, 1, 2, 1),
        "lower": (-2, -1),
        "upper": (-2, -2),  # 12 bases from -2 to 9 of 11; 5 from -1 to 7 of 9
        "channels": 64,
        "pixels": 128,
    }


@pytest.mark.parametrize("clusters", [1, 3, 66])
def test_schedule_covers_every_tile_once(inspection, clusters):
    for conv in SHAPES[::4]:
        for backward in (False, True):
            problem = inspection.problem(conv, backward)
            expected = {
                (index, m, n)
                for index, phase in enumerate(problem["phases"])
                for m in range(phase["m_tiles"])
                for n in range(problem["n_tiles"])
            }
            blocks = inspection.schedule_of(conv, backward, clusters)
            tiles = list(itertools.chain(*blocks))
            assert len(tiles) == len(set(tiles))
            # The block of a cluster whose tile does not exist goes along, past the end.
            past = {t for t in tiles if t[1] == problem["phases"][t[0]]["m_tiles"]}
            assert set(tiles) - past == expected
            assert {m % 2 for _, m, _ in past} <= {1}
            for first, second in zip(blocks[::2], blocks[1::2], strict=True):
                assert [(p, m + 1, n) for p, m, n in first] == second


@pytest.mark.parametrize("channels", [64, 128, 256, 512])
def test_strided_gradient_is_balanced(inspection, channels):
    """Phases of a 3x3 filter have 1, 2, 2, 4 taps: no thread block may get only the long ones."""
    size = 56 * 64 // channels
    conv = Conv(512, 2 * size, 2 * size, channels, 2 * channels, (3, 3), (2, 2), (1, 1), (1, 1))
    problem = inspection.problem(conv, True)
    taps = [phase["slices"] for phase in problem["phases"]]
    assert sorted(taps) == [s * 2 * channels // 64 for s in (1, 2, 2, 4)]
    work = [
        sum(taps[phase] for phase, _, _ in block)
        for block in inspection.schedule_of(conv, True, 66)
    ]
    assert max(work) <= 1.15 * sum(work) / len(work)


def test_partial_sums_have_a_row_per_tile_and_sample(inspection):
    for conv in SHAPES[::3]:
        problem = inspection.problem(conv, True)
        used = Counter()
        for index, phase in enumerate(problem["phases"]):
            if phase["rows"] == 0:
                continue
            samples = [sample for sample, _ in inspection.rows_of(conv, True, index)]
            touched = {(row // 128, sample) for row, sample in enumerate(samples)}
            for sample in range(3):
                first, last = inspection.tiles_of_sample(conv, True, index, sample)
                assert {m for m, s in touched if s == sample} == set(range(first, last + 1))
            for m, sample in touched:
                used[inspection.partial_row(conv, True, index, m, sample)] += 1
        assert set(used.values()) == {1}
        assert min(used) >= 0
        assert max(used) < problem["partial_rows"]


def test_wgmma_descriptor_fields(inspection):
    descriptor = inspection.descriptor(0x12340, 8192, 1024)
    assert descriptor & 0x3FFF == 0x1234
    assert descriptor >> 16 & 0x3FFF == 512
    assert descriptor >> 32 & 0x3FFF == 64
    assert descriptor >> 49 & 7 == 0
    assert descriptor >> 62 == 1  # 128-byte swizzle
    rest = (0x3FFF | 0x3FFF << 16 | 0x3FFF << 32 | 1 << 62) ^ (2**64 - 1)
    assert descriptor & rest == 0


def test_shared_memory_fits(inspection):
    for block_n, keep_filter in ((64, False), (64, True), (128, False)):
        assert 190 * 1024 < inspection.shared_bytes(block_n, keep_filter) <= 227 * 1024


@pytest.mark.parametrize(
    ("conv", "forward", "backward"),
    [
        (Conv(1, 8, 8, 64, 64, (3, 3), (1, 1), (1, 1)), True, True),
        (Conv(1, 8, 8, 72, 64, (3, 3), (1, 1), (1, 1)), False, False),  # 18 slices; 2 column tiles
        (Conv(1, 8, 8, 256, 64), True, False),
        (Conv(1, 8, 8, 64, 256), False, True),
        (Conv(1, 8, 8, 640, 64), False, False),
        (Conv(1, 8, 8, 64, 64, (3, 3), (2, 2), (1, 1)), True, False),  # four phases
    ],
)
def test_filters_that_stay_in_shared_memory(inspection, conv, forward, backward):
    for direction, kept in ((False, forward), (True, backward)):
        assert inspection.problem(conv, direction)["keep_filter"] == kept


@pytest.mark.parametrize(
    ("channels", "block_n"),
    [(64, 64), (128, 128), (192, 64), (256, 128), (320, 128), (576, 128), (1152, 128), (40, 64)],
)
def test_column_tiles_waste_little(inspection, channels, block_n):
    conv = Conv(1, 4, 4, 64, channels)
    assert inspection.problem(conv, False)["block_n"] == block_n


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("pixels", 128, None),
        ("address", 8, "16-byte aligned"),
        ("size", 0, "empty or too long"),
        ("size", 2**32 + 1, "empty or too long"),
        ("stride", 24, "multiple of 8"),
        ("stride", 2**40, "more than"),
        ("element_step", 0, "stride"),
        ("element_step", 9, "stride"),
        ("lower", -129, "128 pixels"),
        ("upper", 128, "128 pixels"),
        ("upper", -14, "box of filter bases is empty"),
        ("channels", 128, "128 bytes of its swizzle"),
        ("pixels", 1025, "1024 pixels"),
    ],
)
def test_what_the_driver_demands_of_a_tensor_map(inspection, name, value, message):
    """Documented with cuTensorMapEncodeIm2col (cuda.h): a map that violates it is refused by us."""
    conv = Conv(2, 12, 12, 64, 64, (3, 3), (1, 1), (1, 1))
    reason = inspection.refuse_changed_map(conv, name, value)
    assert (reason is None) if message is None else re.search(message, reason)


@pytest.mark.parametrize("stride", [(1, 1), (2, 2)])
def test_numbers_of_tensors_above_two_to_the_31st_fit(inspection, emulated_kernels, stride):
    """Rows are counted in 32 bits, elements and bytes are not: the largest problems taken."""
    pixels = 2**31 - 513
    batch, size = pixels // (224 * 224), 224
    for conv in (
        Conv(batch, size, size, 64, 64, (3, 3), stride, (1, 1)),
        Conv(512, size, size, 64, 64, (3, 3), stride, (1, 1)),
        Conv(pixels, 1, 1, 64, 64),
    ):
        assert emulated_kernels.refuse_fprop(**conv.sizes()) is None
        assert emulated_kernels.refuse_dgrad(**conv.sizes()) is None
        for backward in (False, True):
            problem = inspection.problem(conv, backward)
            rows = [phase["rows"] for phase in problem["phases"]]
            height, width = (conv.height, conv.width) if backward else conv.output
            assert sum(rows) == conv.batch * height * width
            assert problem["partial_rows"] > 0
            last = inspection.row_of(conv, backward, len(rows) - 1, rows[-1] - 1)
            assert last == (conv.batch - 1, conv.batch * height * width - 1)
            sample, h, w = inspection.base_of(conv, backward, len(rows) - 1, rows[-1] - 1)
            assert sample == conv.batch - 1
            assert h < conv.height
            assert w < conv.width
    too_many = Conv(pixels + 1, 1, 1, 64, 64).sizes()
    assert re.search("pixels", emulated_kernels.refuse_fprop(**too_many))
    assert re.search("pixels", emulated_kernels.refuse_dgrad(**too_many))


@pytest.mark.parametrize(
    ("sizes", "forward", "backward"),
    [
        ((1, 8, 8, 64, 64, (3, 3), (1, 1), (1, 1), (1, 1)), None, None),
        ((1, 8, 8, 3, 64, (7, 7), (2, 2), (3, 3), (1, 1)), "multiples of 8", "multiples of 8"),
        ((1, 8, 8, 64, 60, (1, 1), (1, 1), (0, 0), (1, 1)), "multiples of 8", "multiples of 8"),
        ((1, 2, 2, 64, 64, (3, 3), (1, 1), (0, 0), (1, 1)), "does not fit", "does not fit"),
        ((0, 8, 8, 64, 64, (1, 1), (1, 1), (0, 0), (1, 1)), "empty", "empty"),
        ((1, 32, 32, 64, 64, (4, 4), (4, 4), (0, 0), (1, 1)), None, "product is above 4"),
        ((1, 32, 32, 64, 64, (1, 1), (9, 9), (0, 0), (1, 1)), "above 8", "product is above 4"),
        ((1, 32, 32, 64, 64, (3, 3), (1, 1), (129, 129), (1, 1)), "128 pixels", "128 pixels"),
        ((1, 300, 300, 64, 64, (3, 3), (1, 1), (127, 127), (127, 127)), None, None),
        ((1, 300, 300, 64, 64, (3, 3), (1, 1), (127, 127), (128, 128)), "wider", "wider"),
        ((1, 300, 300, 64, 64, (1, 2), (1, 1), (0, 127), (1, 255)), "wider", "wider"),
        ((65536, 224, 224, 64, 64, (3, 3), (1, 1), (1, 1), (1, 1)), "2..31", "2..31"),
    ],
)
def test_refusals(emulated_kernels, sizes, forward, backward):
    conv = Conv(*sizes)
    for reason, expected in (
        (emulated_kernels.refuse_fprop(**conv.sizes()), forward),
        (emulated_kernels.refuse_dgrad(**conv.sizes()), backward),
    ):
        if expected is None:
            assert reason is None
        else:
            assert re.search(expected, reason), reason
