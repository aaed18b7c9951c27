import torch

from wfnet.trust.attacks.equalised_rows import equalised


def test_rows_have_the_median_norm(make_network, closed):
    model = closed(make_network(0), 0.0)
    found = equalised(model, ("conv1", "conv2"))
    norms = found.conv1.weight.flatten(1).norm(dim=1)
    kept = [1, 2, 4, 5]
    expected = model.conv1.weight[kept].flatten(1).norm(dim=1).median()
    torch.testing.assert_close(norms[kept], expected.expand(4))
    assert not norms[[0, 3]].any()
    scale = found.conv2.weight.flatten(1).norm(dim=1) / model.conv2.weight.flatten(1).norm(dim=1)
    torch.testing.assert_close(found.conv2.bias, model.conv2.bias * scale)
