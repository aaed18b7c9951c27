"""The backend ``triton``: refusals on the host; its operators and fused networks, interpreted."""

import pytest
import torch
import torch.nn.functional as F
from masked_products import check, check_public

pytest.importorskip("triton")

import wfnet.functional as wf
from wfnet.backends.contract import LINEAR, ConvGeometry, PoolGeometry
from wfnet.backends.triton import backend

X, W = torch.zeros(1, 8, 4, 4), torch.zeros(8, 8, 1, 1)


def test_what_cannot_run_is_refused_in_one_sentence(monkeypatch):
    for x, reason in (
        (X.double(), "not torch.float64"),
        (X, "need a CUDA tensor, and x is on cpu"),
    ):
        weight = W.to(x.dtype)
        assert reason in backend.refuse_conv2d(x, weight, ConvGeometry())
        assert reason in backend.refuse_linear(x[0, 0, None], weight[:, :, 0, 0])
        assert backend.explain_conv2d(x, weight, ConvGeometry()).startswith("refused: ")
    monkeypatch.setattr("wfnet.backends.triton._refuse_tensor", lambda x: None)
    grouped = backend.refuse_conv2d(X, torch.zeros(8, 1, 1, 1), ConvGeometry(groups=8))
    assert "groups=8" in grouped
    assert backend.refuse_conv2d(X, W, ConvGeometry()) is None
    assert "does not fit" in backend.refuse_conv2d(X, torch.zeros(8, 8, 7, 7), ConvGeometry())


def test_explain_names_config_and_reason(monkeypatch):
    monkeypatch.setattr("wfnet.backends.triton._refuse_tensor", lambda x: None)
    text = backend.explain_conv2d(X, W, ConvGeometry())
    assert text.startswith("forward flat ")
    assert "input gradient flat " in text
    text = backend.explain_conv2d(X, torch.zeros(8, 8, 3, 3), ConvGeometry(padding=(1, 1)))
    assert "forward box " in text
    tokens, filters = torch.zeros(2, 16, 7, 1), torch.zeros(8, 16, 1, 1)
    assert "persistent" in backend.explain_conv2d(tokens, filters, LINEAR)
    assert "box" in backend.explain_conv2d(X, W, ConvGeometry(), batch=2)


ONE, SEVERAL = [3, -1, 0], [[0, 1], [2, -1], [4, 4]]


@pytest.mark.interpreter
@pytest.mark.parametrize(("labels", "expanded"), [(ONE, True), (SEVERAL, False)])
@pytest.mark.parametrize(
    ("kernel", "conv", "channels"),
    [(3, (1, 1), 16), (3, (2, 1), 16), (1, (1, 0), 16), (1, (2, 0), 16), (7, (2, 3), 3)],
)
def test_wf_conv2d(kernel, conv, channels, expanded, labels):
    """The public function with this backend against the naive loop of masked weight copies."""
    source = torch.tensor([1, 0, 1]) if expanded else None
    x = torch.randn(2 if expanded else 3, channels, 8, 8)
    weight = torch.randn(16, channels, kernel, kernel) / 8
    check_public("triton", x, weight, torch.tensor(labels), conv, source)


@pytest.mark.interpreter
@pytest.mark.parametrize("expanded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_wf_linear(expanded, dtype):
    source = torch.tensor([1, 0, 1]) if expanded else None
    x, weight = torch.randn(2 if expanded else 3, 13, 16), torch.randn(48, 16) / 4
    check_public("triton", x.to(dtype), weight.to(dtype), torch.tensor(ONE), (), source)


@pytest.mark.interpreter
def test_an_empty_batch():
    x, weight, none = torch.randn(0, 8, 5, 5), torch.randn(16, 8, 3, 3), torch.tensor([]).long()
    y = wf.wf_conv2d(x, weight, None, torch.randn(5, 16), None, none, 1, 1, backend="triton")
    assert y.shape == (0, 16, 5, 5)


@pytest.mark.interpreter
def test_poolings_that_the_kernels_refuse_are_pytorchs():
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
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_durable_untraining(dtype, monkeypatch, check_fused_network):
    """Every product behind which there is a norm takes its moments."""
    taken, run = [], backend.product_moments
    record = lambda *product: taken.append(product) or run(*product)  # noqa: E731
    monkeypatch.setattr(backend, "product_moments", record)
    assert check_fused_network("triton", dtype, False, 2, 2, (8, 8), durable=True)()
    assert len(taken) >= 2 * 5  # five norms, two runs


@pytest.mark.interpreter
def test_traces_as_one_graph(check_one_graph):
    check_one_graph("triton", torch.float32)


@pytest.mark.interpreter
def test_the_interpreter_refuses_bf16():
    with pytest.raises(RuntimeError, match="interpreter"):
        wf.wf_conv2d(X.bfloat16(), W.bfloat16(), None, torch.zeros(3, 8), None, 1, backend="triton")
