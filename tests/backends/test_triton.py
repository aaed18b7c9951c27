"""The backend ``triton``: refusals on the host; its operators and fused networks, interpreted."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

import wfnet
import wfnet.functional as wf
from wfnet.backends.contract import ConvGeometry, Epilogue, LayerBelow, PoolGeometry
from wfnet.backends.triton import backend

X, W = torch.zeros(1, 8, 4, 4), torch.zeros(8, 8, 1, 1)


@pytest.mark.parametrize(
    ("x", "weight", "geometry", "reason"),
    [
        (X.double(), W.double(), ConvGeometry(), "not torch.float64"),
        (X, W, ConvGeometry(), "need a CUDA tensor, and x is on cpu"),
    ],
)
def test_what_cannot_run_is_refused_in_one_sentence(x, weight, geometry, reason):
    assert reason in backend.refuse_conv2d(x, weight, geometry)
    assert reason in backend.refuse_linear(x[0, 0, None], weight[:, :, 0, 0])
    assert backend.explain_conv2d(x, weight, geometry).startswith("refused: ")


def test_groups_are_refused(monkeypatch):
    monkeypatch.setattr("wfnet.backends.triton._refuse_tensor", lambda x: None)
    reason = backend.refuse_conv2d(X, torch.zeros(8, 1, 1, 1), ConvGeometry(groups=8))
    assert "groups=8" in reason
    assert backend.refuse_conv2d(X, W, ConvGeometry()) is None
    assert "does not fit" in backend.refuse_conv2d(X, torch.zeros(8, 8, 7, 7), ConvGeometry())


def test_asked_for_by_name_it_runs_or_raises():
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run this call"):
        wf.wf_conv2d(X, W, None, torch.zeros(3, 8), None, 1, backend="triton")


def test_explain_names_config_and_reason(monkeypatch):
    monkeypatch.setattr("wfnet.backends.triton._refuse_tensor", lambda x: None)
    text = backend.explain_conv2d(X, W, ConvGeometry())
    assert text.startswith("forward flat ")
    assert "input gradient flat " in text
    text = backend.explain_conv2d(X, torch.zeros(8, 8, 3, 3), ConvGeometry(padding=(1, 1)))
    assert "forward box " in text
    text = backend.explain_conv2d(
        torch.zeros(2, 3, 9, 9), torch.zeros(8, 3, 7, 7), ConvGeometry((2, 2), (3, 3))
    )
    assert "pointer path" in text
    assert "persistent" in backend.explain_linear(torch.zeros(2, 7, 16), torch.zeros(8, 16))
    assert "box" in backend.explain_linear(torch.zeros(2, 7, 16), torch.zeros(8, 16), batch=3)
    assert "box" in backend.explain_conv2d(X, W, ConvGeometry(), batch=2)


@pytest.mark.interpreter
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("kernel", [1, 3])
def test_fused_convolution(kernel, residual, check):
    """Tables that are column slices, residual, ReLU; backward without the layer's input."""
    x = torch.randn(2, 16, 6, 6).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(16, 16, kernel, kernel) / 8
    scale, shift = torch.rand(2, 40)[:, 8:24], torch.randn(2, 40)[:, 8:24]
    r = torch.randn(2, 16, 6, 6) if residual else None
    geometry = ConvGeometry(padding=(kernel // 2, kernel // 2))
    epilogue = Epilogue(scale, shift, r, relu=True, save=True)
    out, branch, kept = backend.conv2d(x, weight, geometry, epilogue)
    inputs = [t.double().requires_grad_() for t in (x, scale.contiguous(), shift.contiguous())]
    xs, a, c = inputs
    u = F.conv2d(xs, weight.double(), padding=kernel // 2)
    rs = torch.zeros_like(u) if r is None else r.double()
    rs.requires_grad_()
    y = (a[:, :, None, None] * u + c[:, :, None, None] + rs).relu()
    check(out, y)
    dout = torch.randn(y.shape)
    dx, da, dc, dr = torch.autograd.grad(y, (*inputs, rs), dout.double())
    t1, t0 = torch.full((2, 16), torch.nan), torch.full((2, 16), torch.nan)
    below = LayerBelow(scale, shift, branch, kept, True, t1, t0, need_grad=residual)
    finished = backend.epilogue_backward(dout, below)
    if residual:
        check(finished.grad, dr)
    check(t1, da * a)
    check(t0, dc)
    found = backend.conv2d_dgrad(finished.scaled_grad, weight, tuple(x.shape), geometry)
    check(found.grad, dx)


@pytest.mark.interpreter
def test_poolings_that_the_kernels_refuse_are_pytorchs(check):
    for window in (
        PoolGeometry((2, 2), (2, 2), dilation=(2, 2)),
        PoolGeometry((17, 16), (1, 1), (8, 8)),
    ):
        x = torch.randn(1, 8, 18, 18)
        out, positions = backend.max_pool2d(x, window, True)
        leaf = x.clone().requires_grad_()
        truth = F.max_pool2d(leaf, *window)
        assert torch.equal(out, truth)
        dout = torch.randn(out.shape)
        (dx,) = torch.autograd.grad(truth, leaf, dout)
        like = torch.empty_like(x, device="meta")
        check(backend.max_pool2d_backward(dout, positions, like, window).grad, dx.double())


class Block(torch.nn.Module):
    """A stem, a bottleneck with a projection shortcut, an identity block, a pooling between."""

    def __init__(self, bias: bool):
        super().__init__()
        conv = torch.nn.Conv2d
        self.stem = conv(3, 16, 3, padding=1, bias=bias)
        self.norm = torch.nn.BatchNorm2d(16)
        self.reduce = conv(16, 16, 1, bias=bias)
        self.middle = conv(16, 16, 3, stride=2, padding=1, bias=bias)
        self.grow = conv(16, 32, 1, bias=bias)
        self.project = conv(16, 32, 1, stride=2, bias=bias)
        self.pool = torch.nn.MaxPool2d(2)
        self.last = conv(32, 32, 3, padding=1, bias=bias)
        self.head = torch.nn.Linear(32, 5)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        y = self.middle(self.reduce(x).relu()).relu()
        x = self.pool((self.grow(y) + self.project(x)).relu())
        x = (self.last(x) + x).relu()
        return self.head(x.mean((2, 3)))


@pytest.mark.interpreter
@pytest.mark.parametrize(("dtype", "bias"), [(torch.float32, True), (torch.float16, False)])
def test_fused_network(dtype, bias):
    """The whole chain against the unfused network in fp64, and its bits on a second run."""
    model = Block(bias).eval()
    model.norm.running_mean.normal_()
    model.norm.running_var.uniform_(0.5, 1.5)
    net = wfnet.WFNet(model, 5, backend="triton")
    for parameter in net.filter_parameters():
        parameter.data.normal_(1, 2)
    images, source = torch.randn(2, 3, 12, 12), torch.tensor([0, 1, 1])
    labels, weights = torch.tensor([[0, 3], [4, -1], [2, 2]]), torch.randn(3, 5)

    def gradients(network, fuse, kind):
        network.fuse = fuse
        images_, weights_ = images.to(kind), weights.to(kind)
        with torch.autocast("cpu", dtype, enabled=kind != torch.float64 and dtype != kind):
            out = network(images_, labels, source)
        found = torch.autograd.grad(out, network.filter_parameters(), weights_.to(out.dtype))
        return torch.cat([g.flatten() for g in found])

    exact = wfnet.WFNet(model, 5, backend="reference")
    for mine, other in zip(exact.filter_parameters(), net.filter_parameters(), strict=True):
        mine.data.copy_(other)
    truth = gradients(exact.double(), False, torch.float64)
    first = gradients(net, True, torch.float32)
    assert net._fusion.network is not None, "the network runs unfused"
    error = (first.double() - truth).norm() / truth.norm()
    assert error < {torch.float32: 2e-5, torch.float16: 2e-2}[dtype], f"relative error {error:.1e}"
    assert torch.equal(first, gradients(net, True, torch.float32))


@pytest.mark.interpreter
def test_traces_as_one_graph():
    """torch.compile(fullgraph=True): refusals and operators trace; new labels do not recompile."""
    x, weight = torch.randn(2, 8, 4, 4), torch.randn(16, 8, 3, 3)
    alpha = torch.randn(5, 16, requires_grad=True)
    traces = []

    def counting(graph, inputs):
        traces.append(graph)
        return graph.forward

    def call(forget):
        return wf.wf_conv2d(x, weight, None, alpha, None, forget, 1, 1, backend="triton")

    call(torch.tensor([0, 0]))
    compiled = torch.compile(call, fullgraph=True, backend=counting)
    for labels in ([0, 1], [4, -1]):
        forget = torch.tensor(labels)
        assert torch.equal(compiled(forget), call(forget))
    assert len(traces) == 1


@pytest.mark.interpreter
def test_the_interpreter_refuses_bf16():
    x = torch.randn(1, 8, 4, 4, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="interpreter"):
        wf.wf_conv2d(
            x,
            torch.randn(8, 8, 1, 1, dtype=torch.bfloat16),
            None,
            torch.zeros(3, 8),
            None,
            1,
            backend="triton",
        )
