"""How close kernels come to the truth, and to what PyTorch's own operations make of the same.

Every comparison is noted before it is judged: conftest.py puts a test's comparisons into its report
(the junit XML).
"""

from __future__ import annotations

import math

from torch import Tensor

# Of the test that runs: what, error, eager's error or None, limit, whether it passed.
noted: list[dict[str, object]] = []


def relative_error(result: Tensor, truth: Tensor) -> float:
    """Of the norm; ``truth`` is fp64."""
    difference = (result.double() - truth).norm() / truth.norm().clamp_min(1e-30)
    return difference.item()


def assert_as_good(
    result: Tensor, theirs: Tensor, truth: Tensor, what: str, floor: float = 0.0
) -> None:
    """At most twice the error of ``theirs``, or ``floor``: a few roundings of fp32 sums."""
    eager = relative_error(theirs, truth)
    _judge(what, relative_error(result, truth), eager, max(2 * eager, floor))


def assert_within(result: Tensor, truth: Tensor, what: str, limit: float) -> None:
    """At most ``limit``."""
    _judge(what, relative_error(result, truth), None, limit)


def _judge(what: str, error: float, eager: float | None, limit: float) -> None:
    passed = error <= limit
    noted.append({
        "what": what,
        "error": _finite(error),
        "eager": None if eager is None else _finite(eager),
        "limit": _finite(limit),
        "passed": passed,
    })  # fmt: skip
    assert passed, f"{what}: error {error:.2e}, bound {limit:.2e}"


def _finite(error: float) -> float | None:
    """None for what JSON has no word for."""
    return error if math.isfinite(error) else None
