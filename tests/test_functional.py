"""wf_conv2d and wf_linear: every backend-independent promise, `eager` against the truth."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

import wfnet
from wfnet.functional import explain, wf_conv2d, wf_linear

K = 5


def tensors(out, inside, kernel, bias=True, dtype=torch.float64):
    """weight, bias, alpha_weight, alpha_bias"""
    weight = torch.randn(out, *inside, *kernel, dtype=dtype)
    alphas = [torch.randn(K, out, dtype=dtype, requires_grad=True) for _ in range(2)]
    if not bias:
        return weight, None, alphas[0], None
    return weight, torch.randn(out, dtype=dtype), *alphas


def labels_for(batch, form):
    if form == "int":
        return 2
    shape = (batch,) if form == "vector" else (batch, 3)
    return torch.randint(-1, K, shape)


def compare(function, x, alphas, bound=1e-10):
    """Outputs and all gradients of eager against reference; returns nothing, asserts all."""
    found = {}
    for backend in ("reference", "eager"):
        y = function(backend)
        dout = torch.linspace(-1, 1, max(y.numel(), 1), dtype=y.dtype)[: y.numel()].view(y.shape)
        inputs = [t for t in (x, *alphas) if t is not None]
        found[backend] = (
            y.detach(),
            *torch.autograd.grad(y, inputs, dout, allow_unused=True, materialize_grads=True),
        )
    for truth, value in zip(*found.values(), strict=True):
        assert truth.shape == value.shape
        assert value.dtype == truth.dtype
        torch.testing.assert_close(value, truth, rtol=0, atol=bound)


GEOMETRIES = [
    # in, out, kernel, stride, padding, dilation, groups
    (4, 6, (3, 3), 1, 1, 1, 1),
    (4, 6, (3, 3), 2, 0, 1, 2),
    (4, 8, (3, 3), (2, 1), (0, 1), 1, 4),  # depthwise with a multiplier
    (4, 4, (5, 3), 1, (2, 1), (1, 2), 4),  # depthwise, lopsided
    (3, 5, (1, 1), 2, 0, 1, 1),
    (3, 5, (7, 7), 2, 3, 1, 1),
    (4, 6, (3, 3), 1, "same", 2, 1),
    (4, 6, (4, 2), 1, "same", 1, 2),  # even kernels pad one side more
    (4, 6, (2, 3), 1, "same", (3, 1), 1),
    (4, 6, (3, 3), 2, "valid", 1, 1),
    (1, 1, (9, 9), 1, 0, 1, 1),  # one output pixel
]


@pytest.mark.parametrize(
    ("geometry", "form", "batch"),
    [
        *itertools.product(GEOMETRIES, ["matrix"], [3]),
        *itertools.product(GEOMETRIES[:1], ["int", "vector"], [0, 1, 3]),
    ],
    ids=str,
)
@pytest.mark.parametrize("bias", [True, False])
def test_conv2d_equals_the_reference(geometry, form, batch, bias):
    inside, out, kernel, stride, padding, dilation, groups = geometry
    x = torch.randn(batch, inside, 9, 9, dtype=torch.float64, requires_grad=True)
    weight, b, aw, ab = tensors(out, (inside // groups,), kernel, bias)
    forget = labels_for(batch, form)
    compare(
        lambda backend: wf_conv2d(
            x, weight, b, aw, ab, forget, stride, padding, dilation, groups, 1.3, None, backend
        ),
        x,
        (aw, ab),
    )


LAYOUTS = {
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "sliced": lambda x: x.repeat(1, 2, 1, 2)[:, 4:, :, ::2],
    "transposed": lambda x: x.transpose(2, 3),
    "expanded": lambda x: x[:1, :, :1].expand(3, -1, 7, -1),
    "batch_last": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("groups", "source"), [(1, False), (4, True)])
def test_conv2d_takes_any_strides(layout, source, groups):
    x = LAYOUTS[layout](torch.randn(3, 4, 7, 7, dtype=torch.float64)).requires_grad_()
    weight, b, aw, ab = tensors(8, (4 // groups,), (3, 3))
    if source:
        weight = weight.to(memory_format=torch.channels_last)
    src = torch.tensor([2, 0, 0, 2, 2]) if source else None
    forget = labels_for(5 if source else 3, "matrix")
    compare(
        lambda backend: wf_conv2d(
            x, weight, b, aw, ab, forget, 1, 1, 1, groups, source=src, backend=backend
        ),
        x,
        (aw, ab),
    )


def test_channels_last_stays_channels_last():
    weight, b, aw, ab = tensors(8, (4,), (3, 3), dtype=torch.float32)
    x = torch.randn(2, 4, 6, 6).to(memory_format=torch.channels_last).requires_grad_()
    y = wf_conv2d(x, weight, b, aw, ab, 1, padding=1)
    assert y.is_contiguous(memory_format=torch.channels_last)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y).contiguous())
    assert dx.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(4, 6), (4, 3, 6), (4, 2, 3, 6), (0, 3, 6)])
@pytest.mark.parametrize("form", ["int", "vector", "matrix"])
@pytest.mark.parametrize(("bias", "source"), [(True, False), (False, True)])
def test_linear_equals_the_reference(shape, form, bias, source):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight, b, aw, ab = tensors(7, (6,), (), bias)
    src = torch.randint(0, shape[0], (6,)) if source and shape[0] else None
    forget = labels_for(shape[0] if src is None else 6, form)
    compare(
        lambda backend: wf_linear(x, weight, b, aw, ab, forget, 0.9, source=src, backend=backend),
        x,
        (aw, ab),
    )


@pytest.mark.parametrize("form", ["vector", "matrix"])
def test_windows_of_an_image_share_its_labels(form):
    x = torch.randn(3 * 4, 5, 6, dtype=torch.float64, requires_grad=True)
    weight, b, aw, ab = tensors(7, (6,), ())
    forget = labels_for(3, form)
    windows = wf_linear(x, weight, b, aw, ab, forget)
    repeated = wf_linear(x, weight, b, aw, ab, forget.repeat_interleave(4, 0), backend="reference")
    torch.testing.assert_close(windows, repeated, rtol=0, atol=1e-10)
    compare(lambda backend: wf_linear(x, weight, b, aw, ab, forget, backend=backend), x, (aw, ab))


def test_unbatched_inputs():
    weight, b, aw, ab = tensors(6, (3,), (3, 3))
    x = torch.randn(3, 7, 7, dtype=torch.float64)
    for forget in (2, None):
        batched = wf_conv2d(x[None], weight, b, aw, ab, forget)
        assert torch.equal(wf_conv2d(x, weight, b, aw, ab, forget), batched[0])
    weight, b, aw, ab = tensors(6, (3,), ())
    v = torch.randn(3, dtype=torch.float64)
    expected = wf_linear(v[None], weight, b, aw, ab, 2)[0]
    assert torch.equal(wf_linear(v, weight, b, aw, ab, torch.tensor([2])), expected)


def test_no_labels_is_the_plain_layer():
    weight, _, aw, _ = tensors(6, (4,), (3, 3), False, torch.float32)
    x, src = torch.randn(3, 4, 8, 8), torch.tensor([1, 1, 0, 2])
    plain = F.conv2d(x, weight, padding=1)
    mixed = wf_conv2d(x, weight, None, aw, None, torch.tensor([-1, 2, -1]), padding=1)
    assert torch.equal(mixed[[0, 2]], plain[[0, 2]])
    assert not torch.equal(mixed[1], plain[1])
    found = wf_conv2d(x, weight, None, aw, None, None, padding=1, source=src)
    assert torch.equal(found, plain[src])
    y = wf_conv2d(x, weight, None, aw, None, torch.tensor([-1, -1, -1]))
    assert not torch.autograd.grad(y.sum(), aw)[0].any()


# -- accuracy -------------------------------------------------------------------------------------


def by_hand(x, weight, bias, aw, ab, forget, **options):
    """Hand-written eager PyTorch in the dtype of x: one product, then two broadcast multiplies."""
    linear = weight.dim() == 2
    shape = (-1, 1, weight.shape[0]) if linear else (-1, weight.shape[0], 1, 1)
    gate = aw.sigmoid()[forget].to(x.dtype).view(shape)
    gate_bias = ab.sigmoid()[forget].to(x.dtype).view(shape)
    u = (F.linear if linear else F.conv2d)(x, weight, **options)
    return u * gate + gate_bias * bias.view(1, *shape[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gate", [1.0, 1e-3])
@pytest.mark.parametrize("linear", [False, True], ids=["conv2d", "linear"])
def test_error_is_at_most_twice_that_of_eager_pytorch(dtype, gate, linear):
    torch.manual_seed(int(1 / gate))
    x = torch.randn((8, 16, 16) if linear else (8, 16, 9, 9)).to(dtype)
    weight = (torch.randn(24, 16, *(() if linear else (3, 3))) / 8).to(dtype)
    bias = torch.randn(24).to(dtype)
    alphas = torch.logit((torch.rand(2, K, 24) * 0.5 + 0.5) * gate * 0.999)
    forget = torch.randint(0, K, (8,))
    call, options = (wf_linear, {}) if linear else (wf_conv2d, {"padding": 1})

    def run(function, wide=False):
        to = torch.float64 if wide else dtype
        leaves = [x.to(to), *(a.to(torch.promote_types(to, torch.float32)) for a in alphas)]
        leaves = [t.detach().requires_grad_() for t in leaves]
        y = function(leaves[0], weight.to(to), bias.to(to), *leaves[1:], forget, **options)
        torch.manual_seed(1)
        dout = torch.randn(y.shape).to(dtype).to(to)
        return y, *torch.autograd.grad(y, leaves, dout)

    def error(a, truth):
        return ((a.double() - truth).norm() / truth.norm()).item()

    found = run(by_hand, wide=True), run(call), run(by_hand)
    for name, truth, ours, hand in zip(("out", "dx", "daw", "dab"), *found, strict=True):
        assert error(ours, truth) <= 2 * error(hand, truth) + 1e-7, name


# -- autograd -------------------------------------------------------------------------------------


@pytest.mark.parametrize("needed", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1)])
@pytest.mark.parametrize("linear", [False, True])
def test_any_subset_of_gradients_and_an_in_place_relu_behind(needed, linear):
    weight, b, aw, ab = tensors(3, (4,), () if linear else (2, 2))
    x = torch.randn((3, 2, 4) if linear else (3, 4, 4, 4), dtype=torch.float64)
    call, forget = wf_linear if linear else wf_conv2d, torch.tensor([0, 2, 2])
    inputs = [t.detach().requires_grad_(bool(n)) for t, n in zip((x, aw, ab), needed, strict=True)]
    wanted = [t for t in inputs if t.requires_grad]
    found, truth = (
        call(inputs[0], weight, b, *inputs[1:], forget, backend=backend).relu_().square().sum()
        for backend in ("eager", "reference")
    )
    pairs = zip(torch.autograd.grad(found, wanted), torch.autograd.grad(truth, wanted), strict=True)
    for a, c in pairs:
        torch.testing.assert_close(a, c, rtol=0, atol=1e-10)


def test_weights_never_get_a_gradient():
    weight, b, aw, ab = tensors(6, (4,), ())
    x = torch.randn(2, 4, dtype=torch.float64)
    for forget, layer in ((1, (weight.clone().requires_grad_(), b)), (None, (weight, aw[0]))):
        with pytest.raises(ValueError, match=r"requires grad.*requires_grad_\(False\)"):
            wf_linear(x, *layer, aw, ab, forget)


@pytest.mark.parametrize("linear", [False, True])
def test_unsupported_derivatives_raise(linear):
    weight, b, aw, ab = tensors(6, (4,), () if linear else (3, 3))
    x = torch.randn((2, 3, 4) if linear else (2, 4, 6, 6), dtype=torch.float64)
    call = wf_linear if linear else wf_conv2d

    def loss(alpha, inputs=x):
        return call(inputs, weight, b, alpha, ab, torch.tensor([0, 1])).square().sum()

    plain = aw.detach()
    for transform in (
        lambda: torch.func.grad(loss)(plain),
        lambda: torch.func.vmap(loss)(torch.stack([plain] * 2)),
        lambda: torch.func.jvp(lambda v: loss(plain, v), (x,), (x,)),
    ):
        with pytest.raises(RuntimeError, match="transforms and forward-mode"):
            transform()
    dual = forward_ad.dual_level()
    with dual, pytest.raises(RuntimeError, match="transforms and forward-mode"):
        loss(forward_ad.make_dual(plain, torch.ones_like(plain)))
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(loss(aw), aw, create_graph=True)


def test_autocast():
    weight, b, aw, ab = tensors(6, (4,), (3, 3), dtype=torch.float32)
    x, forget = torch.randn(3, 4, 6, 6, requires_grad=True), torch.tensor([0, 1, -1])
    with torch.autocast("cpu", torch.bfloat16):
        y = wf_conv2d(x, weight, b, aw, ab, forget)
        double = wf_conv2d(x.double(), weight.double(), b.double(), aw, ab, forget)
    assert (y.dtype, double.dtype) == (torch.bfloat16, torch.float64)
    y.float().sum().backward()
    assert x.grad.dtype == aw.grad.dtype == ab.grad.dtype == torch.float32
    torch.testing.assert_close(y.double(), double, rtol=0.05, atol=0.05)


# -- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"x": torch.randn(2, 3, 6, 6)}, ValueError, "x has 3 channels.*takes 4"),
        ({"x": torch.randn(4, 6)}, ValueError, r"must be \[N, C, H, W\]"),
        ({"x": torch.randn(2, 4, 6, 6).double()}, TypeError, "float64.*float32.*autocast"),
        ({"weight": torch.randn(6, 4)}, ValueError, r"weight must be \[O, C / groups, R, S\]"),
        ({"bias": None}, ValueError, "alpha_bias was given without bias"),
        ({"alpha_bias": None}, ValueError, "bias was given without alpha_bias"),
        ({"alpha_weight": torch.randn(K, 5)}, ValueError, r"must be \[5, 6\]; got \[5, 5\]"),
        ({"alpha_bias": torch.randn(K + 1, 6)}, ValueError, r"alpha_bias must be \[5, 6\]"),
        ({"padding": "full"}, ValueError, "'same' or 'valid'; got 'full'"),
        ({"padding": "same", "stride": 2}, ValueError, "needs stride 1"),
        ({"stride": (1, 1, 1)}, ValueError, "stride must be one integer or two"),
        ({"source": torch.tensor([0, 2])}, ValueError, r"0 \.\. 1.*got 2"),
        ({"source": torch.tensor([0.0, 1])}, ValueError, "LongTensor"),
        ({"source": torch.tensor([0, 1, 1])}, ValueError, "2 forget labels.*batch of 3"),
        ({"forget": torch.tensor([0, K])}, ValueError, f"label {K} is out of range"),
        ({"backend": "cuda12"}, ValueError, "unknown backend 'cuda12'; choose one of auto"),
    ],
)
def test_bad_input_is_named(change, error, says):
    weight, b, aw, ab = tensors(6, (4,), (3, 3), dtype=torch.float32)
    good = {"x": torch.randn(2, 4, 6, 6), "weight": weight, "bias": b, "alpha_weight": aw}
    good |= {"alpha_bias": ab, "forget": torch.tensor([0, 1])}
    wf_conv2d(**good)
    with pytest.raises(error, match=says):
        wf_conv2d(**(good | change))


# -- choice of the backend ------------------------------------------------------------------------


def test_explain_says_what_would_run_and_why():
    lines = explain(torch.randn(2, 4, 6, 6), torch.randn(6, 4, 3, 3), padding="same").splitlines()
    assert lines[0].startswith("eager: chosen (auto)")
    assert any(line.startswith("triton: refused: ") for line in lines)
    linear = explain(torch.randn(2, 3, 4), torch.randn(6, 4), backend="eager")
    assert linear.startswith("eager: chosen (asked for by name)")


def test_environment_chooses_the_backend(monkeypatch):
    weight, b, aw, ab = tensors(6, (4,), (3, 3), dtype=torch.float32)
    call = lambda: wf_conv2d(torch.randn(1, 4, 6, 6), weight, b, aw, ab, 1)  # noqa: E731
    monkeypatch.setenv("WFNET_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="unknown backend 'nonsense'"):
        call()
    monkeypatch.setenv("WFNET_BACKEND", "reference")
    assert "wfnet" not in call().grad_fn.name().lower()


def test_a_named_backend_never_falls_back(monkeypatch):
    engine = wfnet.backends.get("eager")
    monkeypatch.setattr(engine, "refuse_conv2d", lambda *_: "it is Monday", raising=False)
    weight, b, aw, ab = tensors(6, (4,), (3, 3), dtype=torch.float32)
    with pytest.raises(RuntimeError, match="'eager' cannot run this call: it is Monday"):
        wf_conv2d(torch.randn(1, 4, 6, 6), weight, b, aw, ab, 1, backend="eager")
