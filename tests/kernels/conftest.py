"""Tiles small enough for the interpreter, and convolutions of every kind."""

import pytest

triton = pytest.importorskip("triton")
from wfnet.kernels.config import GemmConfig  # noqa: E402

_TILES = {
    "box": GemmConfig("box", 32, 16, 16, 4, 2, box=(1, 8, 4)),
    "packed": GemmConfig("box", 64, 16, 16, 4, 2, box=(2, 4, 8)),
    "gather": GemmConfig("gather", 64, 16, 16, 4, 2),
    "flat": GemmConfig("flat", 32, 16, 16, 4, 2),
    "default": None,
}
# name: samples, H, W, C, O, filter, stride, padding, dilation, tiles
_CONVS = {
    "3x3": (3, 7, 9, 16, 20, 3, 1, 1, 1, "box packed gather"),
    "3x3, batch 1, whole tiles": (1, 8, 8, 16, 16, 3, 1, 1, 1, "gather"),
    "3x3, channels past a tile": (2, 5, 5, 24, 40, 3, 1, 1, 1, "packed"),
    "3x3 stride 2": (3, 8, 6, 16, 32, 3, 2, 1, 1, "packed gather"),
    "3x3 stride 2, no padding": (2, 8, 8, 16, 16, 3, 2, 0, 1, "box"),
    "3x3 stride 2, odd size": (2, 7, 7, 16, 16, 3, 2, 1, 1, "gather"),
    "1x1 stride 2": (3, 8, 6, 16, 24, 1, 2, 0, 1, "packed"),
    "7x7 stride 2, 3 channels": (2, 8, 7, 3, 8, 7, 2, 3, 1, "gather"),
    "7x7 stride 2, 16 channels": (2, 8, 8, 16, 16, 7, 2, 3, 1, "packed"),
    "5x5 dilation 2": (2, 8, 6, 16, 8, 5, 1, 4, 2, "packed gather"),
    "3x3 stride 2 dilation 2": (2, 8, 8, 16, 16, 3, 2, 2, 2, "gather"),
    "odd channels": (2, 6, 6, 5, 7, 3, 1, 1, 1, "gather"),
    "1x1 padded": (2, 4, 4, 16, 16, 1, 1, 1, 1, "box"),
    "default tiles": (2, 6, 6, 32, 32, 3, 2, 1, 1, "default"),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``convolution``: sizes and tiles of every kind of convolution."""
    if "convolution" in metafunc.fixturenames:
        cases = []
        for name, (*sizes, filter_, stride, padding, dilation, tiles) in _CONVS.items():
            pairs = [(n, n) for n in (filter_, stride, padding, dilation)]
            cases += [
                pytest.param(((*sizes, *pairs), _TILES[tile]), id=f"{name}-{tile}")
                for tile in tiles.split()
            ]
        metafunc.parametrize("convolution", cases)


@pytest.fixture
def tiles() -> dict[str, GemmConfig | None]:
    """Small tiles of every kind; None for the default."""
    return _TILES
