"""Backend ``cuda`` as a whole: compiled kernels on the emulated device, Triton's interpreted.

Not collected by name: ``test_cuda.py`` runs this file in a process of its own, because Triton's
kernels must be decorated with TRITON_INTERPRET=1 set. Its bf16 products are wrong: all is fp16.
"""

import pytest
import torch
import torch.nn.functional as F

import wfnet
import wfnet.functional as wf
from wfnet.backends import cuda, cuda_launch
from wfnet.backends.contract import ConvGeometry, Epilogue, LayerBelow

TOLERANCE = 4e-4  # roundings to fp16
torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures("emulated_cuda", "exact_interpreter")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def launched(monkeypatch):
    """Names of the compiled kernels that were launched."""
    names, launch = [], cuda_launch._launch

    def record(function, *arguments, **numbers):
        names.append(function)
        launch(function, *arguments, **numbers)

    monkeypatch.setattr(cuda_launch, "_launch", record)
    return names


def check(result, truth, tolerance=TOLERANCE):
    error = (result.double() - truth).norm() / truth.norm()
    assert error < tolerance, f"relative error {error:.1e}"


def operands(n, c, o, size, kernel):
    x = torch.randn(n, c, *size).half()
    weight = (torch.randn(o, c, kernel, kernel) / (c * kernel * kernel) ** 0.5).half()
    return x, weight, torch.rand(n, o) + 0.5, torch.randn(n, o)


@pytest.mark.parametrize(("stride", "kernel"), [(1, 3), (2, 3), (2, 1), (1, 1)])
@pytest.mark.parametrize("shortcut", [False, True], ids=["", "shortcut"])
def test_a_layer_and_the_chain_below_it(launched, stride, kernel, shortcut):
    """Tables and sums that are columns of wider ones; a projection shortcut of the layer below."""
    geometry = ConvGeometry((stride, stride), (kernel // 2,) * 2)
    x, weight, scale, shift = operands(3, 40, 72, (9, 8), kernel)
    u = F.conv2d(x.double(), weight.double(), None, stride, kernel // 2)
    residual = torch.randn(u.shape).half()
    epilogue = Epilogue(scale, shift, residual, relu=True, save=True)
    out, branch, mask = cuda.backend.conv2d(x, weight, geometry, epilogue)
    v = u * scale[:, :, None, None]
    check(branch, v)
    check(out, (v.half().double() + shift[:, :, None, None] + residual.double()).relu())
    assert mask is out

    ag, skip, below_v = (torch.randn(s).half() for s in (u.shape, x.shape, x.shape))
    tables, sums = torch.rand(3, 80), torch.full((3, 80), float("nan"))
    tables[:, 40:] = torch.randn(3, 40)
    other = None
    if shortcut:
        t1, t0 = torch.full((2, 3, 40), float("nan")).unbind()
        other_v, other_scale = torch.randn(x.shape).half(), torch.rand(3, 40)
        other = LayerBelow(other_scale, torch.rand(3, 40), branch=other_v, t1=t1, t0=t0)
    below = LayerBelow(
        branch=below_v,
        scale=tables[:, :40],
        shift=tables[:, 40:],
        relu=True,
        t1=sums[:, :40],
        t0=sums[:, 40:],
        need_grad=not shortcut,
        shortcut=other,
    )
    done = cuda.backend.conv2d_dgrad(ag, weight, tuple(x.shape), geometry, skip, below)
    dx = torch.nn.grad.conv2d_input(x.shape, weight.double(), ag.double(), stride, kernel // 2)
    g = (dx + skip.double()) * (below_v.float() + tables[:, 40:, None, None] > 0)
    check(done.scaled_grad, g * tables[:, :40, None, None])
    check(sums[:, 40:], g.sum((2, 3)))
    check(sums[:, :40], (g * below_v.double()).sum((2, 3)))
    if shortcut:
        assert done.grad is None
        check(done.shortcut, g * other_scale[:, :, None, None])
        check(t1, (g * other_v.double()).sum((2, 3)))
        check(t0, g.sum((2, 3)))
    else:
        check(done.grad, g)
    assert launched == ["fprop", "dgrad"]


# name: channels, columns, filter, stride, expanded, compiled kernels forward and backward
LAYERS = {
    "3x3": (40, 72, 3, 1, False, ["fprop", "dgrad"]),
    "3x3, stride 2": (40, 40, 3, 2, False, ["fprop", "dgrad"]),
    "label expansion": (40, 40, 3, 1, True, ["dgrad"]),
    "a stem": (3, 40, 3, 2, False, []),
    "ragged columns": (40, 12, 3, 1, False, []),
    "stride 3": (40, 40, 3, 3, False, ["fprop"]),
    "patches": (3, 32, 4, 4, False, []),
}


@pytest.mark.parametrize("name", LAYERS)
def test_masked_convolution(launched, name):
    """Through the operator, against fp64 and eager; what the kernels refuse, Triton runs."""
    channels, columns, kernel, stride, expanded, names = LAYERS[name]
    source = torch.tensor([0, 2, 2, 0]) if expanded else None
    x = torch.randn(3, channels, 9, 8).half()
    weight = (torch.randn(columns, channels, kernel, kernel) / (channels**0.5 * kernel)).half()
    bias, alpha = torch.randn(columns).half(), torch.randn(2, 5, columns)
    forget = torch.tensor([[0, 3], [4, -1], [2, 2], [-1, -1]])[: 4 if expanded else 3]
    dout = None

    def run(backend, kind):
        nonlocal dout
        table = torch.float64 if kind == torch.float64 else torch.float32
        leaves = [x.to(kind), alpha[0].to(table), alpha[1].to(table)]
        leaves = [t.clone().requires_grad_() for t in leaves]
        y = wf.wf_conv2d(
            leaves[0],
            weight.to(kind),
            bias.to(kind),
            *leaves[1:],
            forget,
            stride=stride,
            padding=0 if kernel == stride else kernel // 2,
            gate_scale=1.05,
            source=source,
            backend=backend,
        )
        dout = torch.randn(y.shape).half() if dout is None else dout
        return y, *torch.autograd.grad(y, leaves, dout.to(kind))

    mine, eager = run("cuda", torch.float16), run("eager", torch.float16)
    assert launched == names
    for result, theirs, truth in zip(mine, eager, run("reference", torch.float64), strict=True):
        bound = 2 * ((theirs.double() - truth).norm() / truth.norm()).item()
        check(result, truth, max(bound, 3e-6))


@pytest.mark.parametrize("tokens", [1, 13])
@pytest.mark.parametrize("expanded", [False, True])
def test_masked_linear_map(launched, tokens, expanded):
    x, weight = torch.randn(2, tokens, 40).half(), (torch.randn(72, 40) / 6).half()
    alpha, source = torch.randn(5, 72), torch.tensor([1, 0, 1]) if expanded else None
    forget = torch.tensor([0, 4, -1])[: 3 if expanded else 2]
    dout = torch.randn(len(forget), tokens, 72).half()

    def run(backend, kind):
        table = torch.float64 if kind == torch.float64 else torch.float32
        leaves = [x.to(kind).clone().requires_grad_(), alpha.to(table).clone().requires_grad_()]
        y = wf.wf_linear(
            leaves[0],
            weight.to(kind),
            None,
            leaves[1],
            None,
            forget,
            source=source,
            backend=backend,
        )
        return y, *torch.autograd.grad(y, leaves, dout.to(kind))

    mine, eager = run("cuda", torch.float16), run("eager", torch.float16)
    assert launched == (["dgrad"] if expanded else ["fprop", "dgrad"])
    for result, theirs, truth in zip(mine, eager, run("reference", torch.float64), strict=True):
        bound = 2 * ((theirs.double() - truth).norm() / truth.norm()).item()
        check(result, truth, max(bound, 3e-6))


class Blocks(torch.nn.Module):
    """A stem with a pooling, a bottleneck with a projection shortcut, a pooling, an identity block.

    Channels of 40 and 72 fill neither a slice of 64 nor a tile; ``size`` and strides leave rests.
    """

    def __init__(self, bias: bool, stride: int, pool: int):
        super().__init__()

        def conv(*sizes, **options):
            return torch.nn.Conv2d(*sizes, **options, bias=bias)

        self.stem, self.norm = conv(3, 40, 3, padding=1), torch.nn.BatchNorm2d(40)
        self.first = torch.nn.MaxPool2d(3, 2, 1) if pool == 3 else torch.nn.MaxPool2d(2)
        self.reduce, self.middle = conv(40, 32, 1), conv(32, 40, 3, stride=stride, padding=1)
        self.grow, self.project = conv(40, 72, 1), conv(40, 72, 1, stride=stride)
        self.last, self.head = conv(72, 72, 3, padding=1), torch.nn.Linear(72, 5)

    def forward(self, x):
        x = self.first(self.norm(self.stem(x)).relu())
        x = (self.grow(self.middle(self.reduce(x).relu()).relu()) + self.project(x)).relu()
        x = (self.last(x) + x).relu()
        return self.head(x.mean((2, 3)))


# bias, stride of the bottleneck, filter of the pooling, height and width
NETWORKS = {
    "bias, 3x3/2": (True, 2, 2, (12, 8)),
    "no bias, odd sizes, 3x3 pooling": (False, 2, 3, (13, 9)),
    "bias, stride 1, odd sizes": (True, 1, 3, (7, 11)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_fused_network(emulated_cuda, launched, name):
    """All of a chain on both devices against the unfused network in fp64; the bits repeat."""
    *how, size = NETWORKS[name]
    model = Blocks(*how).eval()
    model.norm.running_mean.normal_()
    model.norm.running_var.uniform_(0.5, 1.5)
    images, source = torch.randn(2, 3, *size), torch.tensor([0, 1, 1])
    labels, weights = torch.tensor([[0, 3], [4, -1], [2, 2]]), torch.randn(3, 5)
    nets = {}
    for backend in ("cuda", "eager", "reference"):
        torch.manual_seed(1)
        nets[backend] = wfnet.WFNet(model, 5, backend=backend, fuse=backend != "reference")
        for parameter in nets[backend].filter_parameters():
            parameter.data.normal_(1, 2)

    def run(backend, kind):
        net = nets[backend].to(kind)
        with torch.autocast("cpu", torch.float16, enabled=kind != torch.float64):
            out = net(images.to(kind), labels, source)
        found = torch.autograd.grad(out, net.filter_parameters(), weights.to(out.dtype))
        return out.detach(), torch.cat([g.flatten() for g in found])

    exact = run("reference", torch.float64)
    mine, eager = run("cuda", torch.float32), run("eager", torch.float32)
    assert nets["cuda"]._fusion.network is not None, "the network runs unfused"
    # Forward of the five convolutions behind the expanded stem; gradients of all of them.
    assert launched[-10:] == ["fprop"] * 5 + ["dgrad"] * 5
    for result, theirs, truth in zip(mine, eager, exact, strict=True):
        check(result, truth, 2 * ((theirs.double() - truth).norm() / truth.norm()).item())
    emulated_cuda.set_schedule(5, emulated_cuda.Completion.RANDOM)
    assert all(torch.equal(a, b) for a, b in zip(run("cuda", torch.float32), mine, strict=True))


def test_explains_which_kernels_run():
    def explain(c, o, stride=1, batch=None):
        x, weight, _, _ = operands(1, c, o, (6, 6), 3)
        geometry = ConvGeometry((stride, stride), (1, 1))
        return cuda.backend.explain_conv2d(x, weight, geometry, batch).split("; ")

    forward, backward = explain(64, 64)
    assert forward == "forward: persistent implicit GEMM (TMA, wgmma, clusters of two blocks)"
    assert "wgmma" in backward
    forward, backward = explain(64, 64, batch=5)
    assert forward == "forward: Triton's kernel (label expansion)"
    assert "wgmma" in backward
    assert "less than half of a 64-deep slice" in explain(3, 64)[0]
    forward, backward = explain(64, 64, stride=3)
    assert "wgmma" in forward
    assert "product is above 4" in backward
    x, weight = torch.randn(2, 7, 64).half(), torch.randn(192, 64).half()
    assert cuda.backend.explain_linear(x, weight).count("wgmma") == 2
    assert cuda.backend.explain_linear(x.float(), weight).startswith("refused: ")


def test_traces_as_one_graph():
    """torch.compile(fullgraph=True): refusals and operators trace; new labels do not recompile."""
    x, weight = torch.randn(2, 40, 4, 4).half(), torch.randn(40, 40, 3, 3).half() / 19
    alpha = torch.randn(5, 40, requires_grad=True)
    traces = []

    def counting(graph, inputs):
        traces.append(graph)
        return graph.forward

    def call(forget):
        return wf.wf_conv2d(x, weight, None, alpha, None, forget, 1, 1, backend="cuda")

    call(torch.tensor([0, 0]))
    compiled = torch.compile(call, fullgraph=True, backend=counting)
    for labels in ([0, 1], [4, -1]):
        forget = torch.tensor(labels)
        assert torch.equal(compiled(forget), call(forget))
    assert len(traces) == 1
