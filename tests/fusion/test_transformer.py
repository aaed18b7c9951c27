"""Fused transformers: a prefix per source image, the rest from one table, both checked."""

import copy
import gc
import logging
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import wfnet
from wfnet import backends, fusion, models
from wfnet.benchmarking.timing import peak_mebibytes
from wfnet.fusion import run as running
from wfnet.fusion import transformer

timm = pytest.importorskip("timm")

CLASSES = 5
SOURCE = torch.tensor([0, 1, 1, 2, 0])
LABELS = torch.tensor([[0, -1], [4, 1], [-1, -1], [2, 2], [1, 3]])


def images(n: int = 3) -> torch.Tensor:
    return torch.randn(n, 3, 32, 32, dtype=torch.float64)


@pytest.fixture
def trunk_of(pair_of):
    def make(model: nn.Module, fuse: bool | str = True) -> fusion.TrunkNetwork:
        _, fused = pair_of(model, fuse, targets="qkv")
        network = fused.fused_network(images())
        assert isinstance(network, fusion.TrunkNetwork)
        return network

    return make


def small_swin() -> nn.Module:
    """Four windows an image, shifted in the second block; what crosses the cut is windows."""
    return timm.create_model(
        "swin_tiny_patch4_window7_224",
        num_classes=CLASSES,
        **{"img_size": 32, "window_size": 4, "depths": (2, 1), "num_heads": (2, 2), "embed_dim": 8},
    )


class Attention(nn.Module):
    """A transformer of one layer, called ``calls`` times, that does unusual things to its qkv."""

    def __init__(
        self, calls: int = 1, slices: bool = False, in_place: bool = False, norm: bool = False
    ):
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 8, 8)
        self.qkv = nn.Linear(8, 24)
        self.q_norm = nn.LayerNorm(8) if norm else None
        self.head = nn.Linear(8, CLASSES)
        self.calls, self.slices, self.in_place = calls, slices, in_place

    def attend(self, x):
        qkv = self.qkv(x)
        q, k, v = (qkv[..., :8], qkv[..., 8:16], qkv[..., 16:]) if self.slices else qkv.chunk(3, -1)
        if self.in_place:
            q.mul_(0.5)
        if self.q_norm is not None:
            q = self.q_norm(q)
        return x + F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        for _ in range(self.calls):
            x = self.attend(x)
        return self.head(x.mean(1))


class Joined(Attention):
    """Tokens of all samples side by side, before query, key and value are told apart."""

    def attend(self, x):
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch * tokens, 3, width).unbind(1)
        return x + (q * k.sigmoid() + v).view(batch, tokens, width)


class OneToken(Attention):
    """A masked layer of ``[B, C]``, whose result is taken apart."""

    def forward(self, x):
        q, k, v = self.qkv(self.embed(x).mean((2, 3))).unflatten(1, (3, 8)).unbind(1)
        return self.head(q * k.sigmoid() + v)


MODELS = {
    "vit": lambda vit: vit(),
    "qk_norm": lambda vit: vit(qk_norm=True),
    "without_bias": lambda vit: vit(qkv_bias=False),
    "swin": lambda vit: small_swin(),
    "chunks": lambda vit: Attention(),
    "called_twice": lambda vit: Attention(calls=2),
    "slices": lambda vit: Attention(slices=True, norm=True),
    "joined": lambda vit: Joined(),
    "one_token": lambda vit: OneToken(),
    "in_place": lambda vit: Attention(slices=True, in_place=True),
    "in_place_twice": lambda vit: Attention(calls=2, slices=True, in_place=True, norm=True),
    "distilled": lambda vit: vit("deit_tiny_distilled_patch16_224", depth=1),
    "own": lambda vit: models.create("vit", CLASSES, in_channels=3),
}


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_unfused_network(name, small_vit, pair_of, check_equal):
    net, fused = pair_of(MODELS[name](small_vit))
    x = images()
    check_equal(net, fused, x, LABELS, SOURCE)
    assert isinstance(fused.fused_network(x), fusion.TrunkNetwork)
    torch.testing.assert_close(fused(x, 3), net(x, 3), rtol=1e-10, atol=1e-11)


def test_everything_before_the_first_mask_runs_once_per_image(small_vit, pair_of):
    _, fused = pair_of(small_vit())
    x = images()
    fused(x, LABELS, SOURCE)
    seen: dict[str, int] = {}
    model = fused.model
    for name, module in (
        ("patch", model.patch_embed.proj),
        ("norm", model.blocks[0].norm1),
        ("second norm", model.blocks[0].norm2),
    ):
        forward = module.forward
        module.forward = lambda t, name=name, forward=forward: (
            seen.__setitem__(name, t.shape[0]) or forward(t)
        )
    fused(x, LABELS, SOURCE)
    assert seen == {"patch": 3, "norm": 3, "second norm": 5}


def test_compiled_as_one_graph_that_new_labels_do_not_compile_anew(monkeypatch, small_vit, pair_of):
    compiled = []
    compile_ = torch.compile

    def counting(function, **options):
        def backend(graph, example):
            compiled.append(graph)
            return graph.forward

        assert options["fullgraph"]
        return compile_(function, backend=backend, fullgraph=True)

    monkeypatch.setattr(torch, "compile", counting)
    net, fused = pair_of(small_vit(), fuse="compile")
    x = images()
    for labels in (LABELS, LABELS.flip(0), LABELS.roll(1, 0)):
        torch.testing.assert_close(
            fused(x, labels, SOURCE), net(x, labels, SOURCE), rtol=1e-10, atol=1e-11
        )
    assert fused.fused_network(images()).compiled
    before = len(compiled)
    fused(x, LABELS.roll(2, 0), SOURCE).sum().backward()
    assert len(compiled) == before
    assert all(p.grad is not None for p in fused.filter_parameters())


def test_on_the_host_nothing_is_compiled_unless_asked_for(monkeypatch, small_vit, pair_of):
    monkeypatch.setattr(torch, "compile", lambda *a, **k: pytest.fail("compiled"))
    _, fused = pair_of(small_vit())
    fused(images(), 1)


class Turned(nn.Module):
    """A skip connection that keeps images in its second dimension until it is added."""

    def __init__(self):
        super().__init__()
        self.qkv, self.head = nn.Linear(12, 8), nn.Linear(8, CLASSES)

    def forward(self, x):
        x = F.avg_pool2d(x, 16).flatten(1)
        skip = x.t()
        return self.head((self.qkv(x).t() + skip[:8]).t())


def test_a_wrong_cut_is_never_used(caplog, pair_of):
    net, fused = pair_of(Turned())
    x = images()
    with caplog.at_level(logging.WARNING, logger="wfnet"):
        torch.testing.assert_close(fused(x, LABELS, SOURCE), net(x, LABELS, SOURCE))
    assert "runs unfused" in caplog.text


@pytest.mark.parametrize("name", ["vit", "swin", "chunks"])
def test_batches_of_one_and_of_none(name, small_vit, pair_of, check_equal):
    net, fused = pair_of(MODELS[name](small_vit))
    for x, labels, source in (
        (images(1), torch.tensor([3]), None),
        (images(2), torch.tensor([3]), torch.tensor([1])),
        (images(1), torch.tensor([3, 4, 1]), torch.tensor([0, 0, 0])),
    ):
        check_equal(net, fused, x, labels, source)
    if name != "swin":  # its own reshapes cannot tell the windows of no image
        y = fused(images(2), torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))
        assert y.shape == (0, CLASSES)
        fused.zero_grad()
        y.sum().backward()
        assert all(not p.grad.any() for p in fused.filter_parameters())


def test_kernels_are_operators_of_the_compiled_graph(monkeypatch, small_vit, pair_of):
    compile_ = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, **_: compile_(f, backend="aot_eager", fullgraph=True)
    )
    monkeypatch.setitem(backends._MODULES, "twin", "wfnet.backends.eager")
    monkeypatch.setattr(backends, "NAMES", (*backends.NAMES, "twin"))
    net, fused = pair_of(small_vit(), fuse="compile")
    for layer in fused.masked_layers.values():
        layer.backend = "twin"
    fused.masked_layers["blocks.0.attn.qkv"].alpha_bias.requires_grad_(False)
    x = images()
    network = fused.fused_network(x)
    assert network.compiled
    assert not network.compiles_tables
    dlogits = torch.randn(5, CLASSES, dtype=torch.float64)
    net(x, LABELS, SOURCE).backward(dlogits)
    into = torch.empty(CLASSES, sum(f.shape[1] for f in network.filters()), dtype=torch.float64)
    run = network.start(x, LABELS, SOURCE)
    torch.testing.assert_close(run.forward(), net(x, LABELS, SOURCE), rtol=1e-10, atol=1e-11)
    run.backward(dlogits, into)
    expected = [p.grad for p in net.filter_parameters()]
    expected[1] = torch.zeros_like(expected[1])
    torch.testing.assert_close(into, torch.cat(expected, 1), rtol=1e-8, atol=1e-12)


def test_networks_do_not_share_compiled_code_and_its_limit(monkeypatch, small_vit, trunk_of):
    codes = []
    monkeypatch.setattr(
        torch, "compile", lambda f, **_: codes.append(f.__func__.__code__) or (lambda *a: f(*a))
    )
    for _ in range(2):
        trunk_of(small_vit(), "compile")
    first, second = codes
    assert first is not second
    assert first.co_code == second.co_code


def test_further_sizes_than_a_few_run_as_they_are(monkeypatch, small_vit, trunk_of):
    monkeypatch.setattr(running, "_MOST_GRAPHS", 1)
    monkeypatch.setattr(torch, "compile", lambda f, **_: lambda *a: f(*a))
    network = trunk_of(small_vit(), "compile")
    first, second, again = (network.start(images(n), rows(n), None) for n in (3, 4, 3))
    assert [run.compiled for run in (first, second, again)] == [True, False, True]
    x = images(4)
    compiled = transformer.TrunkRun(network, x, rows(4), None, save=True, compiled=True)
    found = network.start(x, rows(4), None)
    torch.testing.assert_close(found.forward(), compiled.forward(), rtol=1e-10, atol=1e-11)
    dlogits = torch.randn(4, CLASSES, dtype=torch.float64)
    for mine, other in zip(found.backward(dlogits), compiled.backward(dlogits), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-12)


def test_a_compiler_that_fails_leaves_it_uncompiled(monkeypatch, caplog, small_vit, pair_of):
    def failing(function, **_):
        def run(images, *inputs):
            if torch.is_grad_enabled():
                raise torch._dynamo.exc.BackendCompilerFailed(print, RuntimeError("no C++"), None)
            return function(images, *inputs)

        return run

    monkeypatch.setattr(torch, "compile", failing)
    net, fused = pair_of(small_vit(), fuse="compile")
    x = images()
    assert fused.fused_network(x).compiled
    with caplog.at_level(logging.WARNING, logger="wfnet"):
        fused(x, LABELS, SOURCE).square().sum().backward()
    assert "runs uncompiled: compiling failed" in caplog.text
    assert not fused.fused_network(x).compiled
    net(x, LABELS, SOURCE).square().sum().backward()
    for mine, other in zip(fused.filter_parameters(), net.filter_parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-8, atol=1e-12)


def test_a_layer_of_the_reference_backend_is_never_fused(caplog, small_vit, pair_of):
    _, fused = pair_of(small_vit())
    fused.masked_layers["blocks.1.attn.qkv"].backend = "reference"
    with caplog.at_level(logging.WARNING, logger="wfnet"):
        fused(images(), 1)
    assert "the reference backend is never fused" in caplog.text


# -- a run and its backward pass ------------------------------------------------------------------


def rows(count: int = 5) -> torch.Tensor:
    return torch.arange(count)[:, None] % CLASSES


@pytest.mark.parametrize("fuse", [True, "compile"])
def test_a_run_writes_the_gradients_that_autograd_finds(monkeypatch, fuse, small_vit, pair_of):
    compile_ = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, **_: compile_(f, backend="aot_eager", fullgraph=True)
    )
    net, fused = pair_of(small_vit(), fuse)
    x, dlogits = images(), torch.randn(5, CLASSES, dtype=torch.float64)
    net(x, LABELS, SOURCE).backward(dlogits)
    network = fused.fused_network(x)
    assert network.compiled == (fuse == "compile")
    into = torch.full((CLASSES, sum(f.shape[1] for f in network.filters())), torch.nan).double()
    with torch.no_grad():
        run = network.start(x, LABELS, SOURCE)
        logits = run.forward()
        assert not logits.requires_grad
        found = run.backward(dlogits, into)
    for gradient, parameter in zip(found, net.filter_parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(into, torch.cat(found, 1), rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="a second time; its branches are freed"):
        run.backward(dlogits)


def test_under_autocast_it_errs_no_more_than_the_unfused_network(small_vit, pair_of):
    exact, _ = pair_of(small_vit())
    net, fused = (copy.deepcopy(exact).float() for _ in range(2))
    fused.fuse = True
    x = images(8)
    labels = torch.arange(8) % CLASSES
    weights = torch.randn(8, CLASSES)
    errors = []
    exact(x, labels).backward(weights.double())
    for network in (net, fused):
        with torch.autocast("cpu", torch.bfloat16):
            y = network(x.float(), labels)
        assert y.dtype == torch.bfloat16
        y.backward(weights.bfloat16())
        pairs = zip(network.filter_parameters(), exact.filter_parameters(), strict=True)
        errors.append(
            sum((p.grad.double() - q.grad).norm() / q.grad.norm() for p, q in pairs).item()
        )
    assert isinstance(fused.fused_network(x.float()), fusion.TrunkNetwork)
    assert errors[1] <= 1.5 * errors[0]


# -- what is kept ---------------------------------------------------------------------------------


def counted(monkeypatch) -> list[int]:
    """Layers whose result is computed again, as this happens."""
    found = []
    result_of = transformer._Recorded.result_of

    def counting(run, kept):
        result = result_of(run, kept)
        found.append(kept.index)
        return result

    monkeypatch.setattr(transformer._Recorded, "result_of", counting)
    return found


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (lambda vit: vit(), [1, 0]),
        (lambda vit: vit(qk_norm=True), [1, 0]),
        (lambda vit: Attention(calls=2), [0, 0]),
        (lambda vit: Attention(slices=True, in_place=True), []),
    ],
    ids=["vit", "norm", "twice", "in_place"],
)
def test_a_result_is_computed_again_once_per_call(
    monkeypatch, model, expected, small_vit, trunk_of
):
    again = counted(monkeypatch)
    network = trunk_of(model(small_vit))
    again.clear()
    run = network.start(images(), rows(), SOURCE)
    run.backward(run.forward())
    assert again == expected


def test_a_result_computed_again_is_the_same_bit_by_bit(small_vit, trunk_of):
    network = trunk_of(small_vit())
    seen = []

    class Watching(transformer._Recorded):
        def keep(self, kept, out):
            seen.append((kept, out.clone()))
            super().keep(kept, out)

    run = Watching(network, 3, 5, SOURCE, network.tables()(rows(), True), True)
    network.rest(run, *network.crossing(images()))
    assert len(seen) == 2
    for kept, out in seen:
        assert torch.equal(run.result_of(kept), out)


def test_a_tensor_changed_after_it_was_used_is_an_error(pair_of):
    class Careless(Attention):
        def attend(self, x):
            q, k, v = self.qkv(x).chunk(3, dim=-1)
            mask = torch.zeros_like(q[..., :1]) + 1
            y = F.scaled_dot_product_attention(q[:, None] * mask[:, None], k[:, None], v[:, None])
            mask.add_(1)
            return x + y[:, 0]

    class Later(Attention):
        def attend(self, x):
            q, k, v = self.qkv(x).chunk(3, dim=-1)
            k = k.contiguous()
            y = q * k
            k.add_(1)
            return x + y + v

    for model in (Careless(), Later()):
        _, fused = pair_of(model)
        with pytest.raises(RuntimeError, match=r"changed in place|modified by an inplace"):
            fused(images(), 1).sum().backward()


def test_it_takes_less_memory_than_the_unfused_network():
    net = wfnet.WFNet(models.create("vit", CLASSES, in_channels=3).eval(), CLASSES)
    fused = copy.deepcopy(net)
    fused.fuse = True
    x, source = torch.randn(4, 3, 32, 32), torch.arange(16) % 4
    labels = torch.arange(16) % CLASSES
    peaks = []
    for network in (net, fused):
        network(x, labels, source).sum().backward()
        cpu = torch.device("cpu")
        peaks.append(peak_mebibytes(lambda n=network: n(x, labels, source).sum().backward(), cpu))
    assert peaks[1] < 0.85 * peaks[0]


def test_the_compiled_network_does_not_keep_what_it_can_compute_again(
    monkeypatch, small_vit, trunk_of
):
    compile_ = torch.compile
    monkeypatch.setattr(
        torch,
        "compile",
        lambda f, **_: compile_(f, backend="aot_eager_decomp_partition", fullgraph=True),
    )
    network = trunk_of(small_vit(), "compile")
    run = network.start(images(4), rows(4), None)
    kept: dict[int, tuple[int, ...]] = {}
    with saved_tensors_hooks(
        lambda t: kept.update({t.untyped_storage().data_ptr(): (*t.shape, t.numel())}) or t,
        lambda t: t,
    ):
        run.forward()
    branch = 4 * 5 * 72  # [B, T, 3 C]: as a whole, or query, key and value
    parts = [shape for shape in kept.values() if shape[-1] in (branch, branch // 3)]
    assert sum(shape[-1] == branch for shape in parts) == 2
    assert not [shape for shape in parts if len(shape) == 5 and shape[3] == 8 and shape[1] == 3][2:]


@pytest.mark.parametrize("backward", [True, False])
def test_nothing_is_left_after_backward_or_after_a_dropped_forward(backward, small_vit, trunk_of):
    network = trunk_of(small_vit())
    gc.collect()
    gc.disable()
    try:
        run = network.start(images(), rows(), SOURCE)
        logits = run.forward()
        branches = [weakref.ref(kept.branch) for kept in trunk_state(run).kept.values()]
        state = weakref.ref(trunk_state(run))
        assert len(branches) == 2
        assert all(branch() is not None for branch in branches)
        if backward:
            run.backward(logits)
            assert all(branch() is None for branch in branches)
        else:
            del run
        assert state() is None
        assert all(branch() is None for branch in branches)
    finally:
        gc.enable()


def trunk_state(run: transformer.TrunkRun) -> transformer._Recorded:
    """What the nodes of the run's graph refer to."""
    pending = [run.logits.grad_fn]
    while pending:
        node = pending.pop()
        if hasattr(node, "layers"):
            return node.layers
        pending += [below for below, _ in node.next_functions if below is not None]
    raise AssertionError("no masked layer in the graph")
