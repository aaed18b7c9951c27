"""cuDNN's graphs: what they say, by the real package; what they are given, by one that computes."""

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from wfnet.backends import cudnn_graph, mixed
from wfnet.backends.contract import ConvGeometry, Epilogue

GEOMETRY = ConvGeometry((2, 1), (1, 0))


def operands(dtype=torch.bfloat16, shift=True, residual=True):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, dtype=dtype):
        t = torch.randn(shape, generator=generator).to(dtype)
        return t.to(memory_format=torch.channels_last) if t.dim() == 4 else t

    x, weight = draw(3, 16, 9, 7), draw(24, 16, 3, 1)
    tables = draw(3, 60, dtype=torch.float32)  # columns of a wider matrix
    more = {"shift": tables[:, 30:54]} if shift else {}
    more |= {"residual": draw(3, 24, 5, 7)} if residual else {}
    return x, weight, {"scale": tables[:, 2:26], **more}


class Node:
    """A value of a graph: a function of the buffers that it is executed with."""

    def __init__(self, value=None):
        self.value = value or (lambda buffers: buffers[self].float())

    set_output = set_data_type = set_dim = set_stride = lambda self, _: self


class Computing:
    """A graph that computes when it is executed."""

    def __init__(self, handle, **precisions):
        self.tensor = lambda **described: Node()
        self.build = lambda heuristics: None
        self.get_workspace_size = lambda: 16

    def conv_fprop(self, image, weight, **how):
        return Node(lambda b: F.conv2d(image.value(b), weight.value(b), None, **how))

    def mul(self, a, b):
        return Node(lambda buffers: a.value(buffers) * b.value(buffers))

    def add(self, a, b):
        return Node(lambda buffers: a.value(buffers) + b.value(buffers))

    def relu(self, a):
        return Node(lambda buffers: a.value(buffers).relu())

    def execute(self, buffers, workspace, handle):
        for node, t in buffers.items():
            if t.isnan().any():  # a result
                t.copy_(node.value(buffers))


@pytest.fixture
def computing(pretended_device, nan_memory, monkeypatch):
    """The graphs that were made."""
    made = []
    fake = SimpleNamespace(
        data_type=SimpleNamespace(FLOAT=0, HALF=1, BFLOAT16=2),
        heur_mode=SimpleNamespace(A="A", FALLBACK="FALLBACK"),
        create_handle=lambda: "handle",
        set_stream=lambda handle, stream: None,
        pygraph=lambda **options: made.append(Computing(**options)) or made[-1],
    )
    monkeypatch.setattr(cudnn_graph, "require", lambda *_: fake)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: SimpleNamespace(cuda_stream=0))
    return made


@pytest.mark.parametrize(
    ("shift", "residual", "relu", "save"),
    [(True, True, True, True), (True, False, True, False), (False, False, False, True)],
)
def test_a_graph_is_given_what_it_describes(computing, monkeypatch, shift, residual, relu, save):
    x, weight, more = operands(shift=shift, residual=residual)
    epilogue = Epilogue(**more, relu=relu, save=save)
    backend = cudnn_graph.CudnnGraph()
    found = backend.conv2d(x, weight, GEOMETRY, epilogue)
    truth = mixed.MixedEager().conv2d(x, weight, GEOMETRY, epilogue)
    assert (found.branch is None) == (not save)
    assert (found.mask is found.out) == (residual and relu and save)
    for mine, expected in zip(found[:2], truth[:2], strict=True):
        if expected is not None:
            assert mine.dtype == expected.dtype
            torch.testing.assert_close(mine, expected, rtol=2e-2, atol=5e-2)
    monkeypatch.setattr(cudnn_graph, "_MOST_BATCHES", 2)
    for batch in (3, 2, 1, 2):
        few = {n: t[:batch] for n, t in more.items()}
        again = backend.conv2d(x[:batch], weight, GEOMETRY, Epilogue(**few, relu=relu, save=save))
        torch.testing.assert_close(again.out, truth.out[:batch], rtol=2e-2, atol=5e-2)
    assert len(computing) == 2, "once for each size, and the third one by PyTorch"


def test_what_it_does_not_take_is_refused(pretended_device):
    x, weight, _ = operands()
    refuse = cudnn_graph.CudnnGraph().refuse_conv2d
    x, weight = x.cuda(), weight.cuda()
    assert refuse(x, weight, GEOMETRY) is None
    assert "16-bit" in refuse(x.float(), weight.float(), GEOMETRY)
    assert "multiples of 8" in refuse(x[:, :3], weight[:, :3], GEOMETRY)


# What cuDNN asks of a device; numbers of an H200.
H200 = {
    **{"deviceName": "NVIDIA H200", "deviceVer": 900, "driverVer": 13000, "cudaDeviceId": 0},
    **{"maxGridSize": [2**31 - 1, 65535, 65535], "maxBlockSize": [1024, 1024, 64]},
    **{"regsPerBlock": 65536, "multiProcessorCount": 132, "smClockRateKHz": 1980000},
    **{"memClockRateKHz": 3201000, "l2CacheSize": 62914560, "warpSize": 32},
    **{"maxSharedMemoryPerBlock": 49152, "maxSharedMemoryPerBlockOptin": 232448},
    **{"reservedSharedMemoryPerBlock": 1024, "maxRegistersPerSM": 65536, "pciDeviceId": 0},
    **{"maxCtasPerSM": 32, "maxThreadsPerBlock": 1024, "maxThreadsPerSM": 2048},
    **{"isTccDriver": 0, "supportCoopLaunch": 1, "totalGlobalMem": 150 * 10**9},
}


@pytest.mark.parametrize("save", [True, False])
def test_cudnn_accepts_the_graph(save):
    """As an operation graph of its own; plans need a driver."""
    cudnn = pytest.importorskip("cudnn")
    try:
        device = cudnn.create_device_properties(json.dumps(H200))
    except RuntimeError as error:
        pytest.skip(f"cuDNN cannot be loaded: {error}")
    x, weight, more = operands()
    tables = {n: cudnn_graph.channels_last(t) for n, t in more.items()}
    out = torch.empty_like(more["residual"])
    results = {"branch": out, "out": out} if save else {"out": out}
    graph = cudnn.pygraph(device_property=device, **cudnn_graph.precisions(cudnn))
    given = {"x": x, "weight": weight, **tables, **results}
    tensors = cudnn_graph.describe(graph, cudnn, given, GEOMETRY, True)
    graph.validate()
    graph.build_operation_graph()
    for name in results:
        assert list(tensors[name].get_dim()) == list(out.shape)
        assert tensors[name].get_data_type() == cudnn.data_type.BFLOAT16
