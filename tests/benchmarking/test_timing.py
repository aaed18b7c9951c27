import pytest
import torch

from wfnet.benchmarking.timing import kernels_of, peak_mebibytes

CPU = torch.device("cpu")


def test_peak_is_what_a_call_holds_at_once():
    def call():
        one = torch.zeros(2**18)
        del one
        two = torch.zeros(2**19)
        return two + torch.zeros(2**19)

    assert peak_mebibytes(call, CPU) == pytest.approx(6, abs=0.1)
    assert kernels_of(call, CPU) is None
