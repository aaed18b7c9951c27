import pytest
import torch

from wfnet.services.peak_memory import peak_bytes


def test_peak_is_what_a_call_holds_at_once():
    def call():
        one = torch.zeros(2**18)
        del one
        two = torch.zeros(2**19)
        return two + torch.zeros(2**19)

    assert peak_bytes(call, torch.device("cpu")) == pytest.approx(6 * 2**20, rel=0.02)
