"""csrc/ on the emulated device."""

from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def inspection(emulated_module) -> ModuleType:
    """Module of inspection.cpp: what tests look at beside the kernels' results."""
    return emulated_module("inspection", [Path(__file__).parent / "inspection.cpp"])


@pytest.fixture
def poisoned():
    """Fresh memory is NaN: a kernel that forgets an element fails."""
    import torch

    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(False)
