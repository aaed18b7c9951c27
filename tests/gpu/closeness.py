"""How close kernels come to the truth, and to what PyTorch's own operations make of the same."""

from __future__ import annotations

from torch import Tensor


def relative_error(result: Tensor, truth: Tensor) -> float:
    """Of the norm; ``truth`` is fp64."""
    difference = (result.double() - truth).norm() / truth.norm().clamp_min(1e-30)
    return difference.item()


def assert_as_good(
    result: Tensor, theirs: Tensor, truth: Tensor, what: str, floor: float = 0.0
) -> None:
    """At most twice the error of ``theirs``, or ``floor``: a few roundings of fp32 sums."""
    assert_within(result, truth, what, max(2 * relative_error(theirs, truth), floor))


def assert_within(result: Tensor, truth: Tensor, what: str, limit: float) -> None:
    """At most ``limit``."""
    error = relative_error(result, truth)
    assert error <= limit, f"{what}: error {error:.2e}, bound {limit:.2e}"
