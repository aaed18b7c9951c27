import torch
from safetensors.torch import load_file
from torch import nn

from wfnet.services.files import fingerprint, write_tensors


def test_tensors_that_share_memory_are_written_under_each_name(tmp_path):
    shared = torch.arange(6.0).view(2, 3)
    write_tensors(tmp_path / "a.safetensors", {"a": shared, "b": shared, "c": shared[1]})
    found = load_file(tmp_path / "a.safetensors")
    torch.testing.assert_close(found, {"a": shared, "b": shared, "c": shared[1]})


def test_the_fingerprint_is_that_of_the_network_in_any_wrapper():
    network = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    expected = fingerprint(network)
    assert fingerprint(nn.DataParallel(torch.compile(network))) == expected
    network[0] = torch.compile(network[0])
    assert fingerprint(network) == expected
    with torch.no_grad():
        network[1].running_mean += 1
    assert fingerprint(network) != expected
