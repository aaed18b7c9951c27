"""csrc/ on the emulated device."""

from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def inspection(emulated_module) -> ModuleType:
    """Module of inspection.cpp: what tests look at beside the kernels' results."""
    return emulated_module("inspection", [Path(__file__).parent / "inspection.cpp"])
