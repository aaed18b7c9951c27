"""The backend ``triton``: refusals on the host; its operators and fused networks, interpreted."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

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


def through(backend_name, dtype, x, weight, bias, alphas, forget, conv=None, source=None):
    """Output and gradients by x and by the filters, through the public functions."""
    x, *alphas = (t.detach().to(dtype).requires_grad_() for t in (x, *alphas))
    weight, bias = weight.to(dtype), bias.to(dtype)
    if conv is None:
        y = wf.wf_linear(x, weight, bias, *alphas, forget, source=source, backend=backend_name)
    else:
        y = wf.wf_conv2d(
            x, weight, bias, *alphas, forget, *conv, source=source, backend=backend_name
        )
    generator = torch.Generator().manual_seed(1)
    dout = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(dtype)
    return y, *torch.autograd.grad(y, (x, *alphas), dout)


FORGET = {"labels": [3, -1, 0], "several": [[0, 1], [2, -1], [4, 4]]}


@pytest.mark.interpreter
@pytest.mark.parametrize(("labels", "expanded"), [("labels", True), ("several", False)])
@pytest.mark.parametrize(
    ("kernel", "conv", "channels"),
    [(3, (1, 1), 16), (3, (2, 1), 16), (1, (1, 0), 16), (1, (2, 0), 16), (7, (2, 3), 3)],
)
def test_wf_conv2d(kernel, conv, channels, expanded, labels, check):
    """The public function with this backend against the naive loop of masked weight copies."""
    source = torch.tensor([1, 0, 1]) if expanded else None
    x = torch.randn(2 if expanded else 3, channels, 8, 8).contiguous(
        memory_format=torch.channels_last
    )
    weight = torch.randn(16, channels, kernel, kernel) / 8
    bias, alphas = torch.randn(16), (torch.randn(5, 16), torch.randn(5, 16))
    forget = torch.tensor(FORGET[labels])
    arguments = (x, weight, bias, alphas, forget, conv, source)
    for mine, truth in zip(
        through("triton", torch.float32, *arguments),
        through("reference", torch.float64, *arguments),
        strict=True,
    ):
        check(mine, truth)


@pytest.mark.interpreter
@pytest.mark.parametrize("expanded", [False, True])
def test_wf_linear(expanded, check):
    source = torch.tensor([1, 0, 1]) if expanded else None
    x, weight = torch.randn(2 if expanded else 3, 13, 16), torch.randn(48, 16) / 4
    bias, alphas = torch.randn(48), (torch.randn(5, 48), torch.randn(5, 48))
    arguments = (x, weight, bias, alphas, torch.tensor([3, -1, 0]), None, source)
    for mine, truth in zip(
        through("triton", torch.float32, *arguments),
        through("reference", torch.float64, *arguments),
        strict=True,
    ):
        check(mine, truth)


@pytest.mark.interpreter
def test_layouts_dtypes_and_empty_batches(check):
    """Contiguous NCHW input, fp16, no bias, and a batch of none."""
    weight, alpha = torch.randn(16, 8, 3, 3).half() / 8, torch.randn(5, 16)
    x = torch.randn(2, 8, 5, 5).half()
    y = wf.wf_conv2d(x, weight, None, alpha, None, torch.tensor([1, 2]), 1, 1, backend="triton")
    truth = wf.wf_conv2d(
        x.double(),
        weight.double(),
        None,
        alpha.double(),
        None,
        torch.tensor([1, 2]),
        1,
        1,
        backend="reference",
    )
    check(y, truth, torch.float16)
    none = wf.wf_conv2d(
        x[:0],
        weight,
        None,
        alpha,
        None,
        torch.tensor([], dtype=torch.int64),
        1,
        1,
        backend="triton",
    )
    assert none.shape == (0, 16, 5, 5)


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


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("dtype", "how"),
    [(torch.float32, (True, 2, 2, (8, 6))), (torch.float16, (False, 2, 3, (9, 7)))],
)
def test_fused_network(dtype, how, check_fused_network):
    assert check_fused_network("triton", dtype, *how)(), "other bits on a second run"


@pytest.mark.interpreter
def test_traces_as_one_graph(check_one_graph):
    check_one_graph("triton", torch.float32)


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
