"""The torch.library operators: schema, fake tensors, autograd registration (opcheck)."""

import pytest
import torch

from wfnet import operators

K, OUT, C = 4, 6, 4
GEOMETRY = [2, 1], [1, 0], [1, 2]


def arguments_of(kind, bias, source, columns, save, dtype):
    """Of a forward operator: ``kind`` is a layout, ``grouped`` or ``linear``."""
    out, inside, tail = OUT, (C, 3, 2), (*GEOMETRY, 1)
    if kind == "grouped":
        out, inside, tail = 2 * C, (1, 3, 2), (*GEOMETRY, C)
    if kind == "linear":
        inside, tail = (C,), ()
    x = torch.randn((3, 5, C) if kind == "linear" else (3, C, 7, 6), dtype=dtype)
    if kind == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    alpha, alpha_bias = torch.randn(2, K, out).unbind()
    batch = 3 if source is None else len(source)
    tensors = (
        x.requires_grad_(),
        torch.randn(out, *inside, dtype=dtype),
        torch.randn(out, dtype=dtype) if bias else None,
        alpha.clone().requires_grad_(save),
        alpha_bias.clone().requires_grad_() if bias else None,
        torch.randint(-1, K, (batch, columns)),
        source,
    )
    return *tensors, 1.1, "eager", save, *tail


PATTERNS = {
    "contiguous": (True, None, 1, True, torch.float32),
    "channels_last": (True, torch.tensor([2, 0, 0, 1, 2]), 1, True, torch.float32),
    "grouped": (True, None, 3, True, torch.float32),
    "linear": (False, torch.tensor([2, 0, 0, 1]), 2, True, torch.float64),
}
UNSAVED = (True, None, 1, False, torch.bfloat16)
CASES = [
    *(pytest.param(kind, pattern, id=kind) for kind, pattern in PATTERNS.items()),
    *(pytest.param(kind, UNSAVED, id=f"{kind}, unsaved") for kind in ("channels_last", "linear")),
]


@pytest.mark.parametrize(("kind", "pattern"), CASES)
def test_forward(kind, pattern):
    operator = operators.linear if kind == "linear" else operators.conv2d
    torch.library.opcheck(operator, arguments_of(kind, *pattern))


@pytest.mark.parametrize(("kind", "pattern"), CASES)
@pytest.mark.parametrize("need_dx", [True, False])
def test_backward(kind, pattern, need_dx):
    forward, backward = operators.conv2d, operators.conv2d_backward
    if kind == "linear":
        forward, backward = operators.linear, operators.linear_backward
    arguments = arguments_of(kind, *pattern)
    arguments = [t.detach() if isinstance(t, torch.Tensor) else t for t in arguments]
    x, weight, bias, *filters, _, backend, save = arguments[:10]
    out, saved, scale, shift = forward(*arguments)
    layout = list(x.shape), kind == "channels_last"
    tensors = torch.randn_like(out), saved, weight, *filters, scale, shift
    needed = need_dx, save, bias is not None
    torch.library.opcheck(backward, (*tensors, *layout, backend, *needed, *arguments[10:]))


def test_nothing_is_shared_and_nothing_kept_that_backward_will_not_need():
    arguments = arguments_of("contiguous", *PATTERNS["contiguous"])
    out, saved, *_ = operators.conv2d(*arguments)
    assert len({t.untyped_storage().data_ptr() for t in (arguments[0], out, saved)}) == 3
    _, saved, *_ = operators.conv2d(*arguments_of("contiguous", *UNSAVED))
    assert saved.numel() == 0
