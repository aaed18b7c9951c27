"""CUDA kernels on the emulated device (csrc/emulation.h): the kernel source, thread by thread."""

import cuda_modules
import numpy as np
import pytest


@pytest.fixture(scope="module")
def faults():
    return cuda_modules.emulated("faults", "tests/cuda/faults.cpp")


def aligned(count):
    """``[count]`` uint32 on a 16-byte boundary."""
    raw = np.zeros(count + 4, np.uint32)
    start = -raw.ctypes.data % 16 // 4
    return raw[start : start + count]


def run_fault(faults, name, seed=0, completion=0):
    source, target = aligned(128), aligned(128)
    source[:] = np.arange(128)
    counts = faults.run(name, source.ctypes.data, target.ctypes.data, seed, completion)
    return target, counts


@pytest.mark.parametrize("completion", [0, 1, 2], ids=["late", "early", "random"])
@pytest.mark.parametrize("seed", [0, 1])
def test_correct_kernels_run_in_any_order(faults, seed, completion):
    exchanged, counts = run_fault(faults, "exchange", seed, completion)
    assert list(exchanged[:64]) == list(range(63, -1, -1))
    assert counts == (4, 4)
    copied, _ = run_fault(faults, "copy", seed, completion)
    expected = np.arange(64)
    expected[28:32] = 0  # an invalid copy fills with zeros
    assert list(copied[:64]) == list(expected)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing barrier", "race on shared byte"),
        ("missing wait", "copy in flight"),
        ("reads outside", "outside of registered global memory"),
        ("writes input", "write of 4 bytes outside"),
        ("writes twice", "byte 0 of output is written twice"),
        ("shared outside", r"shared bytes \[1024, 1028\) of 1024"),
        ("misaligned", "not aligned to 16"),
        ("deadlock", "32 threads .first 0. wait at sync_block"),
        ("diverged", "shuffle_xor while others of its group are at sync_warp"),
    ],
)
def test_emulation_names_faults(faults, name, message):
    with pytest.raises(RuntimeError, match=message):
        run_fault(faults, name, seed=3)


def test_shared_memory_starts_as_nan(faults):
    target, _ = run_fault(faults, "uninitialised")
    assert np.isnan(target[:64].view(np.float32)).all()


def test_bank_conflicts_are_counted(faults):
    _, (ideal, passes) = run_fault(faults, "conflicting")
    assert (ideal, passes) == (1, 8)
