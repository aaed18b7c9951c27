"""Numerics of every Triton kernel in Triton's interpreter, against plain PyTorch in fp64.

Not collected by name: ``test_triton_interpreter.py`` runs this file in its own process, because
kernels must be decorated with TRITON_INTERPRET=1 set, and interpreted kernels cannot be compiled.
The interpreter's bf16 products are wrong, so bf16 is tested on devices only (tests/gpu).
"""

import pytest
import torch
import torch.nn.functional as F
from wfnet.kernels.config import GemmConfig
from wfnet.kernels.conv_dgrad import conv_dgrad
from wfnet.kernels.conv_fprop import conv_fprop
from wfnet.kernels.epilogue_bwd import LayerBelow, epilogue_bwd
from wfnet.kernels.gate import GatedLayer, GateTables, gate_rows, gate_rows_bwd
from wfnet.kernels.linear import linear_dgrad, linear_fprop

import wfnet
import wfnet.functional as wf
from wfnet import gates
from wfnet.backends import contract
from wfnet.backends.contract import ConvGeometry, Epilogue, PoolGeometry
from wfnet.backends.triton import backend
from wfnet.gate_tables import flatten_filters
from wfnet.untraining.optimizers import RowAdam

torch.set_num_threads(1)

# Relative to the fp64 result: a few roundings of the dtype.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3}

BOX = GemmConfig("box", 32, 16, 16, 4, 2, box=(1, 8, 4))
PACKED = GemmConfig("box", 64, 16, 16, 4, 2, box=(2, 4, 8))
GATHER = GemmConfig("gather", 64, 16, 16, 4, 2)
FLAT = GemmConfig("flat", 32, 16, 16, 4, 2)


pytestmark = pytest.mark.usefixtures("exact_interpreter")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def check(result, truth, dtype=torch.float32):
    """Asserts that ``result`` differs from ``truth`` by a few roundings, and has no NaN."""
    error = (result.double() - truth.double()).norm() / truth.double().norm().clamp_min(1e-30)
    assert error < TOLERANCE[dtype], f"relative error {error:.2e}"


def poisoned(monkeypatch):
    """Fresh memory reads as NaN: what a kernel forgets to write fails the comparison."""
    fresh = {name: getattr(torch, name) for name in ("empty", "empty_like")}
    new_empty = torch.Tensor.new_empty

    def poison(tensor):
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    for name, make in fresh.items():
        monkeypatch.setattr(torch, name, lambda *a, make=make, **k: poison(make(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poison(new_empty(*a, **k)))


def nchw(t):
    return t.permute(0, 3, 1, 2)


def nhwc(t):
    return t.permute(0, 2, 3, 1)


# name: samples, H, W, C, O, filter, stride, padding, dilation, configs
CONVS = {
    "3x3": (3, 7, 9, 16, 20, 3, 1, 1, 1, (BOX, PACKED, GATHER)),
    "3x3, batch 1, whole tiles": (1, 8, 8, 16, 16, 3, 1, 1, 1, (BOX, GATHER)),
    "3x3, channels past a tile": (2, 5, 5, 24, 40, 3, 1, 1, 1, (PACKED,)),
    "3x3 stride 2": (3, 8, 6, 16, 32, 3, 2, 1, 1, (PACKED, GATHER)),
    "3x3 stride 2, no padding": (2, 8, 8, 16, 16, 3, 2, 0, 1, (BOX,)),
    "3x3 stride 2, odd size": (2, 7, 7, 16, 16, 3, 2, 1, 1, (GATHER,)),
    "1x1 stride 2": (3, 8, 6, 16, 24, 1, 2, 0, 1, (PACKED, GATHER)),
    "7x7 stride 2, 3 channels": (2, 8, 7, 3, 8, 7, 2, 3, 1, (GATHER,)),
    "7x7 stride 2, 16 channels": (2, 8, 8, 16, 16, 7, 2, 3, 1, (PACKED,)),
    "5x5 dilation 2": (2, 8, 6, 16, 8, 5, 1, 4, 2, (PACKED, GATHER)),
    "3x3 stride 2 dilation 2": (2, 8, 8, 16, 16, 3, 2, 2, 2, (GATHER,)),
    "odd channels": (2, 6, 6, 5, 7, 3, 1, 1, 1, (GATHER,)),
    "1x1 padded": (2, 4, 4, 16, 16, 1, 1, 1, 1, (BOX,)),
}
CASES = [
    pytest.param(*case[:-1], config, id=f"{name}-{config.path}{'' if i == 0 else i}")
    for name, case in CONVS.items()
    for i, config in enumerate(case[-1])
]


@pytest.mark.parametrize(("n", "h", "w", "c", "o", "k", "stride", "pad", "dil", "config"), CASES)
def test_conv_fprop(n, h, w, c, o, k, stride, pad, dil, config, monkeypatch):
    x = torch.randn(n, h, w, c)
    weight = torch.randn(o, k, k, c) / (k * k * c) ** 0.5
    scale, shift = torch.rand(n, o) + 0.5, torch.randn(n, o)
    u = nhwc(F.conv2d(nchw(x.double()), nchw(weight.double()), None, stride, pad, dil))
    residual = torch.randn(u.shape)
    poisoned(monkeypatch)
    out, branch = conv_fprop(
        x,
        weight,
        scale,
        shift,
        stride=(stride, stride),
        padding=(pad, pad),
        dilation=(dil, dil),
        residual=residual,
        relu=True,
        save_branch=True,
        config=config,
    )
    v = scale[:, None, None] * u
    check(branch, v)
    check(out, (v + shift[:, None, None] + residual).relu())


@pytest.mark.parametrize("config", [BOX, GATHER, None], ids=["box", "gather", "default"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_conv_fprop_source_indices(config, dtype):
    """Expanded samples read their source image; unused images are allowed."""
    x = torch.randn(3, 6, 6, 16).to(dtype)
    weight = (torch.randn(16, 3, 3, 16) / 12).to(dtype)
    source = torch.tensor([2, 0, 2, 2])
    scale = torch.rand(4, 16)
    out, branch = conv_fprop(x, weight, scale, padding=(1, 1), source=source, config=config)
    u = nhwc(F.conv2d(nchw(x[source].double()), nchw(weight.double()), padding=1))
    assert branch is None
    check(out, scale[:, None, None] * u, dtype)


def test_gather_drops_sources_out_of_range():
    x, weight = torch.randn(2, 4, 4, 16), torch.randn(16, 1, 1, 16)
    scale = torch.ones(3, 16)
    for config in (GATHER, BOX):
        source = torch.tensor([0, 7, -3])
        out, _ = conv_fprop(x, weight, scale, source=source, config=config)
        check(out[:1], x[:1].double() @ weight[:, 0, 0].double().T)
        assert (out[1:] == 0).all()


@pytest.mark.parametrize(("relu", "residual", "shifted", "save"), [
    (False, False, False, False),
    (True, False, True, True),
    (False, True, True, False),
    (True, True, False, True),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_forward_epilogue_family(relu, residual, shifted, save, dtype):
    x = torch.randn(2, 5, 4, 16).to(dtype)
    weight = (torch.randn(16, 16) / 4).to(dtype)
    scale = torch.rand(2, 16)
    shift = torch.randn(2, 16) if shifted else None
    r = torch.randn(2, 20, 16).to(dtype) if residual else None
    v = scale[:, None] * (x.flatten(1, 2).double() @ weight.double().T)
    truth = v + (0 if shift is None else shift[:, None]) + (0 if r is None else r.double())
    truth = truth.relu() if relu else truth
    for run in (
        lambda: linear_fprop(
            x.flatten(1, 2), weight, scale, shift, residual=r, relu=relu, save_branch=save,
            config=FLAT,
        ),
        lambda: conv_fprop(
            x, weight[:, None, None], scale, shift, relu=relu, save_branch=save, config=BOX,
            residual=None if r is None else r.unflatten(1, (5, 4)),
        ),
    ):  # fmt: skip
        out, branch = run()
        check(out.reshape(truth.shape), truth, dtype)
        assert (branch is not None) == save
        if save:
            check(branch.reshape(v.shape), v, dtype)


def test_relu_lets_nan_through():
    """A forget label out of range gives NaN for its sample, and for no other."""
    scale = torch.ones(3, 16)
    scale[1] = float("nan")
    for config in (PACKED, GATHER):
        out, _ = conv_fprop(
            torch.randn(3, 3, 3, 16), torch.randn(16, 1, 1, 16), scale, relu=True, config=config
        )
        assert out[1].isnan().all()
        assert out[[0, 2]].isfinite().all()


def test_tables_may_be_column_slices():
    tables = torch.rand(2, 48)
    scale, shift = tables[:, 16:32], torch.randn(2, 48)[:, 32:]
    x, weight = torch.randn(2, 9, 16), torch.randn(16, 16)
    out, _ = linear_fprop(x, weight, scale, shift, config=FLAT)
    check(out, scale[:, None] * (x.double() @ weight.double().T) + shift[:, None])


def layer_below(shape, dtype=torch.float32, residual=False):
    """A layer whose output is [B, ..., C], its tables, and the ReLU mask as a function of g."""
    b, c = shape[0], shape[-1]
    branch = torch.randn(shape).to(dtype)
    scale, shift = torch.rand(b, c) - 0.2, torch.randn(b, c)
    wide = (slice(None), *[None] * (len(shape) - 2))
    if residual:
        activation = torch.randn(shape).to(dtype).relu()
        below = LayerBelow(
            branch, scale, shift, activation, skip=torch.randn(shape).to(dtype), relu=True
        )
        mask = activation > 0
    else:
        below = LayerBelow(branch, scale, shift, relu=True)
        mask = branch.double() + shift.double()[wide] > 0
    return below, mask, scale.double()[wide]


def check_gradient(result, dout, below, mask, scale, dtype=torch.float32):
    g = (dout + (0 if below.skip is None else below.skip.double())) * mask
    over = tuple(range(1, dout.dim() - 1))
    if result.grad is not None:
        check(result.grad, g, dtype)
    if result.scaled_grad is not None:
        check(result.scaled_grad, scale * g, dtype)
    check(result.t0, g.sum(over))
    check(result.t1, (g * below.branch.double()).sum(over))


@pytest.mark.parametrize(("n", "h", "w", "c", "o", "k", "stride", "pad", "dil", "config"), CASES)
def test_conv_dgrad(n, h, w, c, o, k, stride, pad, dil, config, monkeypatch):
    """Skip gradient, ReLU mask of the layer below, its column sums and its A * g."""
    residual = config is not BOX
    if stride == 2 and config.path == "box" and c % config.block_n:
        pytest.skip("strided boxes need whole channel tiles")
    weight = torch.randn(o, k, k, c) / (k * k * c) ** 0.5
    x = torch.zeros(n, c, h, w, dtype=torch.float64, requires_grad=True)
    y = F.conv2d(x, nchw(weight.double()), None, stride, pad, dil)
    ag = torch.randn(nhwc(y).shape)
    (dx,) = torch.autograd.grad(y, x, nchw(ag.double()))
    below, mask, scale = layer_below((n, h, w, c), residual=residual)
    want = ("grad", "scaled_grad", "t0", "t1") if residual else ("scaled_grad", "t0", "t1")
    poisoned(monkeypatch)
    result = conv_dgrad(
        ag,
        weight,
        (h, w),
        below,
        stride=(stride, stride),
        padding=(pad, pad),
        dilation=(dil, dil),
        want=want,
        config=config,
    )
    assert (result.grad is None) == (not residual)
    check_gradient(result, nhwc(dx), below, mask, scale)


@pytest.mark.parametrize("config", [FLAT, GATHER, None], ids=["flat", "gather", "default"])
@pytest.mark.parametrize("tokens", [1, 2, 11, 16, 32, 70])
def test_linear_dgrad(tokens, config, monkeypatch):
    """Flat tiles that meet one, several and too many samples to sum their columns."""
    weight = torch.randn(24, 16) / 5
    ag = torch.randn(5, tokens, 24)
    below, mask, scale = layer_below((5, tokens, 16), residual=True)
    poisoned(monkeypatch)
    result = linear_dgrad(
        ag, weight, below, want=("grad", "scaled_grad", "t0", "t1"), config=config
    )
    check_gradient(result, ag.double() @ weight.double(), below, mask, scale)


@pytest.mark.parametrize("config", [FLAT, GATHER, None], ids=["flat", "gather", "default"])
@pytest.mark.parametrize("tokens", [1, 11, 16, 70])
def test_linear_fprop(tokens, config, monkeypatch):
    x, weight = torch.randn(5, tokens, 16), torch.randn(40, 16) / 4
    scale, shift = torch.rand(5, 40), torch.randn(5, 40)
    poisoned(monkeypatch)
    out, _ = linear_fprop(x, weight, scale, shift, config=config)
    check(out, scale[:, None] * (x.double() @ weight.double().T) + shift[:, None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_default_configs_run(dtype):
    """The tile sizes that ship, on one tile's worth of work."""
    x = torch.randn(2, 6, 6, 32).to(dtype)
    weight = (torch.randn(32, 3, 3, 32) / 17).to(dtype)
    scale = torch.rand(2, 32)
    out, _ = conv_fprop(x, weight, scale, stride=(2, 2), padding=(1, 1))
    u = nhwc(F.conv2d(nchw(x.double()), nchw(weight.double()), stride=2, padding=1))
    check(out, scale[:, None, None] * u, dtype)
    dx = conv_dgrad(out, weight, (6, 6), stride=(2, 2), padding=(1, 1)).grad
    truth = torch.nn.grad.conv2d_input(
        (2, 32, 6, 6), nchw(weight.double()), nchw(out.double()), 2, 1
    )
    check(dx, nhwc(truth), dtype)


@pytest.mark.parametrize("tokens", [1, 5, 300])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_epilogue_bwd(tokens, residual, dtype, monkeypatch):
    dout = torch.randn(3, tokens, 20).to(dtype)
    below, mask, scale = layer_below((3, tokens, 20), dtype, residual)
    poisoned(monkeypatch)
    result = epilogue_bwd(dout, below, want=("grad", "scaled_grad", "t0", "t1"))
    check_gradient(result, dout.double(), below, mask, scale, dtype)


def test_epilogue_bwd_sums_over_equal_sources(monkeypatch):
    source = torch.tensor([3, 1, 3, 0, 3])  # nobody reads image 2
    dout, branch = torch.randn(5, 70, 20), torch.randn(5, 70, 20)
    scale = torch.rand(5, 20)
    poisoned(monkeypatch)
    result = epilogue_bwd(
        dout,
        LayerBelow(branch, scale),
        want=("scaled_grad", "t0", "t1"),
        source=source,
        sources=4,
    )
    scaled = scale[:, None].double() * dout.double()
    total = torch.zeros(4, 70, 20, dtype=torch.float64).index_add_(0, source, scaled)
    check(result.scaled_grad, total)
    assert (result.scaled_grad[2] == 0).all()
    check(result.t0, dout.double().sum(1))
    check(result.t1, (dout.double() * branch).sum(1))


LABELS = {
    "one": [[0], [4], [-1], [2], [2], [3]],
    "several": [[0, 1, -1], [1, 1, 1], [-1, -1, -1], [-1, 3, 3], [4, 2, 0], [2, 0, 2]],
}


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("columns", [7, 140])
@pytest.mark.parametrize("normalised", [True, False])
def test_gate_rows(labels, columns, normalised):
    alpha = torch.randn(5, columns) * 3
    alpha[0] = 3.0
    forget = torch.tensor(LABELS[labels])
    gate_scale = gates.gate_scale(3.0, normalised)
    rows = gate_rows(alpha, forget, gate_scale)
    check(rows, gates.gate_rows(alpha.double(), forget, gate_scale))
    assert (rows[2] == 1).all()  # no label
    if normalised and labels == "one":
        assert (rows[0] == 1).all()  # a fresh gate
    t = torch.randn(6, columns)
    dalpha = gate_rows_bwd(t, alpha, forget)
    check(dalpha, gates.gate_rows_backward(t.double(), alpha.double(), forget))


def test_gate_rows_with_labels_out_of_range():
    alpha = torch.randn(4, 20)
    forget = torch.tensor([[4], [-2], [1], [2**40]])
    rows = gate_rows(alpha, forget, 1.0)
    assert rows[[0, 1, 3]].isnan().all()
    assert rows[2].isfinite().all()
    dalpha = gate_rows_bwd(torch.ones(4, 20), alpha, forget)
    assert (dalpha[[0, 2, 3]] == 0).all()
    check(dalpha[1], torch.sigmoid(-alpha[1].double()))


@pytest.mark.parametrize("labels", LABELS)
def test_gate_tables_of_a_network(labels):
    """All layers in one launch: folded BatchNorm, biases, and both gradients."""
    forget = torch.tensor(LABELS[labels])
    layers = [
        GatedLayer(torch.randn(5, 20), gate_scale=1.05),
        GatedLayer(
            torch.randn(5, 140),
            torch.randn(5, 140),
            bias=torch.randn(140),
            gamma=torch.randn(140),
            beta=torch.randn(140),
            mean=torch.randn(140),
            var=torch.rand(140) + 0.5,
            eps=1e-3,
            gate_scale=1.3,
        ),
        GatedLayer(torch.randn(5, 8), mean=torch.randn(8), var=torch.rand(8) + 0.5),
    ]
    tables = GateTables(layers)
    found = tables.scale_and_shift(forget)
    t1, t0 = tables.empty(6).normal_(), tables.empty(6).normal_()
    gradients = tables.backward(forget, t1, t0)
    gradients = iter(gradients)
    for i, (layer, (scale, shift)) in enumerate(zip(layers, found, strict=True)):
        dweight = next(gradients)
        sums1, sums0 = tables.views(t1, 6)[i].double(), tables.views(t0, 6)[i].double()
        gamma = torch.ones(layer.alpha_weight.shape[1], dtype=torch.float64)
        beta = torch.zeros_like(gamma)
        if layer.var is not None:
            gamma = (1 if layer.gamma is None else layer.gamma.double()) / (
                layer.var.double() + layer.eps
            ).sqrt()
            beta = (0 if layer.beta is None else layer.beta.double()) - layer.mean * gamma
        rows = gates.gate_rows(layer.alpha_weight.double(), forget, layer.gate_scale)
        check(scale, gamma * rows)
        check(dweight, gates.gate_rows_backward(sums1, layer.alpha_weight.double(), forget))
        if layer.alpha_bias is None:
            if beta.any():
                check(shift, beta.expand(6, -1))
            else:
                assert (shift == 0).all()
            continue
        rows = gates.gate_rows(layer.alpha_bias.double(), forget, layer.gate_scale)
        branch = gamma * layer.bias.double() * rows
        check(shift, branch + beta)
        check(
            next(gradients),
            gates.gate_rows_backward(sums0 * branch, layer.alpha_bias.double(), forget),
        )
    layers[0].alpha_weight.mul_(2)  # an optimiser step is seen
    scale, _ = tables.scale_and_shift(forget)[0]
    check(scale, gates.gate_rows(layers[0].alpha_weight.double(), forget, 1.05))


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


@pytest.mark.parametrize("labels", FORGET)
@pytest.mark.parametrize("expanded", [False, True])
@pytest.mark.parametrize(
    ("kernel", "conv", "channels"),
    [(3, (1, 1), 16), (3, (2, 1), 16), (1, (1, 0), 16), (1, (2, 0), 16), (7, (2, 3), 3)],
)
def test_wf_conv2d(kernel, conv, channels, expanded, labels):
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


@pytest.mark.parametrize("expanded", [False, True])
def test_wf_linear(expanded):
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


def test_layouts_dtypes_and_empty_batches():
    """Contiguous NCHW input, fp16, no bias, and a batch of none."""
    weight, alpha = torch.randn(16, 8, 3, 3).half() / 8, torch.randn(5, 16)
    x = torch.randn(2, 8, 5, 5).half()
    y = wf.wf_conv2d(x, weight, None, alpha, None, torch.tensor([1, 2]), 1, 1, backend="triton")
    truth = wf.wf_conv2d(
        x.double(), weight.double(), None, alpha.double(), None, torch.tensor([1, 2]), 1, 1,
        backend="reference",
    )  # fmt: skip
    check(y, truth, torch.float16)
    none = wf.wf_conv2d(
        x[:0], weight, None, alpha, None, torch.tensor([], dtype=torch.int64), 1, 1,
        backend="triton",
    )  # fmt: skip
    assert none.shape == (0, 16, 5, 5)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("kernel", [1, 3])
def test_fused_conv2d(kernel, residual):
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
    below = contract.LayerBelow(scale, shift, branch, kept, True, t1, t0, need_grad=residual)
    finished = backend.epilogue_backward(dout, below)
    if residual:
        check(finished.grad, dr)
    check(t1, da * a)
    check(t0, dc)
    found = backend.conv2d_dgrad(finished.scaled_grad, weight, tuple(x.shape), geometry)
    check(found.grad, dx)


WINDOWS = {
    "3x3/2": (2, 9, 10, 24, PoolGeometry((3, 3), (2, 2), (1, 1))),
    "2x2/2": (2, 8, 6, 72, PoolGeometry((2, 2), (2, 2))),
    "3x2/1, 2": (1, 7, 11, 8, PoolGeometry((3, 2), (1, 2), (1, 0), ceil_mode=True)),
    "2x2/3": (1, 11, 12, 8, PoolGeometry((2, 2), (3, 3), ceil_mode=True)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", WINDOWS)
def test_max_pool(case, dtype):
    """Values as PyTorch's bit by bit, ties included; gradients against fp64, and fused ones."""
    batch, height, width, channels, window = WINDOWS[case]
    x = torch.randn(batch, channels, height, width).to(dtype).relu()  # many are 0 and equal
    x = x.contiguous(memory_format=torch.channels_last)
    out, positions = backend.max_pool2d(x, window, True)
    leaf = x.double().requires_grad_()
    truth = F.max_pool2d(leaf, *window)
    assert torch.equal(out, truth.to(dtype))
    assert positions.dtype == torch.uint8
    assert backend.max_pool2d(x, window, False)[1] is None
    dout = torch.randn(truth.shape).to(dtype)
    (dx,) = torch.autograd.grad(truth, leaf, dout.double())
    like = torch.empty_like(x, device="meta")
    found = backend.max_pool2d_backward(dout, positions, like, window)
    check(found.grad, dx, dtype)
    skip = torch.randn(x.shape).to(dtype)
    check(backend.max_pool2d_backward(dout, positions, like, window, skip).grad, dx + skip, dtype)

    # The layer below: g, A * g and both sums, as in a pass of their own.
    table = (batch, channels)
    scale, shift = torch.rand(table) + 0.5, torch.randn(table)
    branch = torch.randn(x.shape).to(dtype)
    t1, t0 = torch.full(table, torch.nan), torch.full(table, torch.nan)
    below = contract.LayerBelow(scale, shift, branch, None, True, t1, t0, need_grad=True)
    finished = backend.max_pool2d_backward(dout, positions, like, window, skip, below)
    v = branch.double()
    g = (dx + skip) * (v + shift.double()[:, :, None, None] > 0)
    check(finished.grad, g, dtype)
    check(finished.scaled_grad, g * scale[:, :, None, None], dtype)
    check(t1, (g * v).sum((2, 3)))
    check(t0, g.sum((2, 3)))


def test_max_pool_of_nan_and_of_what_the_kernels_refuse():
    x = torch.randn(1, 8, 6, 6)
    x[0, 0, 2, 2] = torch.nan
    x[0, 1] = -torch.inf
    window = PoolGeometry((3, 3), (2, 2), (1, 1))
    out, _ = backend.max_pool2d(x, window, True)
    torch.testing.assert_close(out, F.max_pool2d(x, *window), equal_nan=True, rtol=0, atol=0)
    for window in (PoolGeometry((2, 2), (2, 2), dilation=(2, 2)),
                   PoolGeometry((17, 16), (1, 1), (8, 8))):  # fmt: skip
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


@pytest.mark.parametrize("width", [40, 1500])
def test_row_adam(width, monkeypatch):
    """Steps of some rows, against the tensor operations in fp64; the others do not move."""

    def params(dtype):
        generator = torch.Generator().manual_seed(1)
        drawn = torch.randn(6, width, generator=generator).to(dtype)
        return [torch.nn.Parameter(part) for part in drawn.split([width - 8, 8], 1)]

    mine, exact = params(torch.float32), params(torch.float64)
    ours, theirs = RowAdam(mine, lr=0.1), RowAdam(exact, lr=0.1)
    monkeypatch.setattr(ours, "_fused", lambda grad: True)
    monkeypatch.setattr(theirs, "_fused", lambda grad: False)
    with flatten_filters(mine), flatten_filters(exact):
        start = torch.cat(list(exact), 1).clone()
        for step in range(5):
            gradient = torch.randn(6, width)
            occurred = torch.tensor([True, False, step < 2, False, step % 2 == 0, True])
            gradient[~occurred] = torch.nan  # never read
            for group, drawn in ((mine, gradient), (exact, gradient.nan_to_num().double())):
                for parameter, part in zip(group, drawn.split([width - 8, 8], 1), strict=True):
                    parameter.grad = part
            ours.param_groups[0]["lr"] = torch.tensor(0.1)
            ours.step(occurred=occurred)
            theirs.step(occurred=occurred)
        found, truth = torch.cat(list(mine), 1), torch.cat(list(exact), 1)
        assert torch.equal(found[[1, 3]].double(), start[[1, 3]])
        check(found - start.float(), truth - start)
    for name, moment in ours.moments().items():
        check(moment, theirs.moments()[name])


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


def test_bf16_is_refused_here():
    x = torch.randn(1, 8, 4, 4, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="interpreter"):
        wf.wf_conv2d(
            x, torch.randn(8, 8, 1, 1, dtype=torch.bfloat16), None, torch.zeros(3, 8), None, 1,
            backend="triton",
        )  # fmt: skip
