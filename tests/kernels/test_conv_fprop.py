"""The masked convolution's forward kernels against plain PyTorch in fp64."""

from functools import partial

import pytest
import torch
from masked_products import Forward, check, sizes

pytest.importorskip("triton")

from wfnet.kernels.conv_fprop import conv_fprop

from wfnet.backends.contract import ConvGeometry, Epilogue


@pytest.mark.interpreter
def test_every_kind_of_convolution(convolution, nan_memory):
    case, config = convolution
    Forward(case).check(partial(conv_fprop, config=config))


@pytest.mark.interpreter
@pytest.mark.parametrize("kind", ["box", "gather", "default"])
def test_source_indices(kind, tiles):
    """Expanded samples read their source image; unused images are allowed, unknown ones dropped."""
    run = partial(conv_fprop, config=tiles[kind])
    source = torch.tensor([2, 0, 2, 2])
    Forward(sizes(3, 6, 6, 16, 16, 3), torch.float16, source=source).check(run)
    source[1:3] = torch.tensor([7, -3])
    plain = {"residual": False, "shift": False, "relu": False, "save": False, "source": source}
    out = Forward(sizes(3, 4, 4, 16, 16), **plain).run(run).out
    assert (out[1:3] == 0).all()
    assert (out[[0, 3]] != 0).all()


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("relu", "residual", "shift", "save"),
    [
        (False, False, False, False),
        (True, False, True, True),
        (False, True, True, False),
        (True, True, False, True),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", ["box", "flat"])
def test_epilogues(relu, residual, shift, save, dtype, kind, tiles):
    options = {"relu": relu, "residual": residual, "shift": shift, "save": save}
    case = Forward(sizes(2, 5, 4, 16, 16), dtype, **options)
    case.check(partial(conv_fprop, config=tiles[kind]))


@pytest.mark.interpreter
@pytest.mark.parametrize("kind", ["packed", "gather"])
def test_relu_lets_nan_through(kind, tiles):
    """A forget label out of range gives NaN for its sample, and for no other."""
    case = Forward(sizes(3, 3, 3, 16, 16), residual=False, shift=False, save=False)
    case.epilogue.scale[1] = torch.nan
    found = case.run(partial(conv_fprop, config=tiles[kind]))
    assert found.out[1].isnan().all()
    check(found.out[[0, 2]], case.truth()[0][[0, 2]])


def test_launcher_checks_its_tensors():
    x, w, a = torch.zeros(2, 8, 4, 4), torch.zeros(8, 8, 3, 3), torch.zeros(2, 8)
    for weight, epilogue, message in (
        (w.half(), Epilogue(a), "does not fit x"),
        (w[:, :4], Epilogue(a), "does not fit x"),
        (w, Epilogue(a[:1]), "1 rows for 2 samples"),
        (w, Epilogue(a, torch.zeros(2, 9)), "tables must be float32"),
        (w, Epilogue(a.double()), "tables must be float32"),
        (w, Epilogue(a, source=torch.tensor([0])), "2 rows for 1 samples"),
        (w, Epilogue(a, residual=x), "residual must be"),
    ):
        with pytest.raises(ValueError, match=message):
            conv_fprop(x, weight, ConvGeometry(), epilogue)


def test_empty_batches_launch_nothing():
    x, weight = torch.zeros(0, 8, 4, 4), torch.zeros(8, 8, 1, 1)
    found = conv_fprop(x, weight, ConvGeometry(), Epilogue(torch.zeros(0, 8), save=True))
    assert found.out.shape == found.branch.shape == (0, 8, 4, 4)
