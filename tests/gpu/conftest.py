"""Puts the errors that a test measured into its report."""

from __future__ import annotations

import json
from collections.abc import Iterator

import closeness
import pytest
import torch

BACKENDS = {"test_triton_gpu": "triton", "test_cuda_gpu": "cuda"}


@pytest.fixture(autouse=True)
def errors_in_the_report(request: pytest.FixtureRequest, record_property) -> Iterator[None]:
    """A property ``numerics``: whose errors they are, and all comparisons of the test.

    Tests without a dtype of their own run in bf16.
    """
    closeness.noted.clear()
    yield
    if not closeness.noted:
        return
    parameters = getattr(getattr(request.node, "callspec", None), "params", {})
    dtype = str(parameters.get("dtype", torch.bfloat16)).removeprefix("torch.")
    if parameters.get("tf32") and dtype == "float32":
        dtype = "tf32"
    about = {
        "backend": BACKENDS.get(request.module.__name__) or parameters["backend"],
        "kernels": parameters.get("path"),
        "dtype": dtype,
        "comparisons": closeness.noted,
    }
    record_property("numerics", json.dumps(about))
