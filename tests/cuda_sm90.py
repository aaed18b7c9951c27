"""The emulated module of the Hopper kernels, and convolutions in its terms."""

import functools
from dataclasses import dataclass
from types import ModuleType

import cuda_modules


def sm90() -> ModuleType:
    """Module of tests/cuda/sm90.cpp, built once."""
    return cuda_modules.emulated(
        "sm90", "tests/cuda/sm90.cpp", "csrc/sm90_gemm.cu", "csrc/sm90_bindings.cpp"
    )


@dataclass(frozen=True)
class Conv:
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

    @functools.cached_property
    def native(self) -> object:
        """The same for the module."""
        sizes = (self.batch, self.height, self.width, self.in_channels, self.out_channels)
        return sm90().Convolution(*sizes, self.filter, self.stride, self.pad, self.dilation)

    def _out(self, axis: int) -> int:
        reach = (self.height, self.width)[axis] + 2 * self.pad[axis]
        return (reach - self.dilation[axis] * (self.filter[axis] - 1) - 1) // self.stride[axis] + 1

    @property
    def out_height(self) -> int:
        return self._out(0)

    @property
    def out_width(self) -> int:
        return self._out(1)

    def sizes(self) -> dict:
        """The arguments of the kernels' Python functions that say what is convolved."""
        height, width = (
            (size, self._out(axis), *(pair[axis] for pair in self._pairs()))
            for axis, size in enumerate((self.height, self.width))
        )
        channels = {"in_channels": self.in_channels, "out_channels": self.out_channels}
        return {"batch": self.batch, **channels, "height": height, "width": width}

    def _pairs(self) -> tuple[tuple[int, int], ...]:
        return self.filter, self.stride, self.pad, self.dilation
