"""The masked convolution's forward kernels against plain PyTorch in fp64."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from wfnet.kernels.conv_fprop import conv_fprop
from wfnet.kernels.linear import linear_fprop

from wfnet.backends.contract import ConvGeometry, Epilogue


@pytest.mark.interpreter
def test_every_kind_of_convolution(convolution, check, nan_memory):
    n, h, w, c, o, k, stride, pad, dil, config = convolution
    x, weight = torch.randn(n, c, h, w), torch.randn(o, c, k, k) / (k * k * c) ** 0.5
    scale, shift = torch.rand(n, o) + 0.5, torch.randn(n, o)
    u = F.conv2d(x.double(), weight.double(), None, stride, pad, dil)
    residual = torch.randn(u.shape)
    found = conv_fprop(
        x,
        weight,
        ConvGeometry((stride, stride), (pad, pad), (dil, dil)),
        Epilogue(scale, shift, residual, relu=True, save=True),
        config=config,
    )
    v = scale[:, :, None, None] * u
    check(found.branch, v)
    check(found.out, (v + shift[:, :, None, None] + residual).relu())
    assert found.mask is found.out


@pytest.mark.interpreter
@pytest.mark.parametrize("kind", ["box", "gather", "default"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_source_indices(kind, dtype, check, tiles):
    """Expanded samples read their source image; unused images are allowed."""
    x = torch.randn(3, 16, 6, 6).to(dtype)
    weight = (torch.randn(16, 16, 3, 3) / 12).to(dtype)
    source, scale = torch.tensor([2, 0, 2, 2]), torch.rand(4, 16)
    geometry, epilogue = ConvGeometry(padding=(1, 1)), Epilogue(scale, source=source)
    found = conv_fprop(x, weight, geometry, epilogue, config=tiles[kind])
    assert found.branch is None
    u = F.conv2d(x[source].double(), weight.double(), padding=1)
    check(found.out, scale[:, :, None, None] * u, dtype)


@pytest.mark.interpreter
@pytest.mark.parametrize("kind", ["box", "gather"])
def test_sources_out_of_range_are_dropped(kind, check, tiles):
    x, weight = torch.randn(2, 16, 4, 4), torch.randn(16, 16, 1, 1)
    epilogue = Epilogue(torch.ones(3, 16), source=torch.tensor([0, 7, -3]))
    out = conv_fprop(x, weight, ConvGeometry(), epilogue, config=tiles[kind]).out
    check(out[:1], F.conv2d(x[:1].double(), weight.double()))
    assert (out[1:] == 0).all()


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("relu", "residual", "shifted", "save"),
    [
        (False, False, False, False),
        (True, False, True, True),
        (False, True, True, False),
        (True, True, False, True),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", ["box", "flat"])
def test_epilogues(relu, residual, shifted, save, dtype, kind, check, tiles):
    x = torch.randn(2, 16, 5, 4).to(dtype)
    weight = (torch.randn(16, 16) / 4).to(dtype)
    scale = torch.rand(2, 16)
    shift = torch.randn(2, 16) if shifted else None
    r = torch.randn(2, 16, 5, 4).to(dtype) if residual else None
    v = scale[:, :, None, None] * F.conv2d(x.double(), weight.double()[:, :, None, None])
    truth = v + (0 if shift is None else shift[:, :, None, None]) + (0 if r is None else r.double())
    truth = truth.relu() if relu else truth
    epilogue = Epilogue(scale, shift, r, relu, save=save)
    if kind == "flat":
        found = linear_fprop(x, weight, epilogue, config=tiles["flat"])
    else:
        filters = weight[:, :, None, None]
        found = conv_fprop(x, filters, ConvGeometry(), epilogue, config=tiles["box"])
    check(found.out, truth, dtype)
    assert (found.branch is not None) == save
    if save:
        check(found.branch, v, dtype)


@pytest.mark.interpreter
@pytest.mark.parametrize("kind", ["packed", "gather"])
def test_relu_lets_nan_through(kind, tiles):
    """A forget label out of range gives NaN for its sample, and for no other."""
    scale = torch.ones(3, 16)
    scale[1] = float("nan")
    x, weight = torch.randn(3, 16, 3, 3), torch.randn(16, 16, 1, 1)
    found = conv_fprop(x, weight, ConvGeometry(), Epilogue(scale, relu=True), config=tiles[kind])
    assert found.out[1].isnan().all()
    assert found.out[[0, 2]].isfinite().all()


def test_launcher_checks_its_tensors():
    x, w, a = torch.zeros(2, 8, 4, 4), torch.zeros(8, 8, 3, 3), torch.zeros(2, 8)
    for weight, epilogue, message in (
        (w.half(), Epilogue(a), "does not fit x"),
        (w[:, :4], Epilogue(a), "does not fit x"),
        (w, Epilogue(a[:1]), "1 rows for 2 samples"),
        (w, Epilogue(torch.zeros(2, 9)), "tables must be float32"),
        (w, Epilogue(a, torch.zeros(2, 9)), "tables must be float32"),
        (w, Epilogue(a.double()), "tables must be float32"),
        (torch.zeros(8, 8, 5, 5), Epilogue(a), "does not fit into 4x4"),
        (w, Epilogue(a, source=torch.tensor([0])), "must have 2 entries"),
        (w, Epilogue(a, residual=x), "residual must be"),
    ):
        with pytest.raises(ValueError, match=message):
            conv_fprop(x, weight, ConvGeometry(), epilogue)


def test_empty_batches_launch_nothing():
    x, weight = torch.zeros(0, 8, 4, 4), torch.zeros(8, 8, 1, 1)
    found = conv_fprop(x, weight, ConvGeometry(), Epilogue(torch.zeros(0, 8), save=True))
    assert found.out.shape == found.branch.shape == (0, 8, 4, 4)
