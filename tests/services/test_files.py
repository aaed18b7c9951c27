import importlib

import torch
from safetensors.torch import load_file
from torch import nn

from wfnet.services.files import code_digest, fingerprint, write_tensors


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


def test_the_digest_of_code_is_of_what_it_does(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)

    def digest(name, text):
        (tmp_path / f"{name}.py").write_text(text)
        importlib.import_module(name)
        return code_digest([name])

    first = digest("measure_a", "def f(x):\n    return x + 1\n")
    assert (
        digest("measure_b", '"""Why."""\ndef f(x):  # how\n    """One more."""\n    return x+1')
        == first
    )
    assert digest("measure_c", "def f(x):\n    return x + 2\n") != first
