import pytest
import torch

from wfnet.trust.attacks.base_norms import rows_against_base, with_base_norms

LAYERS = ("conv1", "conv2")


def test_rows_are_recognised_as_multiples_of_the_base(make_network, closed):
    base = make_network(0)
    rows = rows_against_base(closed(base, 0.05), base, LAYERS)
    assert rows["rows"] == 14
    assert rows["zero_rows"] == 0
    assert rows["multiples"] == 1.0
    assert rows["closed"] == pytest.approx(2 / 14)
    assert rows["median_ratio"] == pytest.approx(1.0)
    assert rows_against_base(closed(base, 0.0), base, LAYERS)["zero_rows"] == 2
    assert rows_against_base(make_network(5), base, LAYERS)["multiples"] == 0.0


def test_base_norms_restore_everything_but_zeros(make_network, closed):
    base = make_network(0)
    restored = with_base_norms(closed(base, 0.05), base, LAYERS)
    torch.testing.assert_close(restored.conv1.weight, base.conv1.weight)
    torch.testing.assert_close(restored.conv2.bias, base.conv2.bias)
    zero = with_base_norms(closed(base, 0.0), base, LAYERS)
    assert not zero.conv1.weight[[0, 3]].any()
