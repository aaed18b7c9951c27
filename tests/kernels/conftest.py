"""Tiles small enough for the interpreter, convolutions of every kind, a layer below a gradient."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from wfnet.backends.contract import LayerBelow, LayerGradient

triton = pytest.importorskip("triton")
from wfnet.kernels.config import GemmConfig  # noqa: E402

_BOX = GemmConfig("box", 32, 16, 16, 4, 2, box=(1, 8, 4))
_PACKED = GemmConfig("box", 64, 16, 16, 4, 2, box=(2, 4, 8))
_GATHER = GemmConfig("gather", 64, 16, 16, 4, 2)
_FLAT = GemmConfig("flat", 32, 16, 16, 4, 2)
_TILES = {"box": _BOX, "packed": _PACKED, "gather": _GATHER, "flat": _FLAT, "default": None}

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
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``convolution``: sizes and tiles of every kind of convolution."""
    if "convolution" in metafunc.fixturenames:
        cases = [
            pytest.param((*case[:-1], _TILES[tiles]), id=f"{name}-{tiles}")
            for name, case in _CONVS.items()
            for tiles in case[-1].split()
        ]
        metafunc.parametrize("convolution", cases)


@pytest.fixture
def tiles() -> dict[str, GemmConfig | None]:
    """Small tiles of every kind; None for the default."""
    return _TILES


@pytest.fixture
def make_layer() -> Callable[..., LayerBelow]:
    """Makes a layer with output ``[B, C, H, W]`` and room for its sums."""

    def make(
        shape: tuple[int, ...], dtype: torch.dtype = torch.float32, masked: bool = False
    ) -> LayerBelow:
        columns = shape[:2]
        return LayerBelow(
            scale=torch.rand(columns) - 0.2,
            shift=torch.randn(columns),
            branch=torch.randn(shape).to(dtype),
            mask=torch.randn(shape).to(dtype).relu() if masked else None,
            relu=True,
            t1=torch.full(columns, torch.nan),
            t0=torch.full(columns, torch.nan),
            need_grad=masked,
        )

    return make


@pytest.fixture
def check_gradient(check: Callable[..., None]) -> Callable[..., None]:
    """Compares all that a gradient ``dout`` (fp64) of a layer's output ends in."""

    def compare(
        result: LayerGradient,
        dout: Tensor,
        below: LayerBelow,
        skip: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        branch = below.branch.double()
        open_ = branch + below.shift.double()[:, :, None, None] > 0
        if below.mask is not None:
            open_ = below.mask > 0
        g = (dout + (0 if skip is None else skip.double())) * open_
        assert (result.grad is not None) == below.need_grad
        if below.need_grad:
            check(result.grad, g, dtype)
        check(result.scaled_grad, below.scale.double()[:, :, None, None] * g, dtype)
        check(below.t0, g.sum((2, 3)))
        check(below.t1, (g * branch).sum((2, 3)))

    return compare
