"""The emulated module of the Hopper kernels, and convolutions in its terms."""

from dataclasses import dataclass, field, replace

import cuda_modules


def sm90():
    """Module of tests/cuda/sm90.cpp, built once."""
    return cuda_modules.emulated(
        "sm90", "tests/cuda/sm90.cpp", "csrc/sm90_gemm.cu", "csrc/sm90_bindings.cpp"
    )


@dataclass(frozen=True)
class Conv:
    """Sizes of a convolution; ``native`` is the same for the extension."""

    batch: int
    height: int
    width: int
    in_channels: int
    out_channels: int
    filter: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    pad: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    native: object = field(default=None, compare=False, repr=False)

    @property
    def out_height(self) -> int:
        return self.native.out_height

    @property
    def out_width(self) -> int:
        return self.native.out_width

    def sizes(self) -> dict:
        """The arguments of the kernels' Python functions that say what is convolved."""
        height, width = (
            (size, out, *axis)
            for size, out, *axis in zip(
                (self.height, self.width),
                (self.out_height, self.out_width),
                self.filter,
                self.stride,
                self.pad,
                self.dilation,
                strict=True,
            )
        )
        channels = {"in_channels": self.in_channels, "out_channels": self.out_channels}
        return {"batch": self.batch, **channels, "height": height, "width": width}


def convolution(*sizes) -> Conv:
    """A convolution of these sizes, in the order of :class:`Conv`'s fields."""
    plain = Conv(*sizes)
    native = sm90().Convolution(
        plain.batch,
        plain.height,
        plain.width,
        plain.in_channels,
        plain.out_channels,
        plain.filter,
        plain.stride,
        plain.pad,
        plain.dilation,
    )
    return replace(plain, native=native)
