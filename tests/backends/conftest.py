"""What both kernel backends promise: a whole fused network, and a graph without breaks."""

import contextlib
from collections.abc import Callable

import pytest
import torch

import wfnet
import wfnet.functional as wf


class Blocks(torch.nn.Module):
    """A stem with a pooling, a bottleneck with a projection shortcut, a pooling, an identity block.

    Channels of 40 and 72 fill neither a slice of 64 nor a tile; ``size`` and strides leave rests.
    With ``wide`` the identity block has two convolutions, and so many channels between them; with
    ``norms`` the bottleneck has norms.
    """

    def __init__(self, bias: bool, stride: int, pool: int, wide: int, norms: bool):
        super().__init__()

        def conv(*sizes, **options):
            return torch.nn.Conv2d(*sizes, **options, bias=bias)

        def folded(*sizes, **options):
            made = conv(*sizes, **options)
            return torch.nn.Sequential(made, torch.nn.BatchNorm2d(sizes[1])) if norms else made

        self.stem, self.norm = conv(3, 40, 3, padding=1), torch.nn.BatchNorm2d(40)
        self.first = torch.nn.MaxPool2d(3, 2, 1) if pool == 3 else torch.nn.MaxPool2d(2)
        self.reduce, self.middle = folded(40, 32, 1), folded(32, 40, 3, stride=stride, padding=1)
        self.grow, self.project = folded(40, 72, 1), folded(40, 72, 1, stride=stride)
        self.last, self.head = conv(72, 72, 3, padding=1), torch.nn.Linear(72, 5)
        if wide:
            ends = conv(72, wide, 3, padding=1), conv(wide, 72, 3, padding=1)
            self.last = torch.nn.Sequential(ends[0], torch.nn.ReLU(), ends[1])

    def forward(self, x):
        x = self.first(self.norm(self.stem(x)).relu())
        x = (self.grow(self.middle(self.reduce(x).relu()).relu()) + self.project(x)).relu()
        x = (self.last(x) + x).relu()
        return self.head(x.mean((2, 3)))


# The least bound of a relative error: roundings of sums in another order.
_FLOOR = {torch.float32: 2e-5, torch.float16: 0.0}


@pytest.fixture
def check_fused_network() -> Callable[..., Callable[[], bool]]:
    """Compares a fused network with the unfused one in fp64; the bound is twice eager's error.

    ``durable``: it is one with durable gates, in untraining: their tables are moments of groups.
    Returns a function that says whether the bits of another run are the same.
    """

    def check(
        backend: str,
        dtype: torch.dtype,
        bias: bool,
        stride: int,
        pool: int,
        size: tuple[int, int],
        wide: int = 0,
        durable: bool = False,
    ) -> Callable[[], bool]:
        model = Blocks(bias, stride, pool, wide, norms=durable).eval()
        model.norm.running_mean.normal_()
        model.norm.running_var.uniform_(0.5, 1.5)
        images, source = torch.randn(2, 3, *size), torch.tensor([0, 1, 1])
        labels, weights = torch.tensor([[0, 3], [4, -1], [2, 2]]), torch.randn(3, 5)
        nets = {}
        for name in (backend, "eager", "reference"):
            torch.manual_seed(1)
            options = {"gate": "durable"} if durable else {}
            nets[name] = wfnet.WFNet(model, 5, backend=name, fuse=name != "reference", **options)
            for parameter in nets[name].filter_parameters():
                parameter.data.normal_(1, 2)

        def run(name: str, kind: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
            net, rows, around = nets[name].to(kind), labels, contextlib.nullcontext()
            if durable:
                rows, generator = torch.tensor([3, 0, 3]), torch.Generator().manual_seed(2)
                noise = {
                    layer: torch.rand((2, m.alpha_hard.shape[1]), generator=generator).to(kind)
                    for layer, m in net.masked_layers.items()
                }
                around = net.gate_mode.grouped(rows, noise)
            with torch.autocast("cpu", dtype, enabled=torch.float32 == kind != dtype), around:
                out = net(images.to(kind), rows, source)
            found = torch.autograd.grad(out, net.filter_parameters(), weights.to(out.dtype))
            return out.detach(), torch.cat([g.flatten() for g in found])

        def error(result: torch.Tensor, truth: torch.Tensor) -> float:
            return ((result.double() - truth).norm() / truth.norm()).item()

        exact, mine, eager = run("reference", torch.float64), run(backend), run("eager")
        assert nets[backend]._fusion.network is not None, "the network runs unfused"
        for result, theirs, truth in zip(mine, eager, exact, strict=True):
            assert error(result, truth) <= max(2 * error(theirs, truth), _FLOOR[dtype])
        return lambda: all(torch.equal(a, b) for a, b in zip(run(backend), mine, strict=True))

    return check


@pytest.fixture
def check_one_graph() -> Callable[..., None]:
    """torch.compile(fullgraph=True): refusals and operators trace; new labels do not recompile."""

    def check(backend: str, dtype: torch.dtype) -> None:
        x, weight = torch.randn(2, 40, 4, 4).to(dtype), torch.randn(40, 40, 3, 3).to(dtype) / 19
        alpha = torch.randn(5, 40, requires_grad=True)
        traces = []

        def counting(graph, inputs):
            traces.append(graph)
            return graph.forward

        def call(forget):
            return wf.wf_conv2d(x, weight, None, alpha, None, forget, 1, 1, backend=backend)

        call(torch.tensor([0, 0]))
        compiled = torch.compile(call, fullgraph=True, backend=counting)
        for labels in ([0, 1], [4, -1]):
            forget = torch.tensor(labels)
            assert torch.equal(compiled(forget), call(forget))
        assert len(traces) == 1

    return check
