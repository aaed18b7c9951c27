"""The torch.library operators: schema, fake tensors, autograd registration (opcheck)."""

import pytest
import torch

from wfnet import operators

K, OUT, C = 4, 6, 4


def leaf(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def conv_arguments(layout, bias, source, columns, save, dtype, groups=1):
    x = leaf(3, C, 7, 6, dtype=dtype)
    if layout == "channels_last":
        x = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(OUT if groups == 1 else 2 * C, C // groups, 3, 2, dtype=dtype)
    out = weight.shape[0]
    batch = 3 if source is None else len(source)
    return (
        x, weight, torch.randn(out, dtype=dtype) if bias else None,
        leaf(K, out) if save else torch.randn(K, out), leaf(K, out) if bias else None,
        torch.randint(-1, K, (batch, columns)), source, 1.1, "eager", save,
        [2, 1], [1, 0], [1, 2], groups,
    )  # fmt: skip


PATTERNS = [
    # layout, bias, source, columns, save, dtype, groups
    ("contiguous", True, None, 1, True, torch.float32, 1),
    ("contiguous", False, None, 2, True, torch.float64, 1),
    ("channels_last", True, torch.tensor([2, 0, 0, 1, 2]), 1, True, torch.float32, 1),
    ("channels_last", False, None, 1, False, torch.bfloat16, 1),
    ("contiguous", True, None, 3, True, torch.float32, C),
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=range(len(PATTERNS)))
def test_conv2d(pattern):
    arguments = conv_arguments(*pattern)
    torch.library.opcheck(operators.conv2d, arguments)


@pytest.mark.parametrize("pattern", PATTERNS, ids=range(len(PATTERNS)))
@pytest.mark.parametrize("need_dx", [True, False])
def test_conv2d_backward(pattern, need_dx):
    arguments = conv_arguments(*pattern)
    arguments = [t.detach() if isinstance(t, torch.Tensor) else t for t in arguments]
    x, weight, bias, aw, ab, forget, source, _, backend, save, *geometry = arguments
    out, saved, scale, shift = operators.conv2d(*arguments)
    channels_last = pattern[0] == "channels_last"
    torch.library.opcheck(
        operators.conv2d_backward,
        (
            torch.randn_like(out), saved, weight, aw, ab, forget, source, scale, shift,
            list(x.shape), channels_last, backend, need_dx, save, bias is not None, *geometry,
        ),
    )  # fmt: skip


def linear_arguments(bias, source, columns, save, dtype):
    batch = 3 if source is None else len(source)
    return (
        leaf(3, 5, C, dtype=dtype), torch.randn(OUT, C, dtype=dtype),
        torch.randn(OUT, dtype=dtype) if bias else None,
        leaf(K, OUT) if save else torch.randn(K, OUT), leaf(K, OUT) if bias else None,
        torch.randint(-1, K, (batch, columns)), source, 0.9, "eager", save,
    )  # fmt: skip


LINEAR_PATTERNS = [
    (True, None, 1, True, torch.float32),
    (False, torch.tensor([2, 0, 0, 1]), 2, True, torch.float64),
    (True, torch.tensor([1]), 1, False, torch.bfloat16),
]


@pytest.mark.parametrize("pattern", LINEAR_PATTERNS, ids=range(len(LINEAR_PATTERNS)))
def test_linear(pattern):
    torch.library.opcheck(operators.linear, linear_arguments(*pattern))


@pytest.mark.parametrize("pattern", LINEAR_PATTERNS, ids=range(len(LINEAR_PATTERNS)))
def test_linear_backward(pattern):
    arguments = linear_arguments(*pattern)
    arguments = [t.detach() if isinstance(t, torch.Tensor) else t for t in arguments]
    x, weight, bias, aw, ab, forget, source, _, backend, save = arguments
    out, saved, scale, shift = operators.linear(*arguments)
    torch.library.opcheck(
        operators.linear_backward,
        (
            torch.randn_like(out), saved, weight, aw, ab, forget, source, scale, shift,
            list(x.shape), False, backend, True, save, bias is not None,
        ),
    )  # fmt: skip


def test_the_returned_tensor_is_nobody_elses():
    arguments = conv_arguments("contiguous", True, None, 1, True, torch.float32)
    out, saved, *_ = operators.conv2d(*arguments)
    pointers = {t.untyped_storage().data_ptr() for t in (arguments[0], out, saved)}
    assert len(pointers) == 3


def test_nothing_is_kept_where_backward_will_not_need_it():
    _, saved, *_ = operators.conv2d(
        *conv_arguments("contiguous", True, None, 1, False, torch.float32)
    )
    assert saved.numel() == 0
